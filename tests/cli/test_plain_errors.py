"""What is seen of an error of `bigmac fit`: one line if a user can put it right, one traceback of an error of code."""

import os
import sys
import warnings
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from bigmac_lightning import cli
from tests.training.trainers import on_ranks

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
QUIET = ["--trainer.logger=false", "--trainer.callbacks=[]", "--trainer.enable_checkpointing=false"]
OWN = """
from bigmac_lightning.datamodules import DigitsDataModule


class Wrong(DigitsDataModule):
    def train_dataloader(self):
        return int("nothing")
"""


def _fit(rank: int, folder: Path, arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """The exit code of a rank, and what it says on stderr."""
    os.chdir(folder)
    warnings.simplefilter("default")
    os.environ.update(environment)
    sys.argv = ["bigmac", "fit", "--config", str(DIGITS), *QUIET, *arguments]
    with open(f"{rank}.log", "w+") as log, redirect_stderr(log):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(str(end.code))
        except Exception as error:
            code = 1
            sys.excepthook(type(error), error, error.__traceback__)
        log.seek(0)
        return code, log.read()


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        (["--ckpt_path=none.ckpt"], {}, 2, "bigmac fit: error: there is no checkpoint at none.ckpt (in /"),
        (["--model.init_from=bad.ckpt"], {}, 2, "bigmac fit: error: bad.ckpt holds a pickle that is not of tensors"),
        (
            ["--ckpt_path=none.ckpt"],
            {"BIGMAC_TRACEBACK": "1"},
            1,
            "FileNotFoundError: there is no checkpoint at none.ckpt",
        ),
        (["--data=own_data.Wrong"], {}, 1, "ValueError: invalid literal for int() with base 10: 'nothing'"),
    ],
)
def test_one_rank_says_it(
    arguments: list[str], environment: dict[str, str], code: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.ckpt").write_text("no checkpoint")
    (tmp_path / "own_data.py").write_text(OWN)
    codes, texts = zip(*on_ranks(2, _fit, tmp_path, arguments, environment), strict=True)
    assert codes == (code, code)
    said = "".join(texts)
    assert sum(message in text for text in texts) == 1, said
    assert sum("Traceback (most recent call last)" in text for text in texts) == (code == 1), said
    lines = [line for line in said.splitlines() if "[bigmac] rank" in line]
    assert len(lines) == (code == 1), "the other rank says where the error is shown"
