"""`bigmac plan`: what it shows and writes, its exit codes, and what it may import."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

import bigmac_lightning
from bigmac_lightning.commands.plan import main
from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.draw import measured_picture
from bigmac_lightning.schedule.plan import Plan

PACKAGE = Path(bigmac_lightning.__file__).parent
SMALL = ["--pipeline_parallel_size", "2", "--microbatches", "4"]


def test_shows_a_table_and_a_timeline(capsys):
    command = (
        "--pipeline_parallel_size 4 --microbatches 16 --backbone 1f1b --group_size 4 --policy nested "
        "--costs.F 1 --costs.B 2 --costs.EF 1 --costs.EB 2 --costs.G 0"
    )
    assert main(command.split()) == 0
    shown = capsys.readouterr().out
    assert "makespan 69, ideal 69, ratio 1.0000, bubbles 13.0%" in shown
    assert "rank 3 EF0" in shown
    for text in ("EF0", "0F0", "EB3", "0B15", "3F15"):
        assert text in shown


def test_tells_the_bound_and_the_memory(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    command = ["--pipeline_parallel_size", "4", "--microbatches", "16", "--memory.encoder_unit", "1GiB"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "lower bound 66; at most 4.5% above the optimum" in shown
    assert re.search(r"3 │ +40 │ +9 │ +13.0% │ +2 │ +1 │ +2 GiB │", shown)
    assert main([*command, "--policy", "filled"]) == 0
    assert "lower bound 66; this is the optimum" in capsys.readouterr().out


def test_auto_says_why(tmp_path, capsys):
    path = tmp_path / "plan.json"
    command = ["--pipeline_parallel_size", "4", "--microbatches", "16", "--backbone", "auto", "--group_size", "auto"]
    assert main([*command, "--max_encoder_units", "2", "--output", str(path)]) == 0
    shown = capsys.readouterr().out
    plan = Plan.load(path)
    assert shown.startswith(f"chosen for policy nested: {plan.backbone}")
    assert f"{path}: makespan {plan.makespan:g}" in shown
    assert "refused: " in shown
    assert main(["--plan", str(path), "--max_encoder_units", "2"]) == 0
    assert main([*command, "--layers", "4", "--output", str(path)]) == 0
    assert Plan.load(path).virtual_stages == 1


def test_pictures_have_curves_of_what_is_alive(tmp_path):
    path = tmp_path / "x.svg"
    assert main([*SMALL, "--memory.encoder_unit", "1GiB", "--output", str(path)]) == 0
    text = path.read_text()
    for name in ("encoder units", "LLM microbatches", "memory, GiB", "bubbles", "1.000 of the ideal", "rank 1"):
        assert f"<!-- {name}" in text or name in text, name


def test_writes_a_plan_that_it_can_read(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert main([*SMALL, "--costs.G", "3", "--output", str(path)]) == 0
    assert Plan.load(path).costs.G == 3
    assert main(["--plan", str(path)]) == 0
    assert "nested on 1f1b" in capsys.readouterr().out


def test_fills_bubbles_on_a_zero_bubble_backbone(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert main([*SMALL, "--policy", "filled", "--backbone", "zb1p", "--output", str(path)]) == 0
    assert main(["--plan", str(path), "--max_encoder_units", "2"]) == 0
    assert "filled on zb1p" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "magic"), [("x.png", b"\x89PNG"), ("x.svg", b"<?xml"), ("x.pdf", b"%PDF")])
def test_writes_pictures(tmp_path, name, magic):
    assert main([*SMALL, "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_pictures_of_measured_spans_with_memory(tmp_path):
    spans = [[(Action("EF", 0), 10.0, 10.5), (Action("F", 0, 0), 10.5, 11.0)], [(Action("F", 0, 1), 11.1, 11.6)]]
    memory = [[(10.4, "encoder", 2**20), (10.9, "llm", 2**21)], [(11.5, "llm", 2**20)]]
    measured_picture(spans, tmp_path / "m.svg", title="step 5", memory=memory)
    text = (tmp_path / "m.svg").read_text()
    assert "step 5" in text
    assert "encoder, MiB" in text
    measured_picture([[], []], tmp_path / "empty.png")


def test_takes_a_workload(tmp_path, capsys):
    path = tmp_path / "w.json"
    path.write_text(json.dumps([{"llm": 1 + m, "encoder": [1.0] * m} for m in range(4)]))
    assert main(["--pipeline_parallel_size", "2", "--workload", str(path), "--output", str(tmp_path / "p.json")]) == 0
    plan = Plan.load(tmp_path / "p.json")
    assert plan.microbatches == 4
    assert plan.makespan > Plan.load(_saved(tmp_path, SMALL)).makespan


def test_refuses_an_edited_plan(tmp_path, capsys):
    path = _saved(tmp_path, SMALL)
    path.write_text(path.read_text().replace('"1F0", "1B0"', '"1B0", "1F0"'))
    assert main(["--plan", str(path)]) == 2
    assert capsys.readouterr().err == "bigmac plan: error: rank 1: 1B0 is placed before 1F0, which it needs\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--pipeline_parallel_size is missing; expected an integer of at least 1 (or --plan FILE)"),
        (["--pipeline_parallel_size", "2"], "--microbatches is missing"),
        ([*SMALL, "--group_size", "x"], "--group_size is x; expected int or auto"),
        ([*SMALL, "--memory.static", "much"], "memory.static is 'much'; expected bytes, or a size such as 16GiB"),
        ([*SMALL, "--memory.budget", "1KiB", "--memory.encoder_unit", "600B"], "EF1 brings the memory to 1.172 KiB"),
        ([*SMALL, "--extra_in_flight", "-1"], "extra_in_flight is -1; expected an integer of at least 0"),
        (["--pipeline_parallel_size", "two"], "--pipeline_parallel_size is two; expected int"),
        (["--costs.F", "x"], "--costs.F is x; expected float"),
        ([*SMALL, "--costs.EF", "-1"], "costs.EF is -1.0; expected a finite number of at least 0"),
        ([*SMALL, "--policy", "best"], "policy is 'best'; expected one of nested, upfront, first_stage"),
        ([*SMALL, "--backbone", "best"], "backbone is 'best'; expected one of gpipe, 1f1b"),
        ([*SMALL, "--colour", "red"], "unrecognized arguments: --colour red"),
        (
            [*SMALL, "--output", "x.txt"],
            "--output is 'x.txt'; expected a name that ends with .json, .html, .png, .svg, .pdf",
        ),
        ([*SMALL, "--output", "/nowhere/x.json"], "/nowhere/x.json"),
        ([*SMALL, "--workload", "/nowhere/w.json"], "/nowhere/w.json: cannot be read: No such file or directory"),
        ([*SMALL, "--max_encoder_units", "1"], "rank 0: EF1 brings the live encoder units to 2; the limit is 1"),
        ([*SMALL, "--plan", "p.json"], "everything from its file; leave out --pipeline_parallel_size, --microbatches"),
        (["--plan", "p.json", "--policy", "filled", "--costs.EF", "3"], "leave out --policy, --costs"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"bigmac plan: error: .*\n", shown.err)
    assert message in shown.err


def test_imports_nothing_heavy():
    allowed = {*sys.stdlib_module_names, "rich", "jsonargparse", "matplotlib"}
    pure = ("bigmac_lightning.schedule", "bigmac_lightning.commands.answer", "bigmac_lightning.commands.request")
    pure += ("bigmac_lightning.whole_tables",)
    commands = [PACKAGE / "commands" / f"{name}.py" for name in ("plan", "compare", "answer", "request")]
    for path in [*(PACKAGE / "schedule").rglob("*.py"), PACKAGE / "whole_tables.py", *commands]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed or name.startswith(pure), (path, name)


def _saved(folder: Path, arguments: list[str]) -> Path:
    path = folder / "saved.json"
    assert main([*arguments, "--output", str(path)]) == 0
    return path
