from collections import Counter

import lightning.pytorch as pl
import pytest
import torch

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.datamodules import DigitsDataModule
from bigmac_lightning.datamodules.examples.digits import FACTS, HELD_OUT, TrainingDigits, digits_tokenizer
from bigmac_lightning.models import FlowGenerator, HFDecoder, MultimodalLM, VisionEncoder
from tests.models.parts import TOWER, decoder_config


@pytest.fixture(scope="module")
def data() -> DigitsDataModule:
    made = DigitsDataModule(batch_size=60, microbatches=7, draw_rows=3)
    made.setup("fit")
    return made


def text(tokens: list[int]) -> str:
    return " ".join(digits_tokenizer().id_to_token(token) for token in tokens)


def test_tokenizer() -> None:
    tokenizer = digits_tokenizer()
    assert tokenizer.token_to_id("<pad>") == 0
    assert tokenizer.encode("<image> <image> which digit is this ? 7").tokens[:3] == ["<image>", "<image>", "which"]
    assert "<unk>" not in {token for q, a in FACTS for token in tokenizer.encode(f"{q} {a}").tokens}
    assert tokenizer.get_vocab() == digits_tokenizer().get_vocab()


def test_held_out_images_are_not_trained_on(data: DigitsDataModule) -> None:
    train = {image.numpy().tobytes() for image in data.train.images}
    held_out = [image.numpy().tobytes() for image in data.held_out.images]
    assert (len(data.train.digits), len(held_out)) == (1500, HELD_OUT)
    assert not train & set(held_out)
    assert data.train.images.min() == -1
    assert data.train.images.max() == 1
    shares = Counter(data.held_out.digits)
    assert set(shares) == set(range(10))
    assert max(shares.values()) - min(shares.values()) <= 2
    again = DigitsDataModule(seed=5)
    again.setup("validate")
    assert torch.equal(again.held_out.images, data.held_out.images)


def test_a_sample_of_each_kind(data: DigitsDataModule) -> None:
    digits = data.train
    read = digits.read(3, "which digit is this ?")
    assert text(list(read.tokens)) == "<image> " * 16 + f"which digit is this ? {digits.digits[3]}"
    assert list(read.labelled) == [False] * 21 + [True]
    assert torch.equal(read.media[0].load(), digits.images[3])
    draw = digits.draw(7, "draw a {} :", seed=1, index=3)
    assert text(list(draw.tokens)) == "draw a 7 : <draw> <draw> <draw>"
    assert not any(draw.labelled)
    assert (draw.targets[0].start, draw.targets[0].rows, draw.targets[0].shape) == (4, 3, (1, 8, 8))
    told = digits.tell("is 3 odd or even ?", "odd")
    assert text(list(told.tokens)) == "is 3 odd or even ? odd"
    assert sum(told.labelled) == 1


def test_training_samples_depend_on_seed_epoch_and_index() -> None:
    data = DigitsDataModule(passes=2)
    data.setup("fit")

    def made(seed: int, epoch: int) -> list[tuple[object, ...]]:
        dataset = TrainingDigits(data.train, 2, (3, 2, 1), seed)
        assert len(dataset) == 3000
        samples = [dataset[epoch, index] for index in (0, 1, 2, 3, 4, 1500, 1501)]
        return [
            (list(s.tokens), [t.seed for t in s.targets], [m.load().sum().item() for m in s.media]) for s in samples
        ]

    assert made(0, 0) == made(0, 0)
    assert made(0, 0) != made(0, 1)
    assert made(0, 0) != made(1, 0)
    first, second = made(0, 0)[0], made(0, 0)[5]
    assert first != second  # the same image's second pass


def test_proportions(data: DigitsDataModule) -> None:
    def shares(proportions: tuple[float, float, float]) -> list[float]:
        dataset = TrainingDigits(data.train, 1, proportions, 0)
        samples = [dataset[0, index] for index in range(len(dataset))]
        read, draw = sum(bool(s.media) for s in samples), sum(bool(s.targets) for s in samples)
        return [read / 1500, draw / 1500, 1 - (read + draw) / 1500]

    assert shares((3, 2, 1)) == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=0.04)
    assert shares((0, 1, 0)) == [0, 1, 0]


def test_validation_labels_are_the_digits(data: DigitsDataModule) -> None:
    batches = list(data.val_dataloader())
    labels = torch.cat([batch.labels for batch in batches])
    tokens = [digits_tokenizer().token_to_id(str(digit)) for digit in data.held_out.digits]
    assert labels.tolist() == tokens
    assert sum(len(batch.targets) for batch in batches) == HELD_OUT // 3
    again = torch.cat([batch.labels for batch in data.val_dataloader()])
    assert torch.equal(labels, again)


def test_prediction_draws_every_digit(data: DigitsDataModule) -> None:
    batches: list[Batch] = list(data.predict_dataloader())
    targets = [target for batch in batches for target in batch.targets]
    assert len(targets) == len({target.seed for target in targets}) == 40
    assert all(target.data is None for target in targets)
    ids = torch.cat([m.inputs["input_ids"][:, 2] for batch in batches for m in batch.microbatches])
    digits = [digits_tokenizer().id_to_token(int(token)) for token in ids]
    assert digits == [str(digit) for digit in range(10)] * 4


@pytest.mark.filterwarnings("ignore:.*`IterableDataset` has `__len__` defined.*")
def test_a_short_training_learns(tmp_path: object) -> None:
    """The whole way under Lightning: fit with workers, validate, predict."""
    data = DigitsDataModule(
        batch_size=64, microbatches=2, num_workers=1, draw_rows=2, drawings=1, proportions=(3, 1, 1)
    )
    config = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6]}
    module = MultimodalLM(
        HFDecoder(decoder_config(num_hidden_layers=2, vocab_size=64)),
        {"image": VisionEncoder(TOWER, 32)},
        {"image": FlowGenerator(32, 1, config=config, steps=2)},
        learning_rate=5e-3,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    after = trainer.callback_metrics
    assert after["val/text"] < 0.7 * before["val/text"]
    assert after["val/image"] < before["val/image"]
    assert after["val/accuracy"] > 2 * before["val/accuracy"]
    predictions = trainer.predict(module, data)
    assert predictions is not None
    assert sum(len(prediction["samples"]) for prediction in predictions if isinstance(prediction, dict)) == 10
