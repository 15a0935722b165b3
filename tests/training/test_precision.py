"""Every precision that Lightning offers for ordinary layers, on several ranks and in one process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from lightning.pytorch.plugins import BitsandbytesPrecision, MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode

from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.contracts.precision import converted
from bigmac_lightning.runtime.autocast import _keeps_graphs
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.refusals import check_settings
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.ranks import run_ranks
from tests.toy import ToyData, ToyModule, split_layers, toy_batch
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

TOLERANCES = {
    "32-true": 2e-6,
    "64-true": 1e-13,
    "16-mixed": 2e-3,
    "bf16-mixed": 2e-3,
    "bf16-true": 5e-2,
    "16-true": 5e-3,
}


def _arguments(precision: str) -> dict[str, Any]:
    """Lightning turns 16-mixed into bf16 on the CPU, unless it is given the plugin."""
    if precision != "16-mixed":
        return {"precision": precision}
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))]}


def _fit(trainer: Any) -> tuple[dict[str, torch.Tensor], list[float], dict[str, float]]:
    module = ToyModule(optimizer="sgd", lr=0.05)
    data = ToyData(steps=6, microbatches=5, text_only=(1, 3))
    trainer.fit(module, data)
    trained = weights(module)
    (validated,) = trainer.validate(module, data, verbose=False)
    assert all(torch.isfinite(sample).all() for batch in trainer.predict(module, data) for sample in batch)
    return trained, module.losses, validated


def _fit_on_rank(rank: int, world: int, precision: str, strategy: dict[str, Any]) -> Any:
    return _fit(pipeline_trainer(world, strategy, max_epochs=1, **_arguments(precision)))


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(
    ("world", "strategy"),
    [(1, {}), (2, {"policy": "recompute"}), (3, {"backbone": "zb1p"}), (2, {"backbone": "gpipe", "policy": "upfront"})],
)
def test_against_auto(precision: str, world: int, strategy: dict[str, Any]) -> None:
    tolerance = TOLERANCES[precision]
    expected, losses, validated = _fit(plain_trainer(max_epochs=1, **_arguments(precision)))
    for found, found_losses, found_validated in on_ranks(world, _fit_on_rank, world, precision, strategy):
        assert {value.dtype for value in found.values()} <= {value.dtype for value in expected.values()}
        assert found_losses == pytest.approx(losses, rel=max(tolerance, 1e-13))
        assert_close({k: v.double() for k, v in found.items()}, {k: v.double() for k, v in expected.items()}, tolerance)
        assert found_validated == pytest.approx(validated, rel=10 * tolerance, abs=0.1 * (tolerance > 1e-3))


def test_double_precision_is_double() -> None:
    """No step of the way is single: the loss against a run in float64 by hand."""
    module = ToyModule()
    module.configure_model()
    module.double()
    batch = toy_batch(3, PipelineLayout())
    single = ToyModule()
    single.configure_model()
    assert module.sum_dtype == torch.float64
    loss, rounded = (model.pipeline(batch).loss.detach() for model in (module, single))
    assert loss.dtype == torch.float64
    assert float(loss) != float(rounded)
    assert float(loss) == pytest.approx(float(rounded), rel=1e-6)


def _half(
    rank: int, size: int, microbatches: int, float32: bool | None, text_only: tuple[int, ...] = ()
) -> dict[str, torch.Tensor]:
    trainer = pipeline_trainer(size, {"float32_gradients": float32}, max_epochs=1, precision="bf16-true")
    module, found = _Records(), dict[str, torch.Tensor]()
    module.found = found
    trainer.fit(module, _Same(steps=1, microbatches=microbatches, targets=False, text_only=text_only))
    return found


class _Same(ToyData):
    """`text_only` in all batches."""

    def collate(self, indices: list[int]) -> Batch:
        assert self.trainer is not None
        layout = self.layout
        return toy_batch(self.microbatches, layout, seed=indices[0], text_only=self.text_only, **self.kwargs)


class _Records(ToyModule):
    """Keeps its gradients as the optimizer gets them."""

    found: dict[str, torch.Tensor]

    def configure_model(self) -> None:
        with _DtypeContextManager(torch.float32):  # draws the same numbers whatever the precision is
            super().configure_model()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in self.parameters())
        self.found.update({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})


def _true_gradients(microbatches: int) -> dict[str, torch.Tensor]:
    """In float64, of the weights and data that bfloat16 makes of them."""
    module = _Records()
    module.configure_model()
    module.to(torch.bfloat16).to(torch.float64)
    batch = toy_batch(microbatches, PipelineLayout(), targets=False)
    for microbatch in batch:
        microbatch.media = [converted(item, torch.bfloat16) for item in microbatch.media]
    module.pipeline(batch).loss.backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def _error(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor], name: str) -> float:
    return float((found[name].double() - true[name]).norm() / true[name].norm())


def test_many_gradients_are_summed_up_in_float32() -> None:
    """By default, so that a sum of 64 parts is as good as its parts; in bfloat16 their last digits get lost."""
    true, name = _true_gradients(64), "llm.head.weight"
    by_default, forced, without = (_merged(on_ranks(2, _half, 2, 64, wanted)) for wanted in (None, True, False))
    assert torch.equal(by_default[name], forced[name])
    assert _error(by_default, true, name) < 6e-3
    assert _error(without, true, name) > 2 * _error(by_default, true, name)
    few = [_merged(on_ranks(2, _half, 2, 4, wanted)) for wanted in (None, False)]
    assert torch.equal(few[0][name], few[1][name])


def test_a_rank_without_items_takes_part_in_float32() -> None:
    """One microbatch has media, and few enough for some ranks to have none."""
    one, *others = on_ranks(3, _half, 3, 9, None, tuple(range(8)))
    used = [name for name in one if name.startswith("encoders")]
    assert used
    for other in others:
        assert all(torch.equal(one[name], other[name]) for name in used)
    assert any(one[name].any() for name in used)


def _merged(by_rank: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: value for rank in by_rank for name, value in rank.items()}


class _Casts(TorchDispatchMode):
    """Counts casts of tensors of a shape to bfloat16."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.count += tuple(args[0].shape) == self.shape
        return func(*args, **kwargs)


