"""Streams: equal steps for any number of ranks, replicas and workers, exact resuming, and broken examples."""

import io
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
import torch

from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.datamodules import (
    Example,
    ExampleError,
    File,
    HFStream,
    Image,
    Message,
    MessagesJSONL,
    MixtureOptions,
    PackingOptions,
    SourceError,
    Stream,
    Taken,
)
from bigmac_lightning.datamodules.sources.stream import SourceStream
from tests.datamodules.examples import data, model, said, train_loader, write_jsonl
from tests.datamodules.test_multimodal_training import Losses
from tests.datamodules.test_resume import names, pixels
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

FILES, ROWS = 3, 12
ONE, TWO = MixtureOptions(steps_per_epoch=5), MixtureOptions([3, 1], steps_per_epoch=5)
"""Epochs of a single stream, and of two."""
SMALL_BUFFER = PackingOptions(buffer_size=10)


def png(height: int, width: int, color: int) -> bytes:
    made = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (color, 2 * color % 256, 77)).save(made, "PNG")
    return made.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_streamed(tmp_path_factory.mktemp("streamed"))


def write_streamed(made: Path) -> Path:
    """Parquet files with images in them, and texts in a JSONL file."""
    for f in range(FILES):
        rows: dict[str, list[Any]] = {"messages": [], "images": []}
        for i in range(ROWS):
            number = f * ROWS + i
            rows["messages"].append(said("<image>?" if i % 4 else "?", "n" * (number % 7 + 1)))
            rows["images"].append([{"bytes": png(16 + 8 * (i % 3), 16 + 8 * f, number), "path": None}] if i % 4 else [])
        features = {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        table.to_parquet(str(made / f"{f}.parquet"))
    write_jsonl(made / "texts.jsonl", [{"messages": said("Say", "a" * i)} for i in range(1, 9)])
    return made


def streams(folder: Path) -> list[Any]:
    return [HFStream("parquet", str(folder / "*.parquet")), MessagesJSONL(folder / "texts.jsonl")]


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    defaults = {"train": streams(folder), "val": [], "mixture": TWO, "packing": SMALL_BUFFER, "target": None}
    return {**defaults, "token_budget": 100, "microbatches": 2, **changes}


def loader(folder: Path, replicas: int = 1, replica: int = 0, size: int = 1, rank: int = 0, **changes: Any) -> Any:
    made = data(folder / "texts.jsonl", **arguments(folder, **changes))
    return train_loader(made, replicas, replica, PipelineLayout(size, rank, size))


def samples(batch: Batch) -> list[str]:
    return sorted(name for microbatch in names(batch) for name in microbatch)


def test_the_same_samples_per_step_for_any_ranks_replicas_and_workers(folder: Path) -> None:
    alone = list(loader(folder, microbatches=4))
    expected = [samples(batch) for batch in alone]
    shown = [sum(len(m.media) for m in batch.microbatches) for batch in alone]
    total = [pixels(batch) for batch in alone]
    for microbatches, workers in ((4, [(0, 2)]), (2, [(2, 0), (1, 0)])):  # of each rank of each replica
        got: list[list[str]] = [[] for _ in alone]
        decoded, seen = [0] * len(alone), [0.0] * len(alone)
        for replica, workers_of_ranks in enumerate(workers):
            ranks = []
            for rank, number in enumerate(workers_of_ranks):
                place = (len(workers), replica, 2, rank)
                ranks.append(list(loader(folder, *place, microbatches=microbatches, num_workers=number)))
            for step, pair in enumerate(zip(*ranks, strict=True)):
                assert names(pair[0]) == names(pair[1])
                assert len(pair[0]) == microbatches
                got[step] += samples(pair[0])
                for rank, batch in enumerate(pair):
                    items = [item for m in batch.microbatches for item in m.media]
                    assert all((item.data is not None) == (item.owner == rank) for item in items)
                    mine = [item.data for item in items if item.data is not None]
                    decoded[step] += len(mine)
                    seen[step] += sum(float(image.double().sum()) for image in mine)
        assert [sorted(step) for step in got] == expected
        assert decoded == shown
        assert seen == pytest.approx(total, rel=1e-9)


def test_every_example_once_per_repeat_by_weights_and_packed(folder: Path) -> None:
    made = loader(folder, mixture=replace(TWO, steps_per_epoch=20))
    batches = list(made)
    counts = Counter(name for batch in batches for name in samples(batch))
    assert max(counts.values()) == 1, "names have the number of the draw"
    parquet = sum("parquet" in name for name in counts)
    assert parquet / len(counts) == pytest.approx(0.75, abs=0.05)
    assert all(len(batch) == 2 for batch in batches)
    assert sum(batch.tokens for batch in batches) / (20 * 2 * 100) > 0.85
    assert all(m.shape[1] <= 100 for batch in batches for m in batch.microbatches)
    assert made.state_dict()["position"]["parts"][0]["streams"][1]["repeat"] >= 1, "texts are read again"
    first = [samples(batch) for batch in batches]
    assert first == [samples(batch) for batch in loader(folder, mixture=replace(TWO, steps_per_epoch=20))]
    assert first != [samples(batch) for batch in loader(folder, mixture=replace(TWO, steps_per_epoch=20), seed=1)]
    kept = [
        names(batch)
        for batch in loader(
            folder,
            packing=replace(SMALL_BUFFER, ordered=True),
            train=[HFStream("parquet", str(folder / "*.parquet"), shuffle=False)],
            mixture=ONE,
        )
    ]
    numbers = [int(name.split("sample ")[1].split()[0]) for step in kept for part in step for name in part]
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize(
    "stop", [1, 7, pytest.param(3, marks=pytest.mark.wide), pytest.param(12, marks=pytest.mark.wide)]
)
def test_a_loader_continues_where_another_stopped(folder: Path, stop: int, tmp_path: Path) -> None:
    """In the middle of buffers, over several epochs and repeats, with other workers and ranks."""
    whole = loader(folder)
    expected = []
    for epoch in range(4):
        whole.set_epoch(epoch)
        expected += [(names(batch), pixels(batch)) for batch in whole]
    assert len(expected) == 20
    first = loader(folder, num_workers=2)
    for epoch in range(stop // 5 + 1):
        first.set_epoch(epoch)
        batches = iter(first)
        for _ in range(min(5, stop - 5 * epoch)):
            next(batches)
    torch.save(first.state_dict(), tmp_path / "state")
    second = loader(folder, size=2, rank=0, num_workers=stop % 3)
    for _ in range(2):  # and the same loader again
        second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        rest = []
        for epoch in range(stop // 5, 4):
            second.set_epoch(epoch)
            rest += [names(batch) for batch in second]
        assert rest == [step for step, _ in expected[stop:]]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("parts", "replicas"),
    [(2, 1), (3, 2), *(pytest.param(*given, marks=pytest.mark.wide) for given in ((2, 2), (3, 1), (4, 1), (4, 2)))],
)
def test_parts_come_in_turn_for_any_workers(folder: Path, parts: int, replicas: int, tmp_path: Path) -> None:
    """Each example once in a repeat; a loader continues anywhere, with other workers."""
    steps = 6 * parts
    options: dict[str, Any] = {"mixture": replace(TWO, steps_per_epoch=steps, stream_parts=parts)}
    alone = [list(loader(folder, replicas, replica, **options)) for replica in range(replicas)]
    expected = [(names(batch), pixels(batch)) for batch in alone[0]]
    assert [batch.progress.part for batch in alone[0]] == [step % parts for step in range(steps)]
    counts = Counter(name for batches in alone for batch in batches for name in samples(batch))
    assert max(counts.values()) == 1, "no two examples have the same number"
    content = Counter(pixels(batch) for batch in alone[0])
    assert len(content) > steps // 2
    for workers in (1, 2, 4):
        got = loader(folder, replicas, 0, num_workers=workers, **options)
        assert [(names(batch), pixels(batch)) for batch in got] == expected, workers
    for stop in (1, parts, parts + 1, 3 * parts - 1):
        first = loader(folder, replicas, 0, num_workers=stop % 4, **options)
        batches = iter(first)
        for _ in range(stop):
            next(batches)
        torch.save(first.state_dict(), tmp_path / "state")
        second = loader(folder, replicas, 0, num_workers=(stop + 1) % 4, **options)
        second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        assert [(names(batch), pixels(batch)) for batch in second] == expected[stop:]
    other = loader(folder, replicas, 0, mixture=replace(options["mixture"], stream_parts=parts + 1))
    with pytest.raises(ValueError, match=rf"stream_parts={parts}, and now has {parts + 1}: .* Restore it"):
        other.load_state_dict(second.state_dict())


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_of_a_stream_have_each_example_once(folder: Path, parts: int) -> None:
    """And each of them continues anywhere; files go to parts only if there are enough of them."""
    for stream in (
        HFStream("parquet", str(folder / "*.parquet")),
        SourceStream(MessagesJSONL(folder / "texts.jsonl")),
        SourceStream(MessagesJSONL(folder / "texts.jsonl"), shuffle=False),
        Numbers({4: "record"}),
    ):
        for repeat in (0, 1):
            whole = Counter(_shown(example) for example, _ in stream.read(repeat))
            found: Counter[str] = Counter()
            for number in range(parts):
                part = stream.part(number, parts)
                assert part.name == stream.name
                read = [(_shown(example), place) for example, place in part.read(repeat)]
                found += Counter(text for text, _ in read)
                for k in (0, len(read) // 2):
                    rest = [_shown(example) for example, _ in part.read(repeat, read[k][1])]
                    assert rest == [text for text, _ in read[k + 1 :]]
            assert found == whole
    own = HFStream("parquet", str(folder / "*.parquet")).part(1, 3)
    assert isinstance(own, HFStream)
    assert own._rows.num_shards == 1


def _shown(example: Example | ExampleError) -> str:
    """An example, without where in memory its files are."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(example))


def _read(stream: HFStream, repeat: int) -> None:
    next(stream.read(repeat))


def test_a_worker_does_not_change_the_repeat_of_another(folder: Path) -> None:
    """Forked workers share memory that the library keeps its epoch in."""
    stream = HFStream("parquet", str(folder / "*.parquet"))
    reading = multiprocessing.get_context("fork").Process(target=_read, args=(stream, 5))
    reading.start()
    reading.join()
    assert reading.exitcode == 0
    assert stream._rows.epoch == 0


def test_what_can_be_resumed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = loader(folder)
    batches = iter(made)
    first = samples(next(batches))
    state = made.state_dict()
    assert state["position"]["parts"][0]["step"] == 1
    with pytest.raises(ValueError, match=r"was saved while it read \['parquet .* now it reads .*texts.jsonl"):
        loader(folder, train=streams(folder)[::-1]).load_state_dict(state)
    other = loader(folder, microbatches=1)
    other.load_state_dict(state)
    assert "of which 1 steps come once more" in caplog.text
    again = [name for batch in other for name in samples(batch)]
    assert set(first) & set(again)
    source = data(folder / "texts.jsonl", target=None)
    source.setup("fit")
    with pytest.raises(ValueError, match=r"kind of training loader \(StreamLoader\), and now has StepLoader"):
        source.loader("train").load_state_dict(state)
    with pytest.raises(ValueError, match=r"kind of training loader \(StepLoader\), and now has StreamLoader"):
        loader(folder).load_state_dict(source.loader("train").state_dict())


def _fit(rank: int, folder: Path, workers: int) -> list[float]:
    losses = Losses()
    trainer = pipeline_trainer(4, {"data_parallel_size": 2}, max_epochs=2, limit_val_batches=0, callbacks=[losses])
    trainer.fit(model(generators={}), data(folder / "texts.jsonl", **arguments(folder, num_workers=workers)))
    return losses.losses


def test_training_against_one_process(folder: Path) -> None:
    """test_resumed_runs.py stops and resumes such runs."""
    expected = Losses()
    trainer = plain_trainer(max_epochs=2, limit_val_batches=0, callbacks=[expected])
    trainer.fit(model(generators={}), data(folder / "texts.jsonl", **arguments(folder, microbatches=4)))
    assert len(expected.losses) == 10
    for losses in on_ranks(4, _fit, folder, 1):
        assert losses == pytest.approx(expected.losses, rel=1e-5)


class Numbers(Stream):
    """Numbers with pictures of them, some of which are broken."""

    def __init__(self, broken: dict[int, str], end: int = 20) -> None:
        self.broken, self.end = broken, end

    def read(self, repeat: int, place: Any = None) -> Iterator[tuple[Example | ExampleError, Any]]:
        for i in range(place or 0, self.end):
            yield self.example(i), i + 1

    def example(self, i: int) -> Example | ExampleError:
        broken, content = self.broken.get(i), png(16, 16, i)
        if broken == "record":
            return ExampleError("is no record")
        if broken == "header":
            content = b"nonsense"
        if broken == "pixels":
            content = content[:-30] + bytes(30)
        if broken == "stream":
            raise OSError("the line is cut")
        image = Image(File.lazy(f"{i}.png", lambda: content))
        return Example([Message("user", [image]), Message("assistant", [str(i)])])


class Counted(Numbers):
    """Notes which process makes which example."""

    start, step = 0, 1

    def __init__(self, notes: Path) -> None:
        super().__init__({}, 200)
        self.notes = notes

    def part(self, number: int, parts: int) -> Stream:
        own = copy(self)
        own.start, own.step = number, parts
        return own

    def read(self, repeat: int, place: Any = None) -> Iterator[tuple[Example | ExampleError, Any]]:
        for i in range(self.start if place is None else place, self.end, self.step):
            with self.notes.open("a") as file:
                file.write(f"{os.getpid()} {i}\n")
            yield self.example(i), i + self.step


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_each_worker_reads_its_own_part(folder: Path, tmp_path: Path) -> None:
    for parts in (4, 2, 1):
        notes = tmp_path / str(parts)
        mixture = MixtureOptions(steps_per_epoch=8, stream_parts=parts)
        list(loader(folder, train=[Counted(notes)], mixture=mixture, num_workers=4, packing=SMALL_BUFFER))
        by_process: dict[str, set[int]] = {}
        for line in notes.read_text().splitlines():
            process, number = line.split()
            by_process.setdefault(process, set()).add(int(number) % parts)
        assert len(by_process) == 4
        assert all(len(found) == 1 for found in by_process.values())


BROKEN = {3: "record", 5: "header", 8: "pixels"}
WRONG = {3: "sample 3 is no record", 5: "5.png cannot be read: not an image", 8: "8.png cannot be decoded"}


def test_broken_examples(folder: Path) -> None:
    for number, kind in BROKEN.items():
        with pytest.raises(ExampleError, match=rf"Numbers, sample {number}.*{WRONG[number].split(' ', 2)[-1]}"):
            list(loader(folder, train=[Numbers({number: kind})], mixture=ONE))
    made = loader(folder, train=[Numbers(BROKEN)], mixture=MixtureOptions(steps_per_epoch=3), on_error="skip")
    batches = list(made)
    assert made.agreement.skipped >= 3
    assert not {"Numbers, sample 3", "Numbers, sample 5"} & {name for batch in batches for name in samples(batch)}
    resumed = loader(folder, train=[Numbers(BROKEN)], mixture=ONE, on_error="skip")
    resumed.load_state_dict(made.state_dict())
    assert resumed.agreement.skipped == made.agreement.skipped
    with pytest.raises(SourceError, match="Numbers cannot be read: OSError: the line is cut"):
        list(loader(folder, train=[Numbers({9: "stream"})], mixture=ONE, num_workers=1))
    with pytest.raises(SourceError, match="Numbers has no examples"):
        list(loader(folder, train=[Numbers({}, end=0)], mixture=ONE))
    with pytest.raises(SourceError, match=r"Numbers has no examples, or fewer than mixture\.stream_parts"):
        list(loader(folder, train=[Numbers({}, end=3)], mixture=replace(ONE, stream_parts=4)))
    with pytest.raises(SourceError, match=r"11 examples in a row cannot be used; the last: Numbers, sample 10 is no"):
        list(loader(folder, train=[Numbers(dict.fromkeys(range(20), "record"))], mixture=ONE, on_error="skip"))


class Split(Stream):
    """Gives every rank other examples, as a stream must not."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def read(self, repeat: int, place: Any = None) -> Iterator[tuple[Example | ExampleError, Any]]:
        for i in range(place or 0, 40):
            yield Example([Message("user", [str(2 * i + self.rank)]), Message("assistant", ["yes"])]), i + 1


def _fit_split(rank: int, folder: Path) -> str:
    made = data(folder / "texts.jsonl", **arguments(folder, train=[Split(rank)], mixture=ONE))
    try:
        pipeline_trainer(2, max_epochs=1, limit_val_batches=0).fit(model(generators={}), made)
    except SourceError as error:
        return str(error)
    return "no error"


def test_ranks_that_read_different_examples_end_together(folder: Path) -> None:
    for text in on_ranks(2, _fit_split, folder):
        assert "the ranks have read different examples from the streams" in text


def test_where_streams_go(folder: Path) -> None:
    stream = HFStream("parquet", str(folder / "*.parquet"))
    with pytest.raises(ValueError, match=r"val has streams, .* Taken\(stream, 500\)"):
        data(folder / "texts.jsonl", val=[stream], target=None).setup("fit")
    with pytest.raises(ValueError, match=r"set mixture\.steps_per_epoch, and not"):
        data(folder / "texts.jsonl", train=[stream], target=None).setup("fit")
    taken = Taken(stream, 5)
    made = data(folder / "texts.jsonl", train=[], val=[taken], target=None)
    made.setup("validate")
    (batch,) = list(made.val_dataloader())
    assert batch.samples == 5


def test_a_stream_has_another_order_in_each_repeat_and_continues_anywhere(folder: Path) -> None:
    for stream in (
        HFStream("parquet", str(folder / "*.parquet")),
        HFStream(datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True)),
        SourceStream(MessagesJSONL(folder / "texts.jsonl")),
    ):
        orders = []
        for repeat in range(4):
            found = list(stream.read(repeat))
            texts = [
                repr([message.parts[-1] for message in example.messages])
                for example, _ in found
                if isinstance(example, Example)
            ]
            for stop in (0, len(found) // 2, len(found) - 1):
                rest = list(stream.read(repeat, found[stop][1]))
                told = [
                    repr([m.parts[-1] for m in example.messages]) for example, _ in rest if isinstance(example, Example)
                ]
                assert told == texts[stop + 1 :]
            orders.append(texts)
        assert len({tuple(order) for order in orders}) > 1
        assert len({tuple(sorted(order)) for order in orders}) == 1
