"""The kinds of pipeline that can be personalised: one file and one class for each.

A family wraps a pipeline and says what differs between kinds: how text and pictures are encoded, what the loss is, how a
picture is drawn, and which layers an adapter goes to by default. `base.Family` says what all have in common.
"""

from pathlib import Path

from huggingface_hub import hf_hub_download

from .. import UserError, read_json
from .flux import Flux, Flux2Klein
from .omnigen import OmniGen
from .stable_diffusion import StableDiffusion, StableDiffusionXL
from .stable_diffusion_3 import StableDiffusion3

INDEX = "model_index.json"
KINDS = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Flux2Klein, OmniGen)
FAMILIES = {name: family for family in KINDS for name in family.pipeline_classes}


def _locate(name):
    """A folder or a hub id for `toyworld`, a folder or a hub id."""
    if name == "toyworld":
        from ..toyworld import MODEL_DIR

        if not (MODEL_DIR / INDEX).is_file():
            raise UserError(f"the embedded model toyworld is missing from this installation ({MODEL_DIR})")
        return MODEL_DIR
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise UserError(f"{name} is no pipeline folder: it has no {INDEX}")
        return folder
    if name.count("/") != 1 or name[0] in "./~":
        raise UserError(f"no such folder, nor a hub id (owner/name) or toyworld: {name}")
    return name


def _index(source):
    """The file that names the pipeline's class."""
    if isinstance(source, Path):
        return source / INDEX
    try:
        return Path(hf_hub_download(source, INDEX))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"there is no folder {source}, and the hub gives no such model: {reason}") from error


def load_family(name, dtype, quantize=None, quantize_text_encoders=False):
    """Loads the base model `name` (`toyworld`, a folder or a hub id) with its big parts in `dtype` (None: the half precision
    that it was made for), or quantised as `--quantize` says, and returns its family. Its `to(device)` comes next.

    UserError if there is no such model, its pipeline class is not supported, or a library that it needs is missing.
    """
    import diffusers
    import transformers

    source = _locate(name)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    index = read_json(_index(source))
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind not in FAMILIES:
        raise UserError(f"{name} is a {kind}, which is not supported; supported: {', '.join(FAMILIES)}")
    # such as SD 3's T5, which diffusers must be told of
    missing = {name: None for name, what in index.items() if what == [None, None]}
    try:
        family = FAMILIES[kind].load(source, dtype or FAMILIES[kind].half, **missing)
    except ImportError as error:  # of what a quantised model was saved with
        raise UserError(f"{name} cannot be loaded here: {error}") from error
    if quantize:
        family.quantise(quantize, quantize_text_encoders)
    elif quantize_text_encoders:
        raise UserError("--quantize_text_encoders goes with --quantize: say how")
    return family
