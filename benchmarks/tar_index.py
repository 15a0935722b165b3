"""How long `WebDatasetTars` takes to know where its samples are, and how much memory that takes in a process.

    python -m benchmarks.tar_index [--shards 200] [--samples 50000]

One tar of empty members is written, and linked under as many names as there are to be shards. The first opening reads
all headers; the second is one of a fresh process.
"""

import argparse
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bigmac_lightning.datamodules import WebDatasetTars  # pyright: ignore[reportMissingImports]


def _memory() -> int:
    """Bytes of this process's own memory; pages of mapped files are not among it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def _opened(folder: str) -> tuple[float, int, WebDatasetTars]:
    """The seconds and the own memory that opening takes, with a thousand samples found."""
    before, start = _memory(), time.perf_counter()
    source = WebDatasetTars(f"{folder}/*.tar", index_dir=f"{folder}/index")
    for index in range(0, len(source), max(1, len(source) // 1000)):
        source._index[index]
    return time.perf_counter() - start, _memory() - before, source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--samples", type=int, default=50_000, help="samples of a shard")
    parser.add_argument("--again", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.again:
        seconds, memory, source = _opened(options.again)
        print(seconds, memory, len(pickle.dumps(source)))
        return
    table = Table("opening", "s", "own memory, MB", "sent to a worker, KB")
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "0000.tar"
        with tarfile.open(first, "w") as tar:
            for i in range(options.samples):
                tar.addfile(tarfile.TarInfo(f"{i:06}.txt"))
        for shard in range(1, options.shards):
            os.link(first, Path(folder) / f"{shard:04}.tar")
        again = [sys.executable, "-m", "benchmarks.tar_index", "--again", folder]
        for name in ("first, all headers are read", "again, the index is mapped"):
            said = subprocess.run(again, check=True, capture_output=True, text=True).stdout.split()[-3:]
            seconds, memory, sent = map(float, said)
            table.add_row(name, f"{seconds:.2f}", f"{memory / 1e6:.1f}", f"{sent / 1e3:.1f}")
        kept = sum(file.stat().st_size for file in (Path(folder) / "index").rglob("*.npy"))
    Console(width=120).print(table, f"{options.shards * options.samples:,} samples; the index has {kept / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
