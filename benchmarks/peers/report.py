"""Tables and a picture of the results of a comparison, and the parts of README and docs that are made of them.

python -m benchmarks.peers.report            # peers.md and peers.png beside peers.json
python -m benchmarks.peers.report --write    # also what stands between the marks in README.md and docs/benchmarks.md
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import paper_workload
from benchmarks.peers.case import INTERLEAVED, LABELS, PEERS, Case
from benchmarks.peers.documents import FOLDER, markdown, write_marked

RESULTS, TABLES, PICTURE = "peers.json", "peers.md", "peers.png"
MIB = 2**20

Row = dict[str, Any]


def load(folder: Path = FOLDER) -> dict[str, Any]:
    """The results in a folder."""
    return json.loads((folder / RESULTS).read_text())


def write(folder: Path = FOLDER) -> None:
    """Write the tables and the picture beside the results."""
    results = load(folder)
    texts = blocks(results)
    (folder / TABLES).write_text(
        "# Peers\n\n"
        + "\n\n".join(texts[name] for name in ("peers-run", "peers-computing", "peers-verdict", "peers-sleeping"))
        + "\n"
    )
    if _of(results, "sleep"):
        picture(results, folder / PICTURE)


def blocks(results: dict[str, Any]) -> dict[str, str]:
    """The generated texts by name."""
    return {
        "peers-run": run_text(results),
        "peers-computing": computing_table(results),
        "peers-summary": summary_table(results),
        "peers-verdict": "\n\n".join(verdict_texts(results)),
        "peers-sleeping": sleeping_table(results),
    }


def line(row: Row) -> str:
    """A row of results on one line: seconds of an ideal step, and by peer how many times as long it took."""
    found = [f"{kind} {_ratio(row, kind):.2f}" for kind in row["peers"] if _ran(row, kind)]
    return f"{_case_text(row)}, ideal {row['ideal']:.2f} s: " + ", ".join(found)


def run_text(results: dict[str, Any]) -> str:
    """What was run, and where."""
    machine, note = dict(results["machine"]), results["options"].get("note", "")
    sleeping, computing = len(_of(results, "sleep")), len(_of(results, "compute"))
    where = ", ".join(f"{name} {value}" for name, value in machine.items())
    took = f"{results['seconds'] / 60:.0f} minutes"
    cases = f"{sleeping} cases with layers that sleep, {computing} with layers that compute"
    return f"{note}\n\n{cases}; {took}. {where}.".strip()


def computing_table(results: dict[str, Any]) -> str:
    """The peers whose layers compute."""
    rows = _of(results, "compute")
    if not rows:
        return "(not run)"
    head = ["peer", "step, s (least to most)", "activations, MiB", "resident, MiB", "bubbles", "waiting for data"]
    lines = list[Sequence[str]]()
    for kind, peer in rows[0]["peers"].items():
        if "reason" in peer:
            lines.append([LABELS[kind], peer["reason"], *[""] * 4])
            continue
        seconds = f"{peer['seconds']:.2f} ({peer['least']:.2f} to {peer['most']:.2f})"
        memory = [f"{peer[name] / MIB:.0f}" for name in ("activations", "rss")]
        lines.append([LABELS[kind], seconds, *memory, f"{peer['bubbles']:.0%}", f"{peer['waited']:.1%}"])
    return markdown(head, lines)


def verdict_texts(results: dict[str, Any]) -> list[str]:
    """Each peer against filled, the cases in which one is faster, and how well plans foretell step times."""
    rows = _of(results, "sleep")
    return [summary_table(results), _exceptions(rows), _fidelity(rows)]


def summary_table(results: dict[str, Any]) -> str:
    """Each peer against filled on the same backbone, over all cases with layers that sleep."""
    rows = _of(results, "sleep")
    head = ["peer", "step / filled", "faster than filled", "peak activations / filled", "more memory than filled"]
    lines = list[Sequence[str]]()
    for kind in PEERS:
        pairs = [(row, ours) for row in rows for ours in [rival(kind)] if _ran(row, kind) and _ran(row, ours)]
        if kind.startswith("filled") or not pairs:
            continue
        times = [_ratio(row, kind) / _ratio(row, ours) for row, ours in pairs]
        memory = [_memory(row, kind) / _memory(row, ours) for row, ours in pairs]
        faster = [row for row, ours in pairs if is_faster(row, kind, ours)]
        more = sum(share > 1 + 1e-6 for share in memory)
        lines.append(
            [
                LABELS[kind],
                _spread(times),
                f"in {len(faster)} of {len(pairs)}",
                _spread(memory),
                f"in {more} of {len(pairs)}",
            ]
        )
    return markdown(head, lines)


def _fidelity(rows: Sequence[Row]) -> str:
    """How much longer steps took than their plans say."""
    ratios = [peer["seconds"] / peer["simulated"] for row in rows for peer in row["peers"].values() if _planned(peer)]
    if not ratios:
        return ""
    return (
        f"Steps of this framework's policies took {_spread(ratios)} times as long as their plans say, without messages."
    )


def _planned(peer: dict[str, Any]) -> bool:
    return bool(peer.get("simulated"))


def rival(kind: str) -> str:
    """The variant of filled that has the same backbone as a peer."""
    return INTERLEAVED if kind == "torch_interleaved" else "filled"


def is_faster(row: Row, kind: str, ours: str) -> bool:
    """Whether all steps of a peer were shorter than all steps of ours."""
    return row["peers"][kind]["most"] < row["peers"][ours]["least"]


def _exceptions(rows: Iterable[Row]) -> str:
    """The cases in which a pipeline was faster than filled on the same backbone: by the median, and clearly."""
    found = list[str]()
    for row in rows:
        for kind in row["peers"]:
            ours = rival(kind)
            if kind.startswith("filled") or kind == "ddp" or not (_ran(row, kind) and _ran(row, ours)):
                continue
            share = _ratio(row, kind) / _ratio(row, ours)
            if share < 1:
                clear = "all steps" if is_faster(row, kind, ours) else "within the spread of steps"
                found.append(f"- {_case_text(row)}: {LABELS[kind]} took {share:.3f} of the time of {ours} ({clear})")
    if not found:
        return "No pipeline had a shorter median than filled on the same backbone in any case."
    return "Pipelines with a shorter median than filled on the same backbone:\n\n" + "\n".join(found)


def sleeping_table(results: dict[str, Any]) -> str:
    """Step time over the ideal, and peak activations, for each case with layers that sleep."""
    rows = _of(results, "sleep")
    kinds = [kind for kind in PEERS if any(_ran(row, kind) for row in rows)]
    head = ["P", "encoder", "generator", "sigma", *kinds]
    times = [[*_key(row), *(_cell(row, kind, _ratio, ".3f") for kind in kinds)] for row in rows]
    memory = [[*_key(row), *(_cell(row, kind, _memory, ".1f") for kind in kinds)] for row in rows]
    bubbles = [[*_key(row), *(_cell(row, kind, _bubbles, ".0%") for kind in kinds)] for row in rows]
    reasons = {(kind, peer["reason"]) for row in rows for kind, peer in row["peers"].items() if "reason" in peer}
    texts = [
        "Median step time / ideal:",
        markdown(head, times),
        "Peak activations of the rank that has most, by the forward time of what saved them:",
        markdown(head, memory),
        "Bubbles:",
        markdown(head, bubbles),
        *(f"- {LABELS[kind]}: {reason}" for kind, reason in sorted(reasons)),
    ]
    return "\n\n".join(texts)


def picture(results: dict[str, Any], path: Path) -> None:
    """Step time over the ideal by encoder cost, for each P and generator; means over sigma."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _of(results, "sleep")
    sizes, generators = (sorted({row["case"][name] for row in rows}) for name in ("size", "generator"))
    kinds = [kind for kind in PEERS if any(_ran(row, kind) for row in rows)]
    figure, axes = plt.subplots(
        len(sizes), len(generators), figsize=(4 * len(generators), 3.2 * len(sizes)), squeeze=False, sharey="row"
    )
    for i, size in enumerate(sizes):
        for j, generator in enumerate(generators):
            here = [row for row in rows if (row["case"]["size"], row["case"]["generator"]) == (size, generator)]
            for kind in kinds:
                points = sorted(_means(here, kind))
                style = "-" if kind.startswith("filled") else ":"
                axes[i, j].plot(*zip(*points, strict=True) if points else ([], []), style, marker=".", label=kind)
            axes[i, j].set(title=f"P = {size}, generator {generator:g}", xscale="log", xlabel="encoder / stage")
        axes[i, 0].set_ylabel("step time / ideal")
    axes[0, -1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _means(rows: Sequence[Row], kind: str) -> Iterator[tuple[float, float]]:
    for encoder in {row["case"]["encoder"] for row in rows}:
        found = [_ratio(row, kind) for row in rows if row["case"]["encoder"] == encoder and _ran(row, kind)]
        if found:
            yield encoder, statistics.mean(found)


def _of(results: dict[str, Any], regime: str) -> list[Row]:
    return [row for row in results["rows"] if row["case"]["regime"] == regime]


def _ran(row: Row, kind: str) -> bool:
    return "seconds" in row["peers"].get(kind, {})


def _ratio(row: Row, kind: str) -> float:
    return row["peers"][kind]["seconds"] / row["ideal"]


def _memory(row: Row, kind: str) -> float:
    return row["peers"][kind]["activations"]


def _bubbles(row: Row, kind: str) -> float:
    return row["peers"][kind]["bubbles"]


def _cell(row: Row, kind: str, value: Callable[[Row, str], float], form: str) -> str:
    return format(value(row, kind), form) if _ran(row, kind) else "-"


def _key(row: Row) -> list[str]:
    return [f"{row['case'][name]:g}" for name in ("size", "encoder", "generator", "sigma")]


def _case_text(row: Row) -> str:
    case = Case(**row["case"])
    sigma = f", sigma {case.sigma:g}" if case.regime == "sleep" else ""
    return f"P = {case.size}, encoder {case.encoder:.3g}, generator {case.generator:.3g}{sigma}"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also write into README.md and docs")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    given = parser.parse_args()
    write(given.folder)
    if given.write:
        simulated = {"paper-workload": paper_workload.text(paper_workload.load(given.folder))}
        write_marked(blocks(load(given.folder)) | simulated)


if __name__ == "__main__":
    main()
