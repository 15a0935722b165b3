"""What a model replies to examples of the validation, and the metrics of it: under any strategy as in one process."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torchmetrics import MeanMetric
from torchmetrics.text import CHRFScore, WordErrorRate

from bigmac_lightning import ShardingOptions
from bigmac_lightning.callbacks import SampleReplies
from bigmac_lightning.datamodules import DigitsDataModule, ExampleError
from bigmac_lightning.models.writing import Sampling, written
from tests.datamodules.examples import data, model, write_mixed
from tests.toy import ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*`IterableDataset` has `__len__` defined.*")

TOKENS = 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Twelve records, of which ten end with a reply; with images, and of text alone."""
    return write_mixed(tmp_path, 12, videos=False)


def _validated(trainer: pl.Trainer, path: Path, **options: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    callback = SampleReplies(**{"limit": 9, "max_new_tokens": TOKENS, "dirpath": str(path.parent), **options})
    trainer.callbacks.append(callback)  # pyright: ignore[reportAttributeAccessIssue]
    (found,) = trainer.validate(model(), data(path), verbose=False)
    return callback.lines, {name: value for name, value in found.items() if "reply" in name}


def test_in_one_process(path: Path) -> None:
    """The replies are those that the model writes after each prompt alone."""
    lines, metrics = _validated(plain_trainer(), path)
    assert [line["name"].split()[-1] for line in lines] == [str(k) for k in (0, 1, 2, 4, 5, 6, 7, 9, 10)]
    module, made = model().eval(), data(path)
    module.configure_model()
    source, replies = made.split_sources("val")[0], list[str]()
    for index in (k for k in range(len(source)) if k % 5 != 3):
        prompt, reference = made.question(source[index])
        reply = made.reply([*written(module, prompt, Sampling(TOKENS), made.reply_ends())])
        replies.append(reply)
        if index < 11:
            assert {"reference": reference, "reply": reply}.items() <= lines[len(replies) - 1].items()
    assert len(lines) == 9
    assert [json.loads(line) for line in (path.parent / "replies.jsonl").read_text("utf-8").splitlines()] == lines
    assert metrics.keys() == {"val/reply_exact_match", "val/reply_chrf"}


@pytest.mark.filterwarnings("ignore:SampleReplies leaves out 1 of 4 examples")
def test_metrics() -> None:
    """Of replies alone, not of examples that could not be read."""
    replies, references = ["a circle", "red", "a cube"], ["a circle", "green", "a cone"]
    callback = SampleReplies()
    pairs = zip(replies, references, strict=True)
    callback.lines = [{"name": "", "error": "is gone"}, *({"name": "", "reply": a, "reference": b} for a, b in pairs)]
    chrf: Any = CHRFScore()(replies, [[reference] for reference in references])
    for _ in range(2):  # an evaluation later starts anew
        found = callback._compared()
        assert found == pytest.approx({"val/reply_exact_match": 1 / 3, "val/reply_chrf": float(chrf)})
        callback.lines.reverse()


def _validate(rank: int, world: int, strategy: Any, path: Path) -> Any:
    if strategy == "ddp":
        return _validated(plain_trainer(devices=world, strategy="ddp"), path)
    return _validated(pipeline_trainer(world, strategy), path)


@pytest.mark.parametrize(
    ("world", "strategy"),
    [
        (2, {}),
        (2, "ddp"),
        pytest.param(3, {}, marks=pytest.mark.wide),
        pytest.param(4, {"data_parallel_size": 2}, marks=pytest.mark.wide),
    ],
)
def test_as_in_one_process(world: int, strategy: Any, path: Path) -> None:
    lines, metrics = _validated(plain_trainer(), path)
    for found, others in on_ranks(world, _validate, world, strategy, path):
        assert found == lines
        assert others == pytest.approx(metrics)


def _validate_broken(rank: int, path: Path) -> Any:
    made = data(path)
    question = made.question

    def broken(example: Any) -> Any:
        if os.environ["RANK"] == "1" and "number 5" in example.messages[-1].parts:
            raise ExampleError("is gone")
        return question(example)

    made.question = broken  # pyright: ignore[reportAttributeAccessIssue]
    callback = SampleReplies(limit=9, max_new_tokens=TOKENS, dirpath=str(path.parent))
    trainer = pipeline_trainer(4, {"data_parallel_size": 2}, callbacks=[callback])
    if rank:
        trainer.validate(model(), made, verbose=False)
    else:
        with pytest.warns(UserWarning, match=r"SampleReplies leaves out 1 of 9 examples\. .*, sample .*: is gone"):
            trainer.validate(model(), made, verbose=False)
    return callback.lines


def test_an_example_that_one_rank_cannot_read(path: Path) -> None:
    """All ranks leave it out."""
    lines, _ = _validated(plain_trainer(), path)
    for found in on_ranks(4, _validate_broken, path, timeout=60):
        assert [line["error"] for line in found if "error" in line] == ["is gone"]
        for line, other in zip(lines, found, strict=True):
            assert line == other or "error" in other


def _fit(rank: int, folder: Path, path: Path) -> Any:
    replies = SampleReplies(limit=3, every_n_epochs=2, max_new_tokens=TOKENS)
    saving = ModelCheckpoint(folder / "saved", "{epoch}", "val/reply_chrf", mode="max", save_top_k=-1, every_n_epochs=2)
    trainer = pipeline_trainer(
        2,
        max_epochs=4,
        callbacks=[replies, saving],
        logger=TensorBoardLogger(folder),
        enable_checkpointing=True,
    )
    trainer.fit(model(), data(path))
    return [str(path.relative_to(folder)) for path in replies.artifacts], saving.best_model_score, replies.lines


def test_in_a_training(path: Path, tmp_path: Path) -> None:
    """A checkpoint is chosen by replies."""
    ranks = on_ranks(2, _fit, tmp_path / "run", path)
    assert sorted(p.name for p in (tmp_path / "run" / "saved").glob("*.ckpt")) == ["epoch=1.ckpt", "epoch=3.ckpt"]
    assert ranks[0][0] == ["lightning_logs/version_0/replies.jsonl"]
    assert ranks[0][1] == ranks[1][1]
    assert ranks[0][2] == ranks[1][2]
    assert len(ranks[0][2]) == 3


def _trained(rank: int, path: Path) -> list[dict[str, Any]]:
    found = []
    for callbacks in ([SampleReplies(limit=3, max_new_tokens=TOKENS, temperature=1.0, dirpath=str(path.parent))], []):
        strategy = {"sharding": ShardingOptions("fsdp", "ddp", "zero1")}
        trainer, module = pipeline_trainer(2, strategy, max_epochs=2, callbacks=callbacks), model()
        trainer.fit(module, data(path))
        found.append(weights(module))  # pyright: ignore[reportArgumentType]
    return found


def test_the_training_is_the_same_without_it(path: Path) -> None:
    """Also if weights lie in shards, which are gathered for replies."""
    for with_replies, without in on_ranks(2, _trained, path):
        assert_close(with_replies, without, 0.0)


def test_another_metric_from_yaml(path: Path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--callback", type=pl.Callback)
    config = {
        "class_path": "bigmac_lightning.callbacks.SampleReplies",
        "init_args": {"limit": 2, "max_new_tokens": 2, "metric": {"class_path": "torchmetrics.text.WordErrorRate"}},
    }
    callback = parser.instantiate(parser.parse_object({"callback": config})).callback
    assert isinstance(callback.metric, WordErrorRate)
    callback.dirpath = str(path.parent)
    (found,) = plain_trainer(callbacks=[callback]).validate(model(), data(path), verbose=False)
    assert {name for name in found if "reply" in name} == {"val/reply_exact_match", "val/reply_word_error_rate"}


class _Other(DDPStrategy):
    pass


def test_what_is_refused(path: Path) -> None:
    """Before training."""
    auto = plain_trainer().strategy
    for options, strategy, datamodule, message in (
        ({}, auto, DigitsDataModule(), "DigitsDataModule has no sources of examples"),
        ({}, auto, None, "NoneType has no sources of examples"),
        ({}, auto, data(path, val=[]), "examples of the validation that can be read by index, and there are none"),
        ({"temperature": -1}, auto, data(path), "temperature is -1; expected 0 or more"),
        ({"metric": CHRFScore(return_sentence_level_score=True)}, auto, data(path), "metric=CHRFScore. cannot compare"),
        ({"metric": MeanMetric()}, auto, data(path), r"metric=MeanMetric\) cannot compare"),
        ({}, _Other(), data(path), "does not know whether _Other has whole weights"),
    ):
        trainer: Any = SimpleNamespace(strategy=strategy, datamodule=datamodule)
        with pytest.raises(ValueError, match=message):
            SampleReplies(**options).setup(trainer, ToyModule(), "fit")
    with pytest.raises(ValueError, match=r"SampleReplies\(limit=0\) needs at least 1"):
        SampleReplies(limit=0)


def test_a_validation_without_replies(path: Path) -> None:
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    drawings = [record for record in records if "target" in record]
    path.write_text("".join(json.dumps(record) + "\n" for record in drawings), "utf-8")
    with pytest.raises(ValueError, match="end with a reply, and there are none"):
        plain_trainer(callbacks=[SampleReplies()], max_epochs=1).fit(model(), data(path))
