"""The command as users start it: every shipped config, every README command, launch by Trainer and by torchrun."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
BIN = Path(sys.executable).parent
TINY = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=1",
]

FEW = {"easy_vqa": ["--data.train_questions=1500", "--data.val_questions=50", "--data.cache_dir=cache"]}


def run(command: list[str], folder: Path, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    print(done.stdout, done.stderr)
    return done


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_trains(config: Path, tmp_path: Path) -> None:
    few = FEW.get(config.stem, [])
    done = run(["bigmac", "fit", "--config", str(config), *TINY, *few, "--trainer.default_root_dir=out"], tmp_path)
    assert done.returncode == 0
    assert "val/accuracy" in done.stdout
    draws = "generators:" in config.read_text()
    for name in ("trace.json", "timeline.png", *(["samples.png"] if draws else [])):
        (found,) = tmp_path.rglob(name)
        assert found.stat().st_size > 1000
        assert found.name in done.stdout.replace("\n", "")
    trace = json.loads(next(tmp_path.rglob("trace.json")).read_text())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {event["tid"] for event in spans} == {0, 1}
    names = [event["name"] for event in spans]
    assert {"EF0", "0F0", "1F0", "1B0", "0B0", "EB0", *(["G0"] if draws else [])} <= set(names)


def test_torchrun_then_evaluate_and_predict(tmp_path: Path) -> None:
    """Launched from outside; the checkpoint serves another number of ranks."""
    config = str(ROOT / "configs" / "digits.yaml")
    launch = ["torchrun", "--nproc-per-node", "2", "--master-port", "29517", "-m", "bigmac_lightning.cli"]
    fit = run([*launch, "fit", "--config", config, *TINY], tmp_path)
    assert fit.returncode == 0
    checkpoint = next(path for path in tmp_path.rglob("*.ckpt") if path.is_dir())
    for command in ("validate", "predict"):
        done = run(
            ["bigmac", command, "--config", config, "--ckpt_path", str(checkpoint), "--trainer.devices=1",
             "--trainer.strategy.init_args.pipeline_parallel_size=1", "--trainer.limit_val_batches=2"],
            tmp_path,
        )  # fmt: skip
        assert done.returncode == 0


def test_a_missing_config(tmp_path: Path) -> None:
    done = run(["bigmac", "fit", "--config", "nowhere.yaml"], tmp_path)
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr


def test_an_unknown_key(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())
    config["trainer"]["strategy"]["init_args"]["polcy"] = "nested"
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    done = run(["bigmac", "fit", "--config", "wrong.yaml"], tmp_path)
    assert done.returncode == 2
    assert "polcy" in done.stderr


def test_a_wrong_world_size(tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "digits.yaml")
    done = run(["bigmac", "fit", "--config", config, "--trainer.strategy.init_args.pipeline_parallel_size=3"], tmp_path)
    assert done.returncode != 0
    assert "2 processes cannot form pipelines: pipeline_parallel_size=3" in done.stderr


def readme_commands(*files: str) -> list[str]:
    text = "".join((ROOT / file).read_text() for file in files or ["README.md"])
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_documented_plan_commands(tmp_path: Path) -> None:
    documented = readme_commands("README.md", "docs/schedules.md")
    commands = [command for command in documented if command.startswith("bigmac plan")]
    assert len(commands) >= 7
    for command in commands:
        assert run(shlex.split(command), tmp_path).returncode == 0, command
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == "bigmac-plan/1"


def test_readme_names_real_make_targets_and_files() -> None:
    """The training commands themselves are run by the tests above and by CI."""
    makefile = (ROOT / "Makefile").read_text()
    readme = (ROOT / "README.md").read_text()
    targets = re.findall(r"make (\w+)", " ".join(re.findall(r"`([^`]*)`", readme)) + " ".join(readme_commands()))
    assert {"quickstart", "test", "bench"} <= set(targets)
    assert all(f"\n{target}:" in makefile for target in targets)
    for path in re.findall(r"`((?:bigmac_lightning|models|datamodules|configs|tests|benchmarks)/[\w./]*)`", readme):
        assert (ROOT / path).exists(), path
    for command in readme_commands():
        for path in re.findall(r"configs/[\w.]+", command):
            assert (ROOT / path).is_file(), path
