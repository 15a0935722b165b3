"""docs/finetuning.md: its files (frozen_tower.yaml, rates.yaml, projector_first.py) change what it says, with a tiny
Qwen3-VL, and the exported model learns to draw."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.commands import export
from bigmac_lightning.models import MultimodalLM
from tests.blocks import ROOT, blocks_of
from tests.cli.checkpoints import write_conversations, write_inputs
from tests.cli.commands import bigmac
from tests.cli.test_pretrained_configs import SMALL
from tests.datamodules.examples import said, write_jsonl
from tests.training.trainers import on_ranks

FILES = {block.title: block.text for block in blocks_of("docs/finetuning.md") if block.title}
COMMANDS = [line for block in blocks_of("docs/finetuning.md") if block.kind == "bash" for line in block.commands]
CONFIG = ROOT / "configs" / "qwen3_vl.yaml"
SOURCE = "checkpoints/Qwen3-VL-4B-Instruct"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files of the page, where Python finds them, and a tiny model with its data."""
    for title, text in FILES.items():
        (tmp_path / title).write_text(text)
    write_inputs(CONFIG.read_text(), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("projector_first", None)


def _start() -> dict[str, Tensor]:
    """The weights in the model's folder, by their names in a checkpoint."""
    model = MultimodalLM.from_pretrained(SOURCE)
    model.configure_model()
    return model.state_dict()


def _added(words: str) -> list[str]:
    """What the page's command with these words adds to the config."""
    [command] = [line for line in COMMANDS if words in line]
    return command.split()[4:]


def _fit(ranks: int, *arguments: str) -> dict[str, Tensor]:
    """The weights after a few steps of the config with these changes."""
    bigmac(ranks, Path.cwd(), "fit", "--config", str(CONFIG), *SMALL, *arguments)
    return CheckpointWeights(Path("runs/qwen3_vl/best.ckpt")).read()


def _moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """By how much each tensor has changed at most."""
    assert before.keys() == after.keys()
    return {name: float((after[name] - before[name]).abs().max()) for name in before}


def test_frozen_tower_and_rates() -> None:
    moved = _moved(
        _start(), _fit(2, *_added("bigmac fit --config configs/qwen3_vl.yaml --config "), "--config", "rates.yaml")
    )
    tower = {name for name in moved if "merger" not in name and name.startswith("encoders.")}
    assert {name for name, by in moved.items() if not by} == tower
    own = max(by for name, by in moved.items() if ".visual.merger." in name)
    llm = max(by for name, by in moved.items() if name.startswith("llm."))
    deepstack = max(by for name, by in moved.items() if ".deepstack_merger_list." in name)
    assert own / llm == pytest.approx(5, rel=0.1), "as AdamW's first steps are as long as the learning rate"
    assert deepstack / llm == pytest.approx(0.2, rel=0.1)


def test_the_projector_first_then_all_on_other_ranks_then_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    callback, *two_epochs = _added("projector_first.ProjectorFirst")  # of projector_first.py
    start, first = _start(), _fit(2, callback)
    assert {name for name, by in _moved(start, first).items() if by} == {name for name in start if "merger" in name}
    one_rank = ["--trainer.devices=1", "--trainer.strategy.init_args.pipeline_parallel_size=1"]
    then = _fit(1, callback, *two_epochs, "--ckpt_path=auto", *one_rank)
    assert all(_moved(first, then).values())

    assert export.main(["--checkpoint", "runs/qwen3_vl/best.ckpt", "--output", "checkpoints/mine"]) == 0
    write_conversations(Path("data/pictures.jsonl"), 8)
    drawings = [{"messages": said("Draw.", ""), "target": f"{i}.png"} for i in range(8)]
    write_jsonl(Path("data/drawings.jsonl"), drawings)
    on_ranks(2, _add_generator)
    drawing = CheckpointWeights(Path("drawing.ckpt")).read()
    own = {name: tensor for name, tensor in drawing.items() if not name.startswith("generators.")}
    assert len(own) < len(drawing)
    assert not any(_moved(then, own).values())


def _add_generator(rank: int) -> None:
    warnings.simplefilter("default")  # there are fewer batches than the Trainer logs at
    text = FILES["add_generator.py"].replace("max_epochs=10", "max_epochs=1")
    exec(compile(text, "add_generator.py", "exec"), {"__name__": "__main__"})
