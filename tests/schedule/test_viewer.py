"""The page of timelines: its data are those of the plan, and a browser shows them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigmac_lightning.commands.plan import main
from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.draw import alive_curves, spans_of
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.verify import verify
from bigmac_lightning.schedule.viewer.page import executed_track, planned_track, write_page
from bigmac_lightning.schedule.workload import Workload
from tests.schedule.pages import BROWSER, data_of, opened

needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
WORKLOAD = '[{"llm": 1, "encoder": [2]}, {"llm": 2}, {"llm": 1, "encoder": [1, 3]}, {"llm": 3, "encoder": [1]}]'


def _plan(folder: Path, command: str) -> Plan:
    assert main([*command.split(), "--output", str(folder / "plan.json")]) == 0
    return Plan.load(folder / "plan.json")


@pytest.mark.parametrize(
    "command",
    [
        "--pipeline_parallel_size 2 --microbatches 4",
        "--pipeline_parallel_size 4 --microbatches 8 --policy filled --backbone zb1p --pieces 2 --costs.G 3",
        "--pipeline_parallel_size 2 --microbatches 4 --backbone zbv --costs.EF 0 --costs.EB 0",
        "--pipeline_parallel_size 2 --workload w.json --policy recompute",
    ],
)
def test_the_page_has_exactly_the_plan(tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.json").write_text(WORKLOAD)
    workload = Workload.from_json(WORKLOAD) if "w.json" in command else None
    plan = _plan(tmp_path, command)
    timeline = verify(plan, workload=workload)
    assert main([*command.split(), "--output", "page.html"]) == 0
    data = data_of(tmp_path / "page.html")
    (track,) = data["tracks"]
    assert track["ranks"] == [[[str(a), start, end] for a, start, end in row] for row in spans_of(plan, timeline)]
    curves = {curve["name"]: [[tuple(point) for point in row] for row in curve["ranks"]] for curve in track["curves"]}
    assert curves == alive_curves(plan, timeline, workload)
    assert track["makespan"] == timeline.makespan
    assert track["bubbles"] == pytest.approx(timeline.bubble_share, abs=1e-9)
    assert (track["ideal"], track["groups"], track["unit"]) == (plan.ideal, plan.groups, "")
    assert plan.backbone in data["title"]
    assert "unit of the plan's costs" in data["note"]


def test_texts_cannot_end_the_data(tmp_path: Path) -> None:
    title = "</script><script>document.title = 1</script><!--"
    plan = _plan(tmp_path, "--pipeline_parallel_size 2 --microbatches 4")
    write_page(tmp_path / "page.html", title, [planned_track(plan, verify(plan))])
    assert data_of(tmp_path / "page.html")["title"] == title


def _executed(plan: Plan, factor: float) -> Any:
    """The plan's spans, that many times as long, a little later."""
    rows = spans_of(plan, verify(plan))
    return [[(action, 7 + factor * start, 7 + factor * end) for action, start, end in row] for row in rows]


def test_an_executed_step_begins_at_its_first_action(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "--pipeline_parallel_size 2 --microbatches 4")
    executed = executed_track(_executed(plan, 0.25), plan.groups, [[(7.5, "llm", 2**20)], [(8, "encoder", 2**21)]])
    planned = planned_track(plan, verify(plan))
    for row, wanted in zip(executed.ranks, planned.ranks, strict=True):
        assert [(a, pytest.approx(4 * start), pytest.approx(4 * end)) for a, start, end in row] == wanted
    assert executed.curves == {"llm, MiB": [[(0.5, 1.0)], []], "encoder, MiB": [[], [(1.0, 2.0)]]}
    assert executed.makespan == pytest.approx(planned.makespan / 4)
    assert executed.bubble_share == pytest.approx(planned.bubble_share)


@pytest.mark.parametrize(("unit", "shared"), [("s", True), ("", False)])
def test_one_scale_of_time_only_if_the_plan_is_in_seconds(tmp_path: Path, unit: str, shared: bool) -> None:
    plan = _plan(tmp_path, "--pipeline_parallel_size 2 --microbatches 4")
    planned = planned_track(plan, verify(plan), seconds=unit == "s")
    write_page(tmp_path / "page.html", "both", [planned, executed_track(_executed(plan, 0.25), plan.groups)])
    data = data_of(tmp_path / "page.html")
    assert data["shared"] is shared
    assert ("have one scale of time" in data["note"]) == shared
    assert ("as wide as its own makespan" in data["note"]) != shared
    assert [track["unit"] for track in data["tracks"]] == [unit, "s"]


