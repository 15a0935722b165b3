"""A NaN or Inf anywhere: all ranks raise before a weight changes and say where it began, or all leave out the step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from bigmac_lightning import Batch, ShardingOptions
from bigmac_lightning.contracts.batch import Origin
from tests.toy import ToyData, ToyEncoder, ToyLLM, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

BAD = 2
"""The batch that is bad."""

OF_ITEMS = {"media": float("nan"), "slope": 100.0, "targets": 1e25}
"""Bad numbers in an item's data. The square of 1e25 is infinite, and its gradient is not."""

SHARDED = ShardingOptions("fsdp", "fsdp", "zero1")


class _Faulty(ToyLLM):
    """Divides by zero where "forward" of a token is 1, and has an infinite slope where "backward" is 1; the slope
    is infinite for a weight of the last stage alone where "weight" is 1."""

    def run_layers(self, h_BSD: Tensor, inputs: dict[str, Tensor], layers: range, extras: dict[str, Tensor]) -> Tensor:
        if 2 in layers:
            h_BSD = h_BSD / (1 - inputs["forward"][..., None])
            zero = h_BSD * (1 - inputs["backward"][..., None])
            h_BSD = torch.where(inputs["backward"][..., None] > 0, h_BSD + zero.abs().sqrt(), h_BSD)
        if 3 in layers and inputs["weight"].any():
            h_BSD = h_BSD + (0 * self.norm.weight.sum()).abs().sqrt()
        return super().run_layers(h_BSD, inputs, layers, extras)


class _Slope(ToyEncoder):
    """Items with a number of 100 or more have an infinite slope, in the encoder alone."""

    def forward(self, pixels: list[Tensor]) -> Tensor:
        features = super().forward([item.clamp(max=10) for item in pixels])
        if any((item >= 100).any() for item in pixels):
            features = features + (0 * self.projector.bias.sum()).abs().sqrt()
        return features


class _Data(ToyData):
    """One number of the third batch is bad; in microbatch 1, if it is not an item's."""

    def __init__(self, kind: str, **kwargs: Any) -> None:
        super().__init__(steps=5, microbatches=5, **kwargs)
        self.kind = kind

    def collate(self, indices: list[int]) -> Batch:
        batch = super().collate(indices)
        for m, microbatch in enumerate(batch.microbatches):
            size, length = microbatch.shape
            microbatch.origins = [Origin(f"s{m}.{b}", b * length, (b + 1) * length) for b in range(size)]
            for key in ("forward", "backward", "weight"):
                microbatch.inputs[key] = torch.zeros(size, length)
                if indices[0] == BAD and m == 1 and self.kind == key:
                    microbatch.inputs[key][-1, -1] = 1
        if indices[0] == BAD and self.kind in OF_ITEMS:
            items: list[Any] = [item for m in batch for item in (m.targets if self.kind == "targets" else m.media)]
            if items[0].data is not None:
                items[0].data[0, 0] = OF_ITEMS[self.kind]
        return batch


COMPILED = {"compile": {"backend": "aot_eager"}}
COMPILES = (pytest.mark.wide, pytest.mark.filterwarnings("ignore"))  # Dynamo looks at tensors, which warn


