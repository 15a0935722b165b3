"""Every optimizer of torch is resumed as if nothing had been, and by any number of ranks; what cannot be is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import optim
from torch.distributed.optim import ZeroRedundancyOptimizer

from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, weights

STEPS = 2  # per epoch

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "Adam": lambda p: optim.Adam(p, lr=1e-2),
    "AdamW-fused": lambda p: optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW-foreach-amsgrad": lambda p: optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "SGD": lambda p: optim.SGD(p, lr=1e-2),
    "SGD-nesterov-fused": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, fused=True),
    "Adafactor": lambda p: optim.Adafactor(p, lr=1e-2),
    "Muon": lambda p: optim.Muon([q for q in p if q.ndim == 2], lr=1e-2),
    "Adagrad": lambda p: optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1e-1),
    "Adamax": lambda p: optim.Adamax(p, lr=1e-2),
    "ASGD": lambda p: optim.ASGD(p, lr=1e-2, t0=1),
    "NAdam": lambda p: optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: optim.RAdam(p, lr=1e-2),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "Rprop": lambda p: optim.Rprop(p, lr=1e-2),
    "AdamW-a-group-for-each": lambda p: optim.AdamW([{"params": [q], "lr": 1e-2 / (1 + len(q) % 3)} for q in p]),
    "AdamW-an-empty-group": lambda p: optim.AdamW([{"params": p, "lr": 1e-2}, {"params": [], "lr": 3e-4}]),
    "AdamW-tensor-lr": lambda p: optim.AdamW(p, lr=torch.tensor(1e-2)),
    "LBFGS": lambda p: optim.LBFGS(p),
    "ZeroRedundancyOptimizer": lambda p: ZeroRedundancyOptimizer(p, optim.AdamW, lr=1e-2),
}
REFUSED = ("LBFGS", "ZeroRedundancyOptimizer")
RESUMED = [name for name in OPTIMIZERS if name not in REFUSED]
FEW = ["AdamW-fused", "AdamW-a-group-for-each", "Adafactor", "AdamW-an-empty-group", "Muon", "SGD-nesterov-fused"]
ROUNDED = {"Muon": 1e-3}  # in bfloat16, by the optimizer itself


class _Module(ToyModule):
    def __init__(self, name: str) -> None:
        super().__init__(tied=True)
        self.name = name

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.name](list(self.parameters()))
        schedule = optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


Run = tuple[list[float], dict[str, torch.Tensor], list[float]]


def _fit(rank: int, world: int, folder: Path, names: list[str], epochs: int, resume: bool) -> dict[str, Run]:
    """Each optimizer in turn; every other of them with directories."""
    runs: dict[str, Run] = {}
    for name in names:
        module, ckpt = _Module(name), folder / f"{name}.ckpt"
        distributed = {"save_distributed_checkpoint": names.index(name) % 2 == 0}
        trainer = pipeline_trainer(world, distributed, max_epochs=epochs, limit_val_batches=0)
        trainer.fit(module, ToyData(steps=STEPS), ckpt_path=ckpt if resume else None)
        if not resume:
            trainer.save_checkpoint(ckpt)
        rates = [float(group["lr"]) for group in trainer.optimizers[0].param_groups]
        runs[name] = module.losses, weights(module), rates
    return runs


@pytest.mark.parametrize("names", [FEW, pytest.param(RESUMED, marks=pytest.mark.wide)], ids=["few", "all"])
def test_resuming(names: list[str], tmp_path: Path) -> None:
    whole = on_ranks(2, _fit, 2, tmp_path, names, 2, False)
    on_ranks(2, _fit, 2, tmp_path, names, 1, False)
    assert {(tmp_path / f"{name}.ckpt").is_dir() for name in names} == {True, False}
    again = on_ranks(2, _fit, 2, tmp_path, names, 2, True)
    (alone,) = on_ranks(1, _fit, 1, tmp_path, names, 2, True)
    for name in names:
        for rank in range(2):
            losses, found, rates = again[rank][name]
            expected = whole[rank][name]
            assert losses == expected[0][STEPS:], name
            assert rates == expected[2], name
            assert_close(found, expected[1], 0.0)
        every = {key: weight for rank in whole for key, weight in rank[name][1].items()}
        tolerance = ROUNDED.get(name, 1e-5)
        assert alone[name][0] == pytest.approx(whole[0][name][0][STEPS:], rel=tolerance), name
        assert_close(alone[name][1], every, tolerance)


def _refused(rank: int, name: str) -> str:
    trainer = pipeline_trainer(2, max_epochs=1)
    try:
        trainer.fit(_Module(name), ToyData())
    except ValueError as error:
        return f"{error} {trainer.global_step}"
    return "no error"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LBFGS", "LBFGS looks at all parameters"),
        ("ZeroRedundancyOptimizer", "ZeroRedundancyOptimizer shards parameters over ranks"),
    ],
)
def test_what_cannot_work_is_refused(name: str, reason: str) -> None:
    for error in on_ranks(2, _refused, name):
        assert reason in error
        assert error.endswith(" 0"), "not before training"


class _Changed(_Module):
    """Another choice of parameters, or of groups."""

    def __init__(self, how: str) -> None:
        super().__init__("Adam")
        self.how = how

    def configure_optimizers(self) -> Any:
        everything = list(self.parameters())
        if self.how == "fewer":
            return optim.Adam([p for p in everything if p.ndim > 1], lr=1e-2)
        if self.how == "groups":
            return optim.Adam([{"params": [q], "lr": 1e-2 * (1 + len(q) % 3)} for q in everything])
        if self.how == "foreign":
            return optim.Adam([*everything, torch.nn.Parameter(torch.zeros(3))])
        return optim.Adam(everything, lr=1e-2)


def _change(rank: int, folder: Path, before: str, after: str) -> str:
    trainer = pipeline_trainer(2, max_epochs=1, limit_val_batches=0)
    try:
        trainer.fit(_Changed(before), ToyData(steps=1))
        trainer.save_checkpoint(folder / "before.ckpt")
        trainer = pipeline_trainer(2, max_epochs=2, limit_val_batches=0)
        trainer.fit(_Changed(after), ToyData(steps=1), ckpt_path=folder / "before.ckpt")
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("all", "fewer", "not optimized any more"),
        ("fewer", "all", "optimized now, but not when the checkpoint was saved"),
        ("groups", "all", "are in one group now, but had different settings"),
        ("foreign", "all", "that is none of _Changed's: let configure_optimizers take self.parameters()"),
    ],
)
def test_another_choice_is_refused_when_resuming(before: str, after: str, reason: str, tmp_path: Path) -> None:
    for error in on_ranks(2, _change, tmp_path, before, after):
        assert reason in error
