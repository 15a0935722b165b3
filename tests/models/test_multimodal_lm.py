import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bigmac_lightning.contracts.batch import Batch, Microbatch, Origin
from bigmac_lightning.contracts.module import Part
from bigmac_lightning.models import HFDecoder, MultimodalLM
from bigmac_lightning.models.evaluation import whole_samples
from tests.models.parts import LAYERS, collate, decoder_config, flow, model

KINDS = "rdtrrddtrdr"  # reads, drawings, texts

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def built(**changes: Any) -> MultimodalLM:
    module = model(**changes)
    module.configure_model()
    return module


def gradients(module: MultimodalLM, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    out = module.pipeline(batch)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def trainer(**arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def loader(*batches: Batch) -> "DataLoader[Batch]":
    return DataLoader(list(batches), batch_size=None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("microbatches", [2, 3, len(KINDS)])
@pytest.mark.parametrize("tied", [True, False])
def test_microbatches_change_neither_loss_nor_gradients(microbatches: int, tied: bool) -> None:
    changes = {"llm": HFDecoder(decoder_config(tie_word_embeddings=tied)), "loss_weights": {"text": 0.5, "image": 3.0}}
    one = built(**changes)
    other = copy.deepcopy(one)
    loss, expected = gradients(one, collate(KINDS, 1))
    batch = collate(KINDS, microbatches)
    assert len({m.shape for m in batch.microbatches}) > 1
    got_loss, got = gradients(other, batch)
    torch.testing.assert_close(got_loss, loss, rtol=1e-6, atol=0)
    assert got.keys() == expected.keys() == {n for n, p in one.named_parameters() if p.requires_grad}
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=2e-6, msg=name)


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    module = built(loss_weights={"image": 2.0})
    out = module.pipeline(collate(KINDS, 3))
    assert list(out.metrics) == ["loss", "text", "image"]
    torch.testing.assert_close(out.loss.detach(), out.metrics["text"] + 2 * out.metrics["image"])
    texts = module.pipeline(collate("tt", 2))
    assert texts.metrics["image"] == 0
    assert texts.loss == texts.metrics["text"] > 0


def test_predictions_and_samples_come_in_the_order_of_the_batch() -> None:
    module = built().eval()
    batch = collate(KINDS, 4)
    together = module.pipeline(batch, sample=True)
    assert together.predictions is not None
    assert together.samples is not None
    assert together.predictions.shape == batch.labels.shape
    apart = [module.pipeline(Batch([m]), sample=True) for m in batch.microbatches]
    assert torch.equal(
        together.predictions, torch.cat([out.predictions for out in apart if out.predictions is not None])
    )
    samples = [sample for out in apart for sample in out.samples or []]
    assert len(samples) == len(together.samples) == len(batch.targets) == KINDS.count("d")
    assert all(torch.equal(a, b) for a, b in zip(samples, together.samples, strict=True))


# -- freezing


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        (["llm"], ["llm."]),
        (["encoders.image.tower", "generators"], ["encoders.image.tower.", "generators."]),
        (["llm.model.layers.*.mlp.*"], [f"llm.model.layers.{k}.mlp." for k in range(LAYERS)]),
        (["encoders.image.projector.bias"], ["encoders.image.projector.bias"]),
    ],
)
def test_freeze(freeze: list[str], frozen: list[str]) -> None:
    module = built(freeze=freeze)
    free = built()
    never = {name for name, p in free.named_parameters() if not p.requires_grad}
    got = {name for name, p in module.named_parameters() if not p.requires_grad}
    expected = {name for name, _ in module.named_parameters() if name.startswith(tuple(frozen))}
    assert expected
    assert got == expected | never
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer(max_steps=2).fit(module, loader(collate("rdt", 2), collate("rdt", 2)))
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == before.keys() - got


@pytest.mark.parametrize("pattern", ["llm.lm_head", "llm.model.embed_tokens", "llm.lm_head.weight"])
@pytest.mark.parametrize("part", [Part(), Part([0], True, False), Part([LAYERS - 1], False, True)])
def test_tied_weights_freeze_under_either_name_on_every_part(pattern: str, part: Part) -> None:
    module = model(freeze=[pattern])
    module.part = part
    module.configure_model()
    frozen = {name for name, p in module.llm.named_parameters(remove_duplicate=False) if not p.requires_grad}
    assert frozen == {
        *({"model.embed_tokens.weight"} if part.embedding else {}),
        *({"lm_head.weight"} if part.head else {}),
    }


def test_a_pattern_of_another_parts_layers_is_fine() -> None:
    module = model(freeze=["llm.model.layers.4"])
    module.part = Part([0, 1], True, False)
    module.configure_model()
    assert all(p.requires_grad for p in module.llm.parameters())


