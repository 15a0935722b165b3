"""`bigmac plan --config`: the plan of the first batch, and what a run will need, at full size, without its weights."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigmac_lightning.commands.config import BigMacCLI
from bigmac_lightning.commands.plan_config import RunReader, main
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.training.batch_facts import plan_digest
from tests.training.trainers import on_ranks

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls it
PAPER = ["--config", str(CONFIGS / "qwen3_moe_vit_mmdit.yaml")]
DIGITS = ["--config", str(CONFIGS / "digits.yaml")]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.chdir(tmp_path)  # the files of the configs do not exist here


def test_the_papers_workload_at_full_size(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    begin = time.perf_counter()
    assert main(PAPER) == 0
    assert time.perf_counter() - begin < 60
    shown = capsys.readouterr().out
    for text in ("llm: 30.53 B", "encoders.image: 1.31 B", "generators.image: 20.52 B"):
        assert text in shown
    rows = re.findall(r"│ +(\d+) │ +(\d+)\.\.(\d+) │ +([\d.]+ [BM]) │ +21.83 B │ .* ([\d.]+) GiB │", shown)
    assert [int(rank) for rank, *_ in rows] == list(range(16))
    assert [int(first) for _, first, *_ in rows] == [0, *(int(last) + 1 for _, _, last, *_ in rows[:-1])]
    assert rows[-1][2] == "47"
    parameters = [float(count[:-2]) * (1 if count.endswith("B") else 1e-3) for *_, count, _ in rows]
    assert sum(parameters) == pytest.approx(30.53, abs=0.05)
    assert 30 < max(float(row[-1]) for row in rows) < 48  # GiB, of 80: encoder and generator lie in shards
    assert "1 pipeline of 16 ranks; 64 microbatches of 8192 tokens, 2048 of them of media" in shown
    assert "nested on 1f1b: 16 ranks, 64 microbatches" in shown
    assert "rank 15" in shown
    assert list(tmp_path.iterdir()) == []


def test_the_papers_workload_on_128_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """By the options that the config names."""
    comments = re.findall(r"^#     (--trainer.*)$", (CONFIGS / "qwen3_moe_vit_mmdit.yaml").read_text(), re.MULTILINE)
    assert main([*PAPER, *comments]) == 0
    shown = capsys.readouterr().out
    assert "8 pipelines of 4 ranks, each of 4 processes (tensor parallel size 4, expert parallel size 4)" in shown
    rows = re.findall(r"│ +\d+ │ +\d+\.\.\d+ │ +([\d.]+) B │ +21.83 B │ .* ([\d.]+) GiB │", shown)
    assert len(rows) == 4
    assert 4 * sum(float(parameters) for parameters, _ in rows) == pytest.approx(30.53, rel=0.01)
    assert 20 < max(float(memory) for _, memory in rows) < 60  # GiB, of 80 GB


def test_what_is_offloaded_is_not_counted_on_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DIGITS, "--microbatches=6"]) == 0
    assert "CPU" not in capsys.readouterr().out
    options = "{encoders: fsdp, generators: zero1, stages: zero1, offload: [encoders, stages], master_weights: true}"
    arguments = [f"--trainer.strategy.init_args.sharding={options}", "--trainer.precision=bf16-true"]
    assert main([*DIGITS, "--microbatches=6", *arguments]) == 0
    shown = capsys.readouterr().out
    assert " offloaded ┃" in shown
    kinds = "fsdp for encoders, zero1 for generators, zero1 for stages, float32 master weights"
    assert f"in shards ({kinds}, encoders and stages offloaded to the CPU)" in " ".join(shown.split())


def test_how_gradients_are_summed_is_that_of_the_run() -> None:
    options = {"--trainer.accumulate_grad_batches=4": 2.0, "--trainer.strategy.init_args.float32_gradients=true": 0.0}
    for option, many in options.items():
        assert RunReader("plan", [*DIGITS, option]).precision.many == many


def test_options_change_what_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    strategy = "--trainer.strategy.init_args"
    options = [f"{strategy}.schedule.policy=upfront", f"{strategy}.schedule.costs.EF=2"]
    options += ["--microbatches=6", "--microbatch.tokens=96"]
    assert main([*DIGITS, "--microbatches=6", "--trainer.devices=1", f"{strategy}.ranks_per_device=6"]) == 0
    assert "3 pipelines of 2 ranks" in capsys.readouterr().out
    for name in (["--trainer.strategy=bigmac"], ["--trainer.strategy", "bigmac"]):
        assert main([*DIGITS, *name, "--trainer.strategy.pipeline_parallel_size=1", "--microbatches=6"]) == 0
        assert "2 pipelines of 1 ranks" in capsys.readouterr().out
    assert main([*DIGITS, *options, "--trainer.devices=4", f"{strategy}.stages.partition=[1,3]"]) == 0
    shown = capsys.readouterr().out
    assert "2 pipelines of 2 ranks; 6 microbatches of 96 tokens, 24 of them of media, 24 each, 1 targets" in shown
    assert "upfront on 1f1b: 2 ranks, 6 microbatches" in shown
    assert "as the config says: {F: 1, B: 2, I: 1, W: 1, EF: 2, EB: 2}" in shown
    assert "1..3" in shown


def _first_plan_of_fit(rank: int, arguments: list[str]) -> Plan:
    sys.argv = ["bigmac"]
    run = BigMacCLI(args=["fit", *arguments])
    return run.trainer.strategy.runner.last_plan  # pyright: ignore


STRATEGY = "--trainer.strategy.init_args"
FACTORS = [f"{STRATEGY}.schedule.policy=filled", f"{STRATEGY}.stages.factors=auto"]
AUTO = [f"{STRATEGY}.schedule.backbone=auto", f"{STRATEGY}.schedule.virtual_stages=auto"]
GIVEN = [f"{STRATEGY}.schedule.costs={{F: 1, B: 2.5, EF: 1.5, EB: 2}}"]
FSDP = [f"{STRATEGY}.sharding={{stages: fsdp, encoders: fsdp}}", f"{STRATEGY}.microbatches=6"]
REPLICAS = ["--trainer.devices=4", *FSDP]


@pytest.mark.parametrize(
    ("config", "ranks", "options"),
    [
        ("digits", 2, FACTORS),
        ("easy_vqa", 2, AUTO),
        *(pytest.param("easy_vqa", 4, some, marks=pytest.mark.wide) for some in (REPLICAS, [*REPLICAS, *GIVEN])),
        *(pytest.param("mixed", 2, some, marks=pytest.mark.wide) for some in (FACTORS, AUTO, GIVEN)),
        *(pytest.param(name, 2, [], marks=pytest.mark.wide) for name in ("digits", "video_caption", "two_speakers")),
    ],
)
def test_it_is_the_plan_that_fit_begins_with(
    config: str, ranks: int, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Microbatches and items of these data differ, and nothing was measured before."""
    arguments = ["--config", str(CONFIGS / f"{config}.yaml"), *options]
    assert main([*arguments, "--output=plan.json"]) == 0
    assert "this is the plan of the first batch, with which bigmac fit begins" in capsys.readouterr().out
    shown = Plan.load(tmp_path / "plan.json")
    short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.logger=false"]
    short += ["--trainer.callbacks=[]", "--trainer.enable_checkpointing=false"]
    for ran in on_ranks(ranks, _first_plan_of_fit, [*arguments, *short])[:2]:  # of the first pipeline
        assert ran == shown
        assert plan_digest(ran) == plan_digest(shown)