# -- in a browser


@needs_browser
def test_a_browser_draws_all_actions_of_a_large_plan(tmp_path: Path) -> None:
    command = "--pipeline_parallel_size 8 --microbatches 64 --backbone zb1p --costs.G 3 --memory.encoder_unit 1GiB"
    plan = _plan(tmp_path, command)
    assert main([*command.split(), "--output", str(tmp_path / "page.html")]) == 0
    root = opened(tmp_path / "page.html", "#action=EF1,rank=7")
    count = sum(len(row) for row in plan.ranks)
    assert root["data-total"] == root["data-spans"] == str(count)
    assert count > 1700
    group = ", ".join(map(str, plan.groups[1]))
    assert root["data-selected"].startswith(f"EF1 on rank 7; encoder forward of group 1 (microbatches {group}); ")


@needs_browser
@pytest.mark.parametrize("seconds", [True, False])
def test_an_action_has_its_planned_time_beside_the_executed_one(tmp_path: Path, seconds: bool) -> None:
    plan = _plan(tmp_path, "--pipeline_parallel_size 2 --microbatches 8 --policy filled --pieces 2")
    piece = next(action for action in plan.ranks[1] if action.pieces > 1)
    rows = _executed(plan, 0.25)
    tracks = [planned_track(plan, verify(plan), seconds=seconds), executed_track(rows, plan.groups)]
    write_page(tmp_path / "page.html", "both", tracks)
    root = opened(tmp_path / "page.html", f"#action={piece},rank=1")
    (planned,) = [span for span in tracks[0].ranks[1] if span[0] == piece]
    (executed,) = [span for span in tracks[1].ranks[1] if span[0] == piece]
    unit = " s" if seconds else ""
    for track, (_, start, end), suffix in (("planned", planned, unit), ("executed", executed, " s")):
        said = f"{track}: start {start:.5g}{suffix}, end {end:.5g}{suffix}, duration {end - start:.5g}{suffix}"
        assert said in root["data-selected"]
    assert f"piece {piece.piece + 1} of 2" in root["data-selected"]
    assert ("takes 0.25 times as long as planned" in root["data-selected"]) == seconds


@needs_browser
def test_two_plans_are_no_plan_and_its_execution(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "--pipeline_parallel_size 2 --microbatches 4")
    tracks = [planned_track(plan, verify(plan), name=name) for name in ("one", "other")]
    write_page(tmp_path / "page.html", "both", tracks)
    said = opened(tmp_path / "page.html", "#action=EF0,rank=1")["data-selected"]
    assert said.endswith("; one: start 0, end 1, duration 1; other: start 0, end 1, duration 1")


