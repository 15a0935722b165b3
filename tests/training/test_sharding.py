"""Sharded components under the Trainer: checkpoints, evaluation, and what is refused. That gradients and weights are
those of one process is shown by test_training.py and tests/runtime/matrix.py."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from bigmac_lightning import BigMacStrategy, ShardingOptions
from bigmac_lightning.runtime.sharding import _groups, local
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.sharding import Sharding
from tests.layouts.cases import Case
from tests.layouts.measure import fit_on_rank
from tests.toy import ToyData, ToyEncoder, ToyGenerator, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

STEPS = 3
WHOLE = ShardingOptions()
ZERO1 = ShardingOptions("zero1", "zero1", "zero1")
FSDP = ShardingOptions("fsdp", "fsdp", "fsdp")
OFFLOADED = replace(FSDP, offload=("encoders", "generators", "stages"))


@dataclass(frozen=True)
class Layout:
    """A run's processes, and what they shard. Two replicas train on one batch each, a single one on both."""

    world: int
    dp: int
    sharding: ShardingOptions
    directory: bool = True

    def trainer(self, epochs: int) -> Any:
        strategy = {
            "data_parallel_size": self.dp,
            "sharding": self.sharding,
            "microbatches": 3 if self.dp == 2 else None,
            "save_distributed_checkpoint": self.directory,
        }
        return pipeline_trainer(self.world, strategy, max_epochs=epochs, limit_val_batches=0)

    @property
    def data(self) -> ToyData:
        return ToyData(steps=STEPS, replicas=3 - self.dp)


LAYOUTS = {
    "fsdp-P2xdp2": Layout(4, 2, FSDP),
    "zero1-P2xdp2": Layout(4, 2, ZERO1),
    "zero1-dp2-file": Layout(2, 2, ZERO1, directory=False),
    "fsdp-P3-file": Layout(3, 1, FSDP, directory=False),
    "whole-P2": Layout(2, 1, WHOLE),
    "offloaded-P1": Layout(1, 1, OFFLOADED),
    "offloaded-P2xdp2-file": Layout(4, 2, replace(ZERO1, offload=("encoders", "stages")), directory=False),
}
PAIRS = [
    ("fsdp-P2xdp2", "whole-P2"),
    ("whole-P2", "fsdp-P2xdp2"),
    ("zero1-P2xdp2", "fsdp-P3-file"),
    ("fsdp-P3-file", "zero1-dp2-file"),
    ("zero1-dp2-file", "zero1-P2xdp2"),
    ("zero1-P2xdp2", "offloaded-P1"),
    ("offloaded-P1", "offloaded-P2xdp2-file"),
    ("offloaded-P2xdp2-file", "whole-P2"),
]


def _run(rank: int, layout: Layout, epochs: int, start: Path | None, save: Path | None) -> dict[str, torch.Tensor]:
    module, trainer = ToyModule(tied=True), layout.trainer(epochs)
    trainer.fit(module, layout.data, ckpt_path=start)
    if save is not None:
        trainer.save_checkpoint(save)
        with pytest.raises(ValueError, match="this process holds"):
            module.state_dict()
    trainer.strategy.open_module()
    if save is not None and layout.directory:
        _check_that_shards_are_read(module, trainer.strategy.load_checkpoint(save))
    return weights(module)


def _check_that_shards_are_read(module: ToyModule, checkpoint: dict[str, Any]) -> None:
    """A rank reads of the optimizer's moments what it has of their weights."""
    (optimizer,) = checkpoint["optimizer_states"]
    for name, parameter in module.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq") if name in optimizer["state"] else ():
            assert local(optimizer["state"][name][moment]).shape == local(parameter).shape, name


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """The weights after two epochs in one process."""
    module = ToyModule(tied=True)
    plain_trainer(max_epochs=2, limit_val_batches=0).fit(module, ToyData(steps=STEPS, replicas=2))
    return weights(module)


