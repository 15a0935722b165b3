"""PipelineMonitor's numbers and its trace of a step, against times, bytes and losses that are measured without it."""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from bigmac_lightning.callbacks import PipelineMonitor, pipeline_monitor
from bigmac_lightning.callbacks.pipeline_monitor import _idle
from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.contracts.outputs import StageOutput
from bigmac_lightning.estimates.flops import TrainingFlops
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.training.measuring import Busy
from tests.schedule.pages import data_of
from tests.test_estimates import batch, built
from tests.toy import ToyData, ToyModule, toy_batch
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

STEPS, EVERY, TRACED = 6, 2, 3  # steps, steps between logs, and the recorded step
SIZE, MICROBATCHES = 2, 4
SCHEDULES: dict[str, dict[str, Any]] = {
    "nested": {},
    "upfront": {"policy": "upfront", "backbone": "gpipe"},
}


class _Logger(Logger):
    """Collects what is logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    name = "collected"  # type: ignore[assignment]
    version = 0  # type: ignore[assignment]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.logged.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class _Clock(pl.Callback):
    """Records the time of each hook, once before the monitor's hooks run and once after them."""

    def __init__(self) -> None:
        self.started: list[float] = []
        self.ended: list[float] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started.append(time.perf_counter())

    def on_train_batch_start(self, *_: Any) -> None:
        self.started.append(time.perf_counter())

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended.append(time.perf_counter())


class _Timed(ToyModule):
    """Records when each stage's forward ran, by step and action; every forward takes two milliseconds at least."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, tuple[float, float]]] = []
        self.plans: list[str] = []
        self.numbers: dict[int, int] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.calls.append({})
        self.numbers = {id(m.labels): i for i, m in enumerate(batch.microbatches)}
        loss = super().training_step(batch, batch_idx)
        self.plans.append(self.trainer.strategy.runner.last_plan.to_json())
        return loss

    def run_stage(self, microbatch: Any, layers: range, *args: Any) -> StageOutput:
        start = time.perf_counter()
        time.sleep(0.002)
        out = super().run_stage(microbatch, layers, *args)
        stage = layers.start * SIZE // self.llm.num_layers
        self.calls[-1][f"{stage}F{self.numbers[id(microbatch.labels)]}"] = start, time.perf_counter()
        return out


def _fit(rank: int, folder: Path, strategy: dict[str, Any]) -> dict[str, Any]:
    before, after, logger, module = _Clock(), _Clock(), _Logger(), _Timed()
    monitor = PipelineMonitor(trace_step=TRACED, dirpath=str(folder))
    callbacks = [before, monitor, after]
    options = {"max_epochs": 1, "callbacks": callbacks, "logger": logger, "log_every_n_steps": EVERY}
    trainer = pipeline_trainer(SIZE, strategy, limit_val_batches=0, **options)
    trainer.fit(module, ToyData(MICROBATCHES, steps=STEPS))
    return {
        "logged": logger.logged,
        "clocks": (before, after),
        "calls": module.calls,
        "plans": module.plans,
        "artifacts": [path.name for path in monitor.artifacts],
    }


@pytest.fixture(scope="module", params=SCHEDULES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, request.param, on_ranks(SIZE, _fit, folder, SCHEDULES[request.param])


def _batch(step: int, rank: int, size: int = SIZE) -> Batch:
    layout = PipelineLayout(size, rank, group_size=size)
    return toy_batch(MICROBATCHES, layout, seed=step)


# -- numbers


def test_throughput_and_losses(runs: Any) -> None:
    """Samples and tokens of the steps since the last log, over a time between two that were taken around it."""
    _, _, (run, _) = runs
    before, after = run["clocks"]
    assert sorted(run["logged"]) == [step for step in range(STEPS) if (step + 1) % EVERY == 0]
    plain, reference = ToyModule(), _Logger()
    plain_trainer(max_epochs=1, logger=reference, log_every_n_steps=1, limit_val_batches=0).fit(
        plain, ToyData(MICROBATCHES, steps=STEPS)
    )
    for step, logged in run["logged"].items():
        window = [_batch(s, 0) for s in range(step + 1 - EVERY, step + 1)]
        samples = sum(len(m.inputs["input_ids"]) for batch in window for m in batch.microbatches)
        tokens = sum(m.inputs["input_ids"].numel() for batch in window for m in batch.microbatches)
        rates = logged["throughput/samples_per_second"], logged["throughput/tokens_per_second"]
        assert rates[1] / rates[0] == pytest.approx(tokens / samples, rel=1e-6)
        seconds = samples / rates[0]
        # hooks of fit start and of batch starts are in `started`, so the window's first time is that of its last log
        first = (before.ended[step - EVERY], after.ended[step - EVERY]) if step >= EVERY else None
        first = first or (before.started[0], after.started[0])
        assert before.ended[step] - first[1] <= seconds * (1 + 1e-5)
        assert seconds * (1 - 1e-5) <= after.ended[step] - first[0]
        for name in plain.loss_names:
            expected = reference.logged[step][f"train/{name}"]
            assert logged[f"loss_parts/{name}"] == pytest.approx(expected, rel=1e-5)


def _saved(module: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of the storages that autograd saves in a forward, without parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = tensor  # holding it keeps its address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del out
    return total


def _stage_bytes(module: ToyModule, step: int) -> list[list[int]]:
    """Saved bytes of each stage on each microbatch, every forward run by itself."""
    layers, found = module.llm.num_layers // SIZE, [[0] * MICROBATCHES for _ in range(SIZE)]
    for m, microbatch in enumerate(_batch(step, 0, 1).microbatches):
        features = torch.cat(module.encode(microbatch.media)).detach().requires_grad_() if microbatch.media else None
        hidden = None
        for stage in range(SIZE):
            of_stage = range(stage * layers, (stage + 1) * layers)
            forward = partial(module.run_stage, microbatch, of_stage, hidden, {}, features, "train")
            found[stage][m] = _saved(module, forward)
            out = forward().hidden
            hidden = None if out is None else out.detach().requires_grad_()
    return found


def _most_alive(actions: Sequence[str], rank: int, sizes: Sequence[int]) -> int:
    """The peak of what a rank holds, by its list of actions: from a microbatch's forward to its backward."""
    alive = most = 0
    for action in actions:
        for kind, sign in ((f"{rank}F", 1), (f"{rank}B", -1)):
            if action.startswith(kind):
                alive += sign * sizes[int(action.removeprefix(kind))]
        most = max(most, alive)
    return most