def _autocast(rank: int, policy: str, backbone: str) -> tuple[dict[str, torch.Tensor], int]:
    mesh = build_mesh(torch.device("cpu"), 1, 2, range(2))
    module = ToyModule()
    module.part = part_of(rank, split_layers(4, 2), range(2))
    module.configure_model()
    context = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    runner = PipelineRunner(module, mesh, PipelineOptions(ScheduleOptions(policy, backbone)), context)
    with _Casts((36, 12)) as casts:  # of the first matrix of a layer's MLP
        runner(toy_batch(6, runner.layout, text_only=(1, 2)), "train")
    reduce_gradients(runner.places, mesh)
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}, casts.count


@pytest.mark.parametrize(("policy", "backbone"), [("nested", "1f1b"), ("recompute", "gpipe"), ("upfront", "zb1p")])
def test_autocast_casts_a_weight_once_in_a_step(policy: str, backbone: str) -> None:
    """And gradients are those of one process, where the cache lives as long."""
    module = ToyModule()
    module.configure_model()
    batch = toy_batch(6, PipelineLayout(), text_only=(1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module.pipeline(batch).loss
    loss.backward()
    for gradients, casts in run_ranks(2, _autocast, policy, backbone):
        assert casts == 2  # layers
        for name, gradient in gradients.items():
            expected = module.get_parameter(name).grad
            assert expected is not None
            assert (gradient - expected).norm() <= 2e-2 * expected.norm(), name


def test_casts_without_gradients_lead_to_the_weight() -> None:
    """What the cache over a step relies on, and asks this version of torch about."""
    assert _keeps_graphs("cpu")


class _OwnAutocast(ToyModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().training_step(batch, batch_idx)


def _fit_own(trainer: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    module = _OwnAutocast(optimizer="sgd")
    trainer.fit(module, ToyData(steps=3))
    return weights(module), module.losses


def _fit_own_on_rank(rank: int) -> Any:
    return _fit_own(pipeline_trainer(2, max_epochs=1))


def test_autocast_in_the_users_step() -> None:
    """It is on in forwards and off in backwards, as in one process."""
    expected, losses = _fit_own(plain_trainer(max_epochs=1))
    exact = ToyModule(optimizer="sgd")
    plain_trainer(max_epochs=1).fit(exact, ToyData(steps=3))
    assert losses != pytest.approx(exact.losses, rel=1e-5)
    for found, found_losses in on_ranks(2, _fit_own_on_rank):
        assert found_losses == pytest.approx(losses, rel=1e-3)
        assert_close(found, expected, 1e-2)


def test_a_precision_that_replaces_layers_is_refused() -> None:
    """Lightning itself lets it be made on a GPU alone."""
    plugin, trainer = object.__new__(BitsandbytesPrecision), plain_trainer()
    with pytest.raises(ValueError, match="BitsandbytesPrecision replaces layers"):
        check_settings(trainer, ToyModule(), plugin, None)


class _Overflows(ToyModule):
    """In one step, in a weight that one rank holds."""

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 1:
            for name, parameter in self.named_parameters():
                if name == "llm.norm.weight":
                    assert parameter.grad is not None
                    parameter.grad.fill_(torch.inf)


def _fit_overflowing(trainer: Any) -> tuple[dict[str, torch.Tensor], float, int]:
    module = _Overflows()
    trainer.fit(module, ToyData(steps=6))
    steps = sum(int(state["step"]) for state in trainer.optimizers[0].state.values()) // len(
        trainer.optimizers[0].state
    )
    return weights(module), trainer.precision_plugin.scaler.get_scale(), steps


def _fit_overflowing_on_rank(rank: int) -> tuple[dict[str, torch.Tensor], float, int]:
    return _fit_overflowing(pipeline_trainer(2, max_epochs=1, **_arguments("16-mixed")))


def test_all_ranks_skip_a_step_that_overflows_on_one() -> None:
    expected, scale, steps = _fit_overflowing(plain_trainer(max_epochs=1, **_arguments("16-mixed")))
    assert scale == 2.0**9
    for found, found_scale, found_steps in on_ranks(2, _fit_overflowing_on_rank):
        assert found_scale == scale
        assert found_steps == steps
        assert_close(found, expected, TOLERANCES["16-mixed"])


class _Fused(ToyModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), fused=True)


def _fit_fused(rank: int) -> str:
    try:
        pipeline_trainer(2, max_steps=1, **_arguments("16-mixed")).fit(_Fused(), ToyData(steps=1))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def test_optimizers_that_look_for_overflows_themselves_are_refused() -> None:
    for message in on_ranks(2, _fit_fused):
        assert message.startswith("AdamW(fused=True) looks for overflows of float16 itself")


class _Single(ToyModule):
    """Has float32 weights until the precision converts them, as models of transformers have."""

    def configure_model(self) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        super().configure_model()
        torch.set_default_dtype(before)


def _saved_and_read(rank: int, folder: Path) -> bool:
    trainer, module = pipeline_trainer(2, max_steps=2, precision="64-true"), _Single()
    trainer.fit(module, ToyData())
    trainer.save_checkpoint(folder / "run.ckpt")
    trainer.strategy.open_module()  # pyright: ignore[reportAttributeAccessIssue]
    saved = weights(module)
    trainer, module = pipeline_trainer(2, precision="64-true"), _Single()
    trainer.validate(module, ToyData(), ckpt_path=folder / "run.ckpt", verbose=False)
    return all(torch.equal(value, saved[name]) for name, value in weights(module).items())


def test_float64_weights_are_read_as_such(tmp_path: Path) -> None:
    assert on_ranks(2, _saved_and_read, tmp_path) == [True, True]
