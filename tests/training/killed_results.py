"""Compares what runs have written down: bit for bit, or up to rounding."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Seen:
    """What a rank has seen, over all attempts: by the number of a batch, by optimizer steps of a validation, epochs."""

    batches: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    validations: dict[int, list[str]] = field(default_factory=dict)
    epochs: set[int] = field(default_factory=set)

    def add(self, path: Path) -> "Seen":
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line)
            if "batch" in entry:
                self.batches.setdefault(entry.pop("batch"), []).append(entry)
            elif "epoch" in entry:
                self.epochs.add(entry["epoch"])
            else:
                self.validations.setdefault(entry["validation"], []).append(entry["loss"])
        return self


def _differs(one: str, other: str, exact: bool) -> bool:
    a, b = float.fromhex(one), float.fromhex(other)
    return a != b if exact else abs(a - b) > 1e-6 * max(abs(a), abs(b))


def compare(whole: Seen, found: Seen, exact: bool, samples: bool) -> list[str]:
    """What of a run that was killed differs from the undisturbed one."""
    problems = [f"batch {b} is missing" for b in whole.batches.keys() - found.batches.keys()]
    problems += [f"batch {b} is too much" for b in found.batches.keys() - whole.batches.keys()]
    for b in sorted(whole.batches.keys() & found.batches.keys()):
        (expected,) = whole.batches[b]
        for entry in found.batches[b]:
            same = ["place", *(["samples"] if samples else [])]
            wrong = [name for name in same if entry[name] != expected[name]]
            wrong += [name for name in ("loss", "rate") if _differs(entry[name], expected[name], exact)]
            problems += [f"batch {b}: {name} {entry[name]} instead of {expected[name]}" for name in wrong]
    problems += [f"no validation after step {s}" for s in whole.validations.keys() - found.validations.keys()]
    problems += [f"another validation after step {s}" for s in found.validations.keys() - whole.validations.keys()]
    for s in sorted(whole.validations.keys() & found.validations.keys()):
        problems += [
            f"validation after step {s}: {loss} instead of {whole.validations[s][0]}"
            for loss in found.validations[s]
            if _differs(loss, whole.validations[s][0], exact)
        ]
    return problems + [f"epoch {e} has not ended" for e in whole.epochs - found.epochs]


def weights(place: Path, world: int) -> dict[str, torch.Tensor]:
    return {name: w for rank in range(world) for name, w in torch.load(place / f"weights-{rank}").items()}


def compare_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], exact: bool) -> list[str]:
    found = []
    for name in sorted(one.keys() & other.keys()):
        if name.endswith("k_proj.bias") and not exact:
            continue  # its gradient is zero but for rounding, which AdamW makes large
        error = float((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-12))
        if error > (0.0 if exact else 1e-6):
            found.append(f"weights {name}: {error:.1e}")
    return found[:5]
