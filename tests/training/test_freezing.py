"""What is frozen, and unfrozen in the middle of a run, under the strategy and in one process."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from bigmac_lightning import Costs
from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.models import FlowGenerator, HFDecoder, MultimodalLM, VisionEncoder
from tests.models import parts
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

STEPS = 6


class _Turns(pl.Callback):
    """Freezes and unfreezes at the start of some batches, as one would in `BaseFinetuning`.

    Args:
        turns: batch, beginning of names, whether they are trained from then on.
    """

    def __init__(self, turns: Sequence[tuple[int, str, bool]]) -> None:
        self.turns = turns

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for at, prefix, trained in self.turns:
            if at == batch_idx:
                for name, parameter in pl_module.named_parameters(remove_duplicate=False):
                    if name.startswith(prefix):
                        parameter.requires_grad_(trained)


class _AllOptimized(ToyModule):
    """Its optimizer has all parameters, also those that are frozen at first."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": list(self.parameters())}], lr=0.05)


RUNS: dict[str, dict[str, Any]] = {
    "encoders-unfrozen": {"freeze": ("encoders",), "turns": [(3, "encoders", True)]},
    "lower-layers-unfrozen": {
        "freeze": ("llm.embedding", "llm.layers.0", "llm.layers.1"),
        "turns": [(2, "llm.layers.1", True), (4, "llm", True)],
    },
    "llm-frozen": {"turns": [(1, "llm", False), (4, "llm.layers.3", True)]},
    "everything-turns": {
        "freeze": ("generators", "llm"),
        "turns": [(1, "encoders", False), (1, "llm.norm", True), (2, "", True), (5, "encoders.image", False)],
    },
    "tied-unfrozen": {
        "tied": True,
        "freeze": ("llm.embedding", "llm.head"),
        "turns": [(3, "llm.embedding", True), (3, "llm.head", True)],
    },
}


def _fit(trainer: Any, run: dict[str, Any], **data: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    module = _AllOptimized(tied=run.get("tied", False), freeze=run.get("freeze", ()))
    trainer.callbacks.append(_Turns(run["turns"]))
    trainer.fit(module, ToyData(steps=STEPS, text_only=(1,), **data))
    return weights(module), module.losses


def _fit_on_rank(rank: int, world: int, strategy: dict[str, Any], run: dict[str, Any]) -> Any:
    return _fit(pipeline_trainer(world, strategy, max_epochs=1), run)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    ("world", "strategy"),
    [
        (2, {}),
        (3, {"backbone": "zb1p"}),
        (4, {"data_parallel_size": 2, "backbone": "zbv", "policy": "upfront"}),
    ],
)
def test_freezing_in_the_middle_of_an_epoch(name: str, world: int, strategy: dict[str, Any]) -> None:
    run = RUNS[name]
    expected, losses = _fit(plain_trainer(max_epochs=1), run, replicas=strategy.get("data_parallel_size", 1))
    start = _AllOptimized(tied=run.get("tied", False))
    start.configure_model()
    moved = [n for n, p in start.named_parameters() if not torch.equal(p, expected[n])]
    assert any(n.startswith(prefix) for _, prefix, trained in run["turns"] if trained for n in moved)
    for found, found_losses in on_ranks(world, _fit_on_rank, world, strategy, run):
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert_close(found, expected, 2e-6)


class _InWorkers(ToyData):
    def loader(self, steps: int, first: int = 0) -> torch.utils.data.DataLoader[Any]:
        indices = range(first, first + steps)
        options: dict[str, Any] = {"num_workers": 1, "prefetch_factor": 1, "persistent_workers": True}
        return torch.utils.data.DataLoader(indices, batch_size=1, collate_fn=self.collate, **options)


def _plans_made(rank: int) -> list[bool]:
    """Whether each step ran the plan that came with its batch."""
    ran: list[bool] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
            ran.append(trainer.strategy.runner.last_plan is batch.planned.plan)  # type: ignore[attr-defined]

    trainer = pipeline_trainer(
        2, {"costs": Costs(G=3)}, max_epochs=2, callbacks=[_Turns([(2, "encoders", False)]), Watch()]
    )
    trainer.fit(_AllOptimized(), _InWorkers(steps=8))
    return ran


def test_workers_hear_of_a_change() -> None:
    """They go on planning for what is trained, save batches that they had made ahead."""
    for ran in on_ranks(2, _plans_made):
        assert len(ran) == 16
        assert all(ran[:2])
        assert not ran[2], "the batch had been planned before"
        assert all(ran[6:])


def _real(freeze: Sequence[str], learning_rate: float = 1e-2) -> MultimodalLM:
    return parts.model(freeze=freeze, learning_rate=learning_rate)