USE = """
const box = canvas.getBoundingClientRect(), panel = panels[0], seen = {};
const at = (time, rank) => ({ clientX: box.left + toX(time / tracks[0].length), bubbles: true, cancelable: true,
  clientY: box.top + panel.top + (rank + .5) * rowHeight, pointerId: 1, button: 0 });
const send = (kind, type, place) => { chart.dispatchEvent(new kind(type, place)); draw(); };
const press = (key, shiftKey = false) => send(KeyboardEvent, "keydown", { key, shiftKey });
send(PointerEvent, "pointermove", at(0.5, 1));
seen.hovered = tip.hidden ? "" : tip.textContent;
const bubble = tracks[0].spans[0].find((span, i, row) => i && span.start > row[i - 1].end).start - 0.1;
send(PointerEvent, "pointermove", at(bubble, 0));
seen.bubble = tip.hidden;
send(PointerEvent, "pointerleave", {});
seen.left = tip.hidden;
send(WheelEvent, "wheel", { ...at(4, 0), deltaY: -500 });
seen.zoomed = [from, to, toShare(at(4, 0).clientX - box.left) * tracks[0].length, drawn];
const start = from;
press("ArrowRight"); seen.right = from > start && to <= 1;
press("ArrowLeft"); seen.back = Math.abs(from - start) < 1e-9;
press("+"); seen.plus = to - from < seen.zoomed[1] - seen.zoomed[0];
press("0"); seen.whole = [from, to];
press("ArrowRight", true); seen.first = root.dataset.selected.split(";")[0];
press("ArrowRight", true); seen.second = root.dataset.selected.split(";")[0];
press("ArrowDown", true); seen.below = root.dataset.selected.split(";")[0];
seen.said = byId("said").textContent === root.dataset.selected;
press("Escape"); seen.none = root.dataset.selected;
press("+"); press("+");
const before = from, grabbed = tracks[0].spans[0].find((span) => span.start / tracks[0].length > from).start + 0.1;
send(PointerEvent, "pointerdown", at(grabbed, 0));
send(PointerEvent, "pointermove", at(grabbed - 1, 0));
send(PointerEvent, "pointerup", at(grabbed, 0));
seen.dragged = (from - before) * tracks[0].length;
seen.dragging = root.dataset.selected;
press("0");
send(PointerEvent, "pointerdown", at(0.5, 1));
send(PointerEvent, "pointerup", at(0.5, 1));
seen.clicked = [root.dataset.selected.split(";")[0], location.hash];
chart.setPointerCapture = () => {};  // as these fingers do not exist
const finger = (pointerId, time) => ({ ...at(time, 0), pointerId, pointerType: "touch" });
send(PointerEvent, "pointerdown", finger(5, 4));
send(PointerEvent, "pointerdown", finger(6, 6));
send(PointerEvent, "pointermove", finger(6, 8));
seen.pinched = to - from;
seen.rows = document.querySelectorAll("#table tbody tr").length;
seen.label = chart.getAttribute("aria-label");
root.dataset.seen = JSON.stringify(seen);
"""


@needs_browser
def test_mouse_and_keys(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert main([*["--pipeline_parallel_size", "2", "--microbatches", "4", "--output"], str(path)]) == 0
    (track,) = data_of(path)["tracks"]
    first, second = track["ranks"][0][:2]
    seen = json.loads(opened(path, then=USE)["data-seen"])
    assert seen["hovered"].startswith("EF0 on rank 1encoder forward of group 0 (microbatches 0, 1)")
    assert "planned011" in seen["hovered"], "start, end and duration"
    assert seen["bubble"], "nothing is shown in a bubble"
    assert seen["left"], "nothing is shown once the mouse has left"
    begin, end, fixed, drawn = seen["zoomed"]
    assert 0 < begin < end < 1
    assert fixed == pytest.approx(4), "what is at the mouse stays there"
    visible = (begin * track["makespan"], end * track["makespan"])
    assert drawn == sum(a[2] >= visible[0] and a[1] <= visible[1] for row in track["ranks"] for a in row), "no others"
    assert all(seen[name] for name in ("right", "back", "plus", "said"))
    assert seen["whole"] == [0, 1]
    assert [seen["first"], seen["second"]] == [f"{first[0]} on rank 0", f"{second[0]} on rank 0"]
    assert seen["below"].endswith(" on rank 1")
    assert seen["none"] == ""
    assert seen["dragged"] == pytest.approx(1), "what is under the mouse moves with it"
    assert seen["dragging"] == "", "a drag is no click"
    assert seen["clicked"] == ["EF0 on rank 1", "#action=EF0,rank=1"]
    assert seen["pinched"] == pytest.approx(0.5), "fingers twice as far apart"
    assert seen["rows"] == 2
    assert "Timelines of 2 ranks" in seen["label"]


@needs_browser
def test_odd_pages_have_no_errors(tmp_path: Path) -> None:
    path, title = tmp_path / "page.html", "<b>&amp;</b></script>"
    alone = executed_track([[(Action("F", 0, 0), 1e-6, 3e-6), (Action("F", 1, 0), 3e-6, 3e-6)], []], [])
    write_page(path, title, [alone, executed_track([[], []], []), replace(alone, ranks=[[]])])
    root = opened(path, "#action=9F9,rank=12", then="root.dataset.title = byId('title').textContent")
    assert root["data-title"] == title
    assert root["data-total"] == "2"
    assert "data-selected" not in root or root["data-selected"] == ""
