"""Runs the comparison, and writes `peers.json` and its tables and picture. See the package's docstring."""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import report
from benchmarks.peers.case import ENCODERS, GENERATORS, PEERS, SIGMAS, Case, default_cases, quick_cases, sleeping_cases
from benchmarks.peers.computing_run import compute, true_costs
from benchmarks.peers.machine import description
from benchmarks.peers.measuring import Measured
from benchmarks.peers.results import as_json, joined, peer_row
from benchmarks.peers.running import sleep
from benchmarks.ranks import awake_cores

UNIT_MS = {4: 8.0, 8: 10.0}
"""Milliseconds of the forward of a rank's part of the LLM, by P. The shorter it is, and the more processes share the
cores, the more their own work matters, of which plans know nothing."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    given = _parser().parse_args(argv)
    began, rows = time.time(), list[dict[str, Any]]()
    options = {name: value for name, value in vars(given).items() if name != "output"}
    known = {"machine": description(), "options": options, "rows": rows}
    for row in _rows(given):
        rows.append(row)
        known["seconds"] = time.time() - began
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / report.RESULTS).write_text(as_json(known))
        print(report.line(row), flush=True)
    report.write(given.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("sleep", "compute"), help="one of the two regimes")
    parser.add_argument(
        "--quick", action="store_true", help="eight sleeping cases, and one round of those that compute"
    )
    parser.add_argument("--full", action="store_true", help="all of the grid, which takes hours")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8], help="P of sleeping devices")
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--encoder", type=float, nargs="+", default=ENCODERS)
    parser.add_argument("--generator", type=float, nargs="+", default=GENERATORS)
    parser.add_argument("--sigma", type=float, nargs="+", default=SIGMAS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--unit_ms", type=float, help="how long a unit takes if devices sleep; by default it depends on P"
    )
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run that computes")
    parser.add_argument("--note", default="", help="what the tables say about this run")
    parser.add_argument("--output", type=Path, default=report.FOLDER)
    return parser


def _rows(given: argparse.Namespace) -> Any:
    if given.only != "sleep":
        yield _computing_row(given)
    if given.only != "compute":
        for case in _sleeping(given):
            yield _sleeping_row(case, given)


def _sleeping(given: argparse.Namespace) -> list[Case]:
    """The sleeping cases that were asked for."""
    sizes = tuple(given.ranks)
    cases = quick_cases() if given.quick else sleeping_cases(sizes) if given.full else default_cases(sizes)
    return [
        replace(case, microbatches=given.microbatches)
        for case in cases
        if case.size in sizes
        and case.encoder in given.encoder
        and case.generator in given.generator
        and case.sigma in given.sigma
    ]


def _sleeping_row(case: Case, given: argparse.Namespace) -> dict[str, Any]:
    unit = (given.unit_ms or UNIT_MS.get(case.size, max(UNIT_MS.values()))) / 1e3
    peers = tuple(peer for peer in case.peers if peer in given.peers)
    with awake_cores():
        found = sleep(case, peers, unit, given.repeats)
    return joined(case, unit, {kind: peer_row(found[kind], unit, case) for kind in peers})


def _computing_row(given: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all peers, each run in new processes: so what disturbs the machine for a while disturbs all of them."""
    case = Case("compute", 2, 8, 0.0, 0.0, 0.0)
    costs = true_costs(case)
    case = replace(case, encoder=costs.EF / costs.F, generator=costs.G / costs.F)
    rounds = 1 if given.quick else given.repeats
    peers = tuple(peer for peer in case.peers if peer in given.peers)
    runs = list[dict[str, list[Measured]]]()
    for number in range(rounds):
        runs.append({})
        for kind in peers:
            print(f"round {number + 1} of {rounds}: {kind}", file=sys.stderr, flush=True)
            runs[-1][kind] = compute(case, kind, costs, given.steps)
    return joined(case, costs.F, {kind: peer_row([m for run in runs for m in run[kind]], 1, case) for kind in peers})


def _be_quiet() -> None:
    """Lightning says for each of the trainers what it has found."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


if __name__ == "__main__":  # what changes the whole process is not for tests that call `main`
    torch.set_num_threads(1)
    _be_quiet()
    main()