def _encoder_bytes(module: ToyModule, batch: Batch, groups: Sequence[Sequence[int]], rank: int) -> int:
    """Saved bytes of a rank's media items, encoded group by group."""
    total = 0
    for group in groups:
        items = [item for m in group for item in batch.microbatches[m].media if item.owner == rank]
        total += _saved(module, partial(module.encode, items)) if items else 0
    return total


def test_peak_bytes(runs: Any) -> None:
    """The LLM's, by the bytes of each forward alone and the plan's order; the encoders', where all live at once."""
    _, policy, (run, _) = runs
    module = ToyModule()
    module.configure_model()
    plans = [Plan.from_json(text) for text in run["plans"]]
    for step, logged in run["logged"].items():
        window = range(step + 1 - EVERY, step + 1)
        bytes_of = {s: _stage_bytes(module, s) for s in window}
        for rank in range(SIZE):
            peaks = [_most_alive([*map(str, plans[s].ranks[rank])], rank, bytes_of[s][rank]) for s in window]
            assert logged[f"memory/llm/rank{rank}"] == pytest.approx(max(peaks), rel=0.01)
            if policy == "upfront":
                held = [_encoder_bytes(module, _batch(s, rank), plans[s].groups, rank) for s in window]
                assert logged[f"memory/encoder/rank{rank}"] == pytest.approx(max(held), rel=0.01)
            assert logged[f"memory/generator/rank{rank}"] > 0


def test_peak_bytes_that_plans_expect(runs: Any) -> None:
    """Nothing is expected before something was measured. Then bytes are those of the rows that plans keep alive."""
    _, policy, (run, _) = runs
    (_, first), *later = sorted(run["logged"].items())
    assert not [name for name in first if name.endswith("/plan") and name.startswith("memory/")]
    for _, logged in later:
        for rank in range(SIZE):
            for name, tolerance in (("llm", 0.15), ("encoder", 0.2 if policy == "upfront" else 0.5)):
                measured = logged[f"memory/{name}/rank{rank}"]
                assert logged[f"memory/{name}/rank{rank}/plan"] == pytest.approx(measured, rel=tolerance)
            assert logged[f"memory/generator/rank{rank}/plan"] > 0


def test_idle_time(runs: Any) -> None:
    """Measured once times are, beside what plans say."""
    _, _, (run, _) = runs
    (_, first), *later = sorted(run["logged"].items())
    assert "bubble_share/batch" not in first, "the first two batches are not timed"
    assert all(0 < logged["bubble_share/plan"] < 0.5 for logged in (first, *(logged for _, logged in later)))
    assert all(0 < logged["bubble_share/batch"] < 0.8 for _, logged in later)


def test_the_gradient_norm_and_the_time_that_data_take(runs: Any) -> None:
    _, _, (run, _) = runs
    for logged in run["logged"].values():
        assert logged["gradient_norm"] > 0
        assert 0 < logged["time/data"] < logged["time/batch"]


