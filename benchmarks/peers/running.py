"""Runs all peers of a case in turn, several times, in processes that begin anew for each case."""

from collections.abc import Callable
from typing import Protocol

from benchmarks.peers.bigmac import BigMacPeer, Meshes
from benchmarks.peers.case import DATA_PARALLEL, PIPELINING, Case
from benchmarks.peers.data_parallel import DataParallelPeer, PeerModule
from benchmarks.peers.measuring import Measured, Stopwatch
from benchmarks.peers.pipelining import PipeliningPeer
from benchmarks.peers.sleeping import Device
from benchmarks.ranks import run_ranks

WARM_UP = 0.02
"""How long a unit takes in the first step, in which plans and connections are made, relative to the others."""


class Peer(Protocol):
    """A model under a schedule."""

    module: PeerModule

    def step(self) -> float:
        """Make the gradients of a step; returns its loss."""
        ...

    def gradient_norm(self) -> float:
        """The norm of all gradients of the step before."""
        ...


def make_peer(case: Case, rank: int, kind: str, meshes: Meshes) -> Peer:
    """A peer whose layers sleep.

    Raises:
        ValueError: it cannot run this case; the same on all ranks.
    """
    if kind in DATA_PARALLEL:
        return DataParallelPeer(case, rank, kind)
    if kind in PIPELINING:
        return PipeliningPeer(case, rank, kind)
    return BigMacPeer(case, rank, kind, meshes)


def sleep(case: Case, peers: tuple[str, ...], unit: float, repeats: int) -> dict[str, list[Measured]]:
    """What each rank measures of each peer. Every round has a step of each peer.

    Args:
        unit: seconds of the forward of one rank's part of the LLM.
        repeats: the number of rounds that are measured.
    """
    by_rank = run_ranks(case.size, _sleep_rank, case, peers, unit, repeats, prompt=True)
    return {kind: [found[kind] for found in by_rank] for kind in peers}


def _sleep_rank(rank: int, case: Case, peers: tuple[str, ...], unit: float, repeats: int) -> dict[str, Measured]:
    Device.calibrate()
    found, made, watches = dict[str, Measured](), dict[str, Peer](), dict[str, Stopwatch]()
    meshes: Meshes = {}
    for kind in peers:
        made_or_reason = _or_reason(lambda kind=kind: make_peer(case, rank, kind, meshes))
        if isinstance(made_or_reason, str):
            found[kind] = Measured(reason=made_or_reason)
        else:
            made[kind], watches[kind] = made_or_reason, Stopwatch(made_or_reason.module, sleeping=True)
            found[kind] = watches[kind].measured
            found[kind].state = float(sum(p.nbytes for p in made_or_reason.module.parameters()))
    for step in range(1 + repeats):
        for kind, peer in made.items():
            Device.unit, Device.live, Device.peak = unit * (1.0 if step else WARM_UP), 0.0, 0.0
            watches[kind].start()
            loss = peer.step()
            watches[kind].stop()
            found[kind].losses.append(loss)
            found[kind].activations = Device.peak
            if not step:
                found[kind].gradient_norm = peer.gradient_norm()
                found[kind].simulated = peer.simulated() if isinstance(peer, BigMacPeer) else 0.0
            assert abs(Device.live) < 1e-6, f"{kind} has {Device.live} units of activations alive after a step"
    for kind in made:
        _drop_warm_up(found[kind], 1)
    return found


def _drop_warm_up(measured: Measured, steps: int) -> None:
    for times in (measured.seconds, measured.waited, measured.busy):
        del times[:steps]


def _or_reason(make: Callable[[], Peer]) -> Peer | str:
    try:
        return make()
    except ValueError as refusal:
        return str(refusal)
