"""Saves after the first one, which replace numbers in what torch's DCP has written."""

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from bigmac_lightning import ShardingOptions
from bigmac_lightning.checkpoints import marker
from bigmac_lightning.checkpoints.parts import Names
from bigmac_lightning.checkpoints.reading import DirectoryCheckpointIO
from bigmac_lightning.checkpoints.safe import Reader
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.training import repeating, writing
from bigmac_lightning.training.repeating import Repeating
from tests.toy import ToyData, ToyModule
from tests.training.trainers import on_ranks, pipeline_trainer


def _tensors(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    return {
        "matrix": numbers(7, 5),
        "transposed": numbers(6, 4).t(),
        "a part of something": numbers(9, 9)[2:5, 1:3],
        "channels last": numbers(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": numbers(),
        "bfloat16": numbers(3).bfloat16(),
        "double": numbers(3).double(),
        "integers": torch.randint(9, (4,), generator=random),
        "flags": numbers(5) > 0,
        "large": numbers(300, 300),
        "zeros": torch.zeros(17),
        "with gradient": numbers(2).requires_grad_(),
    }


def _save(path: Path, tensors: dict[str, Tensor], known: Repeating | None) -> None:
    names = Names(frozenset(tensors), frozenset(), {})
    checkpoint = {"state_dict": dict(tensors), "global_step": 1}
    writing.save_directory(writing.Contents.of(checkpoint, names, 0, whole=False), path, None, known)
    assert not marker.problems(path)


def _archives(path: Path) -> dict[str, dict[str, bytes]]:
    """The files in the archive of each tensor."""
    found = {}
    for index, place in Reader(path).read_metadata().storage_data.items():
        data = (path / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
        with zipfile.ZipFile(BytesIO(data)) as archive:
            assert archive.testzip() is None, "a wrong checksum"
            found[index.fqn] = {n: archive.read(n) for n in archive.namelist() if "serialization_id" not in n}
    return found


def test_the_same_is_written_as_by_dcp(tmp_path: Path) -> None:
    known = Repeating()
    _save(tmp_path / "first", _tensors(1), known)
    with mock.patch.object(writing, "dcp_save", side_effect=AssertionError("planned again")):
        _save(tmp_path / "second", _tensors(2), known)
    _save(tmp_path / "dcp", _tensors(2), None)
    assert _archives(tmp_path / "second") == _archives(tmp_path / "dcp") != _archives(tmp_path / "first")
    stored, given = CheckpointWeights(tmp_path / "second").read(), _tensors(2)
    assert stored.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(stored[name], tensor), name


@pytest.mark.parametrize(
    "other",
    [
        {"matrix": torch.ones(5, 7)},
        {"matrix": torch.ones(7, 5).double()},
        {"matrix": torch.ones(5, 7).t()},
        {"more": torch.ones(2)},
        {"matrix": None},
        {"empty": torch.ones(0)},
    ],
    ids=["shape", "type", "strides", "more", "fewer", "empty"],
)
def test_other_tensors_are_planned_again(other: dict[str, Any], tmp_path: Path) -> None:
    known = Repeating()
    _save(tmp_path / "first", _tensors(1), known)
    given = {name: tensor for name, tensor in {**_tensors(2), **other}.items() if tensor is not None}
    for number in range(2):  # once more, as DCP has now written these
        _save(tmp_path / str(number), given, known)
        stored = CheckpointWeights(tmp_path / str(number)).read()
        assert stored.keys() == given.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in given.items())


def test_unfamiliar_files_are_not_written_again(tmp_path: Path) -> None:
    """Such as those of a later version of torch."""
    known = Repeating()
    with mock.patch.object(repeating, "DESCRIPTOR", 1):
        _save(tmp_path / "first", _tensors(1), known)
    assert not known.fits({("model", name): tensor for name, tensor in _tensors(1).items()})


def _fit(rank: int, folder: Path, plain: bool) -> int:
    repeated = []
    trainer = pipeline_trainer(
        2,
        {"sharding": ShardingOptions(encoders="fsdp", generators="zero1"), "async_save": True},
        max_steps=6,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)],
        enable_checkpointing=True,
        limit_val_batches=0,
    )
    write = Repeating.write
    fits = mock.patch.object(Repeating, "fits", return_value=False)
    seen = mock.patch.object(Repeating, "write", lambda *a: (repeated.append(1), write(*a))[1])
    with fits if plain else seen:
        trainer.fit(ToyModule(tied=True), ToyData(steps=6))
    return len(repeated)


def test_ranks_write_their_shards_again(tmp_path: Path) -> None:
    assert on_ranks(2, _fit, tmp_path / "again", False) == [2, 2]
    on_ranks(2, _fit, tmp_path / "plain", True)
    for name in [path.name for path in (tmp_path / "plain").iterdir()]:
        again, plain = (DirectoryCheckpointIO().load_checkpoint(tmp_path / kind / name) for kind in ("again", "plain"))
        for one, other in (
            (again["state_dict"], plain["state_dict"]),
            *zip(
                again["optimizer_states"][0]["state"].values(),
                plain["optimizer_states"][0]["state"].values(),
                strict=True,
            ),
        ):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
