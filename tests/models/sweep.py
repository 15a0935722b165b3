"""Every decoder that the installed `transformers` has, cut after every layer, against the library's unsplit model.

For a type there are two outcomes: exact, or refused by name when it is built. Logits, loss and all gradients are
compared, of rows that are padded and of rows that hold several samples, the latter against each sample alone; single
precision, within 1e-6 or within twice the rounding that the unsplit model has itself (measured in double precision).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import cross_entropy

from bigmac_lightning.models import HFDecoder
from tests.models import tiny

LENGTHS = (9, 6, 11)
ATTENTION = "sdpa"


@dataclass
class Verdict:
    """Of a model type.

    Attributes:
        refused: why it cannot be cut; empty: it can.
        refuses_packing: why rows must not hold several samples; empty: they may.
        errors: largest error of each comparison.
        rounding: the unsplit model's own.
        failed: what is neither exact nor refused by name.
    """

    refused: str = ""
    refuses_packing: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    rounding: float = 0.0
    failed: str = ""
    router_loss: str = ""

    @property
    def exact(self) -> bool:
        return (
            not self.refused
            and not self.failed
            and all(e <= max(1e-6, 2 * self.rounding) for e in self.errors.values())
        )


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, tiny.VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def padded() -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, S)."""
    ids = torch.nn.utils.rnn.pad_sequence(samples(), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in samples()], batch_first=True)
    return ids, mask


class Parts:
    """A decoder in as many parts as it has layers."""

    def __init__(self, config: Any, weights: dict[str, Tensor], attention: str = ATTENTION) -> None:
        self.parts: list[HFDecoder] = []
        for k in range(len_layers(config, attention)):
            part = HFDecoder(config, attn_implementation=attention)
            part.materialize([k], embedding=k == 0, head=k == part.num_layers - 1)
            part.load_state_dict({name: weights[name] for name in part.state_dict()})
            self.parts.append(part.train())

    def run(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, S, V) and auxiliary losses."""
        first, last, extras = self.parts[0], self.parts[-1], dict[str, Tensor]()
        inputs = first.prepare(inputs)
        h = first.embed(inputs)
        for k, part in enumerate(self.parts):
            h = part.run_layers(h, inputs, range(k, k + 1), extras)
        return last.logits(h.flatten(0, 1)).unflatten(0, h.shape[:2]), last.auxiliary(extras)

    def gradients(self) -> dict[str, Tensor | None]:
        """By the names that the unsplit model has; copies of tied weights are summed."""
        found: dict[str, Tensor | None] = {}
        for part in self.parts:
            for name, parameter in part.named_parameters():
                name = part.tied.get(name, name)
                both = [g for g in (found.get(name), parameter.grad) if g is not None]
                found[name] = torch.stack(both).sum(0) if both else None
                parameter.grad = None
        return found


def len_layers(config: Any, attention: str) -> int:
    return HFDecoder(config, attn_implementation=attention).num_layers


def randomized(config: Any, attention: str = ATTENTION, **more: Any) -> Any:
    """The library's model with random weights, also of those that start as zeros or ones."""
    torch.manual_seed(2)
    whole: Any = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention, **more).float()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return whole.train()


