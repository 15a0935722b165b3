"""Every documented format, read from a file as its project publishes it: messages, labels, and unknown keys."""

from pathlib import Path
from typing import Any

import pytest

from bigmac_lightning.datamodules import Example, ExampleError, Image, MultimodalDataModule, Video
from bigmac_lightning.datamodules.packing.measuring import encoded
from tests.datamodules import format_table
from tests.datamodules.examples import VISUAL
from tests.datamodules.format_table import FORMATS, Format, Told, source_of, stream_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def told(example: Example) -> Told:
    names = {Image: "image", Video: "video"}

    def text(part: Any) -> str:
        if isinstance(part, str):
            return part
        name = part.file.name.split("/")[-1]
        return f"{names[type(part)]}:{name.split(', ')[-1].split(': ')[-1]}"

    return [(message.role, [text(part) for part in message.parts]) for message in example.messages]


def examples(given: Format, folder: Path, **settings: Any) -> list[Example]:
    """Of the source, and of the stream where there is one."""
    source = source_of(given, folder, **settings)
    made = [source[0]]
    if given.source == "HFDataset":
        example, _ = next(stream_of(folder, **settings).read(0))
        if isinstance(example, ExampleError):
            raise example
        made.append(example)
    return made


ENCODER = MultimodalDataModule(visual=VISUAL).encoder


@pytest.mark.parametrize("given", FORMATS, ids=lambda given: given.id)
def test_is_read_as_it_is_meant(given: Format, tmp_path: Path) -> None:
    for example in examples(given, tmp_path):
        assert told(example) == given.told
        assert [tool["function"]["name"] for tool in example.tools] == list(given.tools)
        calls = [call["function"]["name"] for message in example.messages for call in message.tool_calls]
        assert calls == list(given.calls)
        if given.tools:  # which the template here does not take
            continue
        sample, sizes = encoded(example, ENCODER, 10_000, "it", learns=True)
        labels = [token for token, wanted in zip(sample.tokens, sample.labelled, strict=True) if wanted]
        assert ENCODER.tokenizer.decode(labels) == given.learnt
        assert len(sizes) == len(example.media)


@pytest.mark.parametrize("given", FORMATS, ids=lambda given: given.id)
def test_unknown_keys_are_refused_by_name(given: Format, tmp_path: Path) -> None:
    if given.source == "WebDatasetTars":
        records: list[dict[str, Any]] = [{**given.record, "origin": "web"}]
        if isinstance(given.record.get("json"), dict) and not given.settings:
            records.append({**given.record, "json": {**given.record["json"], "origin": "web"}})
    else:
        records = [{**given.record, "origin": "web"}]
    source = source_of(given, tmp_path, records)
    for index in range(len(records)):
        with pytest.raises(ExampleError, match=r"has \.?origin"):
            source[index]
    ignore = [*given.settings.get("ignore", ()), "origin"]
    assert told(source_of(given, tmp_path, records, ignore=ignore)[0]) == given.told


@pytest.mark.parametrize(
    "given", [f for f in FORMATS if f.source in ("MessagesJSONL", "LlavaJSON")], ids=lambda f: f.id
)
def test_unknown_keys_of_messages(given: Format, tmp_path: Path) -> None:
    key = next((key for key in ("messages", "conversations", "prompt") if key in given.record), None)
    if key is None:
        return
    first, *others = given.record[key]
    with pytest.raises(ExampleError, match=r"has mood in message \d, which is not known"):
        source_of(given, tmp_path, [{**given.record, key: [{**first, "mood": "glad"}, *others]}])[0]


def test_the_documented_formats_are_those_that_are_tested() -> None:
    assert format_table.PAGE.read_text() == format_table.page(), "run: python -m tests.datamodules.format_table"
