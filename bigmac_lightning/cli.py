"""The command `bigmac`. A subcommand is imported only when it is called: importing those that train takes seconds."""

import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module, metadata
from typing import Any

TRAINING = {
    "fit": "train the model of a config: fit --config RUN.yaml",
    "validate": "evaluate it on the validation data",
    "test": "evaluate it on the test data",
    "predict": "run it on the prediction data; predict RUN writes what it replies",
}
OTHERS = {
    "plan": "make, check, show and save a schedule; with --config, that of a run, with the memory of each rank",
    "profile": "train a config for a few steps and write what it costs on this hardware, for plan, compare, tune, fit",
    "tune": "search the fastest layout and schedule that fit into memory: tune --config RUN.yaml --ranks 16",
    "data": "show what the model will see of a run's data: data --config RUN.yaml",
    "compare": "compare policies and backbones side by side",
    "chat": "ask a trained model something: chat runs/digits/version_0",
    "draw": "let its generator draw: draw runs/digits/version_0 'draw a 3 :' x.png",
    "export": "write a trained model as a folder that transformers loads",
}
HELP = """usage: bigmac COMMAND ...

Trains multimodal LLMs (encoders -> LLM -> generators) in a pipeline, with the work of encoders and generators nested
into the LLM's schedule.

{commands}

Each command has its own --help. Options of fit, validate, test and predict come from a YAML file, from the command
line (--trainer.devices 4), or from both."""


def main() -> None:
    """Entry point. Classes in files of the current folder can be named in configs."""
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {name:<9} {text}" for name, text in {**TRAINING, **OTHERS}.items())))
    elif name == "--version":
        print(versions())
    elif name in OTHERS or (name == "predict" and _of_run(arguments)):
        sys.exit(module_of(name, arguments).main(arguments))
    elif name in TRAINING or name.startswith("-"):
        from bigmac_lightning.commands.config import BigMacCLI

        BigMacCLI()
    else:
        near = get_close_matches(name, [*TRAINING, *OTHERS], 1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join([*TRAINING, *OTHERS])}"
        print(f"bigmac: error: there is no command {name!r}; {meant}", file=sys.stderr)
        sys.exit(2)


def versions() -> str:
    """The versions of this package, of Python and of the packages that it uses, for reports of errors."""
    names = (
        "bigmac-lightning",
        "torch",
        "lightning",
        "jsonargparse",
        "transformers",
        "diffusers",
        "peft",
        "datasets",
        "av",
    )
    lines = [f"python {platform.python_version()}"]
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            lines.append(f"{name} {metadata.version(name)}")
    return "\n".join(lines)


def module_of(name: str, arguments: Sequence[str]) -> Any:
    """The module of a command that does not train."""
    of_config = name == "plan" and _named(arguments, "-c", "--config")
    return import_module(f"bigmac_lightning.commands.{'plan_config' if of_config else name}")


def _of_run(arguments: Sequence[str]) -> bool:
    """Whether `predict` gets a run, and not a config."""
    return bool(arguments) and (not arguments[0].startswith("-") or _named(arguments, "--output"))


def _named(arguments: Sequence[str], *names: str) -> bool:
    """Whether one of these options is among the arguments."""
    return any(argument.split("=")[0] in names for argument in arguments)


if __name__ == "__main__":
    main()
