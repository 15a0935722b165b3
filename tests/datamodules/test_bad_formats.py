"""Broken media in every format, at two pipeline ranks, of which only the owner finds that they are broken."""

import base64
import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.datamodules import (
    ExampleError,
    HFDataset,
    LoadingOptions,
    MessagesJSONL,
    MixtureOptions,
    MultimodalDataModule,
    PackingOptions,
    SourceError,
    WebDatasetTars,
)
from bigmac_lightning.datamodules.sources.stream import Stream
from tests.datamodules.clips import CLIPS
from tests.datamodules.examples import VISUAL, model, said, write_jsonl
from tests.datamodules.format_table import add, of, parquet, stream_of, text
from tests.datamodules.test_multimodal_training import Losses
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

NUMBER, BAD = 12, 7
"""Samples of each source, and which of them is broken."""


def jpeg(number: int) -> bytes:
    """Noise, of which the broken one ends in the middle."""
    made = io.BytesIO()
    noise = PIL.Image.effect_noise((24 + 8 * (number % 3), 24), 50 + number)
    noise.convert("RGB").save(made, "JPEG")
    return made.getvalue()[: -len(made.getvalue()) // 4] if number == BAD else made.getvalue()


def typed_parts(folder: Path) -> Any:
    for i in range(NUMBER):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    records = [
        {"messages": [of("user", [{"type": "image", "path": f"{i}.jpg"}, text("?")]), of("assistant", "a" * i + "!")]}
        for i in range(NUMBER)
    ]
    return MessagesJSONL(write_jsonl(folder / "d.jsonl", records))


def inline(folder: Path) -> Any:
    uris = ["data:image/jpeg;base64," + base64.b64encode(jpeg(i)).decode() for i in range(NUMBER)]
    records = [
        {"messages": [of("user", [{"type": "image_url", "image_url": {"url": uri}}]), of("assistant", f"{i}")]}
        for i, uri in enumerate(uris)
    ]
    return MessagesJSONL(write_jsonl(folder / "d.jsonl", records))


def write_rows(folder: Path) -> str:
    return parquet(
        folder,
        [{"messages": said("what?", f"{i}"), "images": [{"bytes": jpeg(i), "path": None}]} for i in range(NUMBER)],
    )


def columns(folder: Path) -> Any:
    return HFDataset("parquet", write_rows(folder))


def streamed_columns(folder: Path) -> Any:
    write_rows(folder)
    return stream_of(folder, shuffle=False)


def captions_in_columns(folder: Path) -> Any:
    return HFDataset("parquet", parquet(folder, [{"image": jpeg(i), "caption": f"{i}"} for i in range(NUMBER)]))


def videos_in_columns(folder: Path) -> Any:
    good, bad = CLIPS[0], next(clip for clip in CLIPS if clip.when == "decoded")
    rows = [{"caption": f"{i}", "video": (bad if i == BAD else good).write(folder).read_bytes()} for i in range(NUMBER)]
    return HFDataset("parquet", parquet(folder, rows))


def members(folder: Path) -> Any:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(NUMBER):
            add(tar, f"{i:03}.jpg", jpeg(i))
            add(tar, f"{i:03}.txt", f"a caption {i}")
    return WebDatasetTars(str(folder / "0.tar"))


MAKERS: list[Callable[[Path], Any]] = [
    typed_parts,
    inline,
    columns,
    streamed_columns,
    captions_in_columns,
    videos_in_columns,
    members,
]


def made(folder: Path, source: Any, seed: int, on_error: str = "raise", workers: int = 0) -> Any:
    given: dict[str, Any] = {"seed": seed, "on_error": on_error, "num_workers": workers}
    given["loading"] = LoadingOptions(cache_dir=folder / "measured")
    if isinstance(source, Stream):
        given |= {"mixture": MixtureOptions(steps_per_epoch=2), "packing": PackingOptions(buffer_size=NUMBER)}
    return MultimodalDataModule([source], visual=VISUAL, microbatches=3, token_budget=220, **given)


def seed_of(folder: Path, source: Any, rank: int) -> int:
    """Of a run in which a rank of two decodes the broken one."""
    for seed in range(40):
        datamodule = made(folder, source, seed)
        layout = SimpleNamespace(pipeline_layout=PipelineLayout(2, rank, 2))
        datamodule.trainer = SimpleNamespace(strategy=layout, distributed_sampler_kwargs=None)
        datamodule.setup("fit")
        loader = datamodule.loader("train")
        for batch in map(loader.collate_fn, steps(loader)):
            for microbatch in batch.microbatches:
                for item in microbatch.media:
                    name = microbatch.origins[item.origin].name
                    if item.owner == rank and f", sample {BAD}" in name:
                        return seed
    raise AssertionError(f"rank {rank} never owns it")


def steps(loader: Any) -> Iterator[Any]:
    if loader.sampler is not loader:
        return (loader.encoded[step] for step in loader.sampler)
    return islice(iter(loader.stream_steps), 2)


def outcome(trainer: Any, folder: Path, source: Any, seed: int, on_error: str, workers: int = 0) -> Any:
    losses = Losses()
    trainer.callbacks.append(losses)
    try:
        trainer.fit(model(generators={}), made(folder, source, seed, on_error, workers))
    except (ExampleError, SourceError) as error:
        return str(error)
    return losses.losses, trainer.train_dataloader.agreement.skipped


def _fit(rank: int, given: Sequence[tuple[Path, Any, int]], on_error: str, workers: int) -> list[Any]:
    return [outcome(pipeline_trainer(2, max_epochs=1, limit_val_batches=0), *each, on_error, workers) for each in given]


def test_what_only_its_owner_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every format, with the broken file at one rank or at the other."""
    check_what_only_its_owner_finds(lambda number: number % 2, tmp_path, monkeypatch)


@pytest.mark.wide
@pytest.mark.parametrize("faulty_rank", [0, 1])
def test_what_each_rank_may_find(faulty_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_what_only_its_owner_finds(lambda _: faulty_rank, tmp_path, monkeypatch)


def check_what_only_its_owner_finds(
    faulty_rank: Callable[[int], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Args:
        faulty_rank: from the number of a format, the rank that decodes the broken file.
    """
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    given: list[tuple[Path, Any, int]] = []
    for number, make in enumerate(MAKERS):
        folder = tmp_path / make.__name__
        folder.mkdir()
        source = make(folder)
        given.append((folder, source, seed_of(folder, source, faulty_rank(number))))
    raised = on_ranks(2, _fit, given, "raise", 1)
    assert raised[0] == raised[1]
    for make, error in zip(MAKERS, raised[0], strict=True):
        assert isinstance(error, str), make
        assert f", sample {BAD}" in error, make
        assert "cannot be decoded" in error, make
    skipped = on_ranks(2, _fit, given, "skip", 0)
    assert skipped[0] == skipped[1]
    for each, (losses, left_out) in zip(given, skipped[0], strict=True):
        alone, _ = outcome(plain_trainer(max_epochs=1, limit_val_batches=0), *each, "skip")
        assert left_out >= 1
        assert losses == pytest.approx(alone, rel=1e-5)
