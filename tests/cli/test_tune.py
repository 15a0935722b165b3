"""`bigmac tune`: what it prints, and the config that it writes."""

import re
from pathlib import Path

import pytest
import yaml

from bigmac_lightning.commands import plan_config, tune

DIGITS = ["--config", str(Path(__file__).parents[2] / "configs" / "digits.yaml")]
SMALL = ["--microbatches=4", "--microbatch.tokens=256", "--microbatch.target_shape=[1,8,8]"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls it


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)


def test_a_config_that_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    given = "--trainer.strategy.init_args.schedule.ramp=true"
    assert tune.main([*DIGITS, *SMALL, given, "--memory=1GiB", "--device.tflops=0.01", "--device.bandwidth=1GB"]) == 0
    shown = capsys.readouterr().out
    for text in ("the fastest choices", "(1.000)", "computing", "tuned.yaml: the first of them", "0.01 TFLOP/s"):
        assert text in shown
    written = yaml.safe_load(Path("tuned.yaml").read_text())
    options, trainer = written["trainer"]["strategy"]["init_args"], written["trainer"]
    assert not {"ranks", "memory", "output", "device", "microbatch"} & set(written)
    assert trainer["devices"] * trainer["num_nodes"] == 2
    sizes = [options[f"{name}_parallel_size"] for name in ("pipeline", "data", "tensor", "context")]
    assert sizes[0] * sizes[1] * sizes[2] * sizes[3] == 2
    assert options["schedule"]["ramp"], "what is not searched stays"
    assert options["microbatches"] == 4 // sizes[1]
    assert written["data"]["init_args"]["batch_size"] == 96 // sizes[1]
    assert f"dp{sizes[1]} pp{sizes[0]} tp{sizes[2]} cp{sizes[3]}" in shown
    assert plan_config.main(["--config", "tuned.yaml", *SMALL[1:]]) == 0


def test_microbatches_are_those_of_the_first_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """`DigitsDataModule` does not say how many tokens they have. A CPU is not as fast as a GPU."""
    assert plan_config.main(DIGITS) == 0
    told = re.search(r"microbatches of on average (.*)\.", capsys.readouterr().out)
    assert told
    assert tune.main(DIGITS) == 0
    shown = capsys.readouterr().out
    assert f"A microbatch of the config has {told[1]} (by the first batch)." in shown
    assert "The config trains on the CPU" in shown
    assert tune.main([*DIGITS, *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "has 256 tokens" in shown
    assert "(by assumption, as --microbatch.tokens, --microbatch.target_shape, --microbatches say what" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory=1MiB"], "no choice fits 2 ranks of 1 MiB:"),
        (["--memory=much"], "memory is 'much'; expected bytes, or a size such as 16GiB"),
        (["--ranks=0"], "--ranks is 0; expected an integer of at least 1"),
        (["--costs=nowhere.json"], "nowhere.json: cannot be read"),
        (["--output=x.json"], "--output is 'x.json'; expected a name that ends with .yaml, .yml"),
    ],
)
def test_errors_name_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([*DIGITS, *SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("tuned.yaml").exists()


@pytest.mark.parametrize(
    ("total", "before", "nodes", "wanted"), [(4, 2, 1, 1), (16, 8, 1, 2), (128, 16, 2, 16), (2, 16, 2, 2)]
)
def test_processes_are_spread_over_nodes(total: int, before: int, nodes: int, wanted: int) -> None:
    assert tune._nodes(total, before, nodes) == wanted