def test_freezing_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"'encoder' matches no .*'llm', 'encoders.image', 'generators.image'"):
        model(freeze=["llm", "encoder"])


def test_freezing_everything() -> None:
    module = built(freeze=["llm", "encoders", "generators"])
    with pytest.raises(ValueError, match="nothing is left to train"):
        module.configure_optimizers()


# -- optimization


def test_optimizer_has_what_is_trained_and_decays_matrices() -> None:
    module = built(freeze=["llm.model.layers.0"], schedule="constant", weight_decay=0.3)
    decayed, plain = module.configure_optimizers()["optimizer"].param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])
    given = {id(p) for group in (decayed, plain) for p in group["params"]}
    assert given == {id(p) for p in module.parameters() if p.requires_grad}


def test_components_with_settings_of_their_own() -> None:
    overrides = {
        "encoders": {"learning_rate": 1e-3},
        "encoders.image.projector": {"learning_rate": 2e-3, "weight_decay": 0.0},
        "llm.lm_head": {"learning_rate": 3e-3},
    }
    module = built(schedule="constant", learning_rate=1e-4, weight_decay=0.3, optimization=overrides)
    found = {}
    names = {parameter: name for name, parameter in module.named_parameters()}
    for group in module.configure_optimizers()["optimizer"].param_groups:
        found.update({names[p]: (group["initial_lr"], group["weight_decay"]) for p in group["params"]})
    assert found.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    for name, (rate, decay) in found.items():
        projector, encoder = name.startswith("encoders.image.projector"), name.startswith("encoders")
        tied = name == "llm.model.embed_tokens.weight"  # the head under another name
        assert rate == (2e-3 if projector else 1e-3 if encoder else 3e-3 if tied else 1e-4)
        assert decay == (0.0 if projector or module.get_parameter(name).ndim < 2 else 0.3)


def test_settings_that_match_nothing() -> None:
    with pytest.raises(ValueError, match=r"optimization: 'encoders.sound' matches no component"):
        built(optimization={"encoders.sound": {"learning_rate": 1.0}})
    with pytest.raises(ValueError, match=r"'llm' has \['lr'\]; there are learning_rate and weight_decay"):
        built(optimization={"llm": {"lr": 1.0}})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]), ("cosine", [0.25, 0.5, 0.75, 1.0, 0.75, 0.25])],
)
def test_schedule(schedule: Any, expected: list[float]) -> None:
    class Rates(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    module = built(schedule=schedule, learning_rate=1e-3, warmup_steps=3)
    batches = [collate("t", 1)] * 3
    trainer(max_epochs=2, callbacks=[rates]).fit(module, loader(*batches))
    assert rates.seen == pytest.approx([1e-3 * factor for factor in expected], rel=1e-6)


def test_a_resumed_run_may_be_longer(tmp_path: Path) -> None:
    module = built(schedule="cosine", learning_rate=1e-3)
    batches = [collate("t", 1)] * 3
    short = trainer(max_epochs=1)
    short.fit(module, loader(*batches))
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)  # pyright: ignore
    short.save_checkpoint(tmp_path / "short.ckpt")
    longer = trainer(max_epochs=2)
    again = built(schedule="cosine", learning_rate=1e-3)
    longer.fit(again, loader(*batches), ckpt_path=tmp_path / "short.ckpt", weights_only=False)
    (config,) = longer.lr_scheduler_configs
    assert config.scheduler.lr_lambdas[0](3) == pytest.approx(0.5)  # in the middle of six steps
    changed = [not torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True)]
    assert any(changed)


def test_cosine_has_to_know_its_end() -> None:
    endless = trainer(max_epochs=-1)
    with pytest.raises(ValueError, match="has to know its end: set max_epochs or max_steps"):
        endless.fit(built(schedule="cosine"), loader(collate("t", 1)))


