"""Every decoder that the installed `transformers` has, cut after every layer, against the library's unsplit model.

For a type there are two outcomes: exact, or refused by name when it is built. Logits, loss and all gradients are
compared: of padded rows, with and without a mask; of rows that hold several samples, against each sample alone; and of
the load balancing loss. Single precision, within 1e-6, or within twice the rounding that the unsplit model has itself.

``python -m tests.models.sweep [TYPE ...]`` prints the verdicts.
"""

import copy
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bigmac_lightning.models import HFDecoder
from tests.models import tiny

TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LENGTHS = (9, 6, 11)  # of samples
Gradients = dict[str, Tensor | None]


@dataclass
class Verdict:
    """Of a model type.

    Attributes:
        refused: why it cannot be cut; empty: it can.
        packing: why a row must not hold several samples; empty: it may.
        router: why it has no load balancing loss; empty: it has one, or no routers.
        attention: the implementation that was compared.
        errors: the largest of each comparison, relative to what is compared.
        rounding: the unsplit model's own error.
    """

    refused: str = ""
    packing: str = ""
    router: str = ""
    attention: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    rounding: float = 0.0

    @property
    def wrong(self) -> dict[str, float]:
        return {name: error for name, error in self.errors.items() if not error <= max(1e-6, 2 * self.rounding)}


def check(model_type: str, attentions: Sequence[str] = ("sdpa", "eager"), **changes: Any) -> Verdict:
    """The verdict on a type, with the first of these attention implementations that it has.

    Raises:
        Exception: what is neither exact nor refused by name.
    """
    config = buildable(model_type, **changes)
    verdict = Verdict()
    for attention in attentions:
        try:
            decoder = HFDecoder(config, attn_implementation=attention)
        except ValueError as problem:
            verdict.refused = str(problem)
            if "attn_implementation" not in verdict.refused:
                break
        else:
            verdict = Verdict(packing=decoder.refuses_packing, attention=attention)
            break
    if "output_router_logits" in verdict.refused and "output_router_logits" not in changes:
        without = check(model_type, attentions, **changes, output_router_logits=False)
        without.router = verdict.refused
        return without
    if not verdict.refused and "vision_config" not in decoder.config.sub_configs:  # else see tests/models/zoo.py
        _compare(decoder, verdict)
    return verdict


def buildable(model_type: str, **changes: Any) -> Any:
    """A tiny config of which the library can build a model; else the type alone, for its own defaults."""
    try:
        config = tiny.tiny_config(model_type, **changes)
        with torch.device("meta"):
            hf.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except Exception:
        return {"model_type": model_type, **changes}
    return config


def _compare(decoder: HFDecoder, verdict: Verdict) -> None:
    whole = unsplit(decoder.config, verdict.attention)
    parts = Parts(decoder, whole.state_dict(), verdict.attention)
    logits, loss = _alone(whole)
    loss.backward()
    expected = _taken(whole)
    double = unsplit(decoder.config, verdict.attention, experts_implementation="eager").double()
    exact, double_loss = _alone(double)
    double_loss.backward()
    verdict.rounding = max(_largest(expected, _taken(double)), _error(logits, exact))

    def note(name: str, found: Tensor, found_loss: Tensor) -> None:
        found_loss.backward()
        verdict.errors[f"{name}: logits"] = _error(found, logits)
        verdict.errors[f"{name}: loss"] = _error(found_loss.detach(), loss.detach())
        verdict.errors[f"{name}: gradients"] = _largest(parts.gradients(), expected)

    rows = pad_sequence(samples(), batch_first=True)
    mask = pad_sequence([torch.ones_like(sample) for sample in samples()], batch_first=True)
    for name, given in (("padded", {}), ("masked", {"attention_mask": mask})):
        found, _ = parts.run({"input_ids": rows, **given})
        note(name, found[mask.bool()], _loss(found, rows, mask))
    if not verdict.packing:
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        found, _ = parts.run({"input_ids": torch.cat(samples())[None], "position_ids": positions[None]})
        unpacked = pad_sequence(list(found[0].split(list(LENGTHS))), batch_first=True)
        note("packed", found[0], _loss(unpacked, rows, mask))
    if coefficient := decoder.auxiliary_losses.get("router"):
        out = whole(input_ids=rows, attention_mask=mask, use_cache=False, output_router_logits=True)
        (_loss(out.logits, rows, mask) + coefficient * out.aux_loss).backward()
        found, losses = parts.run({"input_ids": rows, "token_mask": mask})
        (_loss(found, rows, mask) + coefficient * losses["router"]).backward()
        verdict.errors["router: loss"] = _error(losses["router"].detach(), out.aux_loss.detach())
        verdict.errors["router: gradients"] = _largest(parts.gradients(), _taken(whole))


