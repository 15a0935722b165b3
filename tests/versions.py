"""Some of the tests with the oldest or the newest versions that pyproject.toml allows: ``make test-oldest``,
``make test-newest``, or ``python -m tests.versions [--python PROGRAM] oldest|newest``.

It installs them into a virtual environment of its own, which takes minutes, and gigabytes in the temporary folder.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
"""Of what is required here; what those packages require themselves may be new in both."""
EXTRAS = ("examples", "heic", "lora")
TOOLS = ("pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "num2words>=0.5")
ALONE = ("pyannote.audio==4.0.7",)  # a recording, see the Makefile
TESTS = (
    "tests/test_imports.py",
    "tests/schedule/test_plans.py",
    "tests/models/test_multimodal_lm.py",
    "tests/models/test_lora.py",
    "tests/models/test_flow.py",
    "tests/models/test_vision.py",
    "tests/models/test_sweep.py",
    "tests/training/test_training.py",
    "tests/training/test_checkpoint.py",
    "tests/training/test_sharding.py",
    "tests/datamodules/test_multimodal_training.py",
    "tests/cli/test_export.py",
    "tests/cli/test_commands.py",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=RESOLUTIONS)
    parser.add_argument("--python", default=sys.executable, help="the interpreter, by default the one that runs this")
    parser.add_argument("--pin", action="append", default=[], help="a version to use instead, such as torch==2.14.1")
    parser.add_argument("--resolve", action="store_true", help="only show the versions, and install nothing")
    parser.add_argument("tests", nargs="*", default=TESTS, help="arguments of pytest")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pins.txt").write_text("\n".join(given.pin))
        subprocess.run([sys.executable, "-m", "venv", folder / "tools"], check=True)
        subprocess.run([folder / "tools/bin/pip", "install", "--quiet", "uv"], check=True)
        uv = [folder / "tools/bin/uv", "pip"]
        options = ["--python", given.python, "--resolution", RESOLUTIONS[given.which]]
        options += ["--constraint", folder / "pins.txt", *(f"--extra={extra}" for extra in EXTRAS)]
        command = [*uv, "compile", "pyproject.toml", *options, "--quiet", "--no-annotate", "--no-header"]
        (folder / "versions.txt").touch()
        subprocess.run([*command, "--output-file", folder / "versions.txt"], cwd=ROOT, check=True)
        print((folder / "versions.txt").read_text(), flush=True)
        if given.resolve:
            return 0
        subprocess.run([*uv[:1], "venv", "--quiet", "--python", given.python, folder / "venv"], check=True)
        python = folder / "venv/bin/python"
        install = [*uv, "install", "--python", python, "--quiet"]
        subprocess.run([*install, "--requirement", folder / "versions.txt", *TOOLS], check=True)
        subprocess.run([*install, "--no-deps", *ALONE, "--editable", ROOT], check=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # packages of other versions warn of other things than those that the test suite knows
        tests = [python, "-m", "pytest", "-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider", *given.tests]
        return subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
