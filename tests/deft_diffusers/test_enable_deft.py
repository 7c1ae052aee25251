"""diffusers' verbs on a pipeline: `enable_deft`, and what it leaves as it was."""

import copy
import inspect
import json
import pickle

import accelerate
import numpy as np
import pytest
import tiny_pipelines
import torch
from deft_diffusers.pipeline import DeftVerbs, enable_deft
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from tiny_pipelines import FAMILIES, build, difference, draw, same_state, state_of
from torch import nn

import deft_kernels as dk
from deft_kernels.adapters.inject import adapted_layers

FAMILY = "stable-diffusion"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of the UNet and the text encoder, a DEFT and a LoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate({"cat": dk.DeftConfig(r=2, init_weights=False, init_scale=15),
                                           "toy": dk.LoraConfig(r=3, alpha=60, init_weights=False)}.items()):  # fmt: skip
        torch.manual_seed(seed)
        pipe = build(FAMILY)
        dk.inject_adapter(pipe, {"unet": config, "text_encoder": config})
        dk.save_adapter(pipe, folder / name)
    return folder


@pytest.fixture
def pipe(folders):
    pipe = enable_deft(build(FAMILY))
    for name in ("cat", "toy"):
        pipe.load_lora_weights(folders / name, adapter_name=name)
    return pipe


def picture(pipe, **more):
    return draw(pipe, FAMILY, **more)


def same(a, b):
    """Pictures that differ by the order of sums in float32 at most."""
    return difference(a, b) < 2e-5


def test_one_line_changes_nothing_but_the_verbs(tmp_path):
    for family in FAMILIES:
        plain = build(family)
        kind, call = type(plain), inspect.signature(plain.__call__)
        pipe = enable_deft(plain)
        assert pipe is plain and isinstance(pipe, kind) and isinstance(pipe, DeftVerbs)
        assert (type(pipe).__name__, type(pipe).__module__) == (kind.__name__, kind.__module__)
        assert inspect.signature(pipe.__call__) == call and enable_deft(pipe) is pipe
        assert torch.equal(draw(pipe, family), draw(build(family), family))
    build(FAMILY).save_pretrained(tmp_path / "plain")
    enable_deft(build(FAMILY)).save_pretrained(tmp_path / "ours")
    index = [json.loads((tmp_path / kind / "model_index.json").read_text()) for kind in ("plain", "ours")]
    assert index[0] == index[1]
    assert type(StableDiffusionPipeline.from_pretrained(tmp_path / "ours")) is StableDiffusionPipeline
    assert copy.copy(pipe).get_list_adapters() == {}


def test_copied_and_pickled_with_its_adapters(pipe):
    drawn = picture(pipe)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert isinstance(other, DeftVerbs) and other.get_list_adapters() == pipe.get_list_adapters()
        other.set_adapters("cat")
        assert torch.equal(picture(pipe), drawn) and not same(picture(other), drawn)


@pytest.mark.parametrize("what", [nn.Linear(2, 2), {"unet": nn.Linear(2, 2)}, object()])
def test_what_is_no_pipeline(what):
    with pytest.raises(TypeError, match="expected a diffusers pipeline, not a|neither a module nor a pipeline"):
        enable_deft(what)


def test_every_verb_of_diffusers_is_there_with_its_arguments():
    for name in ("set_adapters", "get_active_adapters", "get_list_adapters", "delete_adapters", "fuse_lora", "unfuse_lora",
                 "enable_lora", "disable_lora", "unload_lora_weights", "set_lora_device"):  # fmt: skip
        theirs = [p for p in inspect.signature(getattr(LoraBaseMixin, name)).parameters if p != "kwargs"]
        assert list(inspect.signature(getattr(DeftVerbs, name)).parameters) == theirs, name
    theirs = list(inspect.signature(StableDiffusionPipeline.load_lora_weights).parameters)
    assert list(inspect.signature(DeftVerbs.load_lora_weights).parameters) == theirs


