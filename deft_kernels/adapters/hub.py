"""From a hub id to a folder here, by huggingface_hub, whose cache and tokens are the user's own."""

import re
from pathlib import Path

from .files import CONFIG_NAME, WEIGHTS_NAME

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


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
    if not path.exists() and HUB_ID.fullmatch(str(source)) and not str(source).endswith(".safetensors"):
        inside = f"{subfolder}/" if subfolder else ""
        names = [f"{inside}{CONFIG_NAME}", f"{inside}{weight_name}" if weight_name else f"{inside}*.safetensors"]
        if not (weight_name or subfolder):
            names += [f"*/{CONFIG_NAME}", f"*/{WEIGHTS_NAME}"]  # a folder for each part of a pipeline
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
    from huggingface_hub.errors import HfHubHTTPError

    found = None
    try:
        found = Path(snapshot_download(
            repo, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
            allow_patterns=names,
        ))  # fmt: skip
        reason = "its copy in the cache here lacks them" if local_files_only else "it has none of them"
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
    if found is None or not any(file.match("*.safetensors") for name in names for file in found.glob(name)):
        command = f"hf download {repo}" + "".join(f' --include "{name}"' for name in names)
        command += f" --revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"no folder {repo} is here, and the hub did not give {', '.join(names)} of {repo}: {reason}. "
            f"Where there is a network, run\n    {command} --local-dir {repo.partition('/')[2]}\n"
            "and pass that folder's path, or copy it to this machine and pass the path that it has here"
        )
    return found
