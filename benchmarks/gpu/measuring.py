"""Times of steps, peaks of memory, and messages beside computing, on ranks that are on GPUs."""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.model import DDP, Sizes, options_of
from benchmarks.places import Place
from benchmarks.ranks import run_ranks
from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.measure.memory import MemoryTracker
from bigmac_lightning.runtime.measure.trace import Trace
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.training.measuring import FIRST, Measuring
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of, resolve_options

REMEMBERED = ("nested", "upfront")
"""The policies whose memory is measured."""


class Run:
    """A model on this rank, which trains.

    Args:
        size: number of ranks. They form one pipeline; for the policy "DDP", each is a pipeline of its own.
        measures: whether plans are made from measured times.
    """

    def __init__(self, sizes: Sizes, device: torch.device, size: int, policy: str, measures: bool) -> None:
        self.sizes, self.device, self.replicas = sizes, device, size if policy == DDP else 1
        pp = size // self.replicas
        self.module = sizes.model()
        options, stages, _ = resolve_options(self.module, options_of(policy), pp)
        mesh = build_mesh(device, self.replicas, pp, options.stage_rank(pp))
        self.module.part = part_of(mesh.pp_rank, stages, options.stage_rank(pp))
        self.module.configure_model()
        self.module.to(device, getattr(torch, sizes.dtype))
        measuring = Measuring(Ranks(), device) if measures else None
        self.runner = PipelineRunner(self.module, mesh, options, measuring=measuring)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=device.type == "cuda")

    def batch(self, microbatches: int) -> Batch:
        """This rank's part of a step of so many microbatches."""
        given = self.sizes.batch(microbatches // self.replicas, self.runner.layout)
        return self.module.prepare(given).to(self.device)

    def step(self, batch: Batch) -> float:
        """The seconds of a step, but for those of its optimizer."""
        _wait(self.device)
        dist.barrier()
        begin = time.perf_counter()
        self.runner(batch, "train", reduce=True)
        _wait(self.device)
        seconds = time.perf_counter() - begin
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def step_times(
    rank: int, size: int, place: Place, sizes: Sizes, policies: tuple[str, ...], repeats: int
) -> dict[str, dict[str, float]]:
    """For each policy, the median seconds of a step, those that its plan says, and the share of them in which this rank
    computes."""
    device, found = place.device(rank), dict[str, dict[str, float]]()
    for policy in policies:
        run = Run(sizes, device, size, policy, measures=policy != DDP)
        batch = run.batch(sizes.microbatches)
        for _ in range(FIRST if policy != DDP else 2):
            run.step(batch)
        seconds = median(run.step(batch) for _ in range(repeats))
        planned = run.runner.last_planned
        run.runner.measuring = None
        trace = run.runner.executor.trace = Trace(device)
        traced = run.step(batch)
        busy = sum(span.end - span.start for span in trace.spans()) / traced
        found[policy] = {"seconds": seconds, "busy": busy}
        if planned is not None and planned.seconds is not None:
            found[policy]["planned"] = planned.seconds
        del run, batch
        _forget(device)
    return found


def peaks(rank: int, size: int, place: Place, sizes: Sizes, policies: tuple[str, ...]) -> dict[str, list[int]]:
    """For each policy, the peak of this rank's bytes by number of microbatches. On a GPU they are the allocator's, of
    all tensors in a step and its optimizer's; on the CPU, those of activations."""
    device, found = place.device(rank), dict[str, list[int]]()
    for policy in policies:
        run = Run(sizes, device, size, policy, measures=False)
        run.step(run.batch(sizes.counts[0]))  # the optimizer's states are there then
        found[policy] = []
        for count in sizes.counts:
            batch = sizes.batch(count, run.runner.layout)
            batch = run.module.prepare(batch).to(device)
            memory = None
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            else:
                memory = run.runner.executor.memory = MemoryTracker(run.module.parameters())
            run.step(batch)
            used = torch.cuda.max_memory_allocated(device) if memory is None else sum(memory.peak.values())
            found[policy].append(used - _bytes_of(batch) * (memory is None))
        del run
        _forget(device)
    return found


def _bytes_of(batch: Batch) -> int:
    """Of a batch's own tensors on the device, which grow with the number of microbatches under any policy."""
    tensors = [t for m in batch.microbatches for t in (*m.inputs.values(), m.labels, m.label_positions)]
    tensors += [item.data for m in batch.microbatches for item in m.media if isinstance(item.data, torch.Tensor)]
    tensors += [m.media_positions for m in batch.microbatches]
    return sum(tensor.nbytes for tensor in tensors)


def overlap(rank: int, size: int, place: Place, sizes: Sizes) -> dict[str, float]:
    """Seconds of messages from each even rank to the next one, of matrix products that take about as long, and of both
    together; and the part of the shorter of them that the longer one hides. Of ranks without a partner, nothing."""
    if size - size % 2 <= rank:
        for _ in range(1 + 3 * 5):
            dist.barrier()
        return {}
    device, dtype, group = place.device(rank), getattr(torch, sizes.dtype), dist.group.WORLD
    message = torch.ones(sizes.tokens, sizes.width, device=device, dtype=dtype)
    matrix = torch.randn(sizes.width, sizes.width, device=device, dtype=dtype)

    def start() -> list[Any]:
        if rank % 2:
            return [dist.irecv(torch.empty_like(message), rank - 1, group=group) for _ in range(8)]
        return [dist.isend(message, rank + 1, group=group) for _ in range(8)]

    def messages() -> None:
        for work in start():
            work.wait()

    def products(number: int) -> None:
        for _ in range(number):
            torch.mm(matrix, matrix)

    def both(number: int) -> None:
        works = start()
        products(number)
        for work in works:
            work.wait()

    def seconds(function: Callable[[], object]) -> float:
        found = []
        for _ in range(5):
            _wait(device)
            dist.barrier()
            begin = time.perf_counter()
            function()
            _wait(device)
            found.append(time.perf_counter() - begin)
        return median(found)

    messages()  # makes connections
    products(8)
    _wait(device)
    dist.barrier()
    sending = seconds(messages)
    begin = time.perf_counter()
    products(64)
    _wait(device)
    number = max(1, round(sending / ((time.perf_counter() - begin) / 64)))
    computing, together = seconds(lambda: products(number)), seconds(lambda: both(number))
    hidden = (sending + computing - together) / min(sending, computing)
    return {"messages": sending, "products": computing, "together": together, "hidden": hidden}


def measure(place: Place, size: int, sizes: Sizes, policies: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """All numbers, of the slowest or fullest rank each."""
    times = run_ranks(size, step_times, size, place, sizes, policies, repeats, place=place)
    used = run_ranks(size, peaks, size, place, sizes, REMEMBERED, place=place)
    hidden = [row for row in run_ranks(size, overlap, size, place, sizes, place=place) if row]
    model = sizes.model()
    return {
        "card": torch.cuda.get_device_name() if place.kind == "cuda" else "CPU",
        "cards": torch.cuda.device_count() if place.kind == "cuda" else 0,
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers")}
        | {"cuda": torch.version.cuda if place.kind == "cuda" else None},
        "ranks": size,
        "backend": place.backend,
        "sizes": asdict(sizes),
        "parameters": {
            "LLM": sum(p.numel() for p in model.llm.parameters()),
            "encoder": sum(p.numel() for p in model.encoders.parameters()),
        },
        "steps": [
            {
                "policy": policy,
                "seconds": max(row[policy]["seconds"] for row in times),
                "planned": times[0][policy].get("planned"),
                "busy": [row[policy]["busy"] for row in times],
            }
            for policy in policies
        ],
        "memory": [
            {
                "policy": policy,
                "microbatches": count,
                "peak": max(row[policy][i] for row in used),
                "estimate": max(sizes.estimate(size, count, policy)),
            }
            for policy in REMEMBERED
            for i, count in enumerate(sizes.counts)
        ],
        "overlap": {name: median(row[name] for row in hidden) for name in hidden[0]} if hidden else {},
    }