class Parts:
    """A decoder in as many parts as it has layers, each with nothing but its own."""

    def __init__(self, decoder: HFDecoder, weights: dict[str, Tensor], attention: str) -> None:
        last = decoder.num_layers - 1
        self.parts = [HFDecoder(decoder.config, attn_implementation=attention) for _ in range(last + 1)]
        for k, part in enumerate(self.parts):
            part.materialize([k], embedding=k == 0, head=k == last)
            part.load_state_dict({name: weights[name] for name in part.state_dict()})

    def run(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, S, V) and auxiliary losses."""
        first, last, extras = self.parts[0], self.parts[-1], dict[str, Tensor]()
        inputs = first.prepare(inputs)
        h = first.embed(inputs)
        for k, part in enumerate(self.parts):
            h = part.run_layers(h, inputs, range(k, k + 1), extras)
        return last.logits(h.flatten(0, 1)).unflatten(0, h.shape[:2]), last.auxiliary(extras)

    def gradients(self) -> Gradients:
        """By the names that the unsplit model has, the copies of tied weights summed; they are taken away."""
        found: Gradients = {}
        for part in self.parts:
            for name, gradient in _taken(part).items():
                name = part.tied.get(name, name)
                both = [g for g in (found.get(name), gradient) if g is not None]
                found[name] = torch.stack(both).sum(0) if both else None
        return found


def unsplit(config: Any, attention: str, **more: Any) -> Any:
    """The library's model with random weights, also of those that start as zeros or ones."""
    torch.manual_seed(2)
    whole: Any = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention, **more).float()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return whole.train()


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, tiny.VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def _alone(whole: Any) -> tuple[Tensor, Tensor]:
    """Logits of all samples' tokens, each sample for itself, and the loss."""
    logits = [whole(input_ids=sample[None], use_cache=False).logits for sample in samples()]
    losses = [
        _loss(row, sample[None], torch.ones_like(sample[None])) for row, sample in zip(logits, samples(), strict=True)
    ]
    return torch.cat(logits, 1)[0], torch.stack(losses).sum()


def _loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    labelled = mask[:, 1:].bool()
    return cross_entropy(logits[:, :-1][labelled], ids[:, 1:][labelled], reduction="sum")


def _taken(module: torch.nn.Module) -> Gradients:
    """Gradients, which are not there any more then."""
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return found


def _error(found: Tensor | None, expected: Tensor | None, floor: float = 0.0) -> float:
    if expected is None or not expected.any():
        return 0.0 if found is None or found.norm() < 1e-9 else float("inf")
    if found is None:
        return float("inf")
    return float((found.double() - expected.double()).norm() / max(float(expected.double().norm()), floor))


def _largest(found: Gradients, expected: Gradients) -> float:
    """Relative to each gradient's norm, or to a thousandth of the largest one's: biases of keys have none."""
    floor = 1e-3 * max(float(gradient.norm()) for gradient in expected.values() if gradient is not None)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(_error(found[name], gradient, floor) for name, gradient in expected.items())


def main() -> None:
    warnings.simplefilter("ignore")
    hf.utils.logging.set_verbosity_error()
    counts = dict.fromkeys(("exact", "refused", "WRONG"), 0)
    for name in sys.argv[1:] or TYPES:
        start = time.perf_counter()
        try:
            verdict = check(name)
            kind = "refused" if verdict.refused else "WRONG" if verdict.wrong else "exact"
            said = [verdict.refused, str(verdict.wrong or ""), verdict.packing, verdict.router]
        except Exception as problem:
            kind, said = "WRONG", [f"{type(problem).__name__}: {problem}"]
        counts[kind] += 1
        print(
            f"{kind:8}{name:26}{time.perf_counter() - start:5.1f} s ", " | ".join(filter(None, said))[:300], flush=True
        )
    print(counts)


if __name__ == "__main__":
    main()
