"""The command line `deft`: one parser per command, made from the options' dataclasses."""

import argparse
import dataclasses
import importlib
import os
import sys
import traceback
import types
import typing

from . import UserError, __version__, near
from .options import (
    CompareOptions,
    ConvertOptions,
    DemoOptions,
    EvaluateOptions,
    SampleOptions,
    SweepOptions,
    TrainOptions,
)

INTERRUPTED = 130  # a shell's exit code for a command stopped by Ctrl-C


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: `deft_diffusers.<name>`, or `deft_diffusers.<package>.<name>`, has a function `<name>(options)`."""

    name: str
    options: type
    summary: str
    example: str
    package: str = ""


COMMANDS = (
    Command(
        "train",
        TrainOptions,
        "Learn a subject from a few pictures: writes an adapter of a few hundred kilobytes to a few megabytes.",
        """deft train --pretrained_model_name_or_path toyworld --instance_data_dir photos/ \\
    --instance_prompt "a photo of sks cat" --output_dir outputs/cat --rank 8 --max_train_steps 300

  several processes:  accelerate launch -m deft_diffusers train …
  one base for all:   accelerate launch --use_fsdp --fsdp_version 2 -m deft_diffusers train …
  go on after a stop: the same command with --resume_from_checkpoint latest""",
    ),
    Command(
        "sweep",
        SweepOptions,
        "Train many subjects by many methods; what is done is not done again, what fails stops nothing else.",
        """deft sweep --pretrained_model_name_or_path toyworld --subjects dreambooth/dataset \\
    --method deft --method lora --rank 4 --rank 8 --output_dir runs

  on every GPU of a machine: torchrun --nproc-per-node 8 -m deft_diffusers sweep …
  with a plan:               deft sweep --plan sweep.yaml --output_dir runs""",
    ),
    Command(
        "compare",
        CompareOptions,
        "Train, draw and score subjects by many methods: tables with intervals, figures, a report; it goes on where it was.",
        """python -m deft_diffusers.toyworld.subjects --output_dir outputs/subjects
  python -m deft_diffusers.toyworld.subjects --output_dir outputs/plus --layout dreambench++
  deft compare --plan benchmarks/quality/toyworld.yaml --output_dir outputs/compare

  on two cores, or every GPU: torchrun --standalone --nproc-per-node 2 -m deft_diffusers compare …
  go on after a stop, or only write tables, figures and report again: the same command""",
        "evaluation",
    ),
    Command(
        "sample",
        SampleOptions,
        "Draw pictures with a base model and any number of adapters.",
        """deft sample --pretrained_model_name_or_path toyworld --adapter outputs/cat \\
    --prompt "a photo of sks cat in the snow" --num_images_per_prompt 4 --output_dir outputs/snow""",
    ),
    Command(
        "evaluate",
        EvaluateOptions,
        "Score pictures: how like the subject, how true to their texts, how various, and what the model has forgotten.",
        """deft evaluate --images outputs/snow --references photos/ --subject "sks cat" --class_name cat \\
    --output_dir outputs/scores

  no encoder is downloaded here; once, for DreamBooth's protocol (for DreamBench++'s, facebook/dino-vits8):
    hf download openai/clip-vit-base-patch32
    hf download facebook/dino-vits16
    hf download facebook/dinov2-small
  draw first, and tell the drift:
    deft evaluate --pretrained_model_name_or_path toyworld --adapter outputs/cat --encoders toyworld \\
      --subject "sks cat" --class_name cat --prompt "a photo of {} in the snow" \\
      --unrelated_prompt "a photo of a house" --references photos/ --output_dir outputs/scores
  DreamBench++'s samples:      deft evaluate --images samples/METHOD --output_dir outputs/scores""",
        "evaluation",
    ),
    Command(
        "convert",
        ConvertOptions,
        "Bring adapters from one kind of file to another: DEFT out to LoRA, LoRA and the authors' own files in.",
        """deft convert outputs/cat --pretrained_model_name_or_path toyworld --output_dir outputs/cat-lora
    writes a LoRA that plain diffusers loads:  pipe.load_lora_weights("outputs/cat-lora")

  for ComfyUI, at half the size:  deft convert outputs/cat … --format kohya --dtype fp16
  the authors' files, no model needed:  deft convert checkpoint-500/project_replace.pt --output_dir outputs/theirs""",
    ),
    Command(
        "demo",
        DemoOptions,
        "Personalise the embedded model on a real photograph of a cat, before and after, in a few minutes with no GPU.",
        "deft demo --output_dir outputs/demo",
    ),
)


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that point to the command's help."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def _check_value(self, action, value):
        """argparse's, which names the choices, and the nearest of them."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += near(value, action.choices)
            raise


def _formatter(prog):
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110)


def _add_option(group, field):
    meta = dict(field.metadata)
    flag, kind = "--" + field.name, field.type
    if meta.get("positional"):
        group.add_argument(field.name, type=kind, metavar=meta["metavar"], help=meta["help"].replace("%", "%%"))
        return
    required = field.default is dataclasses.MISSING and not meta.get("repeat")
    text = meta["help"].replace("%", "%%")
    if required:
        text += " (required)"
    elif not any(field.default is no for no in (None, False, dataclasses.MISSING)):
        text += f" (default: {'on' if field.default is True else field.default})"
    if kind in (bool, bool | None):
        action = "store_true" if field.default is False else argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, default=field.default, help=text)
        return
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is list:  # `int | None`, `list[str]`
        kind = typing.get_args(kind)[0]
    settings = {key: meta[key] for key in ("choices", "metavar") if key in meta}
    if meta.get("repeat"):
        group.add_argument(flag, type=kind, action="append", default=[], help=text, **settings)
    else:
        default = None if required else field.default
        settings.setdefault("metavar", None if "choices" in meta else kind.__name__.upper())
        group.add_argument(flag, type=kind, required=required, default=default, help=text, **settings)


def build_parser():
    """The parser of `deft` and, by name, the parsers of its commands."""
    parser = _Parser(
        prog="deft",
        description="Personalise a text-to-image model with DEFT adapters.",
        epilog="deft COMMAND --help explains one command. A first try that needs nothing: deft demo",
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"deft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    parsers = {}
    for command in COMMANDS:
        words = [f.metadata["metavar"] for f in dataclasses.fields(command.options) if f.metadata.get("positional")]
        sub = parsers[command.name] = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            epilog="example:\n  " + command.example,
            formatter_class=_formatter,
            allow_abbrev=False,
            usage=" ".join(["deft", command.name, *words, "[options]"]),
        )
        groups = {}
        for field in dataclasses.fields(command.options):
            name = field.metadata["group"]
            groups.setdefault(name, sub.add_argument_group(name))
            _add_option(groups[name], field)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, parsers


def _refuse_unknown(parsers, argv):
    """A misspelt flag is told before anything else that is wrong, such as the flag it should have been being missing."""
    if not argv or argv[0] not in parsers:
        return
    known = [flag for action in parsers[argv[0]]._actions for flag in action.option_strings]
    for flag in (word.split("=")[0] for word in argv[1:] if word.startswith("--")):
        if flag not in known:
            parsers[argv[0]].error(f"unknown option {flag}{near(flag, known)}")


def main(argv=None):
    """Runs one command and returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    parser, parsers = build_parser()
    _refuse_unknown(parsers, argv)
    values = vars(parser.parse_args(argv))
    name, debug = values.pop("command"), values.pop("debug")
    command = next(c for c in COMMANDS if c.name == name)
    # The libraries' hints are for programmers; what a user must know is said here.
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        module = ".".join(["", *filter(None, (command.package, command.name))])
        run = getattr(importlib.import_module(module, __package__), command.name)
        run(command.options(**values))
        return 0
    except KeyboardInterrupt as stop:
        print(f"deft {command.name}: {stop}" if str(stop) else f"deft {command.name}: stopped", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # the border of the program: every error becomes one line
        if debug:
            traceback.print_exc()
        text = " ".join(str(error).split()) or type(error).__name__
        hint = "" if debug or isinstance(error, UserError) else f" ({type(error).__name__}; --debug shows where)"
        print(f"deft {command.name}: error: {text}{hint}", file=sys.stderr)
        return 2
