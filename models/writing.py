"""Lets a trained module write a text token by token, in one process.

Shape suffixes: S tokens, D width of the LLM, V vocabulary.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

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

from bigmac_lightning.contracts.batch import Batch, Microbatch
from bigmac_lightning.contracts.component_module import ComponentModule


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


class GrowingText:
    """A prompt and the tokens after it.

    Attributes:
        logits_V: of the next token.
    """

    def __init__(self, module: ComponentModule, prompt: Batch) -> None:
        """
        Args:
            module: a module with all of its weights.
            prompt: a batch with one microbatch of one sample.
        """
        [self._microbatch] = prompt.microbatches
        self._module, self._cache = module, module.llm.new_cache()
        with torch.inference_mode():
            media = self._moved(self._microbatch).media
            self._features = torch.cat(module.encode(media)) if media else None
            self.logits_V = self._run(self._microbatch, self._features)

    def append(self, token: int) -> None:
        """Add a token."""
        inputs, ids_BS = self._microbatch.inputs, torch.tensor([[token]])
        if self._cache is None:
            each = {name: value for name, value in inputs.items() if value.shape == inputs["input_ids"].shape}
            longer = {name: torch.cat([value, value[:, -1:]], dim=1) for name, value in each.items()}
            longer["input_ids"] = torch.cat([inputs["input_ids"], ids_BS], dim=1)
            longer["position_ids"] = torch.arange(longer["input_ids"].shape[1])[None]
            self._microbatch = replace(self._microbatch, inputs=inputs | longer)
            new, features = self._microbatch, self._features
        else:
            positions = next_positions(self._positions)
            new, features = Microbatch({"input_ids": ids_BS, "position_ids": positions}), None
        with torch.inference_mode():
            self.logits_V = self._run(new, features)

    def _run(self, microbatch: Microbatch, features: Tensor | None) -> Tensor:
        llm = self._module.llm
        microbatch = replace(microbatch, inputs=llm.prepare(microbatch.inputs))
        self._positions = microbatch.inputs.get("position_ids", microbatch.inputs["input_ids"])
        with llm.using_cache(self._cache):
            moved, layers = self._moved(microbatch), range(llm.num_layers)
            out = self._module.run_stage(moved, layers, None, {}, features, "evaluate")
        assert out.last is not None, "all layers have run"
        return llm.logits(out.last[0, -1:])[0].float()

    def _moved(self, microbatch: Microbatch) -> Microbatch:
        """The microbatch on the module's device."""
        return Batch([microbatch]).to(self._module.device).microbatches[0]


def next_positions(positions: Tensor) -> Tensor:
    """The positions of one token after others: (1, 1) of (1, S), or (4, 1, 1) of (4, 1, S). Of the latter, the first
    row counts tokens, and in the others a text goes on after the largest position of all (Qwen2-VL, arXiv
    2409.12191)."""
    last = positions[..., -1:] + 1
    if positions.ndim == 3:
        last = torch.cat([last[:1], (positions[1:].max() + 1).expand(len(positions) - 1, 1, 1)])
    return last


def written(module: ComponentModule, prompt: Batch, sampling: Sampling, ends: Collection[int] = ()) -> Iterator[int]:
    """The tokens that a module writes after a prompt, one by one.

    Args:
        module, prompt: see `GrowingText`.
        ends: the tokens that end a text; none of them is yielded.
    """
    text, processors = GrowingText(module, prompt), sampling.processors()
    random = torch.Generator().manual_seed(sampling.seed)
    known = prompt.microbatches[0].inputs["input_ids"][0].tolist()
    for number in range(sampling.max_new_tokens):
        logits_V = text.logits_V.cpu().clone()
        written_1S = torch.tensor([[token for token in known if token < len(logits_V)]])
        logits_V[[token for token in module.llm.placeholders if token < len(logits_V)]] = -torch.inf
        chosen_1V = processors(written_1S, logits_V[None])  # pyright: ignore[reportArgumentType]
        if sampling.temperature:
            token = int(torch.multinomial(chosen_1V.softmax(-1), 1, generator=random))
        else:
            token = int(chosen_1V.argmax())
        if token in ends:
            return
        yield token
        known.append(token)
        if number + 1 < sampling.max_new_tokens:
            text.append(token)
