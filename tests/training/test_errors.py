"""Bad input: a clear error before training, on all ranks, with nothing hanging; a lost rank ends the run on all."""

import contextlib
import io
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import unittest
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from benchmarks.faults import Row
from benchmarks.faults import run as run_row
from bigmac_lightning import Batch, PipelineLayout, ScheduleOptions
from bigmac_lightning.contracts.batch import Origin
from bigmac_lightning.schedule.budget import MemoryBudget
from tests.toy import VOCABULARY, ToyData, ToyModule
from tests.training.trainers import on_ranks, pipeline_trainer, strategy_of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "2f2b"}, "backbone is '2f2b'; expected one of gpipe, 1f1b, .* or a .csv or .json file"),
        ({"policy": "magic"}, "policy is 'magic'; expected one of nested, upfront, first_stage"),
        ({"virtual_stages": 2}, "virtual_stages is 2; this backbone allows 1"),
        ({"group_size": 0}, "group_size is 0; expected an integer of at least 1"),
        ({"pieces": "auto"}, "pieces is 'auto'; expected an integer of at least 1"),
        ({"partition": "fair"}, "partition is 'fair'; expected"),
        ({"factors": "guess"}, "factors is 'guess'; expected"),
        ({"sample_tokens": -1}, "sample_tokens is -1; expected"),
        ({"microbatches": 0}, "microbatches=0 must be an integer of at least 1"),
        ({"microbatches": "auto"}, "microbatches='auto' must be an integer of at least 1"),
        ({"pipeline_parallel_size": "all"}, "pipeline_parallel_size='all' must be"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy_of(**arguments)


class _Foreign(pl.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None: ...

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.zeros(1)])


class _ScalesLoss(ToyModule):
    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return 2 * self.pipeline(batch).loss


class _ReturnsNothing(ToyModule):
    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        self.pipeline(batch)


class _Twice(ToyModule):
    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.pipeline(batch)
        return self.pipeline(batch).loss


class _Tensors(ToyData):
    def collate(self, indices: list[int]) -> Any:
        return torch.zeros(2)


class _OtherLayout(ToyData):
    @property
    def layout(self) -> PipelineLayout:
        return PipelineLayout(size=5)


class _MissingData(ToyData):
    def collate(self, indices: list[int]) -> Batch:
        batch = super().collate(indices)
        for microbatch in batch.microbatches:
            for item in microbatch.media:
                item.data = None
        return batch


class _Costs(ToyData):
    def collate(self, indices: list[int]) -> Batch:
        batch = super().collate(indices)
        for item in batch.microbatches[1].media:
            item.cost = float("nan")
        return batch


class _NegativeCost(ToyData):
    def collate(self, indices: list[int]) -> Batch:
        batch = super().collate(indices)
        batch.microbatches[2].llm_cost = -1.0
        return batch


class _OtherTokenizer(ToyData):
    def collate(self, indices: list[int]) -> Batch:
        batch = super().collate(indices)
        batch.microbatches[1].inputs["input_ids"][0, 3] = 31_999
        return batch


