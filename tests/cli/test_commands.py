"""The command as users start it: every shipped config, launch by Trainer and by torchrun."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import PIL.Image
import PIL.ImageChops
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bigmac_lightning import cli
from tests.cli import paper_workload
from tests.cli.commands import BIN, bigmac, run

ROOT = Path(__file__).parents[2]
ALL_CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CONFIGS = [path for path in ALL_CONFIGS if "checkpoints/" not in path.read_text()]  # others: test_pretrained_configs.py
TINY = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=1",
]

SIZE = "--trainer.strategy.init_args.pipeline_parallel_size"
ONE_RANK = f"{SIZE}=1"

FEW = {
    "easy_vqa": ["--data.train_questions=1500", "--data.val_questions=50", "--data.loading.cache_dir=cache"],
    "qwen3_moe_vit_mmdit": paper_workload.TINY,
}
FILES = {"qwen3_moe_vit_mmdit": paper_workload.write_files}


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(path, marks=pytest.mark.wide if path.stem in ("mixed", "video_caption") else (), id=path.stem)
        for path in CONFIGS  # test_configs.py runs each of them in one process
    ],
)
def test_config_trains(config: Path, tmp_path: Path) -> None:
    few = FEW.get(config.stem, [])
    if config.stem in FILES:
        FILES[config.stem](tmp_path)
    arguments = ["fit", "--config", str(config), *TINY, *few, "--trainer.default_root_dir=out"]
    if config.stem == "digits":  # one of them from the shell
        done = run(["bigmac", *arguments], tmp_path)
        assert done.returncode == 0
        said = done.stdout.replace("\n", "")
    else:
        said = bigmac(2, tmp_path, *arguments)
    assert "val/accuracy" in said
    draws = "generators:" in config.read_text()
    for name in ("trace.json", "timeline.html", "timeline.png", *(["samples.png"] if draws else [])):
        (found,) = tmp_path.rglob(name)
        assert found.stat().st_size > 1000
        assert found.name in said
    if draws:
        (events,) = tmp_path.rglob("events.out.tfevents.*")
        log = EventAccumulator(str(events), {"images": 0}).Reload()
        (drawn,) = log.Images("samples")
        with PIL.Image.open(next(tmp_path.rglob("samples.png"))) as written:
            assert (drawn.step, drawn.width, drawn.height) == (3, *written.size)
            with PIL.Image.open(BytesIO(drawn.encoded_image_string)) as logged:
                differences = PIL.ImageChops.difference(logged.convert("RGB"), written.convert("RGB")).getextrema()
                assert all(most <= 1 for _, most in differences), "one rounds, the other cuts off"
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
    alone = ["--trainer.devices=1", "--trainer.strategy.init_args.pipeline_parallel_size=1"]
    for command in ("validate", "predict"):
        few = [f"--trainer.limit_{command.removesuffix('idate')}_batches=2"]
        bigmac(1, tmp_path, command, "--config", config, "--ckpt_path", str(checkpoint), *alone, *few)


def _group(number: int) -> list[str]:
    """Commands of the processes of a group, ended ones left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, state, _, group = re.fullmatch(r"\d+ \((.*)\) (\S) (\d+) (\d+) .*", path.read_text().strip()).groups()
            found += [name] if int(group) == number and state != "Z" else []
    return found


@pytest.mark.wide  # test_stopping.py and test_errors.py have signals, without the command line
def test_sigterm_in_mid_training_ends_all_ranks(tmp_path: Path) -> None:
    command = [str(BIN / "bigmac"), "fit", "--config", str(ROOT / "configs" / "digits.yaml")]
    options = ["--trainer.default_root_dir=out", "--trainer.max_epochs=50", "--trainer.enable_progress_bar=false"]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *options], cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 150
        while "Total FLOPs" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(5)  # some batches
        process.terminate()
        process.wait(60)  # as Lightning does it: an interrupted run, no error
        while (left := _group(process.pid)) and time.monotonic() < deadline + 60:
            time.sleep(0.5)
        assert not left
    finally:
        print(log.read_text()[-3000:])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def refused(*arguments: str) -> int | str | None:
    """The exit code of `bigmac` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bigmac", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    """As reports of errors need them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bigmac", "--version"])
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert {"bigmac-lightning", "python", "torch", "lightning", "transformers"} <= {line.split()[0] for line in lines}
    assert all(re.fullmatch(r"[\w-]+ \d+\.\S+", line) for line in lines)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls its parser
