"""What `bigmac data` shows before a training is what the training gets."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from bigmac_lightning.datamodules import MixtureOptions, MultimodalDataModule, PackingOptions, SourceStream, inspection
from bigmac_lightning.datamodules.inspection import SampleView
from tests.datamodules.examples import data, said, write_jsonl, write_mixed

END = "<|im_end|>"


def shown(module: MultimodalDataModule, split: str = "train") -> list[tuple[Any, int, SampleView]]:
    """All usable examples."""
    return [
        (view, index, inspection.sample_of(module, view, index, split))
        for view in inspection.sources_of(module, split)
        for index in view.usable
    ]


def test_spans_separate_learnt_text(tmp_path: Path) -> None:
    module = data(write_mixed(tmp_path, 10))
    for view, index, sample in shown(module):
        example = view.source[index]
        learnt = [span.text for span in sample.spans if span.kind == "learnt"]
        replies = ["".join(str(part) for part in m.parts) + END for m in example.messages if m.role == "assistant"]
        assert learnt == replies
        given = "".join(span.text for span in sample.spans if span.kind == "given")
        for message in example.messages:
            assert message.role == "assistant" or all(part in given for part in message.parts if isinstance(part, str))
        media = [span.text for span in sample.spans if span.kind in ("media", "target")]
        assert media == [f"{item.label}: {item.rows} tokens" for item in sample.items]
        assert sample.learnt == sum(len(reply.removesuffix(END)) + 1 for reply in replies)  # a byte per token
        assert sample.tokens == view.measured.tokens[index]
        assert sample.learnt == view.measured.arrays["learnt"][index]
        assert sum(item.rows for item in sample.items if item.label != "target") == view.measured.arrays["rows"][index]


def test_characters_of_several_tokens_are_whole(tmp_path: Path) -> None:
    module = data(write_jsonl(tmp_path / "a.jsonl", [{"messages": said("Wie heißt »ß«?", "Eszett 😀 …")}]))
    ((_, _, sample),) = shown(module)
    assert [span.text for span in sample.spans if span.kind == "learnt"] == ["Eszett 😀 …" + END]
    assert "Wie heißt »ß«?" in "".join(span.text for span in sample.spans)


def test_pixels_are_those_of_the_files(tmp_path: Path) -> None:
    module = data(write_mixed(tmp_path, 10))
    kinds = set()
    for _, _, sample in shown(module):
        for item in sample.items:
            kinds.add(item.label.split()[0])
            pixels = item.pixels(most=2)
            assert {tuple(picture.shape) for picture in pixels} == {(3, item.size.height, item.size.width)}
            assert len(pixels) == (2 if item.label.startswith("video") else 1)
            if not item.label.startswith("video"):
                with PIL.Image.open(item.item.file.name) as image:
                    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), np.array(image.convert("RGB")))
    assert kinds == {"image", "target", "video"}


@pytest.mark.parametrize("options", [{}, {"packed": False}, {"ordered": True}], ids=str)
def test_the_first_step_is_that_of_training(options: dict[str, Any], tmp_path: Path) -> None:
    module = data(write_mixed(tmp_path, 20, videos=False), packing=PackingOptions(**options))
    step = inspection.first_step(module, inspection.sources_of(module, "train"), "train")
    assert step is not None
    module.prepare_data()
    module.setup("fit")
    loader = module.train_dataloader()
    batch = next(iter(loader))
    assert step.steps == len(loader)
    seen = sorted((m.rows, m.learnt, round(m.cost, 3)) for m in step.microbatches)
    real = [
        (len(m.media_positions), len(m.labels), round(sum(item.cost for item in m.media), 3))
        for m in batch.microbatches
    ]
    assert seen == sorted(real)
    assert 0 < step.used <= 1


def test_what_cannot_be_used_is_counted_by_its_reason(tmp_path: Path) -> None:
    records = [
        {"messages": said("<image>a", "b"), "images": ["no.png"]},
        {"messages": said("a", "b")},
        {"messages": said("a", "b" * 500)},
        {"messages": said("a", "b" * 600)},
        {"messages": said("a", "")},
    ]
    module = data(write_jsonl(tmp_path / "a.jsonl", records))
    (view,) = inspection.sources_of(module, "train")
    assert view.usable == [1]
    reasons = view.reasons()
    assert [count for _, count in reasons] == [2, 1, 1]
    assert reasons[0][0].startswith("has N tokens, more than a microbatch may have")
    assert {"no.png" in reasons[1][0] or "no.png" in reasons[2][0]} == {True}
    assert inspection.evenly_chosen([view], 5) == [(view, 1)]


def test_of_streams_the_start_is_shown(tmp_path: Path) -> None:
    path = write_mixed(tmp_path, 10)
    stream = SourceStream(data(path).sources("train")[0], shuffle=False)  # type: ignore[arg-type]
    module = data(path, train=[stream], mixture=MixtureOptions(steps_per_epoch=2))
    views = inspection.sources_of(module, "train", stream_examples=4)
    (view,) = views
    assert view.stream
    assert len(view.measured) == 4
    assert inspection.first_step(module, views, "train") is None
    assert len(shown(module)) == 10


def test_examples_are_chosen_from_all_sources(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{k}.jsonl", [{"messages": said("a", "b")}] * n) for k, n in enumerate([9, 1, 4])]
    sources = [data(path).sources("train")[0] for path in paths]
    module = data(paths[0], train=sources)
    views = inspection.sources_of(module, "train")
    found = [(views.index(view), index) for view, index in inspection.evenly_chosen(views, 5)]
    assert found == [(0, 0), (0, 8), (1, 0), (2, 0), (2, 3)]
