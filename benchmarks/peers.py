"""Who is measured beside whom, by the names that tables and plots use."""

FROZEN, MERGED = "frozen layer", "merged weight"
DEFT, PARA, LORA = "DEFT here", "PaRa here", "LoRA here"
READY = "DEFT, bases ready, here"
COPY = "Tensor.copy_, all in one"  # of the same bytes
PLAIN = "plain torch (reference)"
FACTORS = "factor form, plain torch"  # y = x W^T + (x A^T) B^T by the library's products: the honest rival
PROJECTOR = "m x m projector, plain torch"  # W' = (I - Q Q^T) W + Q R made whole, as the reference's formula is written
PEFT_DEFT, PEFT_COMPILED, PATCHED = "DEFT, PEFT", "DEFT, PEFT compiled", "DEFT, PEFT patched"
PEFT_LORA, PEFT_OFT = "LoRA, PEFT", "OFT, PEFT"
QR_ALONE = f"{PEFT_DEFT}: QR alone"  # all that it makes before it sees x
LYCORIS, LYCORIS_BYPASS = "LoCon, LyCORIS", "LoCon, LyCORIS bypass"  # W + BA made whole, its default; or the factor form


def is_here(who: str) -> bool:
    """Whether a peer is measured here: one of this project's own."""
    return who.endswith("here") or who.startswith("deft_kernels") or who == PATCHED
