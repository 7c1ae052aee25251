"""From a hub id to a folder here, by huggingface_hub, whose cache and tokens are the user's own."""

import re
from pathlib import Path

from .files import CONFIG_NAME, FOUND, WEIGHTS_NAME
from .inject import DENOISERS, TEXT_ENCODERS

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # files that are not read, and so never names on the hub


def locate(
    source,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder or file that `source` stands for: a path, or else a hub id (owner/name), whose adapter is downloaded.

    Args:
        weight_name: the file to take, where there are several. subfolder: where it lies.
        revision, token, cache_dir, local_files_only: of a hub id, as huggingface_hub takes them.

    Raises FileNotFoundError where there is no such file; for a hub id that cannot be reached it tells what to download and
    where to put it.
    """
    path = Path(source).expanduser()
    if not path.exists() and HUB_ID.fullmatch(str(source)) and path.suffix not in (".safetensors", *PICKLES):
        names = [CONFIG_NAME, weight_name] if weight_name else [CONFIG_NAME, *FOUND]
        if not weight_name:
            names += [f"{part}/{name}" for part in (*DENOISERS, *TEXT_ENCODERS) for name in (CONFIG_NAME, WEIGHTS_NAME)]
        if subfolder:
            names = [f"{subfolder}/{name}" for name in names]
        path = _download(str(source), names, revision, token, cache_dir, local_files_only)
    if subfolder:
        path = path / subfolder
    if weight_name:
        path = path / weight_name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: expected a folder with {WEIGHTS_NAME}, a safetensors file, or a hub id (owner/name)"
        )
    return path


def _download(repo: str, names: list[str], revision, token, cache_dir, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # of its HTTP client, whichever that is

    found, cause, reason = None, None, "it has none of them, or their copy in the cache here is incomplete"
    try:
        found = Path(snapshot_download(
            repo, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
            allow_patterns=names,
        ))  # fmt: skip
    # ValueError: an id that the hub could not have, or an answer that is no JSON, as where a network wants a login first
    except (OSError, ValueError, HTTPError) as error:
        cause, reason = error, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    weights = [name for name in names if not name.endswith(CONFIG_NAME)]
    if found is None or not any((found / name).is_file() for name in weights):
        command = " ".join(["hf download", repo, *(f'--include "{name}"' for name in names)])
        command += f" --revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"there is no folder {repo} here, and the hub gave none of the files {', '.join(weights)} of {repo} ({reason}). "
            f"Where there is a network, run\n    {command} --local-dir {repo.partition('/')[2]}\n"
            "copy that folder to this machine, and pass its path. A file of another name is asked for by weight_name="
        ) from cause
    return found
