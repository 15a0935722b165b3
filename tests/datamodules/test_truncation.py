"""Samples that are too long are refused, or their end is cut off and the rest stays unchanged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigmac_lightning.datamodules import (
    ExampleError,
    MessagesJSONL,
    MixtureOptions,
    MultimodalDataModule,
    PackingOptions,
)
from bigmac_lightning.datamodules.encoding.truncation import cut
from bigmac_lightning.datamodules.packing.measuring import encoded
from bigmac_lightning.datamodules.sources.stream import SourceStream
from tests.datamodules.examples import TARGET, data, model, pictures, said, write_jsonl
from tests.datamodules.format_table import of
from tests.datamodules.test_multimodal_training import Losses
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

BUDGET = 60
IMAGE = ["image.png"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "image.png").write_bytes(pictures(1)[0].read_bytes())
    return write_jsonl(
        tmp_path / "long.jsonl",
        [
            {"messages": said("Say", "a" * 200)},
            {"messages": said("Say", "b" * 10)},
            {"messages": said("<image>?", "c" * 200), "images": IMAGE},
            {"text": "d" * 200},
            {"messages": said("e" * 100, "f")},  # nothing to learn would be left
            {"messages": said("g" * 45 + "<image>", "h"), "images": IMAGE},  # through the image
            {"messages": [*said("i" * 30, "j" * 30), *said("<image>", "k")], "images": IMAGE},  # before the image
            {"messages": [of("user", "l" * 60)], "target": "image.png"},
            {"prompt": "m" * 100, "completion": "n"},
        ],
    )


KEPT = 4
CUT = PackingOptions(truncation="end")


def made(path: Path, **given: Any) -> MultimodalDataModule:
    return data(path, **{"token_budget": BUDGET, "packing": CUT, "on_error": "skip", "microbatches": 2, **given})


def test_the_end_is_cut_off_and_nothing_else(path: Path) -> None:
    whole, short = made(path, token_budget=10_000).encoder, made(path).encoder
    for i, example in enumerate(map(MessagesJSONL(path).__getitem__, range(KEPT))):
        full, sizes = encoded(example, whole, 10_000, "it", learns=True)
        sample, of_cut = encoded(example, short, BUDGET, "it", learns=True)
        assert len(full.tokens) > BUDGET or i == 1
        assert sample.tokens == full.tokens[:BUDGET]
        assert sample.labelled == full.labelled[:BUDGET]
        assert (len(sample.media), of_cut) == (len(full.media), sizes)


def test_what_cannot_be_cut_is_refused(path: Path) -> None:
    datamodule = made(path)
    datamodule.setup("fit")
    errors = datamodule._measured["train"][0].errors
    assert list(errors) == [4, 5, 6, 7, 8]
    for index, reason in (
        (4, "cannot be cut to 60: nothing to learn would be left"),
        (5, "image.png would be cut off, at least in part"),
        (6, "image.png would be cut off, at least in part"),
        (7, "image.png comes last"),
        (8, "nothing to learn would be left"),
    ):
        assert reason in errors[index]
        assert f"(line {index + 1})" in errors[index]
    refusing = made(path, packing=PackingOptions())
    refusing.setup("fit")  # what was measured with the other setting is not used
    assert list(refusing._measured["train"][0].errors) == [0, 2, 3, 4, 5, 6, 7, 8]
    assert 'set packing.truncation to "end"' in refusing._measured["train"][0].errors[0]
    given: Any = "start"
    with pytest.raises(ValueError, match=r"packing\.truncation='start': choose 'refuse' or 'end'"):
        PackingOptions(truncation=given)


def test_rows_of_an_image_are_not_cut_through_at_any_length(path: Path) -> None:
    encoder = made(path, token_budget=10_000).encoder
    sample, _ = encoded(MessagesJSONL(path)[2], encoder, 10_000, "it")
    (image,) = sample.media
    last = image.indices[-1]
    first = sample.labelled.index(True)
    for most in range(1, len(sample.tokens)):
        if most <= first:
            with pytest.raises(ExampleError, match="would be cut off" if most <= last else "nothing to learn"):
                cut(sample, most)
        else:
            assert cut(sample, most).tokens == sample.tokens[:most]


def _fit(rank: int | None, path: Path, stream: bool) -> Any:
    train = [SourceStream(MessagesJSONL(path), 0, False) if stream else MessagesJSONL(path)]
    given: dict[str, Any] = {"train": train}
    if stream:
        given |= {"mixture": MixtureOptions(steps_per_epoch=2), "packing": replace(CUT, buffer_size=5)}
    trainer = (plain_trainer if rank is None else pipeline_trainer)(
        *(() if rank is None else (2,)), max_epochs=1, limit_val_batches=0
    )
    losses = Losses()
    trainer.callbacks.append(losses)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.fit(model(), made(path, target=TARGET, val=[], **given))
    return losses.losses


@pytest.mark.parametrize("stream", [False, True])
def test_is_learnt_on_two_ranks_as_in_one_process(stream: bool, path: Path) -> None:
    one, other = on_ranks(2, _fit, path, stream)
    assert one == other
    assert one == pytest.approx(_fit(None, path, stream), rel=1e-5)
    assert len(one) >= 1
