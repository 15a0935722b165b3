"""Some of the tests with the oldest versions that pyproject.toml allows: ``make test-oldest``, or
``python -m tests.oldest``.

It installs them into a virtual environment of its own, which takes minutes, and gigabytes in the temporary folder.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = "quickstart,data,lora"
TOOLS = ("pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "num2words>=0.5")
TESTS = (
    "tests/test_imports.py",
    "tests/schedule/test_plans.py",
    "tests/models/test_multimodal_lm.py",
    "tests/models/test_lora.py",
    "tests/models/test_flow.py",
    "tests/models/test_vision.py",
    "tests/training/test_training.py",
    "tests/training/test_checkpoint.py",
    "tests/datamodules/test_multimodal_training.py",
    "tests/cli/test_export.py",
    "tests/cli/test_commands.py",
)


def others_than_here(versions: str, pinned: list[str]) -> list[str]:
    """Of lines "name==version", those of packages that are not installed here in this version. What belongs to torch
    is large, and not among them."""
    installed = {f"{one.name.lower().replace('_', '-')}=={one.version}" for one in metadata.distributions()}
    found = [line for line in versions.splitlines() if "==" in line and line not in {*installed, *pinned}]
    return [line for line in found if not line.startswith(("nvidia-", "cuda-", "triton="))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pin", action="append", default=[], help="a version to use instead, such as torch==2.14.1")
    parser.add_argument(
        "--borrow", action="store_true", help="use this environment's packages where it has the version"
    )
    parser.add_argument("--resolve", action="store_true", help="only show the versions, and install nothing")
    parser.add_argument("tests", nargs="*", default=TESTS, help="arguments of pytest")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pins.txt").write_text("\n".join(given.pin))
        subprocess.run([sys.executable, "-m", "venv", folder / "tools"], check=True)
        subprocess.run([folder / "tools/bin/pip", "install", "--quiet", "uv"], check=True)
        uv = [folder / "tools/bin/uv", "pip"]
        # the versions of what is required here; what those packages require themselves may be new
        lowest = ["--resolution", "lowest-direct", "--constraint", folder / "pins.txt"]
        extras = [word for extra in EXTRAS.split(",") for word in ("--extra", extra)]
        (folder / "versions.txt").touch()
        command = [*uv, "compile", "pyproject.toml", *extras, *lowest, "--quiet", "--no-annotate", "--no-header"]
        subprocess.run([*command, "--output-file", folder / "versions.txt"], cwd=ROOT, check=True)
        print((folder / "versions.txt").read_text(), flush=True)
        if given.resolve:
            return 0
        subprocess.run([*uv[:1], "venv", "--python", sys.executable, folder / "venv"], check=True)
        python = folder / "venv/bin/python"
        if given.borrow:
            (site,) = (folder / "venv/lib").glob("python*/site-packages")
            (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
            packages = ["--no-deps", *others_than_here((folder / "versions.txt").read_text(), given.pin)]
        else:
            packages = ["--requirement", folder / "versions.txt", *TOOLS]
        subprocess.run([*uv, "install", "--python", python, "--quiet", *packages], check=True)
        subprocess.run([*uv, "install", "--python", python, "--quiet", "--no-deps", "--editable", ROOT], check=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # old packages warn of other things than those that the test suite knows
        tests = [python, "-m", "pytest", "-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider", *given.tests]
        return subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