def test_load_weigh_list_delete_save(pipe, folders, tmp_path):
    both = {"unet": ["cat", "toy"], "text_encoder": ["cat", "toy"]}
    assert pipe.get_list_adapters() == both and pipe.get_active_adapters() == ["toy"]
    toy = picture(pipe)
    pipe.set_adapters(["cat", "toy"], [0.7, -0.4])
    assert dk.list_adapters(pipe) == {part: {"cat": 0.7, "toy": -0.4} for part in both}
    mixed = picture(pipe)
    pipe.set_adapters(["cat", "toy"], [{"unet": 0.7, "text_encoder": 0.0}, -0.4])
    assert dk.list_adapters(pipe) == {"unet": {"cat": 0.7, "toy": -0.4}, "text_encoder": {"cat": 0.0, "toy": -0.4}}
    pipe.set_adapters("cat", {"text_encoder": 0.5})
    cat = picture(pipe)
    assert dk.list_adapters(pipe) == {"unet": {"cat": 1.0, "toy": None}, "text_encoder": {"cat": 0.5, "toy": None}}
    base = picture(build(FAMILY))
    for a, b in ((toy, mixed), (toy, cat), (mixed, cat), (toy, base), (cat, base)):
        assert (a - b).abs().max() > 0.01
    pipe.set_adapters("cat")
    pipe.save_lora_weights(tmp_path)
    for part in both:
        assert list(dk.list_adapters(pipe)[part]) == ["cat", "toy"]
    pipe.delete_adapters(["cat"])
    assert pipe.get_list_adapters() == {"unet": ["toy"], "text_encoder": ["toy"]} and pipe.get_active_adapters() == []
    pipe.load_lora_weights(tmp_path)  # named as diffusers does
    assert pipe.get_active_adapters() == ["default_1"]
    pipe.set_adapters("default_1", {"text_encoder": 0.5})
    assert same(picture(pipe), cat)
    modules = [type(m) for m in build(FAMILY).unet.modules()]
    pipe.unload_lora_weights()
    assert [type(m) for m in pipe.unet.modules()] == modules and same(picture(pipe), base)
    pipe.unload_lora_weights()


def test_unload_after_delete_leaves_nothing(pipe):
    pipe.delete_adapters(["cat", "toy"])
    pipe.unload_lora_weights()
    assert not adapted_layers(pipe.unet) and "_deft_bank" not in pipe.unet.__dict__
    assert same_state(state_of(pipe), state_of(build(FAMILY)))


