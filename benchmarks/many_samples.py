"""How long a run of millions of samples takes to start, how much memory that takes in a process, and how even replicas
are.

    python -m benchmarks.many_samples [--shards 200] [--samples 50000]

One tar of short texts, of lognormal lengths, is written, and linked under as many names as there are to be shards. Its
measurements are made once, and repeated for the others. Each row is a fresh process that opens the shards, reads the
measurements, plans an epoch and takes the first batch: before anything is kept; when the places of samples are; when
the numbers of bins are as well, from the first step and from the middle of the epoch.
"""

import argparse
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bigmac_lightning.datamodules import (  # pyright: ignore[reportMissingImports]
    LoadingOptions,
    MultimodalDataModule,
    WebDatasetTars,
)
from bigmac_lightning.datamodules.packing.measuring import (  # pyright: ignore[reportMissingImports]
    Measurements,
    measure_all,
    place_of,
)

BUDGET, REPLICAS, MICROBATCHES = 4096, 4, 8
STEPS = 500
"""Steps of which planning is timed, and of which replicas are compared."""


def _memory() -> int:
    """Bytes of this process's own memory; pages of mapped files are not among it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def _opened(folder: Path) -> MultimodalDataModule:
    source = WebDatasetTars(f"{folder}/*.tar", index_dir=folder / "kept")
    loading = LoadingOptions(cache_dir=str(folder / "kept"))
    return MultimodalDataModule(
        [source], processor="bytes", token_budget=BUDGET, microbatches=MICROBATCHES, loading=loading
    )


def _started(folder: Path, middle: bool) -> dict[str, Any]:
    """What it takes to start, and what planning takes after it."""
    before, start = _memory(), time.perf_counter()
    data = _opened(folder)
    opened = time.perf_counter()
    data.setup("fit")
    loader = data.loader("train")
    steps = len(loader)
    planned = time.perf_counter()
    loader.sampler.start = steps // 2 if middle else 0
    next(iter(loader))
    ended = time.perf_counter()
    found: dict[str, Any] = {"open": opened - start, "plan": planned - opened, "batch": ended - planned}
    found |= {"whole": ended - start, "memory": _memory() - before, "sent": len(pickle.dumps(loader.encoded))}
    return found | {"steps": steps, "samples": len(data.split_sources("train")[0])} | _planning(data)


def _planning(data: MultimodalDataModule) -> dict[str, float]:
    """The time of planning, and how much more than the mean the work of the most loaded replica is."""
    measured = data._measurements("train")
    share = {"num_replicas": REPLICAS, "rank": 0}
    sampler = data.sampler("train", measured, MICROBATCHES, share)
    steps = sampler._steps(0, len(sampler))
    start = time.perf_counter()
    found = [steps[number] for number in range(min(STEPS, len(steps)))]
    seconds = time.perf_counter() - start
    tokens, cost = measured[0].tokens, data.packing.attention_tokens
    most, in_turn = list[float](), list[float]()
    for step in found:
        loads = [sum(n + n * n / cost for b in part for _, i in b for n in [int(tokens[i])]) for part in step]
        most.append(max(loads) * len(loads) / sum(loads))
    # as a DistributedSampler deals: one sample after another to each replica, as many as the steps above have
    each = sum(len(b) for step in found for part in step for b in part) // (len(found) * REPLICAS)
    picks = [i for _, i in pairs(sampler, len(found) * each * REPLICAS)]
    for first in range(0, len(picks) - each * REPLICAS + 1, each * REPLICAS):
        loads = [
            sum(n + n * n / cost for i in picks[first + r : first + each * REPLICAS : REPLICAS] for n in [tokens[i]])
            for r in range(REPLICAS)
        ]
        in_turn.append(max(loads) * len(loads) / sum(loads))
    samples = sum(len(b) for step in found for part in step for b in part)
    return {
        "per step": seconds / len(found),
        "per sample": seconds / samples,
        "most": max(most),
        "mean": sum(most) / len(most),
        "in turn": sum(in_turn) / len(in_turn),
        "most in turn": max(in_turn),
    }


def pairs(sampler: Any, number: int) -> list[tuple[int, int]]:
    """The first samples of an epoch, in its order."""
    samples = sampler._steps(0, None)._samples
    sources, examples = samples.part(0, min(number, len(samples)))
    return list(zip(sources.tolist(), examples.tolist(), strict=True))


def _write(folder: Path, shards: int, samples: int) -> None:
    draw, first = random.Random(0), folder / "0000.tar"
    with tarfile.open(first, "w") as tar:
        for i in range(samples):
            length = min(1500, max(4, int(draw.lognormvariate(5.0, 1.0))))
            info = tarfile.TarInfo(f"{i:06}.json")
            content = json.dumps({"text": "x" * length}).encode()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for shard in range(1, shards):
        os.link(first, folder / f"{shard:04}.tar")


def _measure(folder: Path, shards: int) -> dict[str, float]:
    """Make the index; measure the first shard, and keep that as often as there are shards.

    Returns: the seconds of the index, of which this process computed for some, and the seconds of measuring a sample.
    """
    one = WebDatasetTars([f"{folder}/0000.tar"], index_dir=folder / "kept")
    start, computed = time.perf_counter(), time.process_time()
    data = _opened(folder)
    index = {"index": time.perf_counter() - start, "computed": time.process_time() - computed}
    start = time.perf_counter()
    own = measure_all(one, data.encoder, BUDGET, learns=True)
    seconds = time.perf_counter() - start
    assert not own.errors
    arrays = {name: np.tile(array, shards) for name, array in own.arrays.items() if name not in ("first", "sizes")}
    arrays |= {"first": np.zeros(len(own) * shards + 1, np.int64), "sizes": own.arrays["sizes"]}  # there are no media
    source: Any = data.split_sources("train")[0]
    Measurements(arrays).save(place_of(source, data.encoder, BUDGET, folder / "kept", True))
    return {**index, "measuring": seconds / len(own)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--samples", type=int, default=50_000, help="samples of a shard")
    parser.add_argument("--do", choices=["measure", "start", "middle"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        measured = _measure(options.folder, options.shards) if options.do == "measure" else None
        print(json.dumps(measured or _started(options.folder, options.do == "middle")))
        return
    console = Console(width=130)
    table = Table(
        "a fresh process", "open, s", "plan, s", "first batch, s", "all, s", "own memory, MB", "to a worker, KB"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, options.shards, options.samples)
        run = [
            sys.executable,
            "-m",
            "benchmarks.many_samples",
            "--folder",
            name,
            "--shards",
            str(options.shards),
        ]

        def said(what: str) -> Any:
            shown = subprocess.run([*run, "--do", what], check=True, capture_output=True, text=True).stdout
            return json.loads(shown.splitlines()[-1])

        first = said("measure")
        console.print(f"the index is made in {first['index']:.1f} s, of which its process computes for", end=" ")
        console.print(f"{first['computed']:.1f} s; measuring takes {first['measuring'] * 1e6:.0f} us a sample")
        found: dict[str, Any] = {}
        for what, do in (
            ("index and measurements are kept", "start"),
            ("numbers of bins as well", "start"),
            ("... from the middle of the epoch", "middle"),
        ):
            found = said(do)
            times = [f"{found[name]:.2f}" for name in ("open", "plan", "batch", "whole")]
            table.add_row(what, *times, f"{found['memory'] / 1e6:.1f}", f"{found['sent'] / 1e3:.1f}")
        kept = sum(file.stat().st_size for file in (folder / "kept").rglob("*.safetensors"))
    console.print(table)
    console.print(f"{found['samples']:,} samples, {found['steps']:,} steps; {kept / 1e6:.0f} MB are kept on disk")
    console.print(
        f"{REPLICAS} replicas, {STEPS} steps: planning takes {found['per step'] * 1e3:.2f} ms a step, "
        f"{found['per sample'] * 1e6:.0f} us a sample; the most loaded replica has {found['mean']:.3f} times the mean "
        f"work (at most {found['most']:.3f}); in turn {found['in turn']:.3f} (at most {found['most in turn']:.3f})"
    )


if __name__ == "__main__":
    main()
