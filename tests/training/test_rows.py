"""Under the Trainer, components whose weights will lie in shards make only rows of them, and start from the weights of
one process. That they train as it does is shown by tests/layouts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigmac_lightning import ShardingOptions
from bigmac_lightning.models import FlowGenerator, HFDecoder, MultimodalLM, VisionEncoder
from bigmac_lightning.runtime.sharding import is_rows
from tests.layouts.cases import Case
from tests.layouts.models import DECODERS, Data
from tests.models import zoo
from tests.runtime.test_real_models import MMDIT, TOWER
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer, weights

LORA = {
    "encoders.image": {"r": 2, "target_modules": ["q_proj", "fc1"]},
    "llm": {"r": 2, "target_modules": ["v_proj", "o_proj"]},
}


class Watched(MultimodalLM):
    """Keeps which fraction of each component's numbers are rows, and the weights from which it starts."""

    def configure_model(self) -> None:
        super().configure_model()
        self.rows = {name: _share(self.get_submodule(name)) for name in ("encoders.image", "generators.image", "llm")}

    def on_fit_start(self) -> None:
        self.start = weights(self)  # pyright: ignore[reportArgumentType]


def _share(component: torch.nn.Module) -> float:
    parameters = list(component.parameters())
    return sum(p.numel() for p in parameters if is_rows(p)) / sum(p.numel() for p in parameters)


@dataclass(frozen=True)
class Run:
    case: Case
    rows: dict[str, bool]
    lora: bool = False
    masters: bool = False
    start: str = ""

    def module(self, folder: Path | None = None) -> Watched:
        config = {"model_type": "qwen3", **zoo.TEXT, "num_hidden_layers": 4, "tie_word_embeddings": False}
        init_from: Any = {"": None, "file": str, "directory": str}[self.start]
        return Watched(
            HFDecoder({**config, **DECODERS[self.case.decoder]}),
            {"image": VisionEncoder(TOWER, width=32)},
            {"image": FlowGenerator(32, channels=1, config=MMDIT)},
            freeze=["generators.image.connector"],
            lora=LORA if self.lora else None,
            learning_rate=1e-3,
            schedule="constant",
            init_from=None if folder is None or init_from is None else str(folder / self.start),
        )


BOTH = {"encoders.image": True, "generators.image": True}
REPLICAS = {"generators.image": True, "llm": True}  # a pipeline of one rank has no shards of encoders
WIDE = pytest.mark.wide
COPY = {"llm.lm_head.weight"}  # of a tied weight, on another rank than the original
RUNS = {
    "fsdp": Run(Case((1, 2, 1, 1), "dense", "fsdp", "fsdp"), {**BOTH, "llm": False}, lora=True, start="directory"),
    "zero1": Run(Case((2, 1, 1, 1), "tied", "zero1", "zero1", "zero1"), {**BOTH, "llm": True}, start="file"),
    "stages": Run(Case((2, 2, 1, 1), "tied", "fsdp", "ddp", "fsdp"), {"encoders.image": True, "llm": True}, lora=True),
    "masters": Run(Case((2, 1, 1, 1), "experts", "fsdp", "zero1", "zero1"), REPLICAS, masters=True),
    "slices": Run(Case((2, 1, 1, 2), "tied", "zero1", "fsdp", "zero1"), {**BOTH, "llm": False}, start="directory"),
}


def _fit(rank: int, run: Run, folder: Path) -> tuple[dict[str, Tensor], dict[str, float], set[str]]:
    arguments = run.case.strategy_arguments()
    if run.masters:
        sharded: Any = (run.case.encoders, run.case.generators, run.case.stages)
        arguments["sharding"] = ShardingOptions(*sharded, master_weights=True)
    precision: Any = {"precision": "bf16-true"} if run.masters else {}
    trainer = pipeline_trainer(run.case.world, arguments, max_steps=1, limit_val_batches=0, **precision)
    made = run.module(folder)
    trainer.fit(made, Data(run.case, 1, 1))
    return made.start, made.rows, {name for name, p in made.named_parameters() if p.requires_grad}


def _save(rank: int, run: Run, folder: Path) -> None:
    trainer = pipeline_trainer(1, {}, max_steps=1, limit_val_batches=0)
    trainer.fit(run.module(), Data(run.case, 1, 1))
    trainer.save_checkpoint(folder / "directory")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in ("fsdp", "masters") else WIDE) for n in RUNS])
def test_the_weights_of_one_process(name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    before = Run(run.case.in_one_process, {})
    if run.start == "directory":
        on_ranks(1, _save, before, tmp_path)
    elif run.start:
        trainer = plain_trainer(max_steps=1, limit_val_batches=0)
        trainer.fit(before.module(), Data(before.case, 1, 1))
        trainer.save_checkpoint(tmp_path / run.start)
    alone = run.module(tmp_path)
    alone.configure_model()
    expected, trained = dict(alone.named_parameters()), {n for n, p in alone.named_parameters() if p.requires_grad}
    seen = set[str]()
    for found, rows, own in on_ranks(run.case.world, _fit, run, tmp_path):
        assert {component for component, share in rows.items() if share > 0.5} == {c for c, r in run.rows.items() if r}
        assert own - COPY == trained & found.keys() - COPY
        for parameter, value in found.items():
            should = expected.get(parameter, expected.get("llm.model.embed_tokens.weight"))
            assert should is not None
            assert torch.equal(value, should), parameter
        seen |= found.keys()
    assert expected.keys() <= seen
