"""Runs that are killed at random moments and resumed, against the same runs undisturbed.

``python -m tests.training.killed --cases 50 --seed 0`` draws cases and runs them; `test_killed.py` runs a few in CI.
A run that was killed is resumed by ``ckpt_path="auto"`` until it ends by itself.
"""

import argparse
import multiprocessing as mp
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bigmac_lightning.checkpoints import files, marker
from tests.training.killed_results import Seen, compare, compare_weights, weights
from tests.training.killed_run import HOW, WHEN, Case, Kill, Layout, make_data, module_of, train

PATIENCE = 300
"""Seconds after which an attempt hangs."""


def _rank(rank: int, port: int, place: Path, layout: Layout, attempt: int, work: Callable[[int], None]) -> None:
    log = os.open(place / f"log-{attempt}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    (place / f"pid-{rank}").write_text(str(os.getpid()))
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": layout.world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(LOCAL_WORLD_SIZE=str(layout.world), MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="test")
    torch.set_num_threads(1)
    code = 1
    try:
        work(rank)
        code = 0
    except (SIGTERMException, SystemExit) as end:
        code = int(end.code or 0) if isinstance(end.code, int) else 1
        print(f"ended with {code}", flush=True)
        code = code or 77
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attempt(case: Case, layout: Layout, folder: Path, place: Path, number: int, kill: Kill | None, took: float) -> bool:
    """Run until all ranks have ended; whether the run ended by itself, with all its epochs.

    Raises:
        AssertionError: an attempt hangs, or fails though nothing was done to it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = partial(train, case=case, layout=layout, folder=folder, place=place, attempt=number, kill=kill)
    context = mp.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, port, place, layout, number, work)) for rank in range(layout.world)
    ]
    for process in ranks:
        process.start()
    start, hurt = time.monotonic(), kill is None or kill.when != "time"
    while any(process.is_alive() for process in ranks):
        now = time.monotonic() - start
        if not hurt and kill is not None and now > kill.share * took:
            hurt = True
            number_of = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[kill.how.split()[0]]
            for rank, process in enumerate(ranks):
                if process.is_alive() and (kill.how.endswith("all") or rank == kill.rank):
                    os.kill(process.pid or 0, number_of)
        if now > PATIENCE:
            for process in ranks:
                process.kill()
            raise AssertionError(f"attempt {number} hangs; logs:\n{logs(place, number)}")
        time.sleep(0.01)
    codes = [process.exitcode for process in ranks]
    if kill is None:
        assert codes == [0] * layout.world, f"attempt {number} has ended with {codes}:\n{logs(place, number)}"
    text = logs(place, number)
    if any(code == 1 for code in codes) and "Traceback" in text and "int" not in (kill.how if kill else ""):
        assert kill is not None
        assert "kill" in kill.how or "setup" in text, f"attempt {number}: {codes}\n{text}"
    return codes == [0] * layout.world


def logs(place: Path, number: int) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(place.glob(f"log-{number}-*")))


def newest_step(place: Path) -> int:
    """The optimizer steps of the newest whole checkpoint; 0: there is none."""
    found: list[tuple[float, int]] = [(0.0, 0)]
    for path in [p for folder in (place / "saved", place) for p in files.in_folder(folder)]:
        try:
            at = files.present(path)
        except FileNotFoundError:
            continue
        if not marker.problems(at):
            mark = marker.marker_of(at) if at.is_dir() else None
            if mark is not None:
                found.append((mark.saved, mark.step))
            elif at.is_file():
                found.append((at.stat().st_mtime, torch.load(at, weights_only=True)["global_step"]))
    return max(found)[1]


def check(case: Case, folder: Path, place: Path) -> list[str]:
    """Run a case.

    Returns: what has happened, attempt by attempt.

    Raises:
        AssertionError: something differs from the undisturbed run.
    """
    first = case.layouts[0]
    undisturbed, disturbed = place / "undisturbed", place / "killed"
    undisturbed.mkdir(parents=True)
    disturbed.mkdir()
    start = time.monotonic()
    assert attempt(case, first, folder, undisturbed, 0, None, 0)
    took = time.monotonic() - start
    for path in undisturbed.glob("counts-0-*"):
        shutil.copy(path, disturbed)
    story = []
    done, layout = False, first
    for number, kill in enumerate([*case.kills, None, None, None]):
        layout = case.layouts[min(number, len(case.layouts) - 1)]
        saved = newest_step(disturbed)
        if kill is not None and kill.rank >= layout.world:
            kill = replace(kill, rank=0)
        done = attempt(case, layout, folder, disturbed, number, kill, took)
        seen = Seen().add(disturbed / f"seen-{number}-0")
        begun = min(seen.batches, default=-1)
        story.append(f"{layout} {kill}: from step {saved}, batches {begun}..{max(seen.batches, default=-1)}, {done=}")
        if seen.batches:
            step = seen.batches[begun][0]["place"][2]
            assert saved <= step, f"a checkpoint of step {saved} was not used: {story}\n{logs(disturbed, number)}"
        if done:
            break
    assert done, story
    problems = []
    for rank in range(first.world if case.exact else 1):
        whole, found = Seen().add(undisturbed / f"seen-0-{rank}"), Seen()
        for path in sorted(disturbed.glob(f"seen-*-{rank}")):
            found.add(path)
        alike = case.kind != "toys" or case.exact
        if not case.validates_alike:
            whole.validations, found.validations = {}, {}
        problems += [f"rank {rank}: {problem}" for problem in compare(whole, found, case.exact, alike)]
    problems += compare_weights(weights(undisturbed, first.world), weights(disturbed, layout.world), case.exact)
    left = [path.name for path in (disturbed / "saved").iterdir() if path.name.endswith((".unfinished", ".removed"))]
    problems += [f"left: {left}"] if left else []
    assert not problems, "\n".join([str(case), *story, *problems[:20]])
    return story


SHAPES = [
    Layout(1),
    Layout(2),
    Layout(2, backbone="interleaved_1f1b"),
    Layout(2, backbone="zb1p"),
    Layout(2, backbone="zbv"),
    Layout(2, backbone="gpipe"),
    Layout(2, policy="filled"),
    Layout(2, policy="upfront"),
    Layout(2, policy="recompute"),
    Layout(2, policy="first_stage"),
    Layout(2, group_size=1),
    Layout(2, encoders="zero1"),
    Layout(2, encoders="fsdp"),
    Layout(3),
    Layout(1, dp=2),
    Layout(2, dp=2),
    Layout(3, policy="disaggregated"),
]


def draw(seed: int) -> Case:
    """A case of a seed."""
    r = random.Random(seed)
    kind = r.choice(["source", "source", "source", "stream", "stream", "mix", "mix", "toys"])
    layouts = [replace(r.choice(SHAPES), workers=r.choice([0, 0, 1, 2]))]
    kills = tuple(
        Kill(r.choice(HOW), r.choice(WHEN), r.random() * r.choice([0.5, 1.0]), r.randrange(layouts[0].world))
        for _ in range(r.choice([1, 1, 2, 3]))
    )
    same = r.random() < 0.6
    for _ in kills:
        other = layouts[0] if same else r.choice([s for s in SHAPES if kind == "toys" or s.dp == layouts[0].dp])
        layouts.append(replace(other, workers=r.choice([0, 0, 1, 2])))
    if kind == "toys":
        layouts = [replace(layout, workers=0) for layout in layouts]
    directory = r.random() < 0.7
    schedule = r.choice(["cosine", "constant", "plateau"])
    if kind == "toys" and len({layout.dp for layout in layouts}) > 1 and schedule == "plateau":
        schedule = "constant"  # see `Case.validates_alike`
    return Case(
        kind=kind,
        layouts=tuple(layouts),
        kills=kills,
        accumulate=r.choice([1, 1, 2, 3]),
        tokens=r.random() < 0.3 or (kind == "toys" and not same),
        packed=r.random() < 0.8,
        ordered=r.random() < 0.2,
        videos=r.random() < 0.2,
        dropout=0.2 if same and kind != "toys" and r.random() < 0.5 else 0.0,
        schedule=schedule,
        clip=r.choice([None, 0.5]),
        validate=r.choice([0, 0, 1, 2, 3] + [-1] * (schedule != "plateau")),
        save=r.choice([0, 1, 1, 2, 3]),
        keep=r.choice([1, 1, -1]),
        last=r.choice(["", "", "copy", "link"]),
        directory=directory,
        async_save=r.random() < 0.4,
        precision="32-true" if same else "64-true",
        sanity=r.choice([0, 0, 2]),
        epochs=2 if kind == "toys" else 3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--keep", type=Path, help="a folder for the files of cases that fail")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a process that is forked from one with threads of OpenMP can wait for them for ever
    warnings.simplefilter("ignore")
    module_of(Case())  # imports what all runs need, before they are forked
    failed = []
    with tempfile.TemporaryDirectory() as made:
        folder = make_data(Path(made))
        for seed in range(given.seed, given.seed + given.cases):
            case, start, place = draw(seed), time.monotonic(), Path(made) / f"case-{seed}"
            try:
                story = check(case, folder, place)
                print(f"{seed}: equal, {len(story)} attempts, {time.monotonic() - start:.0f} s", flush=True)
            except AssertionError as error:
                failed.append(seed)
                print(f"{seed}: DIFFERS\n{error}", flush=True)
                if given.keep:
                    shutil.copytree(place, given.keep / place.name, dirs_exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
    print(f"{given.cases - len(failed)} of {given.cases} cases are equal; different: {failed}")


if __name__ == "__main__":
    main()
