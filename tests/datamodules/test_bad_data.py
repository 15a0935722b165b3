"""Broken examples, on every rank in turn: the run ends on all ranks with a name, or goes on without them on all."""

import csv
import json
import os
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import PIL.Image
import pytest
from lightning.pytorch.loggers import CSVLogger

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.datamodules import ExampleError, MessagesJSONL, SourceError
from tests.datamodules.clips import CLIPS, Clip, encoded
from tests.datamodules.examples import data, model, said, write_jsonl, write_mixed
from tests.datamodules.pictures import PICTURES, Picture
from tests.datamodules.test_multimodal_training import Losses
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

SETTINGS = {"microbatches": 3, "token_budget": 200}


# -- found when it is measured: before any rank has done anything


def bomb(path: Path) -> None:
    """A PNG of a few kilobytes that says it has 900 million pixels."""
    PIL.Image.new("1", (8, 8)).save(path)
    raw = bytearray(path.read_bytes())
    raw[16:24] = (30_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    path.write_bytes(bytes(raw))


def record(folder: Path, case: str) -> Any:
    """A faulty record, and the file it needs."""
    image = {"messages": said("<image>what?", "this"), "images": ["bad.png"]}
    if case == "corrupt":
        (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"nonsense" * 20)
    elif case == "zero bytes":
        (folder / "bad.png").write_bytes(b"")
    elif case == "bomb":
        bomb(folder / "bad.png")
    elif case == "no video":
        (folder / "bad.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"nonsense" * 20)
        return {"messages": said("<video>what?", "this"), "videos": ["bad.mp4"]}
    elif case == "folder":
        (folder / "bad.png").mkdir()
    elif case == "link":
        (folder / "bad.png").symlink_to("/etc/passwd")
    elif case == "outside":
        return {**image, "images": ["../../secret.png"]}
    elif case == "absolute":
        return {**image, "images": ["/etc/passwd"]}
    elif case == "too few placeholders":
        return {**image, "messages": said("<image>what?", "this"), "images": ["bad.png", "bad.png"]}
    elif case == "too many placeholders":
        return {**image, "messages": said("<image><image>what?", "this")}
    elif case == "no reply":
        return {"messages": said("what is <|image_pad|>?", "")}
    elif case == "too long":
        return {"messages": said("say", "a" * 300)}
    elif case == "empty":
        return {"messages": []}
    elif case == "empty text":
        return {"messages": [{"role": "user", "content": ""}]}
    elif case == "role":
        return {"messages": [{"role": "robot", "content": "hello"}]}
    elif case == "no object":
        return [1, 2]
    elif case == "surrogate":
        return {"messages": said("what?", "\ud800")}
    return image


MEASURED = {
    "missing": "bad.png cannot be read: FileNotFoundError",
    "corrupt": "bad.png cannot be read",
    "zero bytes": "bad.png cannot be read: not an image",
    "bomb": "bad.png",
    "no video": "bad.mp4 cannot be read",
    "outside": "leads out of the media root",
    "absolute": "leads out of the media root",
    "too few placeholders": "has 1 <image> placeholders for 2 images",
    "too many placeholders": "has 2 <image> placeholders for 1 images",
    "no reply": "has nothing to learn",
    "too long": "more than a microbatch may have",
    "empty": "is empty",
    "empty text": "is empty",
    "role": "role 'robot'; roles are system, developer, user, assistant, tool",
    "no object": "is no JSON object",
    "surrogate": "cannot be tokenized",
    "link": "give media_root as a list",
    "folder": "bad.png cannot be read: it is a folder",
    "utf-8": "is not valid UTF-8",
    "json": "is not JSON",
}


FILES = [item for item in (*PICTURES, *CLIPS) if item.refused and item.when == "measured"]
MEASURED |= {item.id: item.refused for item in FILES}


def write_faulty(folder: Path) -> Path:
    """One file with every case, in the middle of good records."""
    good = json.dumps({"messages": said("Say", "something nice")}).encode()
    lines, known = [good] * 4, {item.id: item for item in FILES}
    for case in MEASURED:
        folder_of_case = folder / case.replace(" ", "-")
        folder_of_case.mkdir()
        if case == "utf-8":
            lines.append(good.replace(b"nice", b"\xff\xfe"))
        elif case == "json":
            lines.append(good[:-5])
        elif case in known:
            lines.append(json.dumps(record_of(known[case], folder_of_case)).encode())
        else:
            bad = record(folder_of_case, case)
            if isinstance(bad, dict):
                for key in ("images", "videos"):
                    if bad.get(key) and not bad[key][0].startswith(("/", "..")):
                        bad[key] = [f"{folder_of_case.name}/{name}" for name in bad[key]]
            lines.append(json.dumps(bad).encode())
        lines += [good] * 2
    (folder / "faulty.jsonl").write_bytes(b"\n".join(lines))
    return folder / "faulty.jsonl"


def _fit_measured(rank: int, path: Path, on_error: str) -> Any:
    trainer = pipeline_trainer(2, max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    losses = Losses()
    trainer.callbacks.append(losses)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        trainer.fit(model(), data(path, on_error=on_error, token_budget=200))
    except ExampleError as error:
        return str(error)
    return losses.losses


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    return write_faulty(tmp_path)


def test_what_is_found_before_training(faulty: Path) -> None:
    made = data(faulty, on_error="skip", token_budget=200)
    made.setup("fit")
    (measured,) = made._measured["train"]
    assert len(measured) == 4 + 3 * len(MEASURED)
    assert list(measured.errors) == [4 + 3 * i for i in range(len(MEASURED))]
    for (index, text), (case, expected) in zip(measured.errors.items(), MEASURED.items(), strict=True):
        assert text.startswith(f"{faulty}, sample {index} (line {index + 1})"), case
        assert expected in text, case


def test_a_run_over_such_data_ends_or_continues_on_every_rank(faulty: Path) -> None:
    for text in on_ranks(2, _fit_measured, faulty, "raise"):
        assert f"{len(MEASURED)} of {4 + 3 * len(MEASURED)} train examples cannot be used" in text
        assert f"{faulty}, sample 4 (line 5)" in text
        assert 'on_error="skip"' in text
    one, other = on_ranks(2, _fit_measured, faulty, "skip")
    assert one == other
    assert len(one) == 2


# -- found when it is decoded, by its owner alone


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: -file.stat().st_size // 3])


def replace_by_another(file: Path) -> None:
    PIL.Image.new("RGB", (5, 5)).save(file)


def wipe(file: Path) -> None:
    """A hole in the middle, as of a download that was not finished."""
    content = bytearray(file.read_bytes())
    hole = slice(len(content) * 45 // 100, len(content) * 65 // 100)
    content[hole] = bytes(len(content[hole]))
    file.write_bytes(content)


def become_pipe(file: Path) -> None:
    """Which would be waited for, by one rank, and by the others for that one."""
    file.unlink()
    os.mkfifo(file)


def turn(file: Path) -> None:
    """By the note of a camera alone."""
    with PIL.Image.open(file) as image:
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        image.save(file, exif=exif)


DECODED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated image": (".png", truncate, "cannot be decoded"),
    "vanished": (".png", Path.unlink, "cannot be decoded: FileNotFoundError"),
    "replaced": (".png", replace_by_another, "is another than was measured"),
    "damaged image": (".png", wipe, "cannot be decoded"),
    "pipe": (".png", become_pipe, "cannot be decoded: it is a folder, a pipe or a device, and no file"),
    "turned": (".png", turn, "is another than was measured"),
    "truncated video": (".mp4", truncate, ""),
    "damaged video": (".mp4", wipe, "cannot be decoded: it is damaged"),
    "replaced video": (".mp4", encoded(), "is another than was measured"),
    "truncated target": ("target", truncate, "cannot be decoded"),
}


def owned(path: Path, kind: str, rank: int) -> tuple[Path, str, int]:
    """A file that a rank of two decodes, its sample's name, and the seed of the run in which it does."""
    for seed in range(40):
        made = data(path, seed=seed, **SETTINGS)
        layout = SimpleNamespace(pipeline_layout=PipelineLayout(2, rank, 2))
        made.trainer = SimpleNamespace(strategy=layout, distributed_sampler_kwargs=None)  # pyright: ignore
        made.setup("fit")
        loader = made.loader("train")
        for step in loader.sampler:
            parts = loader.encoded[step]
            batch = loader.collate_fn(parts)  # pyright: ignore
            for part, microbatch in zip(parts, batch.microbatches, strict=True):
                items = [*microbatch.media, *microbatch.targets]
                given = [(s.name, m.name) for s in part for m in s.media]
                given += [(s.name, f"{t.name}/target") for s in part for t in s.targets]
                for item, (sample, file) in zip(items, given, strict=True):
                    if item.owner == rank and file.endswith(kind):
                        return Path(file.removesuffix("/target")), sample, seed
    raise AssertionError(f"rank {rank} owns no {kind}")


def _fit_decoded(rank: int, paths: list[tuple[Path, int]], on_error: str, workers: int) -> list[Any]:
    results: list[Any] = []
    for path, seed in paths:
        trainer = pipeline_trainer(2, max_epochs=1, limit_val_batches=0)
        results.append(_outcome(trainer, path, seed, on_error, workers))
    return results


def _outcome(trainer: Any, path: Path, seed: int, on_error: str, workers: int) -> Any:
    losses = Losses()
    trainer.callbacks.append(losses)
    try:
        trainer.fit(model(), data(path, seed=seed, on_error=on_error, num_workers=workers, **SETTINGS))
    except (ExampleError, SourceError) as error:
        return str(error)
    return losses.losses, trainer.train_dataloader.agreement.skipped


BROKEN = [item for item in (*PICTURES, *CLIPS) if item.when == "decoded"]
"""Files whose headers, and packets, are in order."""


def record_of(item: Picture | Clip, folder: Path) -> dict[str, Any]:
    """Writes a file of the tables of docs/data.md."""
    folder.mkdir(exist_ok=True)
    kind = "image" if isinstance(item, Picture) else "video"
    path = item.write(folder)
    return {"messages": said(f"<{kind}>what?", "this"), f"{kind}s": [f"{folder.name}/{path.name}"]}


def test_what_only_its_owner_finds(tmp_path: Path) -> None:
    """Every kind of fault ends the run, found by one of the ranks. An image, a video and a target are also skipped."""
    skipped = [[*DECODED].index(case) for case in ("truncated image", "damaged video", "truncated target")]
    check_what_only_its_owner_finds(lambda number: number % 2, tmp_path, skipped)


@pytest.mark.wide
@pytest.mark.parametrize("faulty_rank", [0, 1])
def test_what_each_rank_may_find(faulty_rank: int, tmp_path: Path) -> None:
    check_what_only_its_owner_finds(lambda _: faulty_rank, tmp_path, range(len(DECODED) + len(BROKEN)))


def check_what_only_its_owner_finds(
    faulty_rank: Callable[[int], int], tmp_path: Path, skipped_cases: Sequence[int]
) -> None:
    """
    Args:
        faulty_rank: from the number of a case, the rank that decodes the broken file.
        skipped_cases: numbers of the cases that are run with `on_error="skip"`, too.
    """
    paths, samples, files = [], [], []
    for number, (case, (kind, spoil, _)) in enumerate(DECODED.items()):
        folder = tmp_path / case.replace(" ", "-")
        folder.mkdir()
        path = write_mixed(folder, 20)
        file, sample, seed = owned(path, kind, faulty_rank(number))
        spoil(file)
        paths.append((path, seed))
        samples.append(sample)
        files.append(file)
    for k, item in enumerate(BROKEN):
        folder = tmp_path / f"broken-{k}"
        folder.mkdir()
        path = write_mixed(folder, 20)
        others = [record_of(CLIPS[0], folder / str(i)) for i in range(3)]  # as costly as it, so that its owner varies
        with open(path, "a") as lines:
            lines.writelines(json.dumps(made) + "\n" for made in (record_of(item, folder / "broken"), *others))
        file, sample, seed = owned(path, f"broken/{item.write(folder).name}", faulty_rank(k))
        paths.append((path, seed))
        samples.append(sample)
        files.append(file)
    raised = on_ranks(2, _fit_decoded, paths, "raise", 1)
    reasons = [*(reason for _, _, reason in DECODED.values()), *(item.refused for item in BROKEN)]
    for i, reason in enumerate(reasons):
        assert raised[0][i] == raised[1][i]
        assert samples[i] in raised[0][i]
        assert str(files[i]) in raised[0][i]
        assert reason in raised[0][i]
    paths = [paths[i] for i in skipped_cases]
    skipped = on_ranks(2, _fit_decoded, paths, "skip", 0)
    assert skipped[0] == skipped[1]
    for (path, seed), (losses, left_out) in zip(paths, skipped[0], strict=True):
        assert left_out == 1
        alone, _ = _outcome(plain_trainer(max_epochs=1, limit_val_batches=0), path, seed, "skip", 0)
        assert losses == pytest.approx(alone, rel=1e-5)
        assert len(losses) >= 2


def test_every_file_of_the_tables_in_one_run(tmp_path: Path) -> None:
    """What can be read is learnt, on two ranks as in one process; what cannot is left out, and nothing else."""
    items = [*PICTURES, *CLIPS]
    path = write_jsonl(tmp_path / "all.jsonl", [record_of(item, tmp_path / str(i)) for i, item in enumerate(items)])
    made = data(path, on_error="skip", **ALL)
    made.setup("fit")
    assert [items[i].id for i in made._measured["train"][0].errors] == [item.id for item in FILES]
    one, other = on_ranks(2, _fit_all, path)
    assert one == other
    losses, left_out = _fit_all(None, path)
    assert left_out == one[1] == len(BROKEN)
    assert one[0] == pytest.approx(losses, rel=1e-5)
    assert len(losses) > 1


ALL: dict[str, Any] = {"token_budget": 400, "microbatches": 6}


def _fit_all(rank: int | None, path: Path) -> Any:
    av.logging.set_level(av.logging.PANIC)
    make = plain_trainer if rank is None else partial(pipeline_trainer, 2)
    trainer, losses = make(max_epochs=1, limit_val_batches=0), Losses()
    trainer.callbacks.append(losses)
    trainer.fit(model(), data(path, on_error="skip", **ALL))
    return losses.losses, trainer.train_dataloader.agreement.skipped


def _fit_replicas(rank: int, path: Path, on_error: str, strategy: str) -> Any:
    common: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0}
    if strategy == "bigmac":
        trainer = pipeline_trainer(2, {"data_parallel_size": 2}, **common)
    else:
        trainer = plain_trainer(devices=2, strategy="ddp_find_unused_parameters_true", **common)
    losses = Losses()
    trainer.callbacks.append(losses)  # pyright: ignore[reportAttributeAccessIssue]
    made = data(path, on_error=on_error, token_budget=100, microbatches=2)
    try:
        trainer.fit(model(), made)
    except ExampleError as error:
        return str(error)
    return float(trainer.callback_metrics["train/loss"]), len(losses.losses)


@pytest.mark.parametrize("strategy", ["bigmac", "ddp"])
def test_replicas_agree_too(strategy: str, tmp_path: Path) -> None:
    """A broken file in the batch of one replica: the other hears of it, and keeps all of its own."""
    path = write_mixed(tmp_path, 12, videos=False)
    data(path, token_budget=100).prepare_data()
    truncate(tmp_path / "0.png")
    one, other = on_ranks(2, _fit_replicas, path, "raise", strategy)
    assert one == other
    assert "0.png cannot be decoded" in one
    (loss, steps), again = on_ranks(2, _fit_replicas, path, "skip", strategy)
    assert (loss, steps) == again
    assert loss > 0
    assert steps >= 2


def test_the_logger_gets_the_number_of_skipped_samples(tmp_path: Path) -> None:
    path = write_mixed(tmp_path, 12, videos=False)
    data(path, **SETTINGS).prepare_data()
    for name in ("0.png", "3.png", "5.png"):
        truncate(tmp_path / name)
    trainer = plain_trainer(max_epochs=1, logger=CSVLogger(tmp_path))
    trainer.fit(model(), data(path, on_error="skip", **SETTINGS))
    with open(Path(trainer.log_dir or "") / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("data/skipped", "data/skipped_val"):
        counts = [float(row[name]) for row in rows if row[name]]
        assert counts == sorted(counts)
        assert counts[-1] == 3


class Fickle(MessagesJSONL):
    """Gives another text on one rank than when it was measured."""

    rank = -1

    def __getitem__(self, index: int) -> Any:
        example = super().__getitem__(index)
        if os.environ.get("RANK") == str(self.rank):
            raise OSError("the disk is gone")
        return example


def _fit_fickle(rank: int, path: Path, faulty_rank: int) -> str:
    source = Fickle(path)
    source.rank = faulty_rank
    made = data(path, train=[source], val=[], on_error="skip")
    place, os.environ["RANK"] = os.environ["RANK"], "none"
    made.setup("fit")  # measures
    os.environ["RANK"] = place
    trainer = pipeline_trainer(2, max_epochs=1, limit_val_batches=0)
    try:
        trainer.fit(model(), made)
    except SourceError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("faulty_rank", [0, 1])
def test_a_source_that_fails_on_one_rank_ends_the_run_on_all(faulty_rank: int, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", [{"messages": said("Say", "a" * i)} for i in range(1, 9)])
    one, other = on_ranks(2, _fit_fickle, path, faulty_rank)
    assert one == other
    assert "could be read when it was measured, and now: OSError: the disk is gone" in one
    assert str(path) in one


def test_a_sample_that_is_the_only_one_of_its_step(tmp_path: Path) -> None:
    """Nothing is left to learn in that step, and the run goes on."""
    path = write_jsonl(tmp_path / "one.jsonl", [{"messages": said("<image>?", "a"), "images": ["0.png"]}])
    PIL.Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    data(path, **SETTINGS).prepare_data()
    truncate(tmp_path / "0.png")
    for losses, skipped in [results[0] for results in on_ranks(2, _fit_decoded, [(path, 0)], "skip", 0)]:
        assert losses == [0.0]
        assert skipped == 1