def test_fused_weights_are_shipped_without_the_adapters(pipe, tmp_path):
    """diffusers' documented way: fuse, unload, save."""
    with pytest.raises(RuntimeError, match=r"save_lora_weights does, and fuse_lora\(\) followed by unload_lora_weights"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    drawn = picture(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert not adapted_layers(pipe.unet) and pipe.num_fused_loras == 0 and same(picture(pipe), drawn)
    pipe.save_pretrained(tmp_path)
    other = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(picture(other), picture(pipe)) and difference(picture(other), picture(build(FAMILY))) > 0.01


def test_layers_of_diffusers_are_saved_by_diffusers(pipe, tmp_path):
    layers = {"to_q.lora_A.weight": torch.ones(2, 4), "to_q.lora_B.weight": torch.ones(4, 2)}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize("verb", ["delete_adapters", "set_lora_device"])
def test_all_adapters_or_none(pipe, verb):
    before = {name: dk.adapter_parameters(pipe, name)["P"] for name in ("cat", "toy")}
    more = () if verb == "delete_adapters" else ("meta",)
    with pytest.raises(ValueError, match="no adapter named 'nope'"):
        getattr(pipe, verb)(["cat", "nope"], *more)
    assert list(dk.list_adapters(pipe)["unet"]) == ["cat", "toy"]
    assert not any(p.is_meta for parameters in before.values() for p in parameters)
    pipe.fuse_lora()
    with pytest.raises(RuntimeError, match="adapter 'toy' is merged"):
        pipe.delete_adapters(["cat", "toy"])
    assert list(dk.list_adapters(pipe)["unet"]) == ["cat", "toy"]


def test_adapters_are_moved(pipe, monkeypatch):
    """With no second device: what is moved, and where to, told by a move that copies."""
    drawn, moved, move = picture(pipe), [], torch.Tensor.to

    def copied(tensor, device):
        moved.append((tensor.data_ptr(), device))
        return tensor.clone()

    before = {name: [p for group in dk.adapter_parameters(pipe, name).values() for p in group] for name in ("cat", "toy")}
    places = {name: [p.data_ptr() for p in parameters] for name, parameters in before.items()}
    monkeypatch.setattr(torch.Tensor, "to", copied)
    pipe.set_lora_device(["toy"], "cpu")
    monkeypatch.setattr(torch.Tensor, "to", move)
    assert moved == [(place, torch.device("cpu")) for place in places["toy"]]
    assert [p.data_ptr() for p in before["cat"]] == places["cat"]
    assert not {p.data_ptr() for p in before["toy"]} & set(places["toy"])
    assert torch.equal(picture(pipe), drawn)


def test_offloaded_adapters_are_not_moved(pipe):
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="are offloaded with their model, which moves them by itself"):
        pipe.set_lora_device(["toy"], "cpu")


def test_disable_and_enable(pipe):
    base = picture(build(FAMILY))
    pipe.set_adapters(["cat", "toy"], [{"unet": 0.7, "text_encoder": 0.2}, -0.4])
    before, drawn = dk.list_adapters(pipe), picture(pipe)
    pipe.disable_lora()
    pipe.disable_lora()
    assert pipe.get_active_adapters() == [] and same(picture(pipe), base)
    pipe.enable_lora()
    assert dk.list_adapters(pipe) == before and torch.equal(picture(pipe), drawn)
    pipe.enable_lora()
    assert dk.list_adapters(pipe) == before
    pipe.set_adapters("toy", 0.3)
    pipe.enable_lora()  # a second time: nothing is left to enable
    assert pipe.get_active_adapters() == ["toy"]


def states(pipe):
    layers = {**adapted_layers(pipe.unet), **{f"t.{k}": v for k, v in adapted_layers(pipe.text_encoder).items()}}
    return {k: (layer.strengths, layer.combination, layer.routes) for k, layer in layers.items()}


@pytest.mark.parametrize("acting", ["sequential", "routed"])
def test_enable_brings_back_how_adapters_act_together(pipe, acting):
    if acting == "routed":
        dk.route_adapters(pipe, ["cat", "base"])
    else:
        dk.set_adapters(pipe, ["toy", "cat"], [0.5, 1.0], combine="sequential")
    before = states(pipe)
    pipe.disable_lora()
    assert states(pipe) != before
    pipe.enable_lora()
    assert states(pipe) == before


@pytest.mark.parametrize("verb", ["set", "set none", "load", "unload", "delete"])
def test_what_was_disabled_is_forgotten(pipe, folders, verb):
    pipe.set_adapters(["cat", "toy"], 0.7)
    pipe.disable_lora()
    if verb == "set":
        pipe.set_adapters("toy", 0.5)
    elif verb == "set none":
        pipe.set_adapters([])
    elif verb == "load":
        pipe.load_lora_weights(folders / "cat", adapter_name="new")
    elif verb == "unload":
        pipe.unload_lora_weights()
        pipe.load_lora_weights(folders / "cat", adapter_name="cat")
        dk.set_adapters(pipe, [])
    else:
        pipe.delete_adapters("cat")  # of this one alone
    pipe.enable_lora()
    active = {"set": ["toy"], "set none": [], "load": ["new"], "unload": [], "delete": ["toy"]}[verb]
    assert pipe.get_active_adapters() == active


def test_fuse_as_adapters_act_together(pipe):
    with torch.no_grad():  # near to each other, so that their order counts
        for ours, theirs in zip(dk.adapter_parameters(pipe, "toy")["P"], dk.adapter_parameters(pipe, "cat")["P"]):
            theirs[:, :2].add_(ours[:, :2])
    dk.set_adapters(pipe, ["toy", "cat"], 0.5)
    summed = picture(pipe)
    dk.set_adapters(pipe, ["toy", "cat"], 0.5, combine="sequential")
    drawn = picture(pipe)
    assert difference(drawn, summed) > 1e-3
    dk.set_adapters(pipe, ["toy", "cat"], 1.0, combine="sequential")
    pipe.fuse_lora(lora_scale=0.5)
    assert same(picture(pipe), drawn)
    pipe.unfuse_lora()
    dk.route_adapters(pipe, ["cat", "base"])
    for scale in (1.0, 0.5):
        with pytest.raises(ValueError, match="samples are routed to adapters of their own: name the adapters"):
            pipe.fuse_lora(lora_scale=scale)
    assert pipe.num_fused_loras == 0


def test_one_scale_for_parts_of_different_strengths_is_refused(pipe):
    pipe.set_adapters("cat", {"unet": 0.7, "text_encoder": 0.2})
    with pytest.raises(ValueError, match=r"'cat' has strengths \[0.2, 0.7\] in different parts: fuse these one by one"):
        pipe.fuse_lora(lora_scale=0.5)
    drawn = picture(pipe)
    pipe.fuse_lora()
    assert same(picture(pipe), drawn)


def test_pictures_of_one_prompt_are_not_routed_apart(pipe):
    dk.route_adapters(pipe, ["cat", "base"])
    prompts, shape = [tiny_pipelines.PROMPT] * 2, {"height": 32, "width": 32, "num_inference_steps": 1}
    with pytest.raises(ValueError, match="num_images_per_prompt is 2, but adapters are routed by prompt: repeat the"):
        pipe(prompts, num_images_per_prompt=2, **shape)
    order = list(inspect.signature(pipe.__call__).parameters)
    by_position = [None] * order.index("num_images_per_prompt") + [2]
    with pytest.raises(ValueError, match="num_images_per_prompt is 2"):
        pipe(*by_position)
    assert len(pipe(prompts, num_images_per_prompt=1, output_type="np", **shape).images) == 2
    pipe.set_adapters("cat")
    assert len(pipe(prompts[0], num_images_per_prompt=2, output_type="np", **shape).images) == 2


def test_hotswap_with_the_options_of_both(pipe, folders):
    pipe.fuse_lora(adapter_names="toy")
    file = {"subfolder": "cat", "weight_name": "pytorch_deft_weights.safetensors"}
    pipe.load_lora_weights(folders, hotswap=True, weight=0.4, **file)
    swapped = picture(pipe)
    pipe.unfuse_lora()
    pipe.set_adapters("cat", np.float32(0.4))
    assert pipe.get_list_adapters()["unet"] == ["cat", "toy", "hotswap"] and same(picture(pipe), swapped)


@pytest.mark.parametrize("scale", [None, 1.0])
def test_a_call_without_a_scale_of_its_own(pipe, scale):
    assert same(picture(pipe, cross_attention_kwargs={"scale": scale} if scale else {}), picture(pipe))


OFFLOADS = {
    "memory": lambda pipe, folder: accelerate.cpu_offload(pipe.unet, torch.device("cpu")),
    "leaves on disk": lambda pipe, folder: group_offload(pipe, "leaf_level", folder),
    "blocks on disk": lambda pipe, folder: group_offload(pipe, "block_level", folder),
}


def group_offload(pipe, kind, folder):
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=kind, num_blocks_per_group=1,
        offload_to_disk_path=str(folder),
    )  # fmt: skip


