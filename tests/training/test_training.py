"""Twenty optimizer steps under Trainer(strategy=BigMacStrategy()) against strategy="auto" in one process."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from bigmac_lightning import ShardingOptions
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights


@dataclass(frozen=True)
class Run:
    world: int = 2
    dp: int = 1
    strategy: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 2e-6
    scale: float = 2.0**10  # of fp16 losses

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Lightning turns 16-mixed into bf16 on the CPU, unless it is given the plugin."""
        if self.trainer.get("precision") != "16-mixed":
            return self.trainer
        scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=3)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        return {**self.trainer, "precision": None, "plugins": [plugin]}


FSDP = ShardingOptions(encoders="fsdp", generators="fsdp", stages="fsdp")
ZERO1 = ShardingOptions(encoders="zero1", generators="zero1", stages="zero1")
ALL = ("encoders", "generators", "stages")

RUNS = {
    "P1": Run(world=1),
    "P2": Run(data={"text_only": (0, 1)}),
    "P3": Run(world=3, module={"tied": True}),
    "P4-sgd": Run(world=4, module={"optimizer": "sgd"}),
    "P2xdp2": Run(world=4, dp=2, module={"tied": True}),
    "dp2-only": Run(world=2, dp=2),
    "upfront": Run(strategy={"policy": "upfront", "group_size": 1}),
    "first-stage": Run(strategy={"policy": "first_stage"}, module={"tied": True}),
    "recompute": Run(strategy={"policy": "recompute"}),
    "disaggregated": Run(
        world=4,
        strategy={"policy": "disaggregated", "group_size": 2},
        trainer={"gradient_clip_val": 0.1},
        module={"tied": True, "optimizer": "sgd"},
        data={"microbatches": 5, "text_only": (0, 1)},
    ),
    "gpipe": Run(world=3, strategy={"backbone": "gpipe"}),
    "accumulate": Run(trainer={"accumulate_grad_batches": 3}),
    "clip-norm": Run(world=3, trainer={"gradient_clip_val": 0.1}, module={"tied": True, "optimizer": "sgd"}),
    "clip-norm-dp": Run(world=4, dp=2, trainer={"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
    "clip-value": Run(trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "frozen-llm": Run(module={"freeze": ("llm",)}),
    "frozen-encoders": Run(world=3, module={"freeze": ("encoders",)}),
    "only-generators": Run(module={"freeze": ("encoders", "llm")}),
    "only-projectors": Run(
        module={"freeze": ("encoders.image.tower", "encoders.audio.tower", "llm", "generators")},
    ),
    "text-only-batches": Run(data={"media": False, "targets": False}),
    "P1-M1": Run(world=1, data={"microbatches": 1}),
    "P2-M5-group1": Run(strategy={"group_size": 1}, data={"microbatches": 5, "text_only": (0, 3)}),
    "P2-M8-no-targets": Run(data={"microbatches": 8, "targets": False}),
    "P3-M2": Run(world=3, data={"microbatches": 2}, strategy={"group_size": 2}),
    "P3-M8-upfront": Run(world=3, data={"microbatches": 8}, strategy={"policy": "upfront", "group_size": 2}),
    "P4-M1": Run(world=4, data={"microbatches": 1}),
    "P4-M8-first-stage": Run(world=4, data={"microbatches": 8}, strategy={"policy": "first_stage"}),
    "P4-M5-gpipe": Run(world=4, data={"microbatches": 5, "text_only": (0, 1, 2, 3)}, strategy={"backbone": "gpipe"}),
    "interleaved-V2": Run(strategy={"backbone": "interleaved_1f1b", "virtual_stages": 2}, module={"tied": True}),
    "zb1p": Run(world=3, strategy={"backbone": "zb1p"}, data={"microbatches": 5}),
    "zbv": Run(strategy={"backbone": "zbv", "virtual_stages": 2}, module={"tied": True}),
    "auto": Run(strategy={"backbone": "auto", "group_size": "auto", "policy": "filled"}, module={"tied": True}),
    "frozen-generators": Run(module={"freeze": ("generators",)}),
    "frozen-llm-and-generators": Run(world=3, module={"freeze": ("llm", "generators"), "tied": True}),
    "fp16-mixed": Run(trainer={"precision": "16-mixed", "accumulate_grad_batches": 2}, tolerance=2e-3),
    "fp16-mixed-clipped": Run(
        world=3, trainer={"precision": "16-mixed", "gradient_clip_val": 0.1}, tolerance=2e-3, scale=2.0**30
    ),
    "bf16-mixed": Run(trainer={"precision": "bf16-mixed"}, tolerance=2e-3),
    "fsdp": Run(world=3, strategy={"sharding": FSDP}, data={"text_only": (0, 1)}, module={"tied": True}),
    "fsdp-P2xdp2": Run(
        world=4,
        dp=2,
        strategy={"sharding": FSDP, "microbatches": 3},
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        data={"text_only": (0, 1)},
    ),
    "fsdp-dp2-fp16-mixed": Run(
        dp=2,
        strategy={"sharding": FSDP, "microbatches": 3},
        trainer={"precision": "16-mixed", "gradient_clip_val": 0.1},
        module={"tied": True},
        tolerance=2e-3,
    ),
    "zero1": Run(strategy={"sharding": ZERO1, "backbone": "zb1p"}, trainer={"gradient_clip_val": 0.1}),
    "zero1-P2xdp2": Run(
        world=4,
        dp=2,
        strategy={"sharding": ZERO1},
        trainer={"accumulate_grad_batches": 2},
        module={"tied": True, "optimizer": "sgd"},
    ),
    "zero1-dp2-only": Run(dp=2, strategy={"sharding": ZERO1}, module={"tied": True}),
    "fsdp-frozen": Run(strategy={"sharding": FSDP}, module={"freeze": ("encoders.image.tower", "generators")}),
    "zero1-bf16-mixed": Run(strategy={"sharding": ZERO1}, trainer={"precision": "bf16-mixed"}, tolerance=2e-3),
    "offload-P1": Run(world=1, strategy={"sharding": replace(FSDP, offload=ALL)}, trainer={"gradient_clip_val": 0.1}),
    "offload-fsdp-P2xdp2": Run(
        world=4,
        dp=2,
        strategy={"sharding": replace(FSDP, offload=("encoders", "stages")), "microbatches": 3},
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        module={"tied": True, "optimizer": "sgd"},
        data={"text_only": (0, 1)},
    ),
    "offload-zero1-dp2-fp16-mixed": Run(
        dp=2,
        strategy={"sharding": replace(ZERO1, offload=("generators", "stages"))},
        trainer={"precision": "16-mixed", "gradient_clip_val": 0.1},
        module={"tied": True},
        tolerance=2e-3,
        scale=2.0**30,
    ),
    "offload-frozen-P3": Run(
        world=3,
        strategy={"sharding": replace(ZERO1, encoders="fsdp", offload=("encoders", "stages")), "backbone": "zb1p"},
        trainer={"accumulate_grad_batches": 2},
        module={"freeze": ("encoders.image.tower", "llm.layers.1", "llm.layers.2")},
    ),
    "bf16-mixed-P3": Run(world=3, trainer={"precision": "bf16-mixed"}, tolerance=2e-3),
}


def _fit(rank: int, run: Run) -> tuple[dict[str, torch.Tensor], list[float], dict[str, float], int]:
    strategy = {"data_parallel_size": run.dp, **run.strategy}
    trainer = pipeline_trainer(run.world, strategy, max_epochs=1, **run.trainer_arguments)
    module = ToyModule(**run.module)
    trainer.fit(module, ToyData(**run.data))
    return weights(module), module.losses, _logged(trainer), trainer.global_step


def _logged(trainer: Any) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("name", RUNS)
def test_against_auto(name: str) -> None:
    run = RUNS[name]
    trainer = plain_trainer(max_epochs=1, **run.trainer_arguments)
    module = ToyModule(**run.module)
    trainer.fit(module, ToyData(replicas=run.dp, **run.data))
    start = ToyModule(**run.module)
    start.configure_model()
    if run.scale > 2.0**20:
        assert trainer.precision_plugin.scaler.get_scale() < run.scale, "no step was skipped"
    moved = [n for n, p in start.named_parameters() if not torch.equal(p, weights(module)[n])]
    assert moved, "the reference has learnt nothing"

    for found, losses, logged, steps in on_ranks(run.world, _fit, run):
        assert losses == pytest.approx(module.losses, rel=max(run.tolerance, 1e-5))
        assert_close(found, weights(module), run.tolerance)
        assert steps == trainer.global_step
        assert logged.keys() == _logged(trainer).keys()
        if run.dp == 1:
            assert logged == pytest.approx(_logged(trainer), rel=max(10 * run.tolerance, 1e-4))


def _fit_ddp(rank: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    trainer = plain_trainer(max_epochs=1, devices=2, strategy="ddp_find_unused_parameters_true")
    module = ToyModule()
    trainer.fit(module, ToyData())
    return weights(module), module.losses


def test_ddp_against_auto() -> None:
    """The plain path under Lightning's own data parallelism: sums over global counts there, too."""
    trainer = plain_trainer(max_epochs=1)
    module = ToyModule()
    trainer.fit(module, ToyData(replicas=2))
    for found, losses in on_ranks(2, _fit_ddp):
        assert losses == pytest.approx(module.losses, rel=1e-5)
        assert_close(found, weights(module), 2e-6)


class _Unseeded(ToyModule):
    """Starts elsewhere on each rank."""

    def configure_model(self) -> None:
        super().configure_model()
        generator = torch.Generator().manual_seed(1 + torch.distributed.get_rank())
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.rand(parameter.shape, generator=generator))


def _start(rank: int) -> dict[str, torch.Tensor]:
    module = _Unseeded(lr=0.0, optimizer="sgd")
    pipeline_trainer(4, {"data_parallel_size": 2}, max_steps=1, limit_val_batches=0).fit(module, ToyData())
    return weights(module)


def test_replicas_start_equal() -> None:
    first, second, *others = on_ranks(4, _start)
    for mine, other in zip((first, second), others, strict=True):
        assert_close(other, mine, 0.0)
    shared = {name for name in first if not name.startswith("llm.")}
    assert shared
    for name in shared:
        assert torch.equal(first[name], second[name]), name