class _Module(ToyModule):
    """Under other strategies, it leaves out a step with bad gradients itself."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.llm.__class__ = _Faulty
        for encoder in self.encoders.values():
            encoder.__class__ = _Slope
        self.skipped: list[float] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.runner is None and not torch.isfinite(self.gradient_norm()):
            for parameter in self.parameters():
                parameter.grad = None

    def on_train_batch_end(self, *args: Any) -> None:
        self.skipped.append(float(self.trainer.callback_metrics.get("skipped_steps", -1.0)))


def _raise(rank: int, world: int, kind: str, strategy: dict[str, Any], folder: Path) -> Any:
    saving = ModelCheckpoint(folder, save_on_exception=True, every_n_epochs=1)
    trainer = pipeline_trainer(world, strategy, max_epochs=1, enable_checkpointing=True, callbacks=[saving])
    module = _Module()
    with pytest.raises(ValueError, match="is NaN or infinite") as failure:
        trainer.fit(module, _Data(kind))
    assert trainer.global_step == BAD
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
    return str(failure.value)


@pytest.mark.parametrize(
    ("kind", "world", "strategy", "words"),
    [
        ("media", 2, {}, ["step 2", "encoder", "made features of media item 0 of microbatch 0, sample 's0.0'"]),
        ("forward", 2, {}, ["stage 1 made hidden states of microbatch 1, sample 's1.", "(rank 1)"]),
        ("targets", 2, {}, ["generator", "made a loss of target 0 of microbatch"]),
        ("backward", 3, {"backbone": "zb1p"}, ["the backward of stage 1 made a gradient of microbatch 1, sample 's1."]),
        ("weight", 2, {}, ["the gradient of llm.norm.weight, and in no forward (rank 1)"]),
        pytest.param("slope", 2, {}, ["the gradient of encoders.", "and in no forward"], marks=pytest.mark.wide),
        pytest.param("forward", 2, COMPILED, ["made hidden states of microbatch 1"], marks=COMPILES),
        pytest.param("backward", 2, COMPILED, ["the backward of stage 1 made a gradient"], marks=COMPILES),
    ],
)
def test_all_ranks_raise_and_name_the_cause(
    kind: str, world: int, strategy: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    found = on_ranks(world, _raise, world, kind, strategy, tmp_path, timeout=60)
    assert len(set(found)) == 1
    assert all(word in found[0] for word in words), found[0]
    for path in tmp_path.rglob("*.ckpt"):
        assert "step=2" in path.name, "a checkpoint of the weights before the bad step"


def _skip(rank: int, world: int, kind: str, strategy: dict[str, Any], trainer: dict[str, Any]) -> Any:
    module = _Module()
    found = pipeline_trainer(world, {"on_nonfinite": "skip", **strategy}, max_epochs=1, **trainer)
    found.fit(module, _Data(kind))
    return weights(module), module.skipped, found.global_step


@pytest.mark.parametrize(
    ("kind", "world", "strategy", "trainer"),
    [
        ("media", 2, {}, {"gradient_clip_val": 0.5}),
        ("backward", 4, {"data_parallel_size": 2, "sharding": SHARDED, "backbone": "gpipe"}, {}),
        ("targets", 2, {"backbone": "zb1p"}, {"accumulate_grad_batches": 2}),
    ],
)
def test_a_skipped_step_changes_nothing(
    kind: str, world: int, strategy: dict[str, Any], trainer: dict[str, Any]
) -> None:
    """As in one process that leaves out the step. With accumulation, all batches of the step are left out."""
    module, replicas = _Module(), strategy.get("data_parallel_size", 1)
    plain_trainer(max_epochs=1, **trainer).fit(module, _Data(kind, replicas=replicas))
    for trained, skipped, steps in on_ranks(world, _skip, world, kind, strategy, trainer, timeout=60):
        assert_close(trained, weights(module), 1e-5)
        assert steps == (3 if trainer.get("accumulate_grad_batches") else 5)
        assert skipped[0] == 0
        assert skipped[-1] == 1


def _scaled(rank: int, scale: float, kind: str, on_nonfinite: str = "raise") -> tuple[str, float]:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
    trainer, module = pipeline_trainer(2, {"on_nonfinite": on_nonfinite}, max_epochs=1, plugins=[plugin]), _Module()
    try:
        trainer.fit(module, _Data(kind))
    except ValueError as error:
        return str(error), 0.0
    assert plugin.scaler is not None
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
    return "no error", plugin.scaler.get_scale()


def test_a_scaler_of_losses_skips_infinite_gradients_itself() -> None:
    """Gradients of its first steps are infinite; a NaN in a loss is an error all the same."""
    for text, scale in on_ranks(2, _scaled, 2.0**40, "none", timeout=60):
        assert text == "no error"
        assert scale < 2.0**40
    for text, _ in on_ranks(2, _scaled, 2.0**8, "media", timeout=60):
        assert "is NaN or infinite" in text
    for text, scale in on_ranks(2, _scaled, 2.0**8, "media", "skip", timeout=60):
        assert text == "no error"
        assert scale == 2.0**8, "the loss was not finite, which is no matter of the scale"


def _anomaly(rank: int, backbone: str) -> None:
    pipeline_trainer(2, {"backbone": backbone}, max_epochs=1, detect_anomaly=True).fit(_Module(), _Data("backward"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backbone", ["1f1b", pytest.param("zb1p", marks=pytest.mark.wide)])
def test_anomaly_detection_names_the_operation(backbone: str) -> None:
    with pytest.raises(AssertionError) as failure:
        on_ranks(2, _anomaly, backbone, timeout=60)
    assert "Function 'SqrtBackward0' returned nan values" in str(failure.value)
    assert "on pipeline rank 1 of 2" in str(failure.value)
    assert "hung []" in str(failure.value)
