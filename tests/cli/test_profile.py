"""`bigmac profile`: a short training of a config, what it writes, and what it does not."""

import json
from pathlib import Path

import pytest

from bigmac_lightning.commands import plan_config, profile
from bigmac_lightning.schedule.measured_costs import MeasuredCosts
from tests.cli.commands import bigmac

DIGITS = ["--config", str(Path(__file__).parents[2] / "configs" / "digits.yaml")]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls it


def test_profile_then_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    small = ["--data.init_args.batch_size=8", "--data.init_args.passes=1", "--trainer.enable_progress_bar=false"]
    given = ["--trainer.strategy.init_args.schedule.costs=new.json"]  # which does not exist yet
    said = bigmac(2, tmp_path, "profile", *DIGITS, *small, *given, "--steps=4", "--output=new.json")
    assert "new.json: measured on cpu: " in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.log", "1.log", "new.json"]
    known = MeasuredCosts.load(tmp_path / "new.json")
    assert known.layers == (2, 2)
    monkeypatch.chdir(tmp_path)
    assert plan_config.main([*DIGITS, *small, *given]) == 0
    shown = capsys.readouterr().out
    assert "this is the plan of the first batch" in shown
    assert f"costs of the plan, in seconds, by new.json, measured on {known.device}: {{F: 0.0" in shown
    assert plan_config.main([*DIGITS, *given, "--microbatches=8"]) == 0
    shown = capsys.readouterr().out
    assert f"8 microbatches of {-(-known.work.tokens // 1):g} tokens" in shown
    pipeline = ["--trainer.devices=4", "--trainer.strategy.init_args.pipeline_parallel_size=4"]
    assert plan_config.main([*DIGITS, *given, *pipeline, "--microbatch.tokens=99"]) == 0
    shown = capsys.readouterr().out
    assert "microbatches of 99 tokens" in shown
    assert "(stages of 2, 2 layers were measured, and times are spread over 1, 1, 1, 1)" in shown
    Path("new.json").write_text(json.dumps(json.loads(known.to_json()) | {"model": "another"}))
    assert plan_config.main([*DIGITS, *given]) == 2
    assert "new.json: the model (or which of its weights are trained) differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=2"], "--steps is 2; expected an integer of at least 3"),
        (["--output=costs.yaml"], "--output is 'costs.yaml'; expected a name that ends with .json"),
        (["--colour=red"], "unrecognized arguments: --colour=red"),
        (["--trainer.strategy=ddp", "--trainer.devices=1"], "only bigmac has actions to measure"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main([*DIGITS, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_world_size(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        profile.main([*DIGITS, "--trainer.devices=3"])
    assert "bigmac profile: error: 3 processes cannot form pipelines" in capsys.readouterr().err
