"""`bigmac compare`: what it shows and writes, its exit codes, and what it may import."""

import csv
import json
import re
import subprocess
import sys

import pytest

from bigmac_lightning.commands.compare import main
from bigmac_lightning.schedule.backbones import BACKBONES
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.placing.policies import POLICIES
from bigmac_lightning.schedule.plan import Costs
from bigmac_lightning.schedule.request import PlanRequest
from tests.schedule.pages import data_of

from .test_plan_command import PACKAGE, SMALL


def test_shows_all_policies_on_all_backbones(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--pipeline_parallel_size", "4", "--microbatches", "8", "--costs.G", "1"]) == 0
    shown = capsys.readouterr().out
    assert "4 ranks, 8 microbatches, ideal 41" in shown
    assert "…" not in shown
    rows = [line.split() for line in shown.splitlines() if line.split()[:1] and line.split()[0] in POLICIES]
    assert {(row[0], row[1]) for row in rows} == {(policy, backbone) for policy in POLICIES for backbone in BACKBONES}
    makespans = [float(row[4].rstrip("*")) for row in rows]
    assert makespans == sorted(makespans)
    assert [row[4].endswith("*") for row in rows] == [time == makespans[0] for time in makespans]
    for row, time in zip(rows, makespans, strict=True):
        assert float(row[5]) == pytest.approx(time / 41, abs=5e-4)


def test_says_what_cannot_be(capsys):
    command = [*SMALL, "--policies", "nested", "--backbones", "1f1b,zbv,gpipe", "--max_encoder_units", "2"]
    assert main([*command, "--group_size", "1", "--virtual_stages", "2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "nested zbv 2 1" in shown
    assert "no plan: nested on 1f1b (V=2), nested on gpipe (V=2): virtual_stages is 2; this backbone allows 1" in shown
    assert main([*command, "--max_encoder_units", "0.1", "--virtual_stages", "auto"]) == 0
    assert "no plan: all: rank 0: EF0 brings the live encoder units to 1; the limit is 0.1" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_writes_numbers(tmp_path, capsys, suffix):
    path = tmp_path / f"x.{suffix}"
    command = [*SMALL, "--backbones", "1f1b,zbv", "--memory.encoder_unit", "1KiB", "--memory.budget", "2KiB"]
    assert main([*command, "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: {2 * len(POLICIES)} rows\n"
    text = path.read_text()
    rows = json.loads(text) if suffix == "json" else list(csv.DictReader(text.splitlines()))
    over = {(row["policy"], row["backbone"]) for row in rows if row["problem"]}
    assert over == {("first_stage", "zbv"), ("disaggregated", "1f1b"), ("disaggregated", "zbv")}
    row = next(r for r in rows if (r["policy"], r["backbone"]) == ("nested", "zbv"))
    plan = make_plan(
        PlanRequest(backbone="zbv", virtual_stages=2, pipeline_parallel_size=2, microbatches=4, costs=Costs())
    )
    assert float(row["makespan"]) == plan.makespan
    assert float(row["ideal"]) == 21
    assert float(row["peak_encoder_units"]) == max(plan.peak["encoder_units"])
    assert float(row["peak_memory"]) == 1024 * max(plan.peak["encoder_units"])
    assert 0 <= float(row["bubble_share_min"]) <= float(row["bubble_share_max"]) < 1
    assert float(row["planning_seconds"]) > 0


def test_writes_a_page_of_the_fastest_plans(tmp_path, capsys):
    path = tmp_path / "x.html"
    command = [*SMALL, "--policies", "nested,filled,first_stage", "--backbones", "1f1b,interleaved_1f1b,zbv"]
    assert main([*command, "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 8 of 12 combinations\n"
    tracks = data_of(path)["tracks"]
    assert [track["makespan"] for track in tracks] == sorted(track["makespan"] for track in tracks)
    names = [track["name"] for track in tracks]
    assert len(set(names)) == 8
    assert {"filled on 1f1b", "filled on interleaved_1f1b (V=4)"} <= set(names)
    plan = make_plan(PlanRequest(policy="filled", pipeline_parallel_size=2, microbatches=4))
    track = tracks[names.index("filled on 1f1b")]
    assert [[action for action, _, _ in row] for row in track["ranks"]] == [list(map(str, row)) for row in plan.ranks]
    assert data_of(path)["note"] == "All timelines have one scale of time, in the unit of the costs."
    assert main([*SMALL, "--max_encoder_units", "0.1", "--output", str(path)]) == 2
    assert "no combination has a plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--pipeline_parallel_size is missing; expected an integer of at least 1"),
        ([*SMALL, "--policies", "nested,best"], "policy is 'best'; expected one of nested"),
        ([*SMALL, "--backbones", "best"], "backbone is 'best'; expected one of gpipe"),
        ([*SMALL, "--virtual_stages", "2,x"], "--virtual_stages has 'x'; expected auto, or integers"),
        ([*SMALL, "--output", "x.png"], "--output is 'x.png'; expected a name that ends with .json, .csv, .html"),
        ([*SMALL, "--memory.budget", "much"], "memory.budget is 'much'; expected bytes, or a size such as 16GiB"),
        ([*SMALL, "--group_size", "x"], "--group_size is x; expected int or auto"),
        (["--pipeline_parallel_size", "0", "--microbatches", "1"], "pipeline_parallel_size is 0; expected"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"bigmac compare: error: .*\n", shown.err)
    assert message in shown.err


def test_runs_without_torch():
    """In a process where the package's own __init__, which imports the framework, is left out."""
    code = (
        "import sys, types; package = types.ModuleType('bigmac_lightning'); "
        f"package.__path__ = [{str(PACKAGE)!r}]; sys.modules['bigmac_lightning'] = package; "
        "from bigmac_lightning.commands.compare import main; "
        f"assert main({SMALL!r}) == 0; "
        "assert not {'torch', 'lightning', 'transformers', 'diffusers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
