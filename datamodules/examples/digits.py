"""Scikit-learn's real handwritten digits as a small multimodal task: reading, drawing and talking about digits.

There are three kinds of samples, so that batches are as uneven as in real training:

    image to text     <image> x 16 which digit is this ? 7
    text to image     draw a 7 : <draw> x 4                 (their final hidden states condition the generator)
    text only         what comes after 3 ? 4

It is an example of a `PipelineDataModule` to copy: a tokenizer, a dataset that makes `Sample`s, and three loaders.
"""

from collections.abc import Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from bigmac_lightning.contracts.batch import Batch, PipelineLayout

from ..base import PipelineDataModule, PipelineDataset, SampleList
from ..errors import ExampleError
from ..example import Example, Image
from ..loading.collate import Media, Sample, Target, make_batch
from ..media.decoding import measure, read_image

if TYPE_CHECKING:  # this example's own needs, scikit-learn and tokenizers, are imported where they are used
    from tokenizers import Tokenizer

QUESTIONS = ["which digit is this ?", "what number do you see ?", "please read this digit :"]
REQUESTS = ["draw a {} :", "show me a {} :", "please write the digit {} :"]
FACTS = [
    *((f"what comes after {d} ?", str(d + 1)) for d in range(9)),
    *((f"what comes before {d} ?", str(d - 1)) for d in range(1, 10)),
    *((f"is {d} odd or even ?", ("even", "odd")[d % 2]) for d in range(10)),
]
KNOWN = ", ".join(sorted({repr(text) for text in (*QUESTIONS, *REQUESTS, "what comes after 3 ?")}))
"""What can be said, for errors."""

HELD_OUT = 297
"""Number of the 1797 images that are held out for validation."""

NOISE = 0.3
"""Standard deviation of the noise on images that are read in training; pixels are in [-1, 1]."""


