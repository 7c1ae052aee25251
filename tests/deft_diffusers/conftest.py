"""What the application's tests share."""

import contextlib

import pytest
import torch
from accelerate.state import AcceleratorState
from deft_diffusers import sweep
from deft_diffusers.cli import main
from tiny_pipeline import write_picture, write_tiny_pipeline


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_v(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("tiny_v") / "model", "v_prediction")


@pytest.fixture
def photos(tmp_path):
    """Three square pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(3):
        write_picture(folder / f"{k}.png", k)
    return folder


@pytest.fixture
def one_thread():
    """Layers as small as the tiny pipeline's are slower on several threads, far slower where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def commands(monkeypatch):
    """What a sweep runs, here without a process for each."""
    commands = []

    def here(command, environment, output, claim):
        commands.append(command)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return main(command[3:])

    monkeypatch.setattr(sweep, "_call", here)
    return commands


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its settings for the life of a process; each test sets its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