def test_a_class_inside_a_config_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())
    config["model"]["init_args"]["encoders"]["image"] = {"class_path": "my_encoder.MyEncoder"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert refused("fit", "--config", str(tmp_path / "config.yaml")) == 2
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert (
        "--model.encoders: Problem with given class_path 'my_encoder.MyEncoder': No module named 'my_encoder'" in line
    )
    assert "If my_encoder.py is a file of your own, start the command in its folder" in line
    assert "Subtypes" not in line


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls its parser
def test_a_missing_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("fit", "--config", "nowhere.yaml") == 2
    assert "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.devices=8", f"{SIZE}=8"], "the LLM has 4 layers, too few for 8 pipeline stages: choose "),
        (["--model.llm.config=empty"], "there is no config.json in the folder empty: give one that save_pretrained"),
        (["--model.llm.config=./gone"], "there is no folder ./gone (the current folder is "),
        (
            ["--data=MultimodalDataModule", "--data.train+=MessagesJSONL", "--data.train.path=a.jsonl"],
            "MessagesJSONL: there is no file a.jsonl (in ",
        ),
    ],
)
def test_what_is_found_before_other_processes_start(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert refused("fit", "--config", str(ROOT / "configs" / "digits.yaml"), *arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(said) == 1
    assert said[0].startswith(f"bigmac fit: error: {message}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("command", "known"),
    [
        *(("fit --conf x.yaml", "--config"), ("validate --ckpt_pa x", "--ckpt_path")),
        ("fit --trainer.devics=2", "--trainer.devices"),
        *((f"{command} --conf x.yaml", "--config") for command in ("predict", "tune", "data", "profile")),
        *((f"{command} --microb 8", "--microbatches") for command in ("plan", "compare")),
        *(("export --check a --output b", "--checkpoint"), ("chat run --max 3", "--max_new_tokens")),
        ("draw --sede 3 run words picture.png", "--seed"),
    ],
)
def test_options_are_written_out(command: str, known: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *arguments = command.split()
    assert refused(name, *arguments) == 2
    [said] = capsys.readouterr().err.splitlines()
    given = next(argument for argument in arguments if argument.startswith("--"))
    assert said.startswith(f"bigmac {name}: error: unrecognized arguments: {given}")
    assert said.endswith(f"; did you mean {known}?")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())
    config["trainer"]["strategy"]["init_args"]["microbatche"] = 4
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    assert refused("fit", "--config", str(tmp_path / "wrong.yaml")) == 2
    assert "'microbatche' is not accepted; did you mean microbatches?" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls its parser
def test_other_devices_than_those_of_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert refused("fit", "--config", str(ROOT / "configs" / "digits.yaml")) == 2
    message = "bigmac fit: error: torchrun starts 1 on each node, and trainer.devices is 2: give torchrun"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--trainer.devices=3"],
            "3 processes cannot form pipelines: pipeline_parallel_size=2 x data_parallel_size=auto",
        ),
        (
            ["--trainer.devices=6", "--trainer.strategy.init_args.tensor_parallel_size=3"],
            "model_type 'qwen3' has 64 rows in model.layers.0.self_attn.q_proj.weight: choose a number",
        ),
    ],
)
def test_a_wrong_world_size(options: list[str], message: str, tmp_path: Path) -> None:
    """One line, and no other process is started."""
    done = run(["bigmac", "fit", "--config", str(ROOT / "configs" / "digits.yaml"), *options], tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("bigmac fit: error: ")
    assert message in line
    assert "Traceback" not in done.stderr
    assert "GLOBAL_RANK" not in done.stderr


def test_a_wrong_world_size_under_torchrun(tmp_path: Path) -> None:
    """The first process says it, and the others end with it."""
    command = ["torchrun", "--nproc-per-node=3", "-m", "bigmac_lightning.cli", "validate"]
    done = run([*command, "--config", str(ROOT / "configs" / "digits.yaml"), "--trainer.devices=3"], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("bigmac validate: error: 3 processes cannot form pipelines") == 1
    assert "bigmac_lightning/training" not in done.stderr, "a traceback of a rank"


def test_own_classes_and_wrong_arguments(tmp_path: Path) -> None:
    """Classes in files of the current folder are found; a wrong argument is named in one line, without all options."""
    (tmp_path / "mine.py").write_text(
        "import lightning.pytorch as pl\n\n\nclass Told(pl.Callback):\n"
        "    def on_train_start(self, trainer, pl_module):\n        print('told by mine.py')\n"
    )
    arguments = ["bigmac", "fit", "--config", str(ROOT / "configs" / "digits.yaml"), *TINY]
    done = run([*arguments, "--trainer.callbacks+=mine.Told", "--trainer.devices=1", ONE_RANK], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "told by mine.py" in done.stdout
    wrong = "--trainer.strategy.init_args.schedule.policy"
    done = run([*arguments, f"{wrong}=nestd"], tmp_path)
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()
    assert said[-1].startswith("bigmac fit: error: policy is 'nestd'; expected one of nested, ")
    assert len(said) <= 2, said
    done = run([*arguments, "--trainer.devics=2"], tmp_path)
    assert done.returncode == 2
    assert "devics" in done.stderr.strip().splitlines()[-1]
    assert len(done.stderr.strip().splitlines()) <= 3
