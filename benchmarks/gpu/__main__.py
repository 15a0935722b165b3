"""Steps of a model of about 1 B parameters on GPUs: time by policy against what the plan says and against data
parallelism, peak memory against the number of microbatches and against the estimate, and whether messages go together
with computing.

    python -m benchmarks.gpu                # NCCL, a rank per card; or gloo, two ranks that share a single card
    python -m benchmarks.gpu --tiny         # a model of some thousand parameters, also on the CPU

On GPUs, benchmarks/results/gpu.json and gpu.md keep the numbers, with the card and the versions.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu.measuring import measure
from benchmarks.gpu.model import DDP, POLICIES, TINY, Sizes
from benchmarks.gpu.report import as_markdown
from benchmarks.places import CPU, ONE_CARD, OWN_CARDS

RESULTS = Path(__file__).parents[1] / "results"


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
