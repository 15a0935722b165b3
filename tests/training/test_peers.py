"""Ranks of several processes under the Trainer: weights after some steps, checkpoints, and sizes that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bigmac_lightning import BigMacStrategy
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.models import MultimodalLM
from tests.layouts.cases import Case
from tests.layouts.models import Data, module_of
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer, weights, whole

STEPS = 2
CASES = {
    "tp-fsdp": Case((1, 2, 1, 2), "tied", "fsdp", "fsdp", offload=True),
    "cp-tp": Case((1, 1, 2, 2), "tied"),
    "dp-cp": Case((2, 1, 2, 1), "tied"),
    "ep": Case((2, 1, 1, 2), "spread experts", stages="fsdp"),
    "tp-experts": Case((2, 1, 1, 2), "experts", stages="zero1", offload=True),
}


def module(case: Case) -> MultimodalLM:
    """With SGD: AdamW would make as large a step where a gradient is nothing but rounding (biases of keys)."""

    def configure_optimizers() -> Any:
        return torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.05, momentum=0.9)

    made: Any = module_of(case)
    made.configure_optimizers = configure_optimizers
    return made


def _fit(
    rank: int, case: Case, replicas: int, epochs: int, start: Path | None, save: Path | None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    strategy = {**case.strategy_arguments(), "save_distributed_checkpoint": case != CASES["dp-cp"]}
    trainer = pipeline_trainer(case.world, strategy, max_epochs=epochs, gradient_clip_val=0.5)
    made = module(case)
    trainer.fit(made, Data(case, STEPS, replicas), ckpt_path=start)
    if save is not None:
        trainer.save_checkpoint(save)
    trainer.strategy.open_module()  # pyright: ignore[reportAttributeAccessIssue]
    if start is not None:
        _check_slices(made, start)
    return weights(made), {name: float(value) for name, value in trainer.callback_metrics.items()}


def _check_slices(made: MultimodalLM, path: Path) -> None:
    """Weights that are read into slices are those that are read whole, as `init_from` does it."""
    stored = CheckpointWeights(path)
    own = {n: torch.empty_like(tensor) for n, tensor in made.state_dict().items() if n in stored.shapes}
    stored.read_into(own)
    expected = stored.read()
    assert len(own) > 10
    for name, tensor in own.items():
        assert torch.equal(whole(tensor), expected[name]), name


def expected(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    made = module(case)
    trainer = plain_trainer(max_epochs=2, gradient_clip_val=0.5)
    trainer.fit(made, Data(case, STEPS, 2))
    return weights(made), {name: float(value) for name, value in trainer.callback_metrics.items()}


WIDE = pytest.mark.wide


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tp-fsdp", "dp-cp"),
        pytest.param("ep", "tp-experts", marks=WIDE),
        pytest.param("dp-cp", "cp-tp", marks=WIDE),
        pytest.param("cp-tp", "tp-fsdp", marks=WIDE),
    ],
)
def test_two_runs_against_one_process(before: str, after: str, tmp_path: Path) -> None:
    """The second run goes on from the first one's checkpoint, in another layout."""
    should, metrics = expected(CASES[after])
    path = tmp_path / "first.ckpt"
    on_ranks(CASES[before].world, _fit, CASES[before], 2, 1, None, path)
    for found, logged in on_ranks(CASES[after].world, _fit, CASES[after], 2, 2, path, tmp_path / "second.ckpt"):
        names = {name: name if name in should else "llm.model.embed_tokens.weight" for name in found}
        for name, value in found.items():
            error = (value - should[names[name]]).norm() / should[names[name]].norm().clamp(min=1e-2)
            assert error < 1e-5, f"{name}: {error:.1e}"  # biases of keys stay near 0, as their gradients are rounding
        for name, value in metrics.items():
            assert logged[name] == pytest.approx(value, rel=1e-3, abs=2e-3), name
    (validated,) = plain_trainer().validate(
        module(CASES[after]), Data(CASES[after], STEPS, 2), ckpt_path=tmp_path / "second.ckpt", verbose=False
    )
    for name, value in validated.items():
        assert value == pytest.approx(metrics[name], rel=1e-3, abs=2e-3), name


def _with_a_wrong_plan(rank: int, case: Case) -> str:
    trainer = pipeline_trainer(case.world, {"tensor_parallel_size": 2}, max_steps=1, limit_val_batches=0)
    made: Any = module(case)
    division = made.llm._division
    division.tensor_plan = {n: s for n, s in division.tensor_plan.items() if "layers.1.self_attn.k_norm" not in n}
    try:
        trainer.fit(made, Data(case, STEPS, 1))
    except RuntimeError as error:
        return str(error)
    return "nothing was found"


def test_a_plan_that_leaves_out_a_parameter() -> None:
    """Each tensor peer then has a part of its gradient, which no sum would ever put right."""
    for message in on_ranks(2, _with_a_wrong_plan, Case((1, 1, 1, 2))):
        assert message.startswith("the gradients of model.layers.1.self_attn.k_norm.weight and 0 more parameters")


def _refused(rank: int, sizes: dict[str, int]) -> str:
    trainer = pipeline_trainer(2, sizes, max_steps=1)
    case = Case((1, 1, 1, 1))
    made = module(case)
    try:
        trainer.fit(made, Data(case, STEPS, 1))
    except ValueError as error:
        assert all(parameter.is_meta for parameter in made.llm.parameters())
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor_parallel_size": 2, "expert_parallel_size": 2}, "qwen3"),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "x 2 tensor and context peers must be 2"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    """Before any weights are made."""
    for found in on_ranks(2, _refused, sizes):
        assert message in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_parallel_size": 2, "expert_parallel_size": 4}, "expert_parallel_size=4 must be 1 or"),
        ({"context_parallel_size": 0}, "context_parallel_size=0 must be an integer of at least 1"),
    ],
)
def test_sizes_that_do_not_go_together(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BigMacStrategy(**arguments)