def test_two_runs_are_equal() -> None:
    results = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        module = built(learning_rate=1e-2, schedule="constant")
        trainer(max_epochs=1).fit(module, loader(collate(KINDS, 3), collate("rd", 2)))
        results.append(module.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# -- logging


class Keys(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(set(trainer.callback_metrics))


def test_the_same_keys_whatever_is_in_a_batch() -> None:
    keys = Keys()
    batches = [collate("t", 1), collate("d", 1), collate("rd", 2)]
    trainer(max_epochs=1, callbacks=[keys]).fit(built(), loader(*batches))
    assert keys.seen == [{"train/loss", "train/text", "train/image"}] * 3
    for kinds in ("t", "r", "dd", "rdt"):
        (logged,) = trainer().validate(built(), loader(collate(kinds, 2)), verbose=False)
        assert set(logged) == {"val/loss", "val/text", "val/image", "val/accuracy", "val/exact_match"}
    (logged,) = trainer().test(built(), loader(collate("rd", 2)), verbose=False)
    assert set(logged) == {"test/loss", "test/text", "test/image", "test/accuracy", "test/exact_match"}


def test_evaluation_weighs_batches_by_what_they_hold() -> None:
    """Uneven batches, some without labels of a kind, give what one batch of everything gives."""
    module = built(loss_weights={"image": 2.0}).eval()
    everything = collate(KINDS, 1)
    with torch.no_grad():
        whole = module.pipeline(everything)
    assert whole.predictions is not None
    batches = [Batch([m]) for m in collate(KINDS, 4).microbatches]
    (logged,) = trainer().validate(module, loader(*batches), verbose=False)
    assert logged["val/text"] == pytest.approx(whole.metrics["text"].item(), rel=1e-5)
    assert logged["val/image"] == pytest.approx(whole.metrics["image"].item(), rel=1e-5)
    assert logged["val/loss"] == pytest.approx(whole.metrics["loss"].item(), rel=1e-5)
    assert logged["val/accuracy"] == pytest.approx((whole.predictions == everything.labels).float().mean().item())
    (again,) = trainer().validate(module, loader(*batches), verbose=False)
    assert again == logged


def test_exact_match_counts_samples() -> None:
    """Of packed rows, of padded ones, and of rows of which nobody says what they hold; without labels none counts."""
    inputs = {"input_ids": torch.zeros(2, 6, dtype=torch.long)}

    def microbatch(labelled: list[int], *stops: int) -> Microbatch:
        starts = [0, *stops[:-1]]
        origins = [Origin("x", start, stop) for start, stop in zip(starts, stops, strict=False)]
        positions = torch.tensor(labelled, dtype=torch.long) - 1
        return Microbatch(inputs, positions, torch.zeros(len(labelled), dtype=torch.long), origins=origins)

    batch = Batch([microbatch([1, 3, 5, 9], 3, 5, 9, 12), microbatch([], 12), microbatch([2, 5, 6, 11])])
    right = torch.tensor([True, True, False, True, True, False, True, True])
    share, number = whole_samples(batch, right)
    # samples 0..2, 3..4, 5..8 and 9..11, of which the third is wrong; rows 0..5 and 6..11, of which the first is
    assert (share.item(), number.item()) == (pytest.approx(4 / 6), 6)
    assert [float(x) for x in whole_samples(Batch([microbatch([], 12)]), right[:0])] == [0, 0]


def test_exact_match_of_an_evaluation() -> None:
    """Of batches of different sizes, the share over all samples with labels."""
    module, batches = built().eval(), [Batch([m]) for m in collate(KINDS, 4).microbatches]
    expected = list[bool]()
    for batch in batches:
        with torch.no_grad():
            right = module.pipeline(batch).predictions == batch.labels
        [microbatch] = batch.microbatches
        for origin in microbatch.origins:
            own = (microbatch.label_positions + 1 >= origin.start) & (microbatch.label_positions + 1 < origin.stop)
            expected += [bool(right[own].all())] * bool(own.any())
    (logged,) = trainer().validate(module, loader(*batches), verbose=False)
    assert logged["val/exact_match"] == pytest.approx(sum(expected) / len(expected))


def test_a_model_with_nothing_but_text_is_evaluated() -> None:
    (logged,) = trainer().validate(built(generators={}), loader(collate("rt", 2)), verbose=False)
    assert set(logged) == {"val/loss", "val/text", "val/accuracy", "val/exact_match"}
    assert logged["val/loss"] == logged["val/text"] > 0


def test_a_trained_model_scores() -> None:
    """Learning one batch by heart raises the accuracy on it to 1, and validation sees it."""
    module = built(learning_rate=1e-2, schedule="constant")
    batch = collate("rtrt", 2)
    trainer(max_epochs=25, limit_val_batches=0).fit(module, loader(batch))
    (logged,) = trainer().validate(module, loader(batch, collate("d", 1)), verbose=False)
    untrained = trainer().validate(built(), loader(batch), verbose=False)[0]
    assert untrained["val/accuracy"] < 0.3
    assert logged["val/accuracy"] > 0.8
    assert logged["val/exact_match"] > 0.2


def test_predict() -> None:
    batches = [collate("drd", 2), collate("t", 1)]
    results = trainer().predict(built(generators={"image": flow(steps=2)}), loader(*batches))
    assert results is not None
    drawn, text = results
    assert isinstance(drawn, dict)
    assert isinstance(text, dict)
    assert [tuple(sample.shape) for sample in drawn["samples"]] == [(1, 8, 8)] * 2
    assert text["samples"] == []
    assert text["predictions"].shape == batches[1].labels.shape