@pytest.mark.parametrize("how", OFFLOADS)
def test_what_was_offloaded_while_fused_stays_fused(pipe, folders, tmp_path, how):
    """Nothing that is written to an offloaded weight lasts: refused, not done in appearance."""
    pipe.fuse_lora()
    fused = picture(pipe)
    OFFLOADS[how](pipe, tmp_path)
    for undo in (pipe.unfuse_lora, lambda: dk.unmerge(pipe, force=True), lambda: dk.hotswap(pipe, folders / "cat")):
        with pytest.raises(RuntimeError, match=r"unet.*to_q: its weight was offloaded .*: unmerge before offloading, or"):
            undo()
    assert pipe.fused_loras == {"toy"} and same(picture(pipe), fused)


def test_nothing_is_fused_into_what_is_on_disk(pipe, tmp_path):
    group_offload(pipe, "block_level", tmp_path)
    with pytest.raises(ValueError, match="its weight is offloaded to disk, what is written to it would be lost"):
        pipe.fuse_lora()


def test_fuse_and_unfuse(pipe, folders):
    weights = {name: p.clone() for name, p in pipe.unet.named_parameters() if "base_layer" in name}
    pipe.set_adapters("cat", 0.6)
    drawn = picture(pipe)
    pipe.fuse_lora()
    assert pipe.fused_loras == {"cat"} and pipe.num_fused_loras == 1 and same(picture(pipe), drawn)
    with pytest.raises(RuntimeError, match="an adapter is merged"):
        pipe.set_adapters("toy")
    assert dk.list_adapters(pipe)["unet"] == {"cat": 0.6, "toy": None}
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0 and all(
        torch.equal(dict(pipe.unet.named_parameters())[k], w) for k, w in weights.items()
    )
    pipe.fuse_lora(components=["unet"], lora_scale=0.5)  # the text encoder's stays beside its weights
    half = picture(pipe)
    pipe.unfuse_lora(components=["unet"])
    pipe.set_adapters("cat", {"unet": 0.3, "text_encoder": 0.6})
    assert same(picture(pipe), half)
    pipe.fuse_lora(adapter_names=["toy"])
    pipe.load_lora_weights(folders / "cat", hotswap=True)
    swapped = picture(pipe)
    pipe.unfuse_lora()
    pipe.set_adapters("cat")
    assert same(picture(pipe), swapped)