def digits_tokenizer() -> "Tokenizer":
    """A tokenizer with one token per word of the templates; id 0 is the padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    texts = [*QUESTIONS, *REQUESTS, *(f"{question} {answer}" for question, answer in FACTS)]
    words = sorted({word for text in texts for word in text.split()} - {"{}"})
    vocabulary = ["<pad>", "<unk>", "<image>", "<draw>", *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


class Digits:
    """Images of digits, and the samples that can be made of them.

    Args:
        images: (number, 1, 8, 8), in [-1, 1].
        digits: the digits that they show.
        image_rows: number of placeholder tokens of an image that is read: one per patch of the encoder.
        draw_rows: number of placeholder tokens of an image that is drawn.
    """

    def __init__(self, images: Tensor, digits: Sequence[int], image_rows: int, draw_rows: int) -> None:
        self.images, self.digits = images, list(digits)
        self.image_rows, self.draw_rows = image_rows, draw_rows
        self.tokenizer = digits_tokenizer()

    def load(self, index: int, noise: float = 0.0, seed: int = 0) -> Tensor:
        """Pixels (1, 8, 8) with noise. If images were files, this would open and decode one."""
        image = self.images[index]
        return image + noise * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))

    def read(self, index: int, question: str, noise: float = 0.0, seed: int = 0) -> Sample:
        """A sample of image to text. Noise of standard deviation `noise` keeps a model from memorizing the image."""
        media = Media("image", start=0, rows=self.image_rows, load=partial(self.load, index, noise, seed))
        return self._sample("<image> " * self.image_rows + question, str(self.digits[index]), media=[media])

    def draw(self, digit: int, request: str, seed: int, index: int | None = None) -> Sample:
        """A sample of text to image; `index` is the image to learn from, if there is one."""
        prompt = self.tokenizer.encode(request.format(digit)).ids
        load = None if index is None else partial(self.load, index)
        shape = tuple(self.images.shape[1:])
        target = Target("image", start=len(prompt), rows=self.draw_rows, shape=shape, seed=seed, load=load)
        return self._sample(request.format(digit) + " <draw>" * self.draw_rows, targets=[target])

    def tell(self, question: str, answer: str) -> Sample:
        """A sample of text only."""
        return self._sample(question, answer)

    def _sample(
        self, prompt: str, answer: str = "", media: Sequence[Media] = (), targets: Sequence[Target] = ()
    ) -> Sample:
        given, wanted = self.tokenizer.encode(prompt).ids, self.tokenizer.encode(answer).ids
        return Sample(given + wanted, [False] * len(given) + [True] * len(wanted), media, targets)


class TrainingDigits(PipelineDataset):
    """Samples in which every image occurs a few times per epoch, each time with another kind, question and noise."""

    def __init__(self, digits: Digits, passes: int, proportions: Sequence[float], seed: int) -> None:
        self.digits, self.passes, self.proportions, self.seed = digits, passes, proportions, seed

    def __len__(self) -> int:
        return self.passes * len(self.digits.digits)

    def sample(self, epoch: int, index: int) -> Sample:
        random = Random(f"{self.seed}/{epoch}/{index}")
        index %= len(self.digits.digits)
        kind = random.choices(["read", "draw", "tell"], self.proportions)[0]
        if kind == "read":
            return self.digits.read(index, random.choice(QUESTIONS), NOISE, random.getrandbits(63))
        if kind == "draw":
            digit = self.digits.digits[index]
            return self.digits.draw(digit, random.choice(REQUESTS), random.getrandbits(63), index)
        return self.digits.tell(*random.choice(FACTS))


def _small(image: Image) -> Tensor:
    """The pixels (1, 8, 8) of a file, in [-1, 1]."""
    pixels = read_image(image.file, measure(image), "L")
    return resize(pixels, [8, 8], antialias=True).float() / 127.5 - 1


class DigitsDataModule(PipelineDataModule):
    """1500 images to train on, and 297 for validation: always the same ones, with all digits in equal shares.

    Validation reads every held-out image, and computes the generator's loss on a third of them. The only labels are the
    digits, so that token accuracy is digit accuracy. Prediction draws each digit a few times.
    """

    def __init__(
        self,
        batch_size: int = 48,
        microbatches: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        passes: int = 1,
        proportions: tuple[float, float, float] = (3, 2, 1),
        image_rows: int = 16,
        draw_rows: int = 4,
        drawings: int = 4,
    ) -> None:
        """
        Args:
            batch_size, microbatches, num_workers, seed: see `PipelineDataModule`.
            passes: number of times that each image occurs in an epoch.
            proportions: of image-to-text, text-to-image and text-only samples.
            image_rows: number of feature rows of an image: (8 / patch size of the encoder) squared.
            draw_rows: number of hidden states that condition a drawing.
            drawings: number of times that prediction draws each digit.
        """
        super().__init__(batch_size, microbatches, num_workers, seed)
        self.passes = passes
        self.proportions = proportions
        self.image_rows = image_rows
        self.draw_rows = draw_rows
        self.drawings = drawings

    kind: type[Digits] = Digits

    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data: Any = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1  # of 0..16
        train, held_out = train_test_split(range(len(images)), test_size=HELD_OUT, stratify=data.target, random_state=0)
        self.train, self.held_out = (
            self.kind(images[part], data.target[part].tolist(), self.image_rows, self.draw_rows)
            for part in (train, held_out)
        )

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        return self.loader(TrainingDigits(self.train, self.passes, self.proportions, self.seed), shuffle=True)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        digits, samples = self.held_out, []
        for index, digit in enumerate(digits.digits):
            samples.append(digits.read(index, QUESTIONS[0]))
            if index % 3 == 0:
                samples.append(digits.draw(digit, REQUESTS[0], seed=index, index=index))
        return self.loader(SampleList(samples))

    reply_tokens = 1

    def prompt(self, example: Example) -> Batch:
        """Of the last message alone: words that the tokenizer knows, and images, which are shrunk to 8 x 8 pixels. A
        target is one digit."""
        tokenizer, words, media = digits_tokenizer(), list[str](), list[Media]()
        for part in example.messages[-1].parts:
            if isinstance(part, str):
                words += part.split()
            elif isinstance(part, Image):
                load = partial(_small, part)
                media.append(Media("image", len(words), self.image_rows, load, name=part.file.name))
                words += ["<image>"] * self.image_rows
            else:
                raise ExampleError(f"has a {type(part).__name__}: the digits are images and words")
        if unknown := [word for word in words if tokenizer.token_to_id(word) is None]:
            raise ExampleError(f"has the words {unknown}, which the digits' tokenizer does not know; it knows {KNOWN}")
        targets = [Target("image", len(words), self.draw_rows, (1, 8, 8), seed=0)] * (example.target is not None)
        tokens = tokenizer.encode(" ".join([*words, *["<draw>"] * self.draw_rows * len(targets)])).ids
        return make_batch([[Sample(tokens, [False] * len(tokens), media, targets)]], PipelineLayout())

    def reply(self, tokens: Sequence[int]) -> str:
        return digits_tokenizer().decode(list(tokens))

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        requests = [(digit, turn) for turn in range(self.drawings) for digit in range(10)]
        return self.loader(SampleList([self.held_out.draw(d, REQUESTS[0], seed=10 * turn + d) for d, turn in requests]))
