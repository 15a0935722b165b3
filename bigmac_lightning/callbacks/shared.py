"""What callbacks need to know of a Trainer and its module, and where they write files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl

from bigmac_lightning.checkpoints.remote import Place, at
from bigmac_lightning.contracts.module import PipelineModule


def checked(callback: pl.Callback, module: pl.LightningModule) -> PipelineModule:
    """
    Raises:
        TypeError: the module is not a `PipelineModule`.
    """
    if not isinstance(module, PipelineModule):
        raise TypeError(
            f"{type(callback).__name__} is for a PipelineModule, not for {type(module).__name__}: remove it"
        )
    return module


def replicas_of(trainer: pl.Trainer) -> tuple[int, int]:
    """The number of data-parallel replicas, and the index of the one that this process belongs to."""
    place: dict[str, int] = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    return place["num_replicas"], place["rank"]


def folder_of(trainer: pl.Trainer, dirpath: str | None) -> Place:
    """The folder for files: `dirpath`, or else the logger's directory. Collective, as that directory is rank 0's."""
    return at(dirpath or trainer.log_dir or trainer.default_root_dir)


@contextmanager
def filled(folder: Place) -> Iterator[Path]:
    """A local folder to write files into: this one, or if it is remote another one, from which they are uploaded."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with TemporaryDirectory() as local:
        yield Path(local)
        for file in Path(local).iterdir():
            (folder / file.name).upload(file)
