"""Which code something was made by, and when."""

import datetime
import subprocess
from pathlib import Path


def commit():
    """Of this package, where it is a checkout, else None; ends in -dirty where files have changed."""
    if not (Path(__file__).parents[2] / ".git").exists():
        return None  # installed, and git would tell of whatever it lies in
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return git.stdout.strip() or None


def origin():
    """{"commit", "time"} of what is begun now."""
    return {"commit": commit(), "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