@pytest.mark.parametrize(("before", "after"), PAIRS, ids="->".join)
def test_resume(before: str, after: str, tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    """A run that goes on with other processes and other shards ends with the weights of one run in one process."""
    path = tmp_path / "first.ckpt"
    on_ranks(LAYOUTS[before].world, _run, LAYOUTS[before], 1, None, path)
    for found in on_ranks(LAYOUTS[after].world, _run, LAYOUTS[after], 2, path, tmp_path / "second.ckpt"):
        assert_close(found, expected, 2e-6)
    whole = ToyModule.load_from_checkpoint(tmp_path / "second.ckpt", tied=True)
    assert_close(weights(whole), expected, 2e-6)


class _UnevenValidation(ToyData):
    """The second replica has one more batch to validate."""

    def val_dataloader(self) -> Any:
        assert self.trainer is not None
        return self.loader(1 + self.trainer.strategy.mesh.dp_rank, first=50)  # pyright: ignore


def _evaluate(rank: int, sharding: ShardingOptions, dp: int) -> tuple[dict[str, float], list[Any], int]:
    """Replicas have different numbers of validation batches."""
    data, module = _UnevenValidation(steps=2, replicas=3 - dp), ToyModule()
    trainer = pipeline_trainer(
        2 * dp, {"data_parallel_size": dp, "sharding": sharding, "microbatches": 3 if dp == 2 else None}, max_epochs=2
    )
    trainer.fit(module, data)
    (validated,) = trainer.validate(module, data, verbose=False)
    samples = trainer.predict(module, data)
    whole = sum(p.numel() for p in module.parameters())
    stored = sum(getattr(p, "_local_tensor", p).numel() for p in module.parameters())
    return validated, [[t.sum().item() for t in batch] for batch in samples], stored / whole


@pytest.mark.parametrize("dp", [1, 2])
def test_evaluation(dp: int) -> None:
    """Metrics and samples are those of whole weights; a rank stores a part of the weights only."""
    expected = on_ranks(2 * dp, _evaluate, WHOLE, dp)
    for sharding in (ZERO1, FSDP):
        for (validated, samples, share), (should, made, _) in zip(
            on_ranks(2 * dp, _evaluate, sharding, dp), expected, strict=True
        ):
            assert validated == pytest.approx(should, rel=1e-5)
            for one, other in zip(samples, made, strict=True):
                assert one == pytest.approx(other, rel=1e-5)
            assert share < 0.9


@pytest.mark.parametrize(
    ("schedule", "sharding", "words"),
    [
        ({"policy": "first_stage"}, ShardingOptions(encoders="fsdp"), "sharding.encoders is fsdp, but under policy"),
        ({"policy": "disaggregated"}, ShardingOptions(generators="fsdp"), "sharding.generators is fsdp, but"),
        ({"policy": "filled", "pieces": 2}, ShardingOptions(encoders="fsdp"), "pieces=2"),
    ],
)
def test_schedules_that_fsdp_refuses(schedule: dict[str, Any], sharding: ShardingOptions, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PipelineOptions(ScheduleOptions(**schedule), sharding=sharding)


def test_options_that_are_not_possible() -> None:
    with pytest.raises(ValueError, match="expected one of ddp, zero1"):
        ShardingOptions(stages="fsdp2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"offload is \('llm',\); expected a list of some of encoders, generators, st"):
        ShardingOptions(stages="zero1", offload=("llm",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="offload is 'stages'; expected a list"):
        ShardingOptions(stages="zero1", offload="stages")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="offload names generators, but"):
        ShardingOptions(encoders="fsdp", offload=("encoders", "generators"))


def test_backbones_that_fsdp_stages_refuse() -> None:
    """A split backward would need a layer's weights twice; "auto" leaves such backbones out."""
    sharding = ShardingOptions(stages="fsdp")
    for name in ("zb1p", "zbv", "dualpipev"):
        with pytest.raises(ValueError, match=f"stages is fsdp, but backbone {name} splits backwards"):
            PipelineOptions(ScheduleOptions(backbone=name), sharding=sharding)
    chosen, reason = PipelineOptions(ScheduleOptions(backbone="auto"), sharding=sharding).resolved(4, 16, True, True)
    assert chosen.schedule.backbone in ("1f1b", "gpipe", "interleaved_1f1b", "looped_bfs")
    assert "zb1p" in reason


def _fit_unequal(rank: int, microbatches: int | None) -> None:
    strategy = {"data_parallel_size": 2, "sharding": ShardingOptions(stages="fsdp"), "microbatches": microbatches}
    pipeline_trainer(2, strategy, max_epochs=1).fit(ToyModule(), ToyData(steps=1))


@pytest.mark.parametrize(("microbatches", "words"), [(None, "give the strategy microbatches=N"), (4, "microbatches=4")])
def test_fsdp_stages_need_equally_many_microbatches(microbatches: int | None, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        on_ranks(2, _fit_unequal, microbatches)


def _settings_of_steps(rank: int, sharding: ShardingOptions) -> tuple[set[Any], Any]:
    found, module = set[Any](), ToyModule()
    trainer: Any = pipeline_trainer(2, {"sharding": sharding}, max_steps=2, limit_val_batches=0)

    def on_train_start() -> None:
        (optimizer,) = trainer.optimizers
        optimizer.register_step_pre_hook(lambda optimizer, *_: found.add(optimizer.param_groups[0]["foreach"]))

    module.on_train_start = on_train_start
    trainer.fit(module, ToyData(steps=2))
    return found, trainer.optimizers[0].param_groups[0]["foreach"]


def test_shards_and_whole_weights_are_stepped_one_by_one() -> None:
    """A GPU would step them at once, and fail. On the CPU, it is seen in the optimizer's setting during a step."""
    for during, after in on_ranks(2, _settings_of_steps, replace(FSDP, stages="ddp")):
        assert during == {False}
        assert after is None
    for during, _ in on_ranks(2, _settings_of_steps, WHOLE):
        assert during == {None}


class _WithoutSmallest(ToyEncoder):
    smallest = ToyEncoder.__mro__[1].smallest  # pyright: ignore


class _Counting(ToyEncoder):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.norm = nn.BatchNorm1d(3)


def _refused(rank: int, change: str) -> str:
    module = ToyModule()
    if change == "smallest":
        module.encoders["image"] = _WithoutSmallest("image")
    elif change == "batch norm":
        module.encoders["image"] = _Counting("image")
    elif change == "shared":
        image, audio = module.encoders["image"], module.encoders["audio"]
        image.projector = audio.projector
    optimizers: dict[str, Any] = {
        "muon": lambda: torch.optim.Muon([p for p in module.parameters() if p.ndim == 2]),
        "fused": lambda: torch.optim.AdamW(module.parameters(), fused=True),
    }
    if change in optimizers:
        module.configure_optimizers = optimizers[change]
    callbacks = [EMAWeightAveraging()] if change == "averaging" else []
    trainer = pipeline_trainer(2, {"sharding": replace(FSDP, generators="ddp")}, max_steps=1, callbacks=callbacks)
    if change == "twice":
        trainer.fit(module, ToyData(steps=1))
        trainer = pipeline_trainer(2, {"sharding": FSDP}, max_steps=1)
    try:
        trainer.fit(module, ToyData(steps=1))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("smallest", "has no method `smallest`, which fsdp needs"),
        ("batch norm", "encoders.image.norm is a batch norm in training mode"),
        ("shared", "share a weight"),
        ("muon", "Muon is not known to step each number of a parameter by itself"),
        ("fused", "AdamW(fused=True) steps whole parameters and shards on different ranks at once"),
        ("averaging", "EMAWeightAveraging keeps a whole copy of the model"),
        ("twice", "lie in shards already, from an earlier run"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*WeightAveraging.*")
def test_modules_that_fsdp_refuses(change: str, words: str) -> None:
    for message in on_ranks(2, _refused, change):
        assert words in message


def test_toys_have_smallest_items() -> None:
    """They are items like all others."""
    encoder, generator = ToyEncoder("image"), ToyGenerator("drawing")
    assert len(encoder([encoder.smallest()])) == 1
    condition, item = generator.smallest()
    assert generator([condition], [item]).isfinite()


def _in_bfloat16(rank: int, sharding: ShardingOptions) -> dict[str, torch.Tensor]:
    """Ten microbatches: gradients of whole weights are then summed in float32."""
    trainer = pipeline_trainer(2, {"sharding": sharding}, max_steps=3, precision="bf16-true")
    module = ToyModule(optimizer="sgd")
    trainer.fit(module, ToyData(microbatches=10, text_only=(0, 3)))
    trainer.strategy.open_module()  # pyright: ignore[reportAttributeAccessIssue]
    return weights(module)


def test_weights_of_bfloat16() -> None:
    """Shards give what whole weights give, but for a few roundings of 8 bits."""
    expected = on_ranks(2, _in_bfloat16, WHOLE)
    for sharding in (ZERO1, FSDP):
        for found, should in zip(on_ranks(2, _in_bfloat16, sharding), expected, strict=True):
            assert_close({n: w.float() for n, w in found.items()}, {n: w.float() for n, w in should.items()}, 1e-2)


def test_sums_in_float32_are_refused() -> None:
    with pytest.raises(ValueError, match="float32_gradients=True does not go with sharding"):
        BigMacStrategy(float32_gradients=True, sharding=FSDP)


def _twice(rank: int) -> list[list[float]]:
    case = Case(mesh=(2, 1, 1, 1), encoders="fsdp", stages="zero1")
    return [fit_on_rank(case, 2).losses for _ in range(2)]


def test_a_second_training_in_the_same_processes() -> None:
    """Its meshes are equal to those of the first one, for which torch remembers results of operations."""
    for first, second in on_ranks(2, _twice):
        assert first == second


def _left_to_the_end(rank: int, runs: list[tuple[ShardingOptions, int, str]]) -> list[list[bool]]:
    """By run and batch: whether the LLM's gradients were not in their shards before the end of the batch."""
    return [_left_by_batch(*run) for run in runs]


def _left_by_batch(sharding: ShardingOptions, accumulated: int, backbone: str) -> list[bool]:
    left, reduce = list[bool](), Sharding.reduce

    def noting(self: Sharding) -> None:
        left.append(any(group.is_unsharded for group in _groups(self.sharded["llm"]._others)))
        reduce(self)

    strategy: dict[str, Any] = {
        "data_parallel_size": 2,
        "sharding": sharding,
        "backbone": backbone,
    }
    options: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0, "accumulate_grad_batches": accumulated}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sharding, "reduce", noting)
        pipeline_trainer(4, strategy, **options).fit(ToyModule(), ToyData(steps=4))
    return left


def test_gradients_of_stages_are_summed_into_shards_before_the_batch_ends() -> None:
    stages = ShardingOptions(stages="zero1")
    gathered = replace(stages, encoders="fsdp", generators="fsdp")
    early = [(stages, 1, "1f1b"), (gathered, 1, "1f1b"), (stages, 1, "zb1p")]
    for found in on_ranks(4, _left_to_the_end, [*early, (stages, 2, "1f1b"), (gathered, 1, "zb1p")]):
        assert found == [[False] * 4] * 3 + [[True, False, True, False], [True] * 4]