def test_idle_time_of_ranks() -> None:
    """From the first action of any rank to the last one: 9 s, of which one rank has worked 6 s and the other 3 s."""
    found = _idle([Busy(seconds=6.0, begin=1.0, end=8.0), Busy(seconds=3.0, begin=2.0, end=10.0)])
    assert found == {"bubble_share/batch": pytest.approx(0.5)}
    assert _idle([Busy(), Busy()]) == {}


# -- the trace of a step


def test_trace_of_a_step(runs: Any) -> None:
    """Each rank's actions in the order of its plan, one after another, around the forwards that the module has seen;
    and no action before those of other ranks that it waits for."""
    folder, _, ranks = runs
    plan = Plan.from_json(ranks[0]["plans"][TRACED])
    assert ranks[0]["artifacts"] == ["trace.json", "timeline.html", "timeline.png"]
    assert ranks[1]["artifacts"] == []
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {rank: f"rank {rank}" for rank in range(SIZE)}
    spans: dict[str, tuple[float, float]] = {}
    for rank, run in enumerate(ranks):
        own = [event for event in events if event["ph"] == "X" and event["tid"] == rank]
        assert [event["name"] for event in own] == [str(action) for action in plan.ranks[rank]]
        assert all(event["dur"] > 0 for event in own)
        assert own[0]["ts"] >= 0
        assert all(b["ts"] >= a["ts"] + a["dur"] - 1e-3 for a, b in pairwise(own)), "actions overlap"
        for event in own:
            assert event["cat"] == event["name"].strip("0123456789")
        seconds = {event["name"]: (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6) for event in own}
        calls = run["calls"][TRACED]
        assert calls.keys() == {name for name in seconds if "F" in name and not name.startswith("E")}
        # The trace's origin is unknown, but a span lies around its forward: that bounds it from both sides.
        latest = min(calls[name][0] - seconds[name][0] for name in calls)
        earliest = max(calls[name][1] - seconds[name][1] for name in calls)
        assert earliest <= latest
        assert earliest > max(end for _, end in run["calls"][TRACED - 1].values())
        assert latest - earliest < 0.002, "spans are longer than the forwards that they stand for"
        spans |= {f"{name} on {rank}" if name[0] in "EG" else name: (start + latest, end + earliest)
                  for name, (start, end) in seconds.items()}  # fmt: skip

    def check(first: str, then: str) -> None:
        assert spans[first][1] <= spans[then][0], f"{then} began before {first} had ended"

    for m in range(MICROBATCHES):
        check(f"0F{m}", f"1F{m}")
        check(f"1F{m}", f"1B{m}")
        check(f"1B{m}", f"0B{m}")
    for g, group in enumerate(plan.groups):
        for rank in range(SIZE):
            if f"EF{g} on {rank}" in spans:
                check(f"EF{g} on {rank}", f"0F{group[0]}")
                check(f"0B{group[-1]}", f"EB{g} on {rank}")
            if f"G{g} on {rank}" in spans:
                check(f"1F{group[-1]}", f"G{g} on {rank}")
                check(f"G{g} on {rank}", f"1B{group[0]}")


def test_arrows_and_counters_of_a_trace(runs: Any) -> None:
    """An arrow for every message between the ranks, within both actions; and the bytes that the page's curves show."""
    folder, _, ranks = runs
    plan = Plan.from_json(ranks[0]["plans"][TRACED])
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = {}
    for event in events:
        if event["ph"] in "sf":
            (around,) = [
                e["name"]
                for e in events
                if (e["ph"], e["tid"] if e["ph"] == "X" else None) == ("X", event["tid"])
                and e["ts"] <= event["ts"] <= e["ts"] + e["dur"]
            ]
            names.setdefault(event["id"], {})[event["ph"]] = around, event["tid"]
    found = {(*arrow["s"], *arrow["f"]) for arrow in names.values()}
    expected = {(f"0F{m}", 0, f"1F{m}", 1) for m in range(MICROBATCHES)}
    expected |= {(f"1B{m}", 1, f"0B{m}", 0) for m in range(MICROBATCHES)}
    for g, group in enumerate(plan.groups):
        actions = [
            [a for a in map(str, plan.ranks[rank]) if a in (f"EF{g}", f"EB{g}", f"G{g}")] for rank in range(SIZE)
        ]
        expected |= {(f"EF{g}", 1, f"0F{group[0]}", 0)} if f"EF{g}" in actions[1] else set()
        expected |= {(f"0B{group[-1]}", 0, f"EB{g}", 1)} if f"EB{g}" in actions[1] else set()
        expected |= (
            {(f"1F{group[-1]}", 1, f"G{g}", 0), (f"G{g}", 0, f"1B{group[0]}", 1)} if f"G{g}" in actions[0] else set()
        )
    assert found == expected
    counters = [event for event in events if event["ph"] == "C"]
    assert {event["name"] for event in counters} == {
        f"rank {rank}: {name}, MiB of activations" for rank in range(SIZE) for name in ("encoder", "llm", "generator")
    }
    curves = {curve["name"]: curve["ranks"] for curve in data_of(folder / "timeline.html")["tracks"][1]["curves"]}
    for rank, points in enumerate(curves["llm, MiB"]):
        own = [e["args"]["MiB"] for e in counters if e["name"].startswith(f"rank {rank}: llm")]
        assert own == pytest.approx([size for _, size in points])


