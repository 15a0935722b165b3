"""Packed batches of images, videos, texts and drawings under Trainer(strategy="bigmac") against one process."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.datamodules import (
    Example,
    File,
    Image,
    Message,
    MultimodalDataModule,
    PackingOptions,
    TargetProcessor,
)
from bigmac_lightning.models import (
    HFDecoder,
    MultimodalLM,
    NoisyPictureEncoder,
    UnifiedDecoder,
    UnifiedLM,
    VelocityHead,
)
from tests.datamodules.examples import TARGET, VISUAL, VOCABULARY, data, model, write_mixed
from tests.models.parts import decoder_config
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*`IterableDataset` has `__len__` defined.*")


class Losses(pl.Callback):
    """Of each training step, and the shapes of its microbatches."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def fit(trainer: pl.Trainer, datamodule: Any, **arguments: Any) -> list[float]:
    losses = Losses()
    trainer.callbacks.append(losses)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.fit(model(), datamodule, **arguments)
    return losses.losses


def _fit(rank: int, world: int, dp: int, path: Path, changes: dict[str, Any]) -> Any:
    trainer = pipeline_trainer(world, {"data_parallel_size": dp}, max_epochs=2)
    losses = fit(trainer, data(path, **changes))
    return losses, {name: float(value) for name, value in trainer.callback_metrics.items()}


class Joined(MultimodalDataModule):
    """What several replicas see, for one process."""

    replicas: int = 1

    def train_dataloader(self) -> Any:
        loaders = []
        trainer = self.trainer
        for rank in range(self.replicas):
            place = {"num_replicas": self.replicas, "rank": rank}
            self.trainer = SimpleNamespace(strategy=None, distributed_sampler_kwargs=place)  # pyright: ignore
            loaders.append(self.loader("train"))
        self.trainer = trainer
        return _Zipped(loaders)


class _Zipped:
    def __init__(self, loaders: list[Any]) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return len(self.loaders[0])

    def set_epoch(self, epoch: int) -> None:
        for loader in self.loaders:
            loader.sampler.set_epoch(epoch)

    @property
    def sampler(self) -> "_Zipped":
        return self

    def __iter__(self) -> Any:
        for batches in zip(*self.loaders, strict=True):
            yield Batch([m for batch in batches for m in batch.microbatches])


@pytest.mark.parametrize(
    ("ranks", "dp", "changes"),
    [
        ((1, 2, 3), 1, {}),
        ((2,), 1, {"packing": PackingOptions(packed=False, ordered=True)}),
        ((4,), 2, {"num_workers": 1}),
    ],
    ids=["P1-P2-P3", "P2-padded", "P2-dp2"],
)
def test_against_one_process(ranks: tuple[int, ...], dp: int, changes: dict[str, Any], tmp_path: Path) -> None:
    path = write_mixed(tmp_path)
    alone = data(path, **changes)
    alone.__class__, alone.replicas = Joined, dp  # pyright: ignore
    trainer = plain_trainer(max_epochs=2)
    losses = fit(trainer, alone)
    assert len(losses) >= 4
    for world in ranks:
        for found, logged in on_ranks(world, _fit, world, dp, path, changes):
            assert found == pytest.approx(losses, rel=1e-5)
            assert logged.keys() == trainer.callback_metrics.keys()
            if dp == 1:
                assert logged["val/loss"] == pytest.approx(float(trainer.callback_metrics["val/loss"]), rel=1e-4)


COMES_IN = TargetProcessor(rows=16, shape=(3, 8, 8), encoder="drawn")
DRAWINGS = partial(MultimodalDataModule, visual=VISUAL, target=TARGET)


def unified(drawn_token: int | None = None) -> UnifiedLM:
    """As `model`, but for drawings, which run through the LLM; by default it has the DataModule's token for them."""
    token = DRAWINGS().encoder.draw_id() if drawn_token is None else drawn_token
    llm = UnifiedDecoder(decoder_config(vocab_size=VOCABULARY, num_hidden_layers=3), token)
    encoders = {"image": model().encoders["image"], "drawn": NoisyPictureEncoder(32)}
    return UnifiedLM(llm, encoders, {"image": VelocityHead(32)})


