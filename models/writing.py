"""Lets a module write texts token by token, in one process or by the stages of a pipeline.

Shape suffixes: S tokens, V vocabulary.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.growing_text import GrowingText
from bigmac_lightning.contracts.module import MOST_TEXTS, PipelineModule


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: after so many tokens a text is cut off.
        temperature: what logits are divided by before a token is drawn; 0: the most likely token is taken.
        top_k: draw among so many of the most likely tokens; 0: among all.
        top_p: draw among the most likely tokens that together have this probability.
        min_p: draw among tokens that are at least this fraction as likely as the most likely one.
        repetition_penalty: above 1, tokens that the text has already become less likely.
        seed: of the draws.

    Raises:
        ValueError: names the option, its value and what is expected.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "from 0 to below 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}")

    def processors(self) -> LogitsProcessorList:
        """What changes logits before a token is chosen."""
        found = LogitsProcessorList()
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if not self.temperature:
            return found
        found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            found.append(MinPLogitsWarper(self.min_p))
        return found


class _Reply:
    """A text that is being written.

    Attributes:
        text: what the module runs.
        tokens: those that were written, without the one that has ended them.
        ended: whether the text is complete.
    """

    def __init__(self, module: PipelineModule, prompt: Batch, sampling: Sampling, ends: Collection[int]) -> None:
        self.text, self.tokens, self.ended = GrowingText(prompt), list[int](), False
        self._placeholders, self._sampling, self._ends = [*module.llm.placeholders.values()], sampling, ends
        self._before = prompt.microbatches[0].inputs["input_ids"][0].tolist()
        self._processors, self._random = sampling.processors(), torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits_V: Tensor) -> int:
        """The next token."""
        logits_V = logits_V.cpu().clone()
        known = [token for token in (*self._before, *self.tokens) if token < len(logits_V)]
        logits_V[[token for token in self._placeholders if token < len(logits_V)]] = -torch.inf
        chosen_1V = self._processors(torch.tensor([known]), logits_V[None])  # pyright: ignore[reportArgumentType]
        if self._sampling.temperature:
            return int(torch.multinomial(chosen_1V.softmax(-1), 1, generator=self._random))
        return int(chosen_1V.argmax())

    def take(self, token: int) -> None:
        """Add the chosen token, or end the text."""
        if token in self._ends:
            self.ended = True
            return
        self.tokens.append(token)
        self.ended = len(self.tokens) == self._sampling.max_new_tokens


def _go_on(module: PipelineModule, replies: Sequence[_Reply]) -> None:
    """Let each text have its next token."""
    tokens = module.write([reply.text for reply in replies], lambda number, logits_V: replies[number].choose(logits_V))
    for reply, token in zip(replies, tokens, strict=True):
        reply.take(token)


def written(module: PipelineModule, prompt: Batch, sampling: Sampling, ends: Collection[int] = ()) -> Iterator[int]:
    """The tokens that a module writes after a prompt, one by one.

    Args:
        module: the module; in a pipeline, all ranks call this function with the same arguments.
        prompt: see `GrowingText`.
        ends: the tokens that end a text; none of them is yielded.
    """
    reply, known = _Reply(module, prompt, sampling, ends), 0
    while not reply.ended:
        _go_on(module, [reply])
        yield from reply.tokens[known:]
        known = len(reply.tokens)


def all_written(
    module: PipelineModule, prompts: Iterable[Batch], sampling: Sampling, ends: Collection[int] = ()
) -> list[list[int]]:
    """The tokens that a module writes after each prompt, as `written` gives them. In a pipeline, several texts are on
    their way, so that ranks wait less for each other; each text is the same as if it were written alone.

    Args:
        module, sampling, ends: see `written`.
        prompts: see `GrowingText`.
    """
    replies, waiting, running = list[_Reply](), iter(prompts), list[_Reply]()
    while True:
        started = [_Reply(module, prompt, sampling, ends) for prompt in islice(waiting, MOST_TEXTS - len(running))]
        replies += started
        running += started
        if not running:
            return [reply.tokens for reply in replies]
        _go_on(module, running)
        running = [reply for reply in running if not reply.ended]
