"""Users' hooks, norms and optimizers: as in one process, or refused by name."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn

from bigmac_lightning.training.refusals import check_settings
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

Fit = Callable[[Any], Any]
WORLDS: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (3, {"backbone": "zb1p"}),
    (4, {"data_parallel_size": 2, "backbone": "zbv"}),
]


def _on_rank(rank: int, world: int, strategy: dict[str, Any], kind: type[ToyModule], trainer: dict[str, Any]) -> Any:
    return _fit(pipeline_trainer(world, strategy, max_epochs=1, **trainer), kind, 1)


def _fit(trainer: Any, kind: type[ToyModule], replicas: int) -> tuple[dict[str, Tensor], list[float], Any]:
    module = kind(tied=True)
    trainer.fit(module, ToyData(steps=4, replicas=replicas))
    return weights(module), module.losses, getattr(module, "seen", None)


def _compare(kind: type[ToyModule], trainer: dict[str, Any] | None = None, tolerance: float = 2e-6) -> list[Any]:
    """What the module has seen in one process, and on each rank of each world; its weights are the same."""
    trainer, found = trainer or {}, []
    for world, strategy in WORLDS:
        replicas = strategy.get("data_parallel_size", 1)
        expected, losses, seen = _fit(plain_trainer(max_epochs=1, **trainer), kind, replicas)
        for rank, rank_losses, rank_seen in on_ranks(world, _on_rank, world, strategy, kind, trainer):
            assert rank_losses == pytest.approx(losses, rel=max(1e-5, tolerance / 20))
            assert_close(rank, expected, tolerance)
            found.append((seen, rank_seen))
    return found


class _ParameterHooks(ToyModule):
    """Hooks that would be wrong if they saw parts of a gradient, one after another."""

    def on_fit_start(self) -> None:
        self.seen: dict[str, int] = {}
        for name, parameter in self.named_parameters():
            parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3) + 1e-3)
            parameter.register_post_accumulate_grad_hook(self._count(name))

    def _count(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad.add_(parameter.grad.square())
            self.seen[name] = self.seen.get(name, 0) + 1

        return hook


def test_parameter_hooks_see_whole_gradients_once() -> None:
    for seen, rank_seen in _compare(_ParameterHooks):
        assert rank_seen
        for name, count in rank_seen.items():
            assert seen.get(name, seen["llm.embedding.weight"]) == count, name


class _Norms(ToyModule):
    """Clips by hand, in the way that works under every strategy."""

    def __init__(self, tied: bool) -> None:
        super().__init__(tied=tied, optimizer="sgd", lr=0.1)
        self.seen: list[float] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(float(self.gradient_norm()))

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


def test_norms_of_the_whole_model() -> None:
    for seen, rank_seen in _compare(_Norms):
        assert len(seen) == 4
        assert rank_seen == pytest.approx(seen, rel=1e-6)


class _Muon(ToyModule):
    """Works on one matrix at a time: exact."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Muon([p for p in self.parameters() if p.ndim == 2], lr=0.01)


def test_muon() -> None:
    _compare(_Muon, tolerance=2e-3)  # its iteration runs in bfloat16


class _Lbfgs(ToyModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters())


class _ClipsItself(ToyModule):
    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)


class _LogsNorm(ToyModule):
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log_dict(grad_norm(self, norm_type=2))


class _ClippingCallback(pl.Callback):
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def later() -> None:
            nn.utils.clip_grad_norm_(pl_module.parameters(), 1.0)

        later()


class _Synchronized(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoders["image"].norm = nn.SyncBatchNorm(3)


def _refusal(rank: int, kind: type[ToyModule], trainer: dict[str, Any]) -> str:
    try:
        pipeline_trainer(2, max_epochs=1, **trainer).fit(kind(), ToyData(steps=2))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("kind", "trainer", "message"),
    [
        (_Lbfgs, {}, "LBFGS looks at all parameters together"),
        (_ClipsItself, {}, "_ClipsItself.configure_gradient_clipping uses clip_grad_norm_"),
        (_LogsNorm, {}, "_LogsNorm.on_before_optimizer_step uses grad_norm, which would see the gradients of one rank"),
        (ToyModule, {"callbacks": [_ClippingCallback()]}, "_ClippingCallback.on_after_backward uses clip_grad_norm_"),
        (_Synchronized, {}, "encoders.image.norm is a SyncBatchNorm"),
        (ToyModule, {"sync_batchnorm": True}, "sync_batchnorm=True: ranks encode different numbers of items"),
    ],
)
def test_refused_on_all_ranks(kind: type[ToyModule], trainer: dict[str, Any], message: str) -> None:
    for found in on_ranks(2, _refusal, kind, trainer, timeout=60):
        assert message in found


def test_a_batch_norm_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    module, trainer = ToyModule(), plain_trainer()
    module.encoders["image"].norm = nn.BatchNorm1d(3)
    check_settings(trainer, module, trainer.precision_plugin, None)
    assert "encoders.image.norm is a batch norm in training mode" in caplog.text
    caplog.clear()
    module.encoders["image"].norm.eval()
    check_settings(trainer, module, trainer.precision_plugin, None)
    assert not caplog.text
