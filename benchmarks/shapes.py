"""The layers that the benchmarks measure, in one place. W is (m, n) = (out, in); T counts the rows of x, in tokens."""

RANK, RANKS = 16, (4, 8, 16, 32, 64, 128)
TOKENS = (77, 256, 1024, 4096, 16384, 65536)

# (m, n) -> how many: the attention projections of SDXL's UNet, which an adapter takes by default; 0.955 G weights
SDXL = {(1280, 1280): 360, (1280, 2048): 120, (640, 640): 60, (640, 2048): 20}
SDXL_TENTH = {shape: count // 10 for shape, count in SDXL.items()}  # for a CPU

# The whole UNet of stabilityai/stable-diffusion-xl-base-1.0, for diffusers' UNet2DConditionModel: 2 567 463 684 weights
SDXL_UNET = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip

# 8 of the 38 `proj_mlp` of FLUX.1: layers so tall that a strip of them leaves the L2 cache before it is read again
TALL = {(12288, 3072): 8}

# Square projections with the tokens of a 1024-pixel image: (features, T)
LINEAR = [(640, 4096), (1280, 4096), (3072, 4608)]

# Where the forms of lowrank_linear are compared: (T, m, n)
PROJECTIONS = [
    (4096, 320, 320), (1024, 640, 640), (256, 1280, 1280), (77, 1280, 768),  # SD 1.5 at 512 pixels
    (4096, 640, 640), (1024, 1280, 1280), (4096, 1280, 1280), (77, 640, 2048), (77, 1280, 2048),  # SDXL, one and four images
    (4608, 3072, 3072), (512, 3072, 3072), (4608, 12288, 3072), (4608, 3072, 12288), (4608, 3072, 15360),  # FLUX.1
]  # fmt: skip

# What a CPU can try the code on in seconds
TINY = {(64, 64): 3, (64, 96): 2}
TINY_LINEAR = [(64, 96)]


def each(layers: dict[tuple[int, int], int]) -> list[tuple[int, int]]:
    """(m, n) of every layer."""
    return [shape for shape, count in layers.items() for _ in range(count)]


# Whole models: what `dk.DeftConfig()` adapts by default, counted from diffusers' models of these configurations
MODELS = {
    "SD 1.5": {(320, 320): 30, (320, 768): 10, (640, 640): 30, (640, 768): 10, (1280, 1280): 36, (1280, 768): 12},
    "SDXL": SDXL,
    "FLUX.1": {(3072, 3072): 266},
    "FLUX.2 klein": {(3072, 3072): 40, (18432, 3072): 10, (3072, 9216): 10, (27648, 3072): 20},  # 4B
    "OmniGen": {(3072, 3072): 128},
}

# Models of linear layers alone, as an SD attention and its text side have: (layers, features, tokens)
STACKS = [(6, 640, 1024), (40, 320, 77)]
TINY_STACKS = [(2, 32, 16)]

# More of PROJECTIONS, for layers beside their peers: (T, m, n) at 1024 pixels. OmniGen sees the image's 4096 tokens and some
# 128 of text and time; its authors have `qkv_proj` in one.
MORE_PROJECTIONS = [
    (4096, 3072, 3072), (4096, 18432, 3072), (4096, 3072, 9216), (4608, 27648, 3072),  # FLUX.2 klein, 4B
    (4224, 3072, 3072), (4224, 9216, 3072),  # OmniGen
]  # fmt: skip

# What a CPU is measured on in minutes: (T, m, n)
SMALL_PROJECTIONS = [(4096, 640, 640), (1024, 1280, 1280)]
SMALL_RANKS, SMALL_TOKENS = (4, 16, 64), (77, 1024, 4096)
