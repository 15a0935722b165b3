"""What is kept of the measurements of a case: medians and spread over repeats, the worst or the mean over ranks."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.peers.case import Case
from benchmarks.peers.measuring import Measured

TOLERANCE = 1e-4
"""How far losses and gradient norms of peers may be apart, relatively."""


def peer_row(measured: Sequence[Measured], unit: float, case: Case) -> dict[str, Any]:
    """The numbers of one peer in a case, from all ranks of all runs.

    Args:
        unit: seconds of a unit, if times are given in units.
    """
    if measured[0].reason:
        return {"reason": measured[0].reason}
    seconds = [max(times) for m in range(0, len(measured), case.size) for times in _steps(measured[m : m + case.size])]
    busy = statistics.mean(statistics.median(rank.busy) for rank in measured)
    waited = statistics.median(time for rank in measured for time in rank.waited)
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "least": min(seconds),
        "most": max(seconds),
        "steps": len(seconds),
        "bubbles": max(0.0, 1 - busy / median),
        "waited": waited / (median + waited),
        "activations": max(rank.activations for rank in measured),
        "state": max(rank.state for rank in measured),
        "rss": max(rank.rss for rank in measured),
        "simulated": measured[0].simulated * unit,
        "losses": measured[0].losses,
        "gradient_norm": measured[0].gradient_norm,
    }


def _steps(ranks: Sequence[Measured]) -> list[tuple[float, ...]]:
    """Per step, the seconds of each rank."""
    return list(zip(*(rank.seconds for rank in ranks), strict=True))


def joined(case: Case, unit: float, peers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A row of the results.

    Raises:
        ValueError: the peers have not trained the same model on the same data.
    """
    check_agreement({kind: row for kind, row in peers.items() if "reason" not in row})
    return {"case": asdict(case), "unit": unit, "ideal": case.ideal * unit, "peers": peers}


def as_json(results: dict[str, Any]) -> str:
    """The results as a JSON file, in which each case is a line."""
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    others = json.dumps({name: value for name, value in results.items() if name != "rows"})
    return f'{others[:-1]}, "rows": [\n{rows}\n]}}\n'


def check_agreement(peers: dict[str, dict[str, Any]]) -> None:
    """Compare losses and gradient norms of all peers with those of the first one.

    Raises:
        ValueError: names the peers that differ.
    """
    names = list(peers)
    for name in names[1:]:
        for what in ("losses", "gradient_norm"):
            one, other = peers[names[0]][what], peers[name][what]
            pairs = zip(one, other, strict=False) if what == "losses" else [(one, other)]
            if any(abs(a - b) > TOLERANCE * abs(a) for a, b in pairs):
                raise ValueError(f"{what} of {names[0]} are {one}, but those of {name} are {other}; expected the same")
