"""Steps of a model of about 1 B parameters on GPUs: time by policy against what the plan says and against data
parallelism, peak memory against the number of microbatches and against the estimate, and whether messages go together
with computing.

    python -m benchmarks.gpu                # NCCL, a rank per card; or gloo, two ranks that share a single card
    python -m benchmarks.gpu --tiny         # a model of some thousand parameters, also on the CPU

On GPUs, benchmarks/results/gpu.json and gpu.md keep the numbers, with the card and the versions.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.places import CPU, ONE_CARD, OWN_CARDS, Place
from benchmarks.ranks import run_ranks
from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, PipelineLayout, assign_owners
from bigmac_lightning.estimates.microbatch import TypicalMicrobatch
from bigmac_lightning.estimates.ranks import Precision
from bigmac_lightning.estimates.step import StepEstimate
from bigmac_lightning.models import (  # pyright: ignore[reportMissingImports]  (lies in models/, see pyproject.toml)
    HFDecoder,
    MultimodalLM,
    VisionEncoder,
)
from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.measure.memory import MemoryTracker
from bigmac_lightning.runtime.measure.trace import Trace
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.measuring import FIRST, Measuring
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of, resolve_options

POLICIES = ("nested", "filled", "first_stage", "upfront")
DDP = "DDP"
REMEMBERED = ("nested", "upfront")
"""The policies whose memory is measured."""
RESULTS = Path(__file__).parent / "results"
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """The model, and what a step computes.

    Attributes:
        images: per microbatch, of `pixels` x `pixels`.
        counts: numbers of microbatches for which the peak of memory is measured.
    """

    width: int = 2048
    layers: int = 16
    inner: int = 6144
    heads: int = 16
    vocabulary: int = 32_768
    tower_width: int = 1024
    tower_layers: int = 12
    pixels: int = 448
    patch: int = 14
    tokens: int = 4096
    images: int = 2
    microbatches: int = 16
    counts: tuple[int, ...] = (8, 16, 32, 64)
    dtype: str = "bfloat16"

    @property
    def rows(self) -> int:
        """Feature rows of an image."""
        return (self.pixels // self.patch) ** 2

    def model(self) -> MultimodalLM:
        decoder: dict[str, Any] = {
            "model_type": "qwen3",
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "head_dim": self.width // self.heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
        }
        tower: dict[str, Any] = {
            "model_type": "siglip_vision_model",
            "hidden_size": self.tower_width,
            "intermediate_size": 4 * self.tower_width,
            "num_hidden_layers": self.tower_layers,
            "num_attention_heads": self.heads,
            "image_size": self.pixels,
            "patch_size": self.patch,
        }
        return MultimodalLM(HFDecoder(decoder), {"image": VisionEncoder(tower, width=self.width)})

    def batch(self, microbatches: int, layout: PipelineLayout) -> Batch:
        """Rows of images and then of text; all microbatches are alike."""
        random, media = torch.Generator().manual_seed(microbatches), self.images * self.rows
        made = []
        for _ in range(microbatches):
            ids = torch.randint(self.vocabulary, (1, self.tokens), generator=random)
            made.append(
                Microbatch(
                    inputs={"input_ids": ids, "position_ids": torch.arange(self.tokens)[None]},
                    label_positions=torch.arange(media, self.tokens - 1),
                    labels=ids[0, media + 1 :],
                    media=[MediaItem("image", self.rows) for _ in range(self.images)],
                    media_positions=torch.arange(media),
                )
            )
        assign_owners(made, layout)
        for item in [item for microbatch in made for item in microbatch.media]:
            if item.owner == layout.rank:
                item.data = torch.randn(3, self.pixels, self.pixels, generator=random).to(getattr(torch, self.dtype))
        return Batch(made, layout)

    def estimate(self, size: int, microbatches: int, policy: str) -> list[float]:
        """Bytes that each rank will need, as `bigmac plan --config` estimates them."""
        module = self.model()
        options, stages, _ = resolve_options(module, options_of(policy), size)
        typical = TypicalMicrobatch(self.tokens, self.images * self.rows, self.rows)
        precision = Precision.of("bf16-true" if self.dtype == "bfloat16" else "32-true")
        return [
            rank.memory for rank in StepEstimate(module, options, stages, size, typical, microbatches, precision).ranks
        ]


TINY = Sizes(32, 4, 64, 4, 128, 32, 2, 16, 4, 64, 1, 4, (4, 8), "float32")
SMALL = Sizes(512, 8, 1536, 8, 8192, 384, 6, 224, 14, 1024, 2, 8, (8, 32))


def options_of(policy: str) -> PipelineOptions:
    return PipelineOptions(ScheduleOptions("nested" if policy == DDP else policy))


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


def as_markdown(found: dict[str, Any]) -> str:
    """The numbers as tables."""
    known, sizes = ", ".join(f"{n} {v}" for n, v in found["versions"].items() if v), found["sizes"]
    parameters = ", ".join(f"{name} {count:,}" for name, count in found["parameters"].items())
    lines = [
        "# Steps on GPUs",
        "",
        f"`python -m benchmarks.gpu`: {found['ranks']} ranks by {found['backend']} on {found['cards'] or 'no'} x "
        f"{found['card']}; {known}. Parameters: {parameters}; {sizes['dtype']}; microbatches of {sizes['tokens']} "
        f"tokens, {sizes['images']} images of {sizes['pixels']} x {sizes['pixels']}.",
        "",
        f"Seconds of a step of {sizes['microbatches']} microbatches, without its optimizer:",
        "",
        "| | measured | as planned from measured actions | measured / planned | ranks compute |",
        "|---|---|---|---|---|",
    ]
    for row in found["steps"]:
        planned = row["planned"]
        said = ("", "") if planned is None else (f"{planned:.3f}", f"{row['seconds'] / planned:.3f}")
        busy = f"{min(row['busy']):.0%} to {max(row['busy']):.0%}"
        lines.append(f"| {row['policy']} | {row['seconds']:.3f} | {said[0]} | {said[1]} | {busy} |")
    what = "activations" if found["card"] == "CPU" else "the allocator, without the batch"
    lines += ["", f"Peak GiB of the fullest rank ({what}), and what `bigmac plan --config` estimates for it:", ""]
    lines += ["| | microbatches | peak | estimate |", "|---|---|---|---|"]
    for row in found["memory"]:
        peak, estimate = row["peak"] / GIB, row["estimate"] / GIB
        lines.append(f"| {row['policy']} | {row['microbatches']} | {peak:.4g} | {estimate:.4g} |")
    if seconds := found["overlap"]:
        lines += [
            "",
            f"Eight messages of a stage's size take {seconds['messages'] * 1e3:.2f} ms, matrix products "
            f"{seconds['products'] * 1e3:.2f} ms, and both together {seconds['together'] * 1e3:.2f} ms: "
            f"{seconds['hidden']:.0%} of the shorter one is hidden.",
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="default: the number of cards, but at least 2")
    parser.add_argument("--backend", choices=["nccl", "gloo"], help="default: nccl if each rank has a card")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in float32; the only one for the CPU")
    parser.add_argument("--microbatches", type=int, help="of a step whose time is measured")
    parser.add_argument("--policies", nargs="+", choices=[*POLICIES, DDP], default=[*POLICIES, DDP])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a folder; default on GPUs: benchmarks/results")
    given = parser.parse_args(argv)
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not cards and not given.tiny:
        parser.error("there is no GPU: add --tiny")
    size = given.ranks or max(cards, 2)
    place = CPU if not cards else ONE_CARD if given.backend == "gloo" or cards < size else OWN_CARDS
    if (given.backend or place.backend) != place.backend:
        parser.error(f"--backend {given.backend} {place.why_not(size) or OWN_CARDS.why_not(size)}")
    sizes = TINY if given.tiny else Sizes()
    sizes = replace(sizes, microbatches=given.microbatches or sizes.microbatches)
    if sizes.microbatches % size:
        parser.error(f"--microbatches {sizes.microbatches} must be a multiple of the {size} ranks, for DDP")
    found = measure(place, size, sizes, tuple(given.policies), given.repeats)
    text, folder = as_markdown(found), given.output or (RESULTS if cards else None)
    print(text)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (folder / "gpu.md").write_text(text)


if __name__ == "__main__":
    main()
