"""Float32 master weights with 16-bit computing, against the same written by hand in one process: a 16-bit copy of the
model for each step, gradients of each microbatch added up in float32, and an optimizer of the float32 weights."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.precision.utils import _DtypeContextManager

from bigmac_lightning import ShardingOptions
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from tests.toy import ToyData, ToyModule, toy_batch
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer, weights, whole

BATCHES = 4
ALL = ("zero1", "zero1", "zero1")
BLOCKS = ("fsdp", "fsdp", "zero1")


@dataclass(frozen=True)
class Case:
    """A run: its processes and shards, and what the model and the Trainer do."""

    world: int = 1
    dp: int = 1
    kinds: tuple[str, str, str] = ALL
    precision: str = "bf16-true"
    backbone: str = "1f1b"
    tied: bool = False
    targets: bool = True
    frozen_for: str = ""
    accumulated: int = 1
    clip: float | None = None
    lr: float = 0.01
    microbatches: int = 4
    offload: tuple[str, ...] = ()

    @property
    def sharding(self) -> ShardingOptions:
        encoders, generators, stages = self.kinds
        return ShardingOptions(encoders, generators, stages, master_weights=True, offload=self.offload)  # pyright: ignore

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "max_epochs": 1,
            "accumulate_grad_batches": self.accumulated,
            "gradient_clip_val": self.clip,
            "callbacks": [_Freezes(self.frozen_for)] if self.frozen_for else [],
        }

    def module(self) -> ToyModule:
        return ToyModule(tied=self.tied, optimizer="sgd", lr=self.lr)

    def data(self, replicas: int = 1) -> ToyData:
        return ToyData(self.microbatches, BATCHES, replicas, text_only=(1,), targets=self.targets)


class _Freezes(pl.Callback):
    """Freezes parts for all batches but the first and the last one."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def on_train_batch_start(self, trainer: Any, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.freeze(module, batch_idx)

    def freeze(self, module: torch.nn.Module, batch_idx: int) -> None:
        for name, parameter in module.named_parameters():
            if name.startswith(self.prefix):
                parameter.requires_grad_(batch_idx in (0, BATCHES - 1))


