"""The 5,000 drawn shapes of the `easy-vqa` package and 48,000 questions about them: an example of a source to copy."""

import json
import re
from typing import Any, Literal

from ..example import Example, Image, Message, Size
from ..files import File
from ..media.modalities import MODALITIES
from ..multimodal import MultimodalDataModule
from ..options import DRAW, ChatOptions
from ..sources.source import Source
from .installed import installed_folder

IMAGE = MODALITIES["image"].token

TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}"
    + IMAGE
    + "{% else %} {{ part.text }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
SHAPES = ("circle", "rectangle", "triangle")


class EasyVQA(Source):
    """``<image> what shape is in the image ?`` ``circle``"""

    def __init__(self, split: Literal["train", "test"] = "train", limit: int | None = None) -> None:
        """
        Args:
            split: 4,000 pictures with 38,575 questions to train with, or 1,000 others with 9,673.
            limit: number of questions, from the first on; ``None``: all.
        """
        self.folder = installed_folder("easy_vqa", "easy-vqa") / "data" / split
        questions = json.loads((self.folder / "questions.json").read_text("utf-8"))
        self.questions: list[tuple[str, str, int]] = questions[:limit]

    @property
    def name(self) -> str:
        return f"easy-vqa {self.folder.name}"

    def __len__(self) -> int:
        return len(self.questions)

    def fingerprint(self) -> str:
        return "1.0"

    def __getitem__(self, index: int) -> Example:
        question, answer, picture = self.questions[index]
        image = Image(File.at(self.folder / "images" / f"{picture}.png"), Size(64, 64))
        return Example([Message("user", [image, question]), Message("assistant", [answer])])


class EasyVQADrawings(Source):
    """``Draw a red circle.`` and the picture of one."""

    def __init__(self, split: Literal["train", "test"] = "train", limit: int | None = None) -> None:
        """
        Args:
            split: see `EasyVQA`.
            limit: number of pictures, from the first on; ``None``: all.
        """
        facts_of: dict[int, dict[str, str]] = {}
        source = EasyVQA(split)
        for _, answer, picture in source.questions:
            if answer not in ("yes", "no"):
                facts_of.setdefault(picture, {})["shape" if answer in SHAPES else "color"] = answer
        whole = [(picture, facts) for picture, facts in sorted(facts_of.items()) if len(facts) == 2]
        self.folder, self.pictures = source.folder, whole[:limit]

    @property
    def name(self) -> str:
        return f"easy-vqa {self.folder.name} drawings"

    def __len__(self) -> int:
        return len(self.pictures)

    def fingerprint(self) -> str:
        return "1.0"

    def __getitem__(self, index: int) -> Example:
        picture, facts = self.pictures[index]
        image = Image(File.at(self.folder / "images" / f"{picture}.png"), Size(64, 64))
        return Example([Message("user", [f"Draw a {facts['color']} {facts['shape']}."])], image)


class EasyVQADataModule(MultimodalDataModule):
    """Trains on the training questions, and validates on the others. The answer is one word, and the only label: token
    accuracy is the share of right answers."""

    reply_tokens = 1

    def __init__(
        self,
        train_questions: int | None = None,
        val_questions: int | None = None,
        chat: ChatOptions = ChatOptions(end_of_reply=""),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            train_questions, val_questions: number of questions, from the first on; ``None``: all.
            chat: as for `MultimodalDataModule`; by default replies end without a token, as each is one word.
            kwargs: as for `MultimodalDataModule`.
        """
        train, val = EasyVQA("train", train_questions), EasyVQA("test", val_questions)
        super().__init__(train=[train], val=[val], processor=word_tokenizer(train), chat=chat, **kwargs)


def word_tokenizer(source: EasyVQA) -> Any:
    """A tokenizer with one token per word of all training questions and answers; id 0 is the padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = (f"{question} {answer}" for question, answer, _ in EasyVQA(source.folder.name).questions)  # pyright: ignore
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", IMAGE, DRAW, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([IMAGE, DRAW])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE
    )