@pytest.mark.parametrize("draws", [False, True], ids=["", "in the LLM"])
def test_packing_changes_neither_loss_nor_gradients(draws: bool, tmp_path: Path) -> None:
    """Samples in one row do not see each other."""
    path = write_mixed(tmp_path)
    results = []
    changes = {"target": COMES_IN} if draws else {}
    for packed in (True, False):
        made = data(path, packing=PackingOptions(packed=packed), **changes)
        made.setup("fit")
        module = unified() if draws else model()
        made.check(module)
        module.configure_model()
        batch = next(iter(made.train_dataloader()))
        assert all((m.shape[0] == 1) == packed or len(m.origins) == 1 for m in batch.microbatches)
        out = module.pipeline(batch)
        out.loss.backward()
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        results.append((out.loss.detach(), gradients))
    (loss, gradients), (other, others) = results
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=2e-6, msg=name)


def test_a_prompt_for_an_llm_that_draws() -> None:
    made = DRAWINGS(target=COMES_IN)
    module = unified().eval()
    module.configure_model()
    batch = made.prompt(Example([Message("user", ["a cat"])], Image(File.lazy("none", bytes))))
    with torch.no_grad():
        drawn = module.pipeline(batch, sample=True).samples
    assert drawn is not None
    assert [one.shape for one in drawn] == [(3, 8, 8)]


def test_data_that_an_llm_that_draws_cannot_take() -> None:
    with pytest.raises(ValueError, match=r"set target.encoder to the model's NoisyPictureEncoder, one of image, drawn"):
        DRAWINGS().check(unified())
    with pytest.raises(ValueError, match=r"target.encoder='drawn': leave it out, as HFDecoder does not draw"):
        DRAWINGS(target=COMES_IN).check(model())
    with pytest.raises(ValueError, match=r"drawn_token=70 \('a'\), and chat.draw_token='<\|draw\|>' has the id 5"):
        DRAWINGS(target=COMES_IN).check(unified(70))
    with pytest.raises(ValueError, match="drawn_token=70 "):
        DRAWINGS(target=None).check(unified(70))


def test_text_of_other_samples_in_the_row_changes_nothing(tmp_path: Path) -> None:
    path = write_mixed(tmp_path)
    made = data(path)
    made.setup("fit")
    module = model().eval()
    module.configure_model()
    batch = next(iter(made.val_dataloader()))
    microbatch = max(batch.microbatches, key=lambda m: len(m.origins))
    first, second = microbatch.origins[:2]
    ids = microbatch.inputs["input_ids"].clone()
    ids[0, first.start + 1 : first.stop] = 77
    changed = replace(microbatch, inputs={**microbatch.inputs, "input_ids": ids})
    hidden = []
    with torch.no_grad():
        for m in (microbatch, changed):
            features = torch.cat(module.encode(m.media)) if m.media else None
            out = module.run_stage(m, range(2), None, {}, features, "evaluate").hidden
            assert out is not None
            hidden.append(out[0])
    assert torch.equal(hidden[0][second.start :], hidden[1][second.start :])
    assert not torch.equal(hidden[0][: first.stop], hidden[1][: first.stop])


def test_a_model_that_does_not_know_all_tokens_is_refused(tmp_path: Path) -> None:
    """Before anything is measured or trained: on a GPU a token id that is too large ends the process without a word."""
    small = MultimodalLM(HFDecoder(decoder_config(vocab_size=VOCABULARY - 2)))
    with pytest.raises(ValueError, match=r"2 tokens of the tokenizer, .* lie beyond the LLM's vocabulary of 260"):
        plain_trainer(max_epochs=1).fit(small, data(write_mixed(tmp_path)))
