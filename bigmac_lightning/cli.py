"""The command `bigmac`: LightningCLI's fit, validate, test and predict; `plan`, of a config or of numbers alone,
`data`, `compare`, which needs no model, and `export`."""

import sys
from collections.abc import Callable, Sequence

from bigmac_lightning import compare_command, data_command, export_command, plan_command, plan_config_command
from bigmac_lightning.config_cli import BigMacCLI

OTHERS = (
    "More commands, each with a --help of its own: plan (make, check and show plans; with --config, those of a run and "
    "its needs), data (what the model will see of a run's data), compare (policies and backbones side by side), export "
    "(a trained model as a folder that transformers loads)."
)


def _plan(arguments: Sequence[str]) -> int:
    of_config = any(argument.split("=")[0] in ("-c", "--config") for argument in arguments)
    return (plan_config_command if of_config else plan_command).main(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "plan": _plan,
    "data": data_command.main,
    "compare": compare_command.main,
    "export": export_command.main,
}


def main() -> None:
    """Entry point."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.exit(COMMANDS[name](arguments))
    if name in ("-h", "--help"):
        BigMacCLI(args=["--help"], parser_kwargs={"epilog": OTHERS})
    BigMacCLI()


if __name__ == "__main__":
    main()
