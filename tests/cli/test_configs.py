"""Every shipped config under every strategy and precision, on two CPU processes (auto: one), with tiny models and data.

`pytest -m wide tests/cli/test_configs.py` runs all combinations; by default each config runs under one strategy besides
"bigmac", under which other tests run it, and the precisions take turns.
"""

from itertools import product
from pathlib import Path

import pytest

from tests.cli.checkpoints import BUFFERS, PEERS, write_inputs
from tests.cli.commands import bigmac
from tests.cli.test_commands import ALL_CONFIGS, FEW, FILES, TINY

PIPELINE = "--trainer.strategy.init_args."
STRATEGIES: dict[str, list[str]] = {
    "bigmac": [f"{PIPELINE}pipeline_parallel_size=2", "--trainer.devices=2"],
    "auto": ["--trainer.strategy=auto", "--trainer.devices=1"],
    "ddp": ["--trainer.strategy=ddp", "--trainer.devices=2"],
}
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]
SMALL = ["--data.token_budget=256", "--data.microbatches=2", "--data.num_workers=0", "--data.loading.cache_dir=cache"]
DIGITS = ["--data.batch_size=24", "--data.passes=1"]


UNUSED = ["llava_onevision"]  # a batch of several images per sample has no use for `image_newline`


def _few(config: Path) -> list[str]:
    if config.stem == "siglip_qwen3":  # test_two_stages starts it from the first stage's checkpoint
        return [*SMALL, "--model.init_args.init_from=null"]
    if config.stem in ("digits", "drawn_digits"):
        return DIGITS
    if config.stem in FEW:
        return [option for option in FEW[config.stem] if not option.startswith(PIPELINE)]
    return [*SMALL, *BUFFERS.get(config.stem, ())] if "checkpoints/" in config.read_text() else []


def check(config: Path, strategy: str, precision: str, folder: Path) -> None:
    write_inputs(config.read_text(), folder) if config.stem not in FILES else FILES[config.stem](folder)
    options = ["--trainer.accelerator=cpu", "--trainer.num_nodes=1", f"--trainer.precision={precision}"]
    arguments = [*TINY, *_few(config), *options, *STRATEGIES[strategy], "--trainer.default_root_dir=out"]
    if strategy == "bigmac" and config.stem in PEERS:
        arguments += [f"{PIPELINE}pipeline_parallel_size=1", *PEERS[config.stem]]
    if strategy == "ddp" and config.stem in UNUSED:
        arguments.append("--trainer.strategy=ddp_find_unused_parameters_true")
    ranks = 1 if strategy == "auto" else 2
    said = bigmac(ranks, folder, "fit", "--config", str(config), *arguments)
    assert "val/accuracy" in said
    drawn = "SampleImages" in config.read_text()
    assert ("samples.png" in said) == drawn
    assert ("timeline.png" in said) == (strategy == "bigmac")


def _turn(number: int) -> tuple[str, str]:
    """The strategy and precision of a config by default."""
    return (["auto", "ddp"][number % 2], PRECISIONS[number % 3])


BY_DEFAULT = [(config, *_turn(number)) for number, config in enumerate(ALL_CONFIGS)]
ALL = list(product(ALL_CONFIGS, STRATEGIES, PRECISIONS))


def _name(value: object) -> str:
    return value.stem if isinstance(value, Path) else str(value)


@pytest.mark.parametrize(("config", "strategy", "precision"), BY_DEFAULT, ids=_name)
def test_config(config: Path, strategy: str, precision: str, tmp_path: Path) -> None:
    check(config, strategy, precision, tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize(("config", "strategy", "precision"), ALL, ids=_name)
def test_config_everywhere(config: Path, strategy: str, precision: str, tmp_path: Path) -> None:
    check(config, strategy, precision, tmp_path)
