"""A modality that the documentation adds: signals of sensors, from every format to a training in pipelines."""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigmac_lightning import Encoder
from bigmac_lightning.datamodules import (
    Example,
    ExampleError,
    Image,
    LlavaJSON,
    MediaPart,
    Message,
    MessagesJSONL,
    Modality,
    MultimodalDataModule,
    Size,
    Video,
    WebDatasetTars,
    example_of,
    register,
)
from bigmac_lightning.datamodules.media.modalities import MODALITIES
from bigmac_lightning.models import HFDecoder, VisionEncoder
from tests.datamodules.examples import LoadingOptions, model, pictures, said, write_jsonl
from tests.models.parts import decoder_config
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
KINDS = {"rising": [[k, 1.0] for k in range(9)], "falling": [[-k, 1.0] for k in range(5)], "still": [[0.0, 2.0]]}


def page(whole: bool = False) -> dict[str, Any]:
    """What the page defines; on request, also its DataModule, which is of a file in the current folder."""
    code = next(text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "register(" in text)
    names: dict[str, Any] = {"__name__": __name__}
    exec(code if whole else code.partition("\ndatamodule = ")[0], names)
    return names


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Other tests have the table as it was."""
    before = dict(MODALITIES)
    yield
    MODALITIES.clear()
    MODALITIES.update(before)


class SignalEncoder(Encoder):
    def __init__(self, patch: int = 4, channels: int = 2, width: int = 32) -> None:
        super().__init__()
        self.width = width
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(patch * channels, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, pixels: list[Tensor]) -> Tensor:
        return self.layers(torch.cat(pixels))


def _csv(rows: list[list[float]]) -> bytes:
    return "".join(",".join(map(str, row)) + "\n" for row in rows).encode()


def write(folder: Path, number: int = 12) -> Path:
    """Records with signals, and some with an image as well."""
    records = []
    for i in range(number):
        kind = list(KINDS)[i % 3]
        (folder / f"{i}.csv").write_bytes(_csv(KINDS[kind] * (1 + i % 2)))
        record: dict[str, Any] = {"messages": said("<signal>What is it?", kind), "signal": f"{i}.csv"}
        if i % 4 == 3:
            (folder / f"{i}.png").write_bytes(pictures(i + 1)[i].read_bytes())
            record = {"messages": said("<image> and <signal>", kind), "signals": [f"{i}.csv"], "image": f"{i}.png"}
        records.append(record)
    return write_jsonl(folder / "sensors.jsonl", records)


def module() -> Any:
    config = decoder_config(vocab_size=263, num_hidden_layers=3)
    tower = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "hidden_size": 24}
    tower |= {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoders = {"image": VisionEncoder(tower, 32), "signal": SignalEncoder()}
    return model(llm=HFDecoder(config), encoders=encoders, generators={})


def datamodule(folder: Path, names: dict[str, Any], **changes: Any) -> MultimodalDataModule:
    from tests.datamodules.examples import VISUAL

    given: dict[str, Any] = {"train": [MessagesJSONL(folder / "sensors.jsonl")], "visual": VISUAL, "token_budget": 160}
    given |= {"microbatches": 2, "media": {"signal": names["SignalProcessor"]()}}
    return MultimodalDataModule(**given, loading=LoadingOptions(cache_dir=folder / "measured"), **changes)


def _losses(trainer: Any, folder: Path) -> Any:
    from tests.datamodules.test_multimodal_training import Losses

    losses, trained = Losses(), module()
    trainer.callbacks.append(losses)
    trainer.fit(trained, datamodule(folder, page()))
    return losses.losses


def _fit(rank: int, world: int, folder: Path) -> Any:
    return _losses(pipeline_trainer(world, {}, max_epochs=2), folder)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = page(whole=True)
    steps = MODALITIES["signal"].measure
    assert steps(io.BytesIO(b"1,2\n3,4\n\n"), None) == Size(1, 1, frames=2)  # pyright: ignore[reportArgumentType]
    made = names["datamodule"]
    example = Example([Message("user", [names["Signal"](made._sources["train"][0][0].media[0].file)])])
    sample = made.encoder.encode(example, [Size(1, 1, frames=9)], "x")
    assert (sample.media[0].encoder, sample.media[0].rows) == ("signal", 3)
    assert made.encoder.tokenizer.decode(sample.tokens[sample.media[0].start]) == "<|signal_pad|>"
    assert sample.media[0].load().tolist()[-1] == [8.0, 1.0] + [0.0] * 6  # the last step, and padding


def test_training_equals_one_process(tmp_path: Path) -> None:
    write(tmp_path)
    expected = _losses(plain_trainer(max_epochs=2), tmp_path)
    assert len(expected) > 2
    for found in on_ranks(2, _fit, 2, tmp_path):
        assert found == pytest.approx(expected, rel=1e-5)


def test_all_formats_know_it(tmp_path: Path) -> None:
    write(tmp_path, 4)
    names = page()
    kind = names["Signal"]
    (tmp_path / "list.json").write_text(json.dumps([{"signal": "0.csv", "caption": "rising"}]))
    [example] = list(LlavaJSON(tmp_path / "list.json"))
    assert [type(item) for item in example.media] == [kind]
    members = {"1.csv": _csv(KINDS["still"]), "1.txt": b"still", "1.png": pictures(1)[0].read_bytes()}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    [example] = list(WebDatasetTars([str(tmp_path / "a.tar")]))
    assert [type(item) for item in example.media] == [Image, kind]
    parts = [{"type": "signal", "path": "0.csv"}, {"type": "text", "text": "?"}]
    example = example_of({"messages": [{"role": "user", "content": parts}]}, media_root=tmp_path)
    assert type(example.media[0]) is kind
    signal = example.media[0]
    example = example_of({"messages": said("a <signal>", "b")}, others={"signal": [signal]})
    assert example.media == [signal]
    with pytest.raises(ExampleError, match="2 <signal> placeholders for 1 signals"):
        example_of({"messages": said("<signal> <signal>", "b")}, others={"signal": [signal]})


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    names, signal = page(), None
    signal = names["Signal"]
    write(tmp_path, 1)
    made = datamodule(tmp_path, names)
    example = made._sources["train"][0][0]  # pyright: ignore[reportIndexIssue]
    assert isinstance(example.media[0], signal)
    without = MultimodalDataModule()
    with pytest.raises(ExampleError, match=r'has signal items, but .* no processor .*media={"signal"'):
        without.encoder.encode(example, [Size(1, 1, 9)], "x")
    with pytest.raises(
        ValueError, match=r"media names 'sonar', which is no modality: known are image, video, .*signal"
    ):
        MultimodalDataModule(media={"sonar": names["SignalProcessor"]()})
    with pytest.raises(ValueError, match="media names 'image': images and videos are prepared by visual"):
        MultimodalDataModule(media={"image": names["SignalProcessor"]()})
    with pytest.raises(ExampleError, match="with a part of type 'sonar': known are text, image, video"):
        example_of({"messages": [{"role": "user", "content": [{"type": "sonar", "path": "a"}]}]})

    class Sonar(MediaPart):
        pass

    with pytest.raises(ExampleError, match="has a Sonar, which is of no modality"):
        made.encoder.encode(Example([Message("user", [Sonar(example.media[0].file)])]), [Size(1, 1, 9)], "x")
    steps = MODALITIES["signal"].measure
    for wrong, message in (
        (Modality("signal", Sonar, steps), "has the name or the class of another"),
        (Modality("sonar", Video, steps), "has the name or the class of another"),
        (Modality("sonar", Sonar, steps, (".png", ".x")), "files .png are of the modality 'image'"),
    ):
        with pytest.raises(ValueError, match=message):
            register(wrong)
    for name in ("text", "Sonar", "sonar_url", "two words"):
        with pytest.raises(ValueError, match=f"name='{name}'.*give a word in lower case that is no key of messages"):
            Modality(name, Sonar, steps)
