"""Examples of training sources that are held out for validation."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmac_lightning.datamodules import ExampleError, MessagesJSONL, MixtureOptions, Source, SourceStream
from bigmac_lightning.datamodules.sources.splitting import SourceSubset
from tests.datamodules.examples import data, model, said, write_jsonl
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer


def write(folder: Path, name: str, number: int) -> MessagesJSONL:
    return MessagesJSONL(
        write_jsonl(folder / f"{name}.jsonl", [{"messages": said(name, f"{i}.")} for i in range(number)])
    )


def replies(source: Source) -> list[str]:
    return ["".join(map(str, source[i].messages[1].parts)) for i in range(len(source))]


def parts(
    folder: Path, val_split: Any, numbers: tuple[int, ...] = (20, 7), **changes: Any
) -> tuple[list[Any], list[Any]]:
    sources = [write(folder, f"s{k}", n) for k, n in enumerate(numbers)]
    module = data(sources[0].path, train=sources, val=[], mixture=MixtureOptions(val_split=val_split), **changes)
    return list(module.split_sources("train")), list(module.split_sources("val"))


@pytest.mark.parametrize(
    ("val_split", "held_out"),
    [(0.25, [5, 2]), (3, [3, 3]), ([0.5, 1], [10, 1]), ([2, 0.01], [2, 1]), ([4, 0], [4]), ([0, 2], [2])],
)
def test_every_example_is_in_one_part(val_split: Any, held_out: list[int], tmp_path: Path) -> None:
    train, val = parts(tmp_path, val_split)
    assert [len(source) for source in val] == held_out
    assert sum(map(len, train)) == 27 - sum(held_out)
    every = sorted([(s.name, r) for s in [*train, *val] for r in replies(s)])
    assert len(set(every)) == len(every) == 27
    again, other = parts(tmp_path, val_split), parts(tmp_path, val_split, seed=1)
    assert [replies(s) for s in again[1]] == [replies(s) for s in val]
    if max(held_out) > 1:
        assert [replies(s) for s in other[1]] != [replies(s) for s in val]


def test_given_validation_sources_stay(tmp_path: Path) -> None:
    source, other = write(tmp_path, "a", 10), write(tmp_path, "b", 3)
    module = data(source.path, train=[source], val=[other], mixture=MixtureOptions(val_split=0.2))
    assert [len(part) for part in module.split_sources("val")] == [3, 2]
    assert module.sources("val") == [other]


@pytest.mark.parametrize(
    ("val_split", "message"),
    [
        (1.0, "val_split=1.0 of the 20 examples of"),
        (-0.1, "a share between 0 and 1"),
        (20, "leaves some to train on"),
        ([1], r"val_split=\[1\] for 2 training sources"),
    ],
)
def test_what_cannot_be_split_is_refused(val_split: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parts(tmp_path, val_split)


def test_streams_are_not_split(tmp_path: Path) -> None:
    source, other = write(tmp_path, "a", 10), write(tmp_path, "b", 6)
    options: dict[str, Any] = {"train": [SourceStream(source), other], "val": []}

    def mixture(val_split: Any) -> MixtureOptions:
        return MixtureOptions(val_split=val_split, steps_per_epoch=2)

    with pytest.raises(
        ValueError, match=r"a\.jsonl is a stream, of which nothing can be held out.*0 for the stream.*Taken"
    ):
        data(source.path, mixture=mixture(0.5), **options).split_sources("val")
    module = data(source.path, mixture=mixture([0, 0.5]), **options)
    assert [len(part) for part in module.split_sources("val")] == [3]  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "val"])
def test_errors_give_the_number_in_the_whole_source(split: str, tmp_path: Path) -> None:
    records: list[Any] = [{"messages": said("a", f"{i}.")} for i in range(30)]
    options: dict[str, Any] = {"val": [], "mixture": MixtureOptions(val_split=0.4), "on_error": "raise"}
    (part,) = data(write_jsonl(tmp_path / "a.jsonl", records), **options).split_sources(split)
    assert isinstance(part, SourceSubset)
    bad = part.indices[7]
    assert bad != 7
    records[bad] = {"messages": said("a", "b" * 500)}
    module = data(write_jsonl(tmp_path / "a.jsonl", records), **options)
    module.prepare_data()
    with pytest.raises(ExampleError, match=re.escape(f"sample {bad} (line {bad + 1}) has 5")):
        module.setup("fit" if split == "train" else "validate")


def test_another_subset_has_its_own_measurements(tmp_path: Path) -> None:
    """What was measured of one part is not taken for another of the same source."""
    records = [{"messages": said("a", "b" * i)} for i in range(1, 31)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    seen = set()
    for val_split, seed in ((10, 0), (10, 1), (12, 0), (10, 0)):
        module = data(path, val=[], mixture=MixtureOptions(val_split=val_split), seed=seed)
        module.prepare_data()
        (part,) = module.split_sources("train")
        assert isinstance(part, SourceSubset)
        known = module.measure(part, "train", read_only=True)
        spoken = [len(reply) for reply in replies(part)]
        assert (known.arrays["learnt"] - spoken).tolist() == [1] * len(part)  # and the end of the reply
        seen.add(tuple(spoken))
    assert len(seen) == 3


def _fit(trainer: Any, folder: Path, val_split: Any) -> tuple[list[float], int]:
    source = MessagesJSONL(folder / "a.jsonl")
    module = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*|.*lr_scheduler.*")
        trainer.fit(module, data(source.path, train=[source], val=[], mixture=MixtureOptions(val_split=val_split)))
    return [float(trainer.callback_metrics.get("val/loss", torch.nan))], trainer.global_step


def _fit_on_rank(rank: int, folder: Path, val_split: Any) -> tuple[list[float], int]:
    return _fit(pipeline_trainer(2, max_epochs=1), folder, val_split)


@pytest.mark.parametrize("val_split", [None, 0.3])
def test_runs_without_a_warning(val_split: Any, tmp_path: Path) -> None:
    """With and without validation examples, on two ranks as on one."""
    write(tmp_path, "a", 20)
    (expected,), steps = _fit(plain_trainer(max_epochs=1), tmp_path, val_split)
    assert (expected == expected) == (val_split is not None)
    for (loss,), others in on_ranks(2, _fit_on_rank, tmp_path, val_split):
        assert others == steps
        assert loss == pytest.approx(expected, rel=1e-5, nan_ok=True)