@pytest.mark.gpu
def test_adapters_rest_on_the_host(pipe):
    pipe.to("cuda")
    drawn = picture(pipe)
    pipe.set_lora_device(["cat", "toy"], "cpu")
    assert {p.device.type for p in dk.adapter_parameters(pipe, "toy")["P"]} == {"cpu"}
    pipe.set_lora_device(["cat", "toy"], "cuda")
    assert torch.equal(picture(pipe), drawn)


@pytest.mark.parametrize("call,error,message", [
    (lambda p: p.set_adapters(["cat", "dog"]), ValueError, "no adapter named 'dog'; the model has cat, toy"),
    (lambda p: p.set_adapters(["cat", "toy"], [1.0]), ValueError, "2 adapter names but 1 weights"),
    (lambda p: p.set_adapters("cat", {"transformer": 1.0}), ValueError, "a weight is for transformer, but the parts with"),
    (lambda p: p.set_adapters("cat", {"unet": {"down": 1.0}}), ValueError, "weights by block are not served"),
    (lambda p: p.set_adapters("cat", True), ValueError, "the weight for unet is True, expected a finite number"),
    (lambda p: p.load_lora_weights(".", hotswap=True), ValueError, "but nothing is fused: leave adapter_name out and fuse"),
    (lambda p: p.load_lora_weights(".", "cat", hotswap=True), ValueError, "but adapter_name is 'cat': leave adapter"),
    (lambda p: p.enable_lora_hotswap(target_rank=8), NotImplementedError, "is not needed: fuse_lora"),
    (lambda p: [dk.inject_adapter(p, dk.DeftConfig(r=2), "u"), p.set_adapters("toy"),
                p.set_adapters("u", {"text_encoder": 1})],
     ValueError, "a weight is for text_encoder, but the parts with adapter 'u' are unet"),
    (lambda p: enable_deft(build(FAMILY)).fuse_lora(), ValueError, "StableDiffusionPipeline has no adapter"),
    (lambda p: p.set_adapters("cat", float("nan")), ValueError, "the weight for unet is nan, expected a finite number"),
    (lambda p: p.fuse_lora(components=["transformer"]), ValueError, "has no transformer; its parts are unet, text_encoder"),
    (lambda p: p.set_lora_device(["dog"], "cpu"), ValueError, "no adapter named 'dog'"),
    (lambda p: p.load_lora_weights({}), TypeError, "expected a folder, a file or a hub id, not a state dict"),
    (lambda p: p.load_lora_weights(".", proxies={}), TypeError, "unexpected keyword argument 'proxies'"),
    (lambda p: p.unfuse_lora(), RuntimeError, "nothing is merged"),
    (lambda p: [p.set_adapters(["cat", "toy"]), p.save_lora_weights(".")], ValueError, "active adapters are cat, toy: say"),
    (lambda p: p(tiny_pipelines.PROMPT, cross_attention_kwargs={"scale": 0.5}), ValueError, "does not reach these adapters"),
])  # fmt: skip
def test_what_is_refused(pipe, call, error, message):
    with pytest.raises(error, match=message):
        call(pipe)
    assert dk.list_adapters(pipe)["unet"]["toy"] == 1.0 and pipe.num_fused_loras == 0
