"""Whether a release can be made of this working tree: ``make release-check``, or ``python -m tests.release_check``.

It builds wheel and sdist of the tracked files, compares them, installs the wheel into a virtual environment of its own,
and uses it there from another folder. That takes minutes, and gigabytes in the temporary folder while it runs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
PLACES = {"bigmac_lightning": "bigmac_lightning", "models": "bigmac_lightning/models"}
PLACES["datamodules"] = "bigmac_lightning/datamodules"
"""Where the folders of the repository lie in a wheel."""
FIT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1")


def tracked() -> list[str]:
    """The files of the repository, and those that could be added to it."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


def copy_to(folder: Path) -> None:
    """Copy these files: a folder `build` of earlier builds would put old files into a wheel."""
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


def build(kind: str, source: Path, output: Path) -> Path:
    """A wheel or an sdist of a folder, by the backend that pyproject.toml names, in this environment."""
    output.mkdir(parents=True, exist_ok=True)
    program = f"from setuptools.build_meta import build_{kind} as build; print(build({str(output)!r}))"
    _run([sys.executable, "-c", program], source)
    (made,) = output.iterdir()
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, but the list of them."""
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith("/RECORD")}


def expected_in_wheel() -> set[str]:
    """All files of the packages, by their places in a wheel."""
    parts = [PurePosixPath(name).parts for name in tracked()]
    return {"/".join([PLACES[first], *rest]) for first, *rest in parts if first in PLACES and rest}


def check_contents(found: set[str]) -> None:
    """
    Raises:
        ValueError: a wheel with these files lacks some of the packages, or has others.
    """
    own = {name for name in found if ".dist-info/" not in name}
    if own != expected_in_wheel():
        raise ValueError(
            f"missing in the wheel: {sorted(expected_in_wheel() - own)}; too many: {sorted(own - expected_in_wheel())}"
        )
    if not any(name.endswith("/licenses/LICENSE") for name in found):
        raise ValueError("the wheel has no LICENSE")


def check_builds(folder: Path) -> Path:
    """Build everything. Returns: the wheel.

    Raises:
        ValueError: its files are not those of the packages, or the sdist makes another wheel.
    """
    copy_to(folder / "source")
    wheel = build("wheel", folder / "source", folder / "wheel")
    check_contents(set(contents(wheel)))
    shutil.rmtree(folder / "source")
    copy_to(folder / "source")
    sdist = build("sdist", folder / "source", folder / "sdist")
    with tarfile.open(sdist) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    again = build("wheel", unpacked, folder / "again")
    if contents(again) != contents(wheel):
        one, other = contents(wheel), contents(again)
        differ = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        raise ValueError(f"the sdist makes another wheel: {differ}")
    return wheel


def check_use(wheel: Path, folder: Path, borrow: bool) -> None:
    """Install the wheel and use it: an import, a plan, a short training."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python, elsewhere = folder / "venv" / "bin" / "python", folder / "elsewhere"
    if borrow:
        _run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], folder)
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        # later than the wheel's own folder; links in them to working trees are not followed
        (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    else:
        _run([python, "-m", "pip", "install", "--quiet", f"{wheel}[quickstart]"], folder)
    elsewhere.mkdir()
    shutil.copyfile(ROOT / "configs" / "digits.yaml", elsewhere / "digits.yaml")
    place = _run([python, "-c", "import bigmac_lightning, sys; print(bigmac_lightning.__file__)"], elsewhere)
    if not Path(place.strip()).is_relative_to(folder):
        raise ValueError(f"what was imported is {place.strip()}, and not the wheel")
    bigmac = folder / "venv" / "bin" / "bigmac"
    print(_run([bigmac, "--version"], elsewhere))
    print(
        _run([bigmac, "plan", "--pipeline_parallel_size", "2", "--microbatches", "4", "--output", "x.html"], elsewhere)
    )
    _run([bigmac, "fit", "--config", "digits.yaml", *FIT], elsewhere)
    if not [*elsewhere.glob("runs/digits/version_0/checkpoints/*.ckpt")]:
        raise ValueError("the training has left no checkpoint")


def check_extras(folder: Path) -> None:
    """Find versions for all extras together, without installing any: pip would download gigabytes for that."""
    subprocess.run([sys.executable, "-m", "venv", folder / "tools"], check=True)
    _run([folder / "tools/bin/pip", "install", "--quiet", "uv"], folder)
    _run([folder / "tools/bin/uv", "pip", "compile", "--quiet", "--all-extras", ROOT / "pyproject.toml"], folder)


def _run(command: list[object], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "120"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{' '.join(words)} has failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--borrow", action="store_true", help="use the packages of this environment, and download nothing"
    )
    borrow = parser.parse_args().borrow
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = check_builds(folder)
        print(f"{wheel.name}: {len(contents(wheel))} files; the sdist makes the same", flush=True)
        if not borrow:
            check_extras(folder)
            print("there are versions for all extras", flush=True)
        check_use(wheel, folder, borrow)
        print("the wheel was installed, and has planned and trained", flush=True)


if __name__ == "__main__":
    main()
