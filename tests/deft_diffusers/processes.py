"""Children forked from a process that has imported all and run nothing: they start at once, and may be killed or starved."""

import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

import torch
from deft_diffusers.options import TrainOptions

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["deft_diffusers.train", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "transformers.models.clip"]
)


def short_run(tiny, photos, output_dir, **changes):
    """Options for a short run on the tiny pipeline."""
    return TrainOptions(
        **{
            "pretrained_model_name_or_path": str(tiny),
            "instance_data_dir": str(photos),
            "instance_prompt": "a cat",
            "output_dir": str(output_dir),
            "max_train_steps": 4,
            "report_to": "none",
        }
        | ({"rank": 2} if changes.get("method", "deft") in ("deft", "para", "lora") else {})
        | changes
    )


def words(options):
    """The command line that asks for these options, after `deft`."""
    default = TrainOptions(pretrained_model_name_or_path="", instance_data_dir="", output_dir="")
    said = ["train"]
    for name, value in vars(options).items():
        if value != getattr(default, name):
            said += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return said


def _child(function, args, environment, output):
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        function(*args)
    except SystemExit:
        raise
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


class Child:
    """A process that runs `function(*args)`; `said` is all that it has printed, the last line its error."""

    def __init__(self, output, function, *args, **environment):
        self.output = Path(output)
        self.output.unlink(missing_ok=True)
        self.process = CONTEXT.Process(target=_child, args=(function, args, environment, str(output)))
        self.process.start()

    def wait(self, timeout=180):
        """Its exit code, negative after a signal."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout} s: {self.said[-3000:]}")
        return self.process.exitcode

    @property
    def said(self):
        return self.output.read_text() if self.output.exists() else ""


def together(folder, function, *args, processes=2, **environment):
    """Starts the processes of one distributed run on this machine's CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    common |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(processes)} | environment
    return [
        Child(folder / f"{rank}.txt", function, *args, **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(processes)
    ]