class _Vocabulary(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.llm.vocabulary = VOCABULARY


class _UnknownEncoder(ToyData):
    def collate(self, indices: list[int]) -> Batch:
        batch = super().collate(indices)
        for item in batch.microbatches[1].media:
            item.encoder = "smell"
        return batch


def _fit_wrong(rank: int, strategy: dict[str, Any], module: pl.LightningModule, data: pl.LightningDataModule) -> str:
    trainer = pipeline_trainer(2, strategy, max_epochs=1)
    try:
        trainer.fit(module, data)
    except (ValueError, TypeError, FileNotFoundError) as error:
        return f"{type(error).__name__}: {error} {trainer.global_step}"
    return "no error"


@pytest.mark.parametrize(
    ("strategy", "module", "data", "message"),
    [
        (
            {"pipeline_parallel_size": 3},
            ToyModule,
            ToyData,
            "2 processes cannot form pipelines: pipeline_parallel_size=3",
        ),
        ({"data_parallel_size": 3}, ToyModule, ToyData, "data_parallel_size=3 must be 2"),
        ({"policy": "disaggregated"}, ToyModule, ToyData, "is 2; policy disaggregated expects at least 3, as encoder"),
        ({}, lambda: ToyModule(layers=1), ToyData, "the LLM has 1 layers, too few for 2 pipeline stages"),
        ({}, _Foreign, ToyData, "_Foreign is none: derive it from PipelineModule"),
        ({"microbatches": 4}, ToyModule, ToyData, "microbatches=4, but the batch has 3"),
        (
            {"max_encoder_units": 0.5},
            ToyModule,
            ToyData,
            "rank 0: EF0 brings the live encoder units to",
        ),
        (
            {"memory": MemoryBudget("1GiB", encoder_unit="2GiB")},
            ToyModule,
            ToyData,
            "the budget is 1 GiB: use a smaller group_size",
        ),
        (
            {"backbone": "auto", "max_llm_microbatches": 0.1},
            ToyModule,
            ToyData,
            "backbone 'auto' and policy 'nested' give no plan that is possible:\n  gpipe, group_size 2: rank 0: 0F0",
        ),
        ({}, _ScalesLoss, ToyData, "_ScalesLoss.training_step must return the loss of self.pipeline"),
        ({}, _ReturnsNothing, ToyData, "_ReturnsNothing.training_step must return the loss"),
        ({}, _Twice, ToyData, "training_step called self.pipeline"),
        ({}, ToyModule, _Tensors, "the pipeline got a Tensor"),
        ({}, ToyModule, _OtherLayout, "the DataModule made this batch for PipelineLayout"),
        ({}, ToyModule, _UnknownEncoder, "microbatch 1: no media component 'smell'; the model has"),
        ({}, ToyModule, _Costs, "microbatch 1: a media item has the cost nan: it must be a finite number >= 0"),
        ({}, ToyModule, _NegativeCost, "microbatch 2 has the LLM cost -1.0: it must be a finite number above 0"),
        ({}, _Vocabulary, _OtherTokenizer, "31999, but the LLM's vocabulary has 29: use the tokenizer that belongs to"),
        (
            {"backbone": "interleaved_1f1b", "virtual_stages": 3},
            ToyModule,
            ToyData,
            "too few for 6 pipeline stages: choose pipeline_parallel_size * virtual_stages <= 4, or a deeper LLM",
        ),
    ],
)
def test_refused_on_all_ranks(strategy: dict[str, Any], module: Any, data: Any, message: str) -> None:
    for found in on_ranks(2, _fit_wrong, strategy, module(), data(), timeout=60):
        assert message in found
        assert found.endswith(" 0"), "not before training"


class _Narrow(ToyModule):
    """Its encoder makes features of another width than it says, on whichever rank encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders["audio"].projector = torch.nn.Linear(7, 5)


def _fit_narrow(rank: int) -> None:
    pipeline_trainer(2, max_epochs=1).fit(_Narrow(), ToyData())


def test_features_of_another_width_are_named() -> None:
    """They must not be taken for a shorter message on another rank."""
    with pytest.raises(AssertionError) as failure:
        on_ranks(2, _fit_narrow, timeout=60)
    assert "encoder 'audio' made features of shape" in str(failure.value)
    assert "their width is that of the LLM" in str(failure.value)
    assert "hung []" in str(failure.value)


def _fit_idle(rank: int) -> str:
    with unittest.TestCase().assertLogs("bigmac_lightning") as logs:
        pipeline_trainer(3, {"backbone": "gpipe"}, max_epochs=1).fit(ToyModule(), ToyData(microbatches=2, steps=2))
        logging.getLogger("bigmac_lightning").warning("the end")
    return logs.output[0]


def test_idle_ranks_are_warned_of() -> None:
    first, *others = on_ranks(3, _fit_idle)
    assert "has 2 microbatches for a pipeline of 3 ranks, which are idle for about" in first
    assert "bigmac compare --pipeline_parallel_size 3 --microbatches 2" in first
    assert all("the end" in other for other in others), "rank 0 alone"


def test_backbones_say_how_many_stages_they_need() -> None:
    """A backbone that needs two stages per rank has two where nothing else is said."""
    assert ScheduleOptions(backbone="zbv").stages_per_rank == 2
    assert ScheduleOptions(backbone="1f1b").stages_per_rank == 1
    with pytest.raises(ValueError, match="virtual_stages is 3; this backbone allows 2"):
        ScheduleOptions(backbone="zbv", virtual_stages=3)


def test_an_owner_without_data_is_named() -> None:
    """Only the owner can see it; the error says where, and the run ends on all ranks."""
    with pytest.raises(AssertionError) as failure:
        on_ranks(2, _fit_uncaught, timeout=60)
    assert "has no data on its owner, rank" in str(failure.value)
    assert "in EF0 on pipeline rank" in str(failure.value)
    assert "hung []" in str(failure.value)


def _fit_uncaught(rank: int) -> None:
    pipeline_trainer(2, max_epochs=1).fit(ToyModule(), _MissingData())


class _Hungry(ToyModule):
    """Its image encoder asks for more memory than there is."""

    def configure_model(self) -> None:
        super().configure_model()
        self.encoders["image"].register_forward_pre_hook(lambda *_: torch.empty(2**50))


class _Named(ToyData):
    def collate(self, indices: list[int]) -> Batch:
        batch = super().collate(indices)
        for m, microbatch in enumerate(batch.microbatches):
            rows, tokens = microbatch.inputs["input_ids"].shape
            microbatch.origins = [Origin(f"sample {m}.{b}", b * tokens, (b + 1) * tokens) for b in range(rows)]
        return batch


def _fit_hungry(rank: int) -> list[str]:
    budget = MemoryBudget("1GiB", encoder_unit="1MiB", static="1KiB")
    trainer = pipeline_trainer(2, {"memory": budget}, max_epochs=1)
    try:
        trainer.fit(_Hungry(), _Named())
    except RuntimeError as error:
        return getattr(error, "__notes__", [])
    return ["no error"]


def test_out_of_memory_says_where_and_what_helps() -> None:
    found = [notes for notes in on_ranks(2, _fit_hungry, timeout=60) if any("alive there" in note for note in notes)]
    assert found, "no rank has said that its memory has run out"
    for where, what, plan, memory in found:
        assert where.startswith("in EF")
        assert "media items of " in what
        assert " of microbatch" in what
        assert "sample 'sample " in what or "samples 'sample " in what
        assert "encoder units and " in plan
        assert "by schedule.memory, whose budget is 1 GiB" in plan
        assert "weights 1" in memory, memory
        assert "most of the encoder: a smaller schedule.group_size" in memory


def _say_wrong(rank: int) -> str:
    trainer = pipeline_trainer(2, {"microbatches": 4}, max_epochs=1)
    with pytest.raises(ValueError, match="microbatches=4") as failure:
        trainer.fit(ToyModule(), ToyData())
    with contextlib.redirect_stderr(io.StringIO()) as said:
        sys.excepthook(ValueError, failure.value, failure.value.__traceback__)
    return said.getvalue()


def test_an_error_of_all_ranks_has_one_traceback() -> None:
    first, second = sorted(on_ranks(2, _say_wrong, timeout=60), key=len)
    assert first in [f"[bigmac] rank {rank} ends with the same error as rank {1 - rank}\n" for rank in (0, 1)]
    assert "Traceback (most recent call last)" in second


def _missing_checkpoint(rank: int, folder: Path) -> str:
    try:
        pipeline_trainer(2, max_epochs=1).fit(ToyModule(), ToyData(), ckpt_path=folder / "none.ckpt")
    except FileNotFoundError as error:
        return str(error)
    return "no error"


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    for message in on_ranks(2, _missing_checkpoint, tmp_path):
        assert f"{tmp_path}/none.ckpt" in message


SCRIPT = """
import os, sys
import lightning.pytorch as pl
import bigmac_lightning
from tests.toy import VOCABULARY, ToyData, ToyModule

class Dies(ToyModule):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and self.global_rank == int(sys.argv[1]):
            if sys.argv[2] == "stop":
                print("stopped", os.getpid(), flush=True)
            if sys.argv[2] != "raise":
                os.kill(os.getpid(), {"kill": 9, "stop": 19}[sys.argv[2]])
            raise RuntimeError("the dog ate this rank")
        return super().training_step(batch, batch_idx)

trainer = pl.Trainer(strategy="bigmac", accelerator="cpu", devices=2, max_epochs=1, logger=False,
                     enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False)
trainer.fit(Dies(), ToyData(steps=50))
"""


@pytest.mark.parametrize(
    ("row", "codes", "words"),
    [
        (Row("trainer", "forward", 1, "raise"), {1}, r"as rank 1 failed: RuntimeError: the dog ate this rank \(in EF"),
        # under the Trainer's launcher, Lightning's own watch over processes may come first
        (
            Row("environment", "step", 1, "kill"),
            {1, -9},
            "has lost its connection to others, as rank 1 failed: its process has ended",
        ),
        (
            Row("torchrun", "step", 1, "hang"),
            {1},
            "(?s)The run hangs: rank .*Rank 1 waits for no other rank: look there first.",
        ),
        pytest.param(
            *(Row("trainer", "validation", 0, "stop"), {-9}, "The run's store does not answer"), marks=pytest.mark.wide
        ),
        pytest.param(*(Row("trainer", "worker", 1, "hang"), {1}, "look there first"), marks=pytest.mark.wide),
        pytest.param(
            *(Row("trainer", "optimizer", 1, "lock"), {1}, "Nothing was heard of rank 1"), marks=pytest.mark.wide
        ),
        pytest.param(
            *(
                Row("trainer", "between", 1, "term twice"),
                {0},
                "SIGTERM: all ranks stop before one of the next batches",
            ),
            marks=pytest.mark.wide,  # test_stopping.py has it in one process
        ),
    ],
    ids=str,
)
def test_a_fault_ends_the_run(
    row: Row, codes: set[int], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """See benchmarks/faults.py, which has many more."""
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "1000")
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", f"{tmp_path}/rank_")
    result = run_row(row)
    assert result.seconds is not None, result.log
    assert not result.left
    assert {*result.codes} <= codes, result.log
    assert re.search(words, result.log), result.log
    ours = result.log if row.launcher == "trainer" else ""  # torchrun has one of its own
    assert ours.count("Traceback (most") == (row.fault == "raise"), result.log
    assert ("preempted" in result.saved) == (codes == {0})
    if row.fault == "hang":
        for rank in (0, 1):
            entries = pickle.loads((tmp_path / f"rank_{rank}").read_bytes())["entries"]
            assert "gloo:all_reduce" in {entry["profiling_name"].split(" ")[0] for entry in entries}


def test_a_rank_that_hangs_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """A stopped process hears no signal but one. It must not stay and hold its GPU."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "1", "stop"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        said = map(str.split, process.stdout)
        stopped = next(int(words[1]) for words in said if words[:1] == ["stopped"])
    finally:
        process.kill()
        process.communicate()
    for _ in range(50):
        if not _runs(stopped):
            return
        time.sleep(0.1)
    os.kill(stopped, signal.SIGKILL)
    raise AssertionError("the stopped process is left")


def _runs(process: int) -> bool:
    """Whether there is such a process that has not ended: it stays as a zombie if nobody asks for its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _group_alive(group: int) -> bool:
    """Whether any process of the session is left; it gets a few seconds to go."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    return True