def by_hand(
    case: Case, batches: Sequence[int] = range(BATCHES)
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, the gradients of the first optimizer step, and the weights at the end."""
    half = torch.bfloat16 if case.precision == "bf16-true" else torch.float16
    module = case.module()
    module.configure_model()
    configured: Any = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    losses, first = list[float](), dict[str, torch.Tensor]()
    for i in batches:
        if case.frozen_for:
            _Freezes(case.frozen_for).freeze(module, i)
        text_only = (1,) if i % 2 else ()
        made = [
            toy_batch(case.microbatches, PipelineLayout(), i * case.dp + r, text_only, targets=case.targets)
            for r in range(case.dp)
        ]
        counts, loss = module.counts(Batch([m for b in made for m in b], PipelineLayout())), 0.0
        rounded: Any = copy.deepcopy(module).to(half)
        rounded.counts = lambda batch, counts=counts: counts
        for microbatch in (m for batch in made for m in batch):
            out = rounded.pipeline(Batch([microbatch], PipelineLayout()))
            (out.loss / case.accumulated).backward()
            loss += float(out.loss.detach())
            for name, parameter in rounded.named_parameters():
                if parameter.grad is not None:
                    master, added = module.get_parameter(name), parameter.grad.float()
                    master.grad = added if master.grad is None else master.grad + added
                    parameter.grad = None
        losses.append(loss)
        if (i + 1) % case.accumulated == 0:
            first = first or {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
            if case.clip is not None:
                torch.nn.utils.clip_grad_norm_(module.parameters(), case.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return losses, first, weights(module)


class _Records(pl.Callback):
    """Keeps the gradients of the first step, before they are clipped."""

    found: dict[str, torch.Tensor]

    def on_before_optimizer_step(self, trainer: Any, module: pl.LightningModule, optimizer: Any) -> None:
        if not hasattr(self, "found"):
            self.found = {n: whole(p.grad).clone() for n, p in module.named_parameters() if p.grad is not None}


def _train(rank: int, case: Case) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    module, records, arguments = case.module(), _Records(), case.arguments
    strategy = {"data_parallel_size": case.dp, "sharding": case.sharding, "backbone": case.backbone}
    arguments["callbacks"] = [*arguments["callbacks"], records]
    trainer = pipeline_trainer(case.world, strategy, precision=case.precision, **arguments)
    trainer.fit(module, case.data())
    trainer.strategy.open_module()  # pyright: ignore[reportAttributeAccessIssue]
    found = weights(module)
    states = [buffer for o in trainer.optimizers for state in o.state.values() for buffer in state.values()]
    assert {t.dtype for t in (*found.values(), *records.found.values(), *states)} == {torch.float32}
    return module.losses, records.found, found


def check(case: Case) -> None:
    losses, first, trained = by_hand(case)
    start = case.module()
    start.configure_model()
    for rank_losses, gradients, found in on_ranks(case.world, _train, case):
        assert rank_losses == pytest.approx(losses, rel=4e-3)
        for name, gradient in gradients.items():
            expected = first.get(name, first["llm.embedding.weight"])
            assert float((gradient - expected).norm()) <= 6e-3 * float(expected.norm()) + 1e-6, name
        assert set(gradients) - {"llm.head.weight"} <= set(first)
        for name, value in found.items():
            source = name if name in trained else "llm.embedding.weight"
            moved = (trained[source] - start.get_parameter(source)).norm()
            assert float((value - trained[source]).norm()) <= 5e-2 * moved.item() + 1e-6, name


CASES = {
    "one-rank": Case(accumulated=2, clip=1.0, tied=True),
    "one-rank-fsdp": Case(kinds=BLOCKS, frozen_for="encoders.image"),
    "one-rank-offload": Case(kinds=BLOCKS, accumulated=2, offload=("encoders", "stages")),
    "P2": Case(2, kinds=BLOCKS, tied=True, clip=1.0, frozen_for="generators.drawing.net.0", microbatches=16),
    "P2-zb1p-16": Case(2, backbone="zb1p", precision="16-true", accumulated=2),
    "dp2": Case(2, 2, kinds=BLOCKS, targets=False, tied=True),
    "P2xdp2": Case(4, 2, kinds=("fsdp", "zero1", "zero1"), clip=1.0, frozen_for="llm.layers.1"),
    "P2xdp2-offload-16": Case(4, 2, BLOCKS, "16-true", tied=True, clip=1.0, offload=("encoders", "stages")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_a_loop_by_hand(case: Case) -> None:
    check(case)


@pytest.mark.wide
@pytest.mark.parametrize("seed", range(40))
def test_random_cases_against_a_loop_by_hand(seed: int) -> None:
    draw = random.Random(seed)
    pp, dp = draw.choice([1, 2]), draw.choice([1, 2])
    frozen_for = draw.choice(["", "", "encoders", "generators.sketch", "llm.layers.2", "llm.norm"])
    check(
        Case(
            pp * dp,
            dp,
            (draw.choice(["zero1", "fsdp"]), draw.choice(["zero1", "fsdp"]), "zero1"),
            draw.choice(["bf16-true", "bf16-true", "16-true"]),
            draw.choice(["1f1b", "zb1p", "gpipe"]),
            tied=draw.random() < 0.5,
            targets=draw.random() < 0.7,
            frozen_for=frozen_for,
            accumulated=1 if frozen_for else draw.choice([1, 2]),
            clip=draw.choice([None, 1.0]),
            offload=tuple(kind for kind in ("encoders", "generators", "stages") if draw.random() < 0.4),
        )
    )


class _SameStart(ToyModule):
    """Its initial values are those of float32, rounded, if the precision is bf16-true."""

    def configure_model(self) -> None:
        with _DtypeContextManager(torch.float32):
            super().configure_model()


def _weights_after(trainer: Any, kind: type[ToyModule] = ToyModule) -> dict[str, torch.Tensor]:
    module = kind(**SLOW)
    trainer.fit(module, ToyData(2, steps=20))
    trainer.strategy.open_module() if hasattr(trainer.strategy, "open_module") else None
    return weights(module)


SLOW = {"lr": 1e-5}
"""AdamW changes a weight by about 1e-5 in a step, which is less than the last digit of most weights in bfloat16."""


def _train_slowly(rank: int, sharding: ShardingOptions) -> dict[str, torch.Tensor]:
    options: dict[str, Any] = {"max_epochs": 1, "precision": "bf16-true", "limit_val_batches": 0}
    trainer = pipeline_trainer(2, {"sharding": sharding}, **options)
    return _weights_after(trainer, ToyModule if sharding.master_weights else _SameStart)


def test_small_steps_are_not_lost() -> None:
    """Masters start from float32 values, too: they are compared with those of a run in float32."""
    expected = _weights_after(plain_trainer(max_epochs=1, limit_val_batches=0))
    start = ToyModule()
    start.configure_model()
    kinds = ("fsdp", "zero1", "zero1")
    masters, without = (ShardingOptions(*kinds, master_weights=wanted) for wanted in (True, False))
    for found, rounded in zip(on_ranks(2, _train_slowly, masters), on_ranks(2, _train_slowly, without), strict=True):
        print(
            "D",
            _distance(found, expected),
            _distance(found, weights(start)),
            _distance(rounded, {n: w.bfloat16() for n, w in weights(start).items()}),
        )
        assert _distance(found, expected) < 0.1 * _distance(found, weights(start))
        assert _distance(rounded, {n: w.bfloat16() for n, w in weights(start).items()}) < 0.3 * _distance(
            found, weights(start)
        )


def _distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(one.float() - expected[name]).flatten() for name, one in found.items()]).norm())


RUNS: dict[str, Case | None] = {
    "P2-fsdp": Case(2, kinds=BLOCKS),
    "dp2-zero1": Case(2, 2, offload=("generators", "stages")),
    "bfloat16": None,
}


def _go_on(rank: int, run: str, epochs: int, start: Path | None, save: Path) -> dict[str, torch.Tensor]:
    case = RUNS[run]
    module, strategy = (
        (_SameStart if case is None else ToyModule)(optimizer="sgd"),
        {"save_distributed_checkpoint": run != "dp2-zero1"},
    )
    if case is not None:
        strategy |= {"data_parallel_size": case.dp, "sharding": case.sharding}
    trainer = pipeline_trainer(2, strategy, max_epochs=epochs, limit_val_batches=0, precision="bf16-true")
    trainer.fit(module, ToyData(4, 2, 2 if case is None or case.dp == 1 else 1, text_only=(1,)), ckpt_path=start)
    trainer.save_checkpoint(save)
    trainer.strategy.open_module()  # pyright: ignore[reportAttributeAccessIssue]
    return weights(module)


@pytest.mark.parametrize(
    ("before", "after"), [("P2-fsdp", "dp2-zero1"), ("dp2-zero1", "bfloat16"), ("bfloat16", "P2-fsdp")]
)
def test_resume(before: str, after: str, tmp_path: Path) -> None:
    """With other shards, and with and without master weights: a checkpoint has weights of the type of its run."""
    first, second, dtypes = tmp_path / "first.ckpt", tmp_path / "second.ckpt", set[torch.dtype]()
    *_, expected = by_hand(Case(dp=2), (0, 1, 0, 1))
    start = ToyModule()
    start.configure_model()
    on_ranks(2, _go_on, before, 1, None, first)
    for found in on_ranks(2, _go_on, after, 2, first, second):
        dtypes |= {value.dtype for value in found.values()}
        moved = _distance({name: expected[name] for name in found}, weights(start))
        print("D", _distance(found, expected), moved)
        assert _distance(found, expected) < (0.3 if "bfloat16" in (before, after) else 0.01) * moved
    assert dtypes == {torch.bfloat16 if after == "bfloat16" else torch.float32}
    for path, run in ((first, before), (second, after)):
        saved = CheckpointWeights(path).read()
        assert {t.dtype for t in saved.values()} == {torch.bfloat16 if run == "bfloat16" else torch.float32}


def _refused(rank: int, kinds: tuple[str, str, str], precision: str, unfrozen: bool) -> str:
    sharding = ShardingOptions(*kinds, master_weights=True)  # pyright: ignore[reportArgumentType]
    trainer = pipeline_trainer(
        2, {"sharding": sharding}, max_steps=2, precision=precision, callbacks=[_Unfreezes()] if unfrozen else []
    )
    try:
        trainer.fit(ToyModule(freeze=["encoders"] if unfrozen else ()), ToyData(steps=2))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


class _Unfreezes(pl.Callback):
    def on_train_batch_start(self, trainer: Any, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            module.requires_grad_()


@pytest.mark.parametrize(
    ("kinds", "precision", "unfrozen", "words"),
    [
        (ALL, "bf16-mixed", False, "master_weights is for precision bf16-true or 16-true, but this is bf16-mixed"),
        (ALL, "32-true", False, "but this is 32-true"),
        (("ddp", "fsdp", "zero1"), "bf16-true", False, "encoders is trained and sharding.encoders is ddp"),
        (("fsdp", "fsdp", "ddp"), "16-true", False, "set sharding.stages to zero1 or fsdp, or freeze llm"),
        (("ddp", "fsdp", "zero1"), "bf16-true", True, "encoders is trained and sharding.encoders is ddp"),
    ],
)
def test_what_is_refused(kinds: tuple[str, str, str], precision: str, unfrozen: bool, words: str) -> None:
    for message in on_ranks(2, _refused, kinds, precision, unfrozen):
        assert words in message


def test_masters_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="master_weights needs shards"):
        ShardingOptions(master_weights=True)