def test_without_a_first_batch_it_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, reason in (
        (["--microbatches=6", "--microbatch.tokens=96"], "as --microbatch.tokens, --microbatches say what a step has"),
        (["--trainer.limit_train_batches=0"], "as the training has no batches"),
        (["--model.encoders=null"], "as microbatch 0: no media component 'image'; the model has []"),
    ):
        assert main([*DIGITS, *arguments]) == 0
        shown = capsys.readouterr().out
        assert f"whose microbatches are all alike, and not of the first batch, {reason}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.devices=3"], "3 processes cannot form pipelines: pipeline_parallel_size=2"),
        (["--trainer.devices=auto"], "trainer.devices is 'auto'; a plan needs their number"),
        (
            ["--trainer.strategy=ddp", "--trainer.strategy.sizes=1"],
            "--trainer.strategy.sizes: --trainer.strategy is a name, which has no options; give its class",
        ),
        (["--trainer.strategy=ddp"], "trainer.strategy is 'ddp'; plans are made for bigmac"),
        (["--trainer.strategy.init_args.polcy=nested"], "'polcy' is not accepted"),
        (["--trainer.strategy.init_args.schedule.polcy=nested"], "unrecognized arguments: --schedule.polcy=nested"),
        (
            ["--trainer.strategy.init_args.schedule.policy=best"],
            "error: policy is 'best'; expected one of nested, upfront, first_stage, filled, recompute, disaggregated",
        ),
        (["--trainer.strategy.init_args.schedule={group_sise: 4}"], "'schedule' does not accept option 'group_sise'"),
        (["--trainer.colour=red"], "unrecognized arguments: --trainer.colour=red"),
        (
            ["--trainer.devices=8", "--trainer.strategy.init_args.pipeline_parallel_size=8"],
            "the LLM has 4 layers, too few for 8 pipeline stages",
        ),
        (["--trainer.strategy.init_args.schedule.max_encoder_units=0.1"], "live encoder units"),
        (["--microbatch.tokens=0"], "microbatch.tokens is 0; expected at least 1"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*DIGITS, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"bigmac plan: error: .*\n", shown.err)
    assert message in shown.err


def test_all_commands_are_listed() -> None:
    done = subprocess.run([sys.executable, "-m", "bigmac_lightning.cli"], capture_output=True, text=True, check=True)
    for command in ("fit", "validate", "test", "predict", "plan", "compare", "export"):
        assert re.search(rf"\b{command}\b", done.stdout), command