def _record(rank: int, folder: Path) -> list[tuple[int, tuple[int, ...]]]:
    logger = TensorBoardLogger(folder, name="")
    monitor = PipelineMonitor(memory=False, trace_step=1, trace_every=2)
    options: dict[str, Any] = {"max_epochs": 1, "callbacks": [monitor], "logger": logger, "limit_val_batches": 0}
    pipeline_trainer(SIZE, **options).fit(ToyModule(), ToyData(MICROBATCHES, steps=STEPS))
    if rank:
        return []
    events = EventAccumulator(logger.log_dir, {"images": 0}).Reload()
    return [(image.step, (image.height, image.width)) for image in events.Images("timeline")]


def test_pictures_in_tensorboard(tmp_path: Path) -> None:
    found, _ = on_ranks(SIZE, _record, tmp_path)
    assert [step for step, _ in found] == [2, 4, 6]  # recorded from the first batch after step 1, 3 and 5
    assert all(min(size) > 100 for _, size in found)


def test_operations_per_second_and_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations that the components estimate of each batch, in the same time as the samples, and as a fraction of
    what the device could compute."""
    monkeypatch.setattr(pipeline_monitor, "get_available_flops", lambda *_: 1e9)
    module, given, logger = built(), batch(PipelineLayout(), 2), _Logger()
    options: dict[str, Any] = {"callbacks": [PipelineMonitor()], "logger": logger, "log_every_n_steps": 1}
    trainer = plain_trainer(max_steps=3, limit_val_batches=0, **options)
    batches: Any = DataLoader([given] * 3, batch_size=None)  # pyright: ignore[reportArgumentType]
    trainer.fit(module, batches, batches)
    assert len(logger.logged) == 3
    for values in logger.logged.values():
        batches = values["throughput/samples_per_second"] / given.samples
        assert values["throughput/tflops_per_rank"] * 1e12 == pytest.approx(TrainingFlops(module).of(given) * batches)
        assert values["throughput/mfu"] == pytest.approx(values["throughput/tflops_per_rank"] * 1e3)


def test_recording_again_needs_a_first_record() -> None:
    with pytest.raises(ValueError, match="needs at least 1, and a trace_step"):
        PipelineMonitor(trace_step=None, trace_every=10)


def test_page_of_a_step(runs: Any) -> None:
    """The plan of the traced batch above the spans of the trace."""
    folder, _, ranks = runs
    plan, data = Plan.from_json(ranks[0]["plans"][TRACED]), data_of(folder / "timeline.html")
    planned, executed = data["tracks"]
    assert data["title"] == f"step {TRACED + 1}: planned and executed"
    assert not data["shared"]
    assert [[text for text, *_ in row] for row in planned["ranks"]] == [[*map(str, row)] for row in plan.ranks]
    assert planned["makespan"] == pytest.approx(plan.makespan)
    assert (planned["ideal"], planned["groups"]) == (pytest.approx(plan.ideal), plan.groups)
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    begin = min(event["ts"] for event in events if event["ph"] == "X")
    for rank, row in enumerate(executed["ranks"]):
        traced = [event for event in events if event["ph"] == "X" and event["tid"] == rank]
        times = [(e["name"], e["ts"] - begin, e["ts"] - begin + e["dur"]) for e in traced]
        assert [text for text, *_ in row] == [text for text, *_ in times]
        for (_, *found), (_, *wanted) in zip(row, times, strict=True):
            assert [time * 1e6 for time in found] == pytest.approx(wanted, abs=1e-3)
    curves = {curve["name"]: curve["ranks"] for curve in executed["curves"]}
    assert curves.keys() == {"encoder, MiB", "llm, MiB", "generator, MiB"}
    for name, rows in curves.items():
        for rank, points in enumerate(rows):
            peak = max(size for _, size in points) * 2**20
            logged = ranks[0]["logged"][TRACED][f"memory/{name.removesuffix(', MiB')}/rank{rank}"]
            assert 0 < peak <= logged * (1 + 1e-6)
            assert all(0 <= time <= executed["makespan"] + 1 for time, _ in points)
