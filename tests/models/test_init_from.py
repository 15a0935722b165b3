"""Weights of an earlier run to start from: of any strategy and number of ranks, whole or by component, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.models import HFDecoder, HFVisionEncoder, MultimodalLM
from tests.cli.test_export import ZooData
from tests.models import zoo
from tests.models.parts import flow
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

FAMILY = "qwen3_vl"  # tied embeddings, so that two ranks hold a copy each


def tensors(module: MultimodalLM) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters(remove_duplicate=False)}


def module_of(folder: Path, **changes: Any) -> MultimodalLM:
    return MultimodalLM.from_pretrained(str(folder / FAMILY), learning_rate=1e-2, schedule="constant", **changes)


def _train(rank: int, world: int, folder: Path, init_from: str | None, name: str | None) -> dict[str, Tensor]:
    """One epoch, saved as `name`; without one nothing is learnt. Returns: this rank's weights."""
    module = module_of(folder, init_from=None if init_from is None else str(folder / init_from))
    if name is None:
        module.learning_rate = 0.0
    trainer = pipeline_trainer(world, max_epochs=1, limit_val_batches=0)
    trainer.fit(module, ZooData(FAMILY))
    assert trainer.global_step == 3, "starts at its own first step"
    if name is not None:
        trainer.save_checkpoint(folder / name)
    return tensors(module)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with ``ranks1.ckpt`` of one rank, a directory, and ``plain.ckpt`` of no pipeline, a file; their
    weights."""
    folder = tmp_path_factory.mktemp("trained")
    zoo.save(FAMILY, folder)
    (weights,) = on_ranks(1, _train, 1, folder, None, "ranks1.ckpt")
    module = module_of(folder, init_from=str(folder / "ranks1.ckpt"))
    trainer = plain_trainer(max_epochs=1, limit_train_batches=0, limit_val_batches=0)
    trainer.fit(module, ZooData(FAMILY))
    trainer.save_checkpoint(folder / "plain.ckpt")
    start = module_of(folder)
    start.configure_model()
    moved = [name for name, tensor in start.state_dict().items() if not torch.equal(tensor, weights[name])]
    assert len(moved) > 0.9 * len(weights)
    return folder, weights


def _start(rank: int, folder: Path) -> list[dict[str, Tensor]]:
    return [_train(rank, 2, folder, name, None) for name in ("ranks1.ckpt", "plain.ckpt")]


def test_two_ranks_start_from_one(trained: tuple[Path, dict[str, Tensor]]) -> None:
    """Of a directory and of a file: weights alone, each rank its own."""
    folder, expected = trained
    seen: set[str] = set()
    for starts in on_ranks(2, _start, folder):
        for start in starts:
            assert 0 < len(start) < len(expected)
            seen |= start.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in start.items())
    assert seen == expected.keys()


def test_a_rank_reads_its_own_tensors_alone(trained: tuple[Path, dict[str, Tensor]]) -> None:
    """As the other rank's file may even be gone by then."""
    folder, _ = trained
    parts = on_ranks(2, _train, 2, folder, None, "ranks2.ckpt")
    weights = CheckpointWeights(folder / "ranks2.ckpt")
    weights.check()
    (folder / "ranks2.ckpt" / "__1_0.distcp").unlink()
    mine, other = (f"llm.model.language_model.layers.{layer}.self_attn.k_norm.weight" for layer in (0, 4))
    into = torch.empty_like(parts[0][mine], dtype=torch.bfloat16)
    weights.read_into({mine: into})
    assert torch.equal(into, parts[0][mine].to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"__1_0\.distcp"):
        weights.read_into({other: torch.empty_like(parts[1][other])})
    with pytest.raises(ValueError, match=r"is not whole: .*__1_0\.distcp is missing"):
        CheckpointWeights(folder / "ranks2.ckpt")


def test_some_components_of_another_model(trained: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = trained
    checkpoint = str(folder / "ranks1.ckpt")
    module = module_of(folder, generators={"image": flow()}, init_from={"encoders.image": checkpoint})
    module.configure_model()
    fresh = module_of(folder)
    fresh.configure_model()
    for name in fresh.state_dict():
        source = expected if name.startswith("encoders.image.") else fresh.state_dict()
        assert torch.equal(module.state_dict()[name], source[name]), name


@pytest.mark.parametrize(
    ("changes", "init_from", "message"),
    [
        ({"generators": {"image": flow()}}, "ranks1.ckpt", r"generators\.image\.connector\.weight: missing"),
        ({"generators": {"image": flow()}}, {"generators.image": "ranks1.ckpt"}, "generators.image cannot start from"),
        ({}, {"encoders.sound": "ranks1.ckpt"}, r"'encoders.sound' is no component; there are \['llm', 'encoders.im"),
        ({}, "nowhere.ckpt", "there is no checkpoint at .*nowhere.ckpt"),
        ({}, ".", r"trained\d* is not a checkpoint directory"),
    ],
)
def test_what_does_not_fit(
    changes: dict[str, Any], init_from: Any, message: str, trained: tuple[Path, dict[str, Tensor]]
) -> None:
    folder, _ = trained
    paths = (
        {name: str(folder / path) for name, path in init_from.items()}
        if isinstance(init_from, dict)
        else str(folder / init_from)
    )
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        module_of(folder, init_from=paths, **changes).configure_model()


def test_another_shape_is_refused(trained: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = trained
    config = zoo.MODELS[FAMILY].config()
    config.text_config.num_hidden_layers = 4
    config.text_config.intermediate_size = 40
    module = MultimodalLM(HFDecoder(config), {"image": HFVisionEncoder(config)}, init_from=str(folder / "ranks1.ckpt"))
    with pytest.raises(ValueError, match=r"\(48, 32\) in the checkpoint, \(40, 32\) in the model") as error:
        module.configure_model()
    assert "and 18 more" in str(error.value)


def _resume(rank: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first = _train(rank, 1, folder, "plain.ckpt", "second.ckpt")
    again = module_of(folder, init_from=str(folder / "plain.ckpt"))
    pipeline_trainer(1, max_epochs=1).fit(again, ZooData(FAMILY), ckpt_path=str(folder / "second.ckpt"))
    return first, tensors(again)


def test_resuming_comes_after(trained: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = trained
    ((first, again),) = on_ranks(1, _resume, folder)
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.items())