def loss_of(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    labelled = mask[:, 1:].bool()
    return cross_entropy(logits[:, :-1][labelled], ids[:, 1:][labelled], reduction="sum")


def error(found: Tensor | None, expected: Tensor | None, floor: float = 0.0) -> float:
    if expected is None or not expected.any():
        return 0.0 if found is None or found.norm() < 1e-9 else float("inf")
    if found is None:
        return float("inf")
    return float((found.double() - expected.double()).norm() / max(expected.double().norm(), floor))


def largest(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> float:
    floor = 1e-3 * max(float(g.norm()) for g in expected.values() if g is not None)
    assert found.keys() >= expected.keys(), expected.keys() - found.keys()
    return max(error(found[name], g, floor) for name, g in expected.items())


def gradients_of(whole: Any) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for parameter in whole.parameters():
        parameter.grad = None
    return found


def alone(whole: Any) -> tuple[list[Tensor], Tensor]:
    logits, loss = [], torch.zeros((), dtype=whole.dtype)
    for sample in samples():
        out = whole(input_ids=sample[None], use_cache=False).logits
        logits.append(out[0])
        loss = loss + loss_of(out, sample[None], torch.ones_like(sample[None]))
    return logits, loss


def compare(config: Any, verdict: Verdict, attention: str = ATTENTION) -> None:
    whole = randomized(config, attention)
    ids, mask = padded()
    parts = Parts(config, whole.state_dict(), attention)

    logits, loss = alone(whole)
    loss.backward()
    expected = gradients_of(whole)
    try:
        double = randomized(config, attention, experts_implementation="eager").double()
        double_logits, double_loss = alone(double)
        double_loss.backward()
        verdict.rounding = max(
            largest(expected, gradients_of(double)), error(torch.cat(logits), torch.cat(double_logits))
        )
    except (RuntimeError, NotImplementedError):
        pass

    def note(name: str, found: list[Tensor], found_loss: Tensor) -> None:
        found_loss.backward()
        verdict.errors[f"{name} logits"] = error(torch.cat(found), torch.cat(logits))
        verdict.errors[f"{name} loss"] = error(found_loss.detach(), loss.detach())
        verdict.errors[f"{name} gradients"] = largest(parts.gradients(), expected)

    rows = [(b, length) for b, length in enumerate(LENGTHS)]
    for name, inputs in (("padded", {"input_ids": ids}), ("masked", {"input_ids": ids, "attention_mask": mask})):
        found, _ = parts.run(inputs)
        note(name, [found[b, :length] for b, length in rows], loss_of(found, ids, mask))
    if auxiliary := parts.parts[0].auxiliary_losses:
        out = whole(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True)
        coefficient = auxiliary["router"]
        (loss_of(out.logits, ids, mask) + coefficient * out.aux_loss).backward()
        with_router = gradients_of(whole)
        found, losses = parts.run({"input_ids": ids, "token_mask": mask})
        (loss_of(found, ids, mask) + coefficient * losses["router"]).backward()
        verdict.errors["router loss"] = error(losses["router"].detach(), out.aux_loss.detach())
        verdict.errors["router gradients"] = largest(parts.gradients(), with_router)
        verdict.router_loss = "exact"
    verdict.refuses_packing = parts.parts[0].refuses_packing
    if not verdict.refuses_packing:
        row = torch.cat(samples())[None]
        positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        found, _ = parts.run({"input_ids": row, "position_ids": positions})
        pieces = list(found[0].split(list(LENGTHS)))
        losses = [loss_of(p[None], s[None], torch.ones_like(s[None])) for p, s in zip(pieces, samples(), strict=True)]
        note("packed", pieces, torch.stack(losses).sum())


def check(model_type: str, attention: str = ATTENTION, **changes: Any) -> Verdict:
    verdict = Verdict()
    try:
        config = tiny.tiny_config(model_type, **changes)
    except Exception:  # the class's own default must be refused then
        config = {"model_type": model_type}
    try:
        try:
            HFDecoder(config, attn_implementation=attention)
        except ValueError as problem:
            if "use eager" not in str(problem):
                raise
            attention = "eager"
            HFDecoder(config, attn_implementation=attention)
    except ValueError as problem:
        if "output_router_logits" in str(problem) and "output_router_logits" not in changes:
            made = check(model_type, attention, output_router_logits=False, **changes)
            made.router_loss = str(problem)
            return made
        verdict.refused = str(problem)
        return verdict
    try:
        compare(config, verdict, attention)
    except Exception as problem:
        import traceback

        verdict.failed = f"{type(problem).__name__}: {problem} " + "|".join(
            traceback.format_exc().strip().split("\n")[-4:-1]
        )
    return verdict


def types() -> Iterator[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    yield from MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


if __name__ == "__main__":
    import sys
    import time
    import warnings

    warnings.simplefilter("ignore")
    hf.utils.logging.set_verbosity_error()
    for name in sys.argv[1:] or types():
        start = time.perf_counter()
        try:
            v = check(name)
        except Exception as problem:
            print("CRASH", name, type(problem).__name__, str(problem)[:200], flush=True)
            continue
        state = "refused" if v.refused else "FAILED" if v.failed else "exact" if v.exact else "WRONG"
        detail = (
            v.refused
            or v.failed
            or " ".join(f"{n}={e:.0e}" for n, e in v.errors.items() if e > max(1e-6, 2 * v.rounding))
        )
        print(
            f"{state:8} {name:24} {time.perf_counter() - start:4.1f}s rounding={v.rounding:.0e}",
            "PACKS" if not v.refuses_packing and not v.refused else v.refuses_packing[-60:],
            "|",
            detail[:400].replace("\n", " "),
            flush=True,
        )