class _RealData(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        layout = getattr(self.trainer.strategy, "pipeline_layout", None)
        collate = parts.Collator(layout or parts.PipelineLayout(), 4)
        return torch.utils.data.DataLoader(parts.samples("rtdtrdtt" * 3), batch_size=8, collate_fn=collate)

    val_dataloader = train_dataloader


RECIPES = {
    "projector": ["llm", "generators", "encoders.image.tower"],
    "projector and generator": ["llm", "encoders.image.tower"],
    "output weight and norm": ["encoders", "generators", "llm.model.layers.*", "llm.model.embed_tokens"],
    "generator": ["encoders", "llm"],
    "last layer": ["encoders", "generators", "llm.model.embed_tokens", "llm.lm_head", "llm.model.norm"]
    + [f"llm.model.layers.{k}" for k in range(parts.LAYERS - 1)],
    "first layer": ["encoders", "generators", "llm.model.embed_tokens", "llm.lm_head", "llm.model.norm"]
    + [f"llm.model.layers.{k}" for k in range(1, parts.LAYERS)],
}


def _fit_recipe(rank: int, world: int, freeze: list[str], strategy: dict[str, Any]) -> Any:
    module = _real(freeze)
    pipeline_trainer(world, strategy, max_epochs=1, limit_val_batches=0).fit(module, _RealData())
    return weights(module)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("backbone", ["1f1b", "zb1p"])
def test_recipes(name: str, backbone: str) -> None:
    """Ranks that have nothing to train, and microbatches of text alone below a trained projector."""
    module = _real(RECIPES[name])
    plain_trainer(max_epochs=1, limit_val_batches=0).fit(module, _RealData())
    expected = weights(module)
    for found in on_ranks(3, _fit_recipe, 3, RECIPES[name], {"backbone": backbone}):
        for weight, value in found.items():
            other = expected[weight] if weight in expected else expected["llm.model.embed_tokens.weight"]
            torch.testing.assert_close(value, other, rtol=1e-4, atol=2e-6, msg=f"{name}: {weight}")


class _BareList(ToyModule):
    """As in most tutorials."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def _fit_bare(trainer: Any) -> dict[str, torch.Tensor]:
    module = _BareList(freeze=("encoders", "generators", "llm.embedding", "llm.layers.0", "llm.layers.1"))
    trainer.fit(module, ToyData(steps=3))
    return weights(module)


def _fit_bare_on_rank(rank: int) -> dict[str, torch.Tensor]:
    return _fit_bare(pipeline_trainer(2, max_epochs=1))


def test_an_optimizer_of_nothing_on_a_rank() -> None:
    expected = _fit_bare(plain_trainer(max_epochs=1))
    for found in on_ranks(2, _fit_bare_on_rank):
        assert_close(found, expected, 2e-6)
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.AdamW([])


def _refusal(rank: int, tied: bool, freeze: Sequence[str], turns: list[tuple[int, str, bool]]) -> str:
    trainer = pipeline_trainer(2, max_epochs=1, callbacks=[_Turns(turns)])
    try:
        trainer.fit(_AllOptimized(tied=tied, freeze=freeze), ToyData(steps=3))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("tied", "freeze", "turns", "message"),
    [
        (False, ("llm", "encoders", "generators"), [], "nothing is left to train"),
        (True, ("llm.head",), [], "llm.head.weight and llm.embedding.weight are one tied parameter"),
        (True, (), [(1, "llm.embedding", False)], "one tied parameter, of which the first and the last stage hold"),
    ],
)
def test_refused_on_all_ranks(tied: bool, freeze: Sequence[str], turns: Any, message: str) -> None:
    for found in on_ranks(2, _refusal, tied, freeze, turns, timeout=60):
        assert message in found


def test_nothing_to_train_without_a_pipeline() -> None:
    with pytest.raises(ValueError, match="nothing is left to train"):
        plain_trainer(max_epochs=1, limit_val_batches=0).fit(_real(["llm", "encoders", "generators"]), _RealData())


def _fit_in_eval(trainer: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    module = ToyModule()
    module.eval()
    trainer.fit(module, ToyData(steps=3))
    return weights(module), module.losses


def _fit_in_eval_on_rank(rank: int) -> Any:
    return _fit_in_eval(pipeline_trainer(2, max_epochs=1))


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_module_in_eval_mode_is_trained() -> None:
    """Lightning leaves modes alone: then there is no dropout, but there are gradients."""
    expected, losses = _fit_in_eval(plain_trainer(max_epochs=1))
    for found, found_losses in on_ranks(2, _fit_in_eval_on_rank):
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert_close(found, expected, 2e-6)


@pytest.mark.parametrize(
    ("components", "error", "message"),
    [
        ({"encoders": {"image": torch.nn.Linear(3, 3)}}, TypeError, r"encoders\['image'\] must be a .*Encoder, but it"),
        ({"generators": {"image": torch.nn.Linear(3, 3)}}, TypeError, r"generators\['image'\] must be a .*Generator"),
        ({"llm": torch.nn.Linear(3, 3)}, TypeError, "llm must be a bigmac_lightning.LanguageModel, but it is a Linear"),
        ({"encoders": {"image": VisionEncoder(parts.TOWER, 16)}}, ValueError, "has the width 16, but the LLM has 32"),
        (
            {"generators": {"image": FlowGenerator(16, channels=1)}},
            ValueError,
            r"generators\['image'\] has the width 16, but the LLM has 32: they must be equal",
        ),
    ],
)
def test_components_are_checked_at_construction(components: Any, error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"llm": HFDecoder(parts.decoder_config()), "encoders": {}, "generators": {}}
    with pytest.raises(error, match=message):
        MultimodalLM(**{**arguments, **components})


def _freeze_in_a_step(rank: int, turns: list[tuple[int, str, bool]]) -> str:
    trainer = pipeline_trainer(2, max_epochs=1, accumulate_grad_batches=2)
    try:
        _fit(trainer, {"turns": turns})
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([(3, "encoders", False)], "was frozen between two batches of one optimizer step"),
        ([(1, "llm.layers.3", False)], "was frozen between two batches of one optimizer step"),  # on one rank
        ([(2, "encoders", False), (3, "encoders", True)], "nothing was refused"),
    ],
)
def test_freezing_within_a_step_is_refused(turns: list[tuple[int, str, bool]], words: str) -> None:
    """Gradients of the step's first batches would be summed over no ranks, and stepped nevertheless."""
    for message in on_ranks(2, _freeze_in_a_step, turns):
        assert words in message
