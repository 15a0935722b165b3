"""SampleReplies: what the model replies to examples of the validation, and how like the examples' own replies it is."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # pyright: ignore[reportPrivateImportUsage]
from torchmetrics import Metric
from torchmetrics.text import CHRFScore

from bigmac_lightning.callbacks.shared import checked, filled, folder_of, replicas_of
from bigmac_lightning.checkpoints.remote import Place
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.example_sources import name_of, sources_of
from bigmac_lightning.ranks import Ranks
from bigmac_lightning.training.strategy import BigMacStrategy

Line = dict[str, Any]
FILE = "replies.jsonl"


class SampleReplies(pl.Callback):
    """Lets the model reply to examples of the validation, and logs how like the examples' own replies that is:
    ``val/reply_exact_match``, the share of replies that are the same, and the text metric, such as ``val/reply_chrf``.
    Writes a file of JSON lines with all replies, and a text for TensorBoard with some.

    The examples are the first ones of the validation that end with a reply. It works in a pipeline, and with DDP or one
    process, for a `MultimodalDataModule` whose validation can be read by index; data-parallel replicas divide the
    examples among themselves. An example that cannot be read is left out, and its line says why.

    Args:
        limit: the number of examples.
        every_n_epochs: reply after the validation of every n-th epoch (and always after the last). A `ModelCheckpoint`
            that monitors the metrics needs the same number.
        metric: a text metric of torchmetrics, which compares texts with texts; ``None``: chrF.
        max_new_tokens: the number of tokens after which a reply is cut off; ``None``: what the data say.
        temperature: what logits are divided by before a token is drawn; 0: the most likely token is taken.
        top_p: draw among the most likely tokens that together have this probability.
        seed: of the draws.
        shown: the number of replies in the text for TensorBoard.
        dirpath: the folder for ``replies.jsonl``; ``None``: the logger's directory.

    Attributes:
        artifacts: the files that were written, on global rank 0.
        lines: what the file holds, on every rank: "name", "reference" and "reply", or "name" and "error".
    """

    def __init__(
        self,
        limit: int = 32,
        every_n_epochs: int = 1,
        metric: Metric | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        shown: int = 8,
        dirpath: str | None = None,
    ) -> None:
        for name, value in (("limit", limit), ("every_n_epochs", every_n_epochs)):
            if value < 1:
                raise ValueError(f"SampleReplies({name}={value}) needs at least 1")
        self.limit, self.every_n_epochs, self.shown, self.dirpath = limit, every_n_epochs, shown, dirpath
        self.metric = CHRFScore() if metric is None else metric
        self.metric.sync_on_compute = False  # every rank has the replies of all
        given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        self._sampling = {name: value for name, value in given.items() if value is not None}
        self.artifacts: list[Place] = []
        self.lines: list[Line] = []
        self._places: list[tuple[int, int]] | None = None
        self._ranks = Ranks()

    # -- what is refused -----------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        checked(self, pl_module)
        strategy, data = trainer.strategy, _data(trainer)
        if not isinstance(strategy, BigMacStrategy | SingleDeviceStrategy) and type(strategy) is not DDPStrategy:
            raise ValueError(
                f"SampleReplies does not know whether {type(strategy).__name__} has whole weights on each rank, which "
                "may write other numbers of tokens: use the strategy bigmac, auto or ddp, or remove it"
            )
        if not sources_of(data, "val"):
            raise ValueError(
                "SampleReplies needs examples of the validation that can be read by index, and there are none: give "
                "the DataModule a source in val, or mixture.val_split"
            )
        self._options(data)
        try:
            _values(self.metric, ["a text"], ["a text"])
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"SampleReplies(metric={type(self.metric).__name__}) cannot compare a list of texts with another one "
                f"and give a number, or several by name: use a metric of torchmetrics.text that can ({_words(error)})"
            ) from error
        self._places = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._find(trainer)

    def _options(self, data: Any) -> Any:
        """How tokens are chosen.

        Raises:
            ValueError: an option has a value that it cannot have.
        """
        # imported here because it imports transformers
        from bigmac_lightning.models.writing import Sampling  # pyright: ignore[reportMissingImports]

        return Sampling(**{"max_new_tokens": data.reply_tokens, **self._sampling})

    # -- examples ------------------------------------------------------------------------------------------------------

    def _find(self, trainer: pl.Trainer) -> list[tuple[int, int]]:
        """The sources' numbers and the indices of the examples, which rank 0 looks for. Collective.

        Raises:
            ValueError: there are none; on all ranks.
        """
        places = self._places
        if places is None:
            found = self._look(_data(trainer)) if self._ranks.rank == 0 else ([], "")
            places, why = self._ranks.exchange(found)()[0][0]
            if not places:
                raise ValueError(
                    "SampleReplies needs examples of the validation that end with a reply, and there are none: remove "
                    f"it, or give the DataModule some in val{why}"
                )
            self._places = places
        return places

    def _look(self, data: Any) -> tuple[list[tuple[int, int]], str]:
        places, why = list[tuple[int, int]](), ""
        for number, source in enumerate(sources_of(data, "val")):
            for index in range(len(source)):
                if len(places) == self.limit:
                    return places, why
                try:
                    _, reference = data.question(source[index])
                except Exception as error:  # a source may raise anything
                    why = why or f". {name_of(source, index)}: {_words(error)}"
                else:
                    places += [(number, index)] * (reference is not None)
        return places, why

    # -- replies -------------------------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch, trains = trainer.current_epoch + 1, trainer.state.fn == TrainerFn.FITTING
        if trainer.sanity_checking or (trains and epoch % self.every_n_epochs and epoch != trainer.max_epochs):
            return
        self.lines = self._reply(trainer, checked(self, pl_module))
        pl_module.log_dict(self._compared(), sync_dist=True)  # they are equal on all ranks; Lightning would warn
        folder = folder_of(trainer, self.dirpath)  # collective
        if not trainer.is_global_zero:
            return
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines)
        with filled(folder) as local:
            (local / FILE).write_text(text, "utf-8")
        self.artifacts = [folder / FILE]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("replies", _table(self.lines[: self.shown]), trainer.global_step)

    def _reply(self, trainer: pl.Trainer, module: PipelineModule) -> list[Line]:
        """The lines of all examples. Replica r of R replies to the examples r, r + R, r + 2R, ... Collective."""
        from bigmac_lightning.models.writing import all_written  # pyright: ignore[reportMissingImports]

        data, places = _data(trainer), self._find(trainer)
        sources, (replicas, replica) = sources_of(data, "val"), replicas_of(trainer)
        lines: list[Line] = [{"name": name_of(sources[number], index)} for number, index in places]
        questions, errors = dict[int, tuple[Any, str]](), dict[int, str]()
        for k in range(replica, len(places), replicas):
            number, index = places[k]
            try:
                questions[k] = data.question(sources[number][index])
            except Exception as error:  # a source may raise anything
                errors[k] = _words(error)
        for found in self._ranks.exchange(errors)()[0]:  # one rank alone may fail, and all must leave the example out
            for k, words in found.items():
                lines[k]["error"] = words
                questions.pop(k, None)
        with nullcontext() if module.runner is not None else trainer.precision_plugin.forward_context():
            prompts = (prompt for prompt, _ in questions.values())
            tokens = all_written(module, prompts, self._options(data), data.reply_ends())
        own = [(k, questions[k][1], data.reply(written)) for k, written in zip(questions, tokens, strict=True)]
        for found in self._ranks.exchange(own)()[0]:
            for k, reference, reply in found:
                lines[k] |= {"reference": reference, "reply": reply}
        return lines

    def _compared(self) -> dict[str, float]:
        """The metrics.

        Raises:
            ValueError: no example could be read; on all ranks.
        """
        if failed := [line for line in self.lines if "error" in line]:
            rank_zero_warn(
                f"SampleReplies leaves out {len(failed)} of {len(self.lines)} examples. "
                f"{failed[0]['name']}: {failed[0]['error']}"
            )
        known = [line for line in self.lines if "reply" in line]
        if not known:
            raise ValueError("SampleReplies could read none of its examples")
        replies, references = [line["reply"] for line in known], [line["reference"] for line in known]
        same = sum(reply == reference for reply, reference in zip(replies, references, strict=True))
        found = {"exact_match": same / len(known), **_values(self.metric, replies, references)}
        return {f"val/reply_{name}": value for name, value in found.items()}


def _data(trainer: pl.Trainer) -> Any:
    return trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _values(metric: Metric, replies: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The numbers that a text metric gives, by name."""
    metric.reset()
    metric.update(replies, references)
    value: Any = metric.compute()
    return {name: float(one) for name, one in (value if isinstance(value, Mapping) else {_name(metric): value}).items()}


def _name(metric: Metric) -> str:
    """Such as "chrf" for CHRFScore and "word_error_rate" for WordErrorRate."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(metric).__name__).lower().removesuffix("score").removesuffix("_")


def _table(lines: Sequence[Line]) -> str:
    """A table in Markdown."""
    rows = [[line["name"], line.get("reference", ""), line.get("reply", line.get("error"))] for line in lines]
    cells = [[html.escape(str(cell)).replace("|", "&#124;").replace("\n", "<br>") for cell in row] for row in rows]
    return "\n".join(["| example | reference | reply |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in cells)])
