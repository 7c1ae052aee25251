"""Writing of which, whatever happens, all is there or nothing: beside the target, down to the disk, then into its place."""

import contextlib
import fcntl
import os
import shutil

from safetensors import SafetensorError

from . import UserError

PARTS = ".*.part"  # what a killed process may leave in a folder


@contextlib.contextmanager
def alone(folder):
    """Makes a folder, in which no other process can be so till this one leaves or dies. UserError if one is, or none can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot make --output_dir {folder}: {error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run writes to {folder}: wait for its end, or choose another --output_dir") from None
        yield
    finally:
        os.close(handle)


def remove(path):
    """A file or a folder; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hide(path):
    """Takes the name from a file or folder, in one step, and returns the one that it has now."""
    hidden = path.with_name(f".{path.name}.old.part")
    remove(hidden)
    os.replace(path, hidden)
    return hidden


def discard(path):
    """Removes a folder, of which nobody sees a part."""
    remove(_hide(path))


def sync(path):
    """Waits until a file, or a folder with all that it holds, would survive a power cut."""
    for one in (path, *path.rglob("*")):
        handle = os.open(one, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def telling(target):
    """A write that fails inside becomes a UserError: what, why, and how much space there is."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        free = shutil.disk_usage(target.parent).free / 1e6
        raise UserError(f"cannot write {target}: {reason}; {free:,.1f} MB are free there") from error


def _reason(error):
    """What the system said, which torch wraps in a RuntimeError of its own."""
    if isinstance(error, SafetensorError):
        return str(error)
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error and (error.strerror or str(error))


@contextlib.contextmanager
def replacing(target):
    """Yields the path to write a file or folder to, which then takes the target's place. After a failure the target is as it
    was, and nothing else is left; UserError if the failure was one of writing."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with telling(target):
        remove(part)
        try:
            yield part
            sync(part)
            _publish(part, target)
        except BaseException:
            remove(part)
            raise


def _publish(part, target):
    old = _hide(target) if target.is_dir() else None  # a folder cannot be replaced in one step
    os.replace(part, target)
    if old:
        remove(old)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
