"""How fast samples become batches, how even they are, and whether training waits for them.

Real pictures and questions of the `easy-vqa` package, resized to a lognormal mix of sizes, and texts: numbers of one
worker process, of packing and ownership, and of the share of a step that a tiny model on two ranks spends waiting.

    python -m benchmarks.data_loading
"""

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import PIL.Image
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ranks import run_ranks
from bigmac_lightning import BigMacStrategy
from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.contracts.owners import assign_owners
from bigmac_lightning.datamodules import (  # pyright: ignore[reportMissingImports]  (lies in datamodules/)
    EasyVQA,
    HFStream,
    LoadingOptions,
    MessagesJSONL,
    MixtureOptions,
    MultimodalDataModule,
    PackingOptions,
    PatchProcessor,
)
from bigmac_lightning.datamodules.loading.stream_loader import (  # pyright: ignore[reportMissingImports]
    StreamLoader,
    StreamStep,
)
from bigmac_lightning.models import (  # pyright: ignore[reportMissingImports]  (lies in models/)
    HFDecoder,
    MultimodalLM,
    VisionEncoder,
)
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.planner import Planner
from bigmac_lightning.training.trained import Trained

RANKS = 4
SAMPLES = 600


def write_mix(folder: Path) -> Path:
    """Three quarters of the samples have a picture, of lognormal size; texts are lognormal, too."""
    draw, source = random.Random(0), EasyVQA("train", SAMPLES)
    records: list[Any] = []
    for i in range(SAMPLES):
        question, answer, picture = source.questions[i]
        answer = " ".join([answer] * max(1, int(draw.lognormvariate(2, 1))))
        record: dict[str, Any] = {"messages": [{"role": "user", "content": question}]}
        if draw.random() < 0.75:
            side = min(448, max(32, int(draw.lognormvariate(4.6, 0.6))))
            with PIL.Image.open(source.folder / "images" / f"{picture}.png") as image:
                image.convert("RGB").resize((side, min(448, max(32, int(side * draw.uniform(0.5, 2)))))).save(
                    folder / f"{i}.png"
                )
            record["images"] = [f"{i}.png"]
            record["messages"][0]["content"] = f"<image>{question}"
        record["messages"].append({"role": "assistant", "content": answer})
        records.append(record)
    (folder / "mix.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "mix.jsonl"


def datamodule(path: Path, train: Sequence[Any] | None = None, **changes: Any) -> MultimodalDataModule:
    visual = PatchProcessor(patch_size=16, max_rows=784)
    arguments: dict[str, Any] = {
        "token_budget": 2048,
        "microbatches": 8,
        "loading": LoadingOptions(cache_dir=path.parent / "measured"),
        **changes,
    }
    return MultimodalDataModule(train or [MessagesJSONL(path)], visual=visual, **arguments)


def unevenness(loads: Sequence[float]) -> float:
    return max(loads) * len(loads) / sum(loads)


def owners_in_turn(microbatches: Sequence[Any], layout: PipelineLayout) -> None:
    """What one would do without knowing costs."""
    for number, item in enumerate(item for microbatch in microbatches for item in microbatch.media):
        item.owner = number % layout.size


def encoder_imbalance(batches: Sequence[Batch], assign: Callable[[Sequence[Any], PipelineLayout], None]) -> float:
    """Mean over groups of max/mean encoder cost per rank."""
    layout, found = PipelineLayout(RANKS, 0, RANKS), []
    for batch in batches:
        assign(batch.microbatches, layout)
        for first in range(0, len(batch), RANKS):
            loads = [0.0] * RANKS
            for microbatch in batch.microbatches[first : first + RANKS]:
                for item in microbatch.media:
                    loads[item.owner] += item.cost
            if any(loads):
                found.append(unevenness(loads))
    return statistics.mean(found)


def loading(path: Path) -> tuple[dict[str, str], list[Batch]]:
    """One process: measuring, then an epoch."""
    made = datamodule(path)
    start = time.perf_counter()
    made.prepare_data()
    measuring = time.perf_counter() - start
    made.setup("fit")
    loader = made.loader("train")
    len(loader)
    start = time.perf_counter()
    batches = list(loader)
    seconds = time.perf_counter() - start
    images = sum(len(m.media) for batch in batches for m in batch.microbatches)
    tokens = sum(batch.tokens for batch in batches)
    real = sum(origin.stop - origin.start for b in batches for m in b.microbatches for origin in m.origins)
    return {
        "measured once, examples/s": f"{SAMPLES / measuring:,.0f}",
        "images/s of one worker": f"{images / seconds:,.0f}",
        "tokens/s of one worker": f"{tokens / seconds:,.0f}",
        "padding, packed": f"{1 - real / tokens:.1%}",
        "tokens of the budget that are used": f"{tokens / (2048 * sum(map(len, batches))):.1%}",
    }, batches


def streamed(path: Path) -> float:
    """Examples/s that one process reads from a Parquet file with images in it, tokenizes and packs, before decoding."""
    datasets.disable_progress_bars()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rows: dict[str, list[Any]] = {"messages": [record["messages"] for record in records]}
    rows["images"] = [[(path.parent / name).read_bytes() for name in record.get("images", [])] for record in records]
    rows["images"] = [[{"bytes": image, "path": None} for image in images] for images in rows["images"]]
    datasets.Dataset.from_dict(rows).to_parquet(str(path.with_suffix(".parquet")))
    made = datamodule(
        path,
        [HFStream("parquet", str(path.with_suffix(".parquet")))],
        mixture=MixtureOptions(steps_per_epoch=1),
        packing=PackingOptions(buffer_size=256),
    )
    made.setup("fit")
    loader, samples, start = made.loader("train"), 0, time.perf_counter()
    assert isinstance(loader, StreamLoader)
    with closing(iter(loader.stream_steps)) as steps:
        while samples < 3 * SAMPLES:
            step = next(steps)
            assert isinstance(step, StreamStep)
            samples += sum(map(len, step.microbatches))
    return samples / (time.perf_counter() - start)


def padded(path: Path) -> float:
    made = datamodule(path, packing=PackingOptions(packed=False))
    made.setup("fit")
    batches = list(made.loader("train"))
    real = sum(origin.stop - origin.start for b in batches for m in b.microbatches for origin in m.origins)
    return 1 - real / sum(batch.tokens for batch in batches)


def simulated(path: Path) -> tuple[float, float, float, float]:
    """Makespan / ideal, and the costliest group's encoder cost / the mean group's, of 16 microbatches on 4 ranks: in
    any order, and as the DataModule orders them."""
    made = datamodule(path, microbatches=16, mixture=MixtureOptions(samples_per_epoch=4 * SAMPLES))
    made.setup("fit")
    options, trained = PipelineOptions(), Trained((True,) * RANKS, frozenset({"image"}))
    planner, draw, found = Planner(options, RANKS, 0, trained), random.Random(0), []
    for batch in made.loader("train"):
        row: list[float] = []
        for microbatches in (draw.sample(batch.microbatches, len(batch)), batch.microbatches):
            assign_owners(microbatches, planner.layout)
            plan = planner(Batch(microbatches, planner.layout)).plan
            groups = planner.layout.groups(len(batch))
            row += [plan.makespan / plan.ideal]
            row += [unevenness([sum(item.cost for m in group for item in microbatches[m].media) for group in groups])]
        found.append(row)
    any_order, any_groups, ordered, ordered_groups = map(statistics.mean, zip(*found, strict=True))
    return any_order, ordered, any_groups, ordered_groups


class Waiting(pl.Callback):
    """Seconds in which a rank has no batch to work on, and in all.

    Waiting is all the time from the end of one batch to the start of the next: for the worker, for the batch's way from
    it, for the other ranks' word about it, and what Lightning does in between. The first step is left out, in which the
    workers start.
    """

    def __init__(self) -> None:
        self.waited = self.started = self.ended = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if batch_idx == 1:  # the first batch waits for the workers to start
            self.started = self.ended
        if batch_idx:
            self.waited += now - self.ended

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ended = time.perf_counter()


def train(rank: int, path: Path, workers: int) -> float:
    """Share of the steps' time that was spent waiting for data."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533", TORCHELASTIC_RUN_ID="benchmark")
    tower = {
        "model_type": "siglip_vision_model", "image_size": 224, "patch_size": 16, "num_channels": 3, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    decoder = {
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 262,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    module = MultimodalLM(HFDecoder(decoder), {"image": VisionEncoder(tower, 64)}, schedule="constant")
    waiting = Waiting()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=BigMacStrategy(), max_epochs=1, limit_train_batches=8,
        limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[waiting],
    )  # fmt: skip
    trainer.fit(module, datamodule(path, num_workers=workers))
    return waiting.waited / (waiting.ended - waiting.started)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = write_mix(Path(folder))
        rows, batches = loading(path)
        rows["examples/s of a stream, before decoding"] = f"{streamed(path):,.0f}"
        rows["padding, a row per sample"] = f"{padded(path):.1%}"
        rows["encoder max/mean in a group of 4 ranks, in turn"] = f"{encoder_imbalance(batches, owners_in_turn):.3f}"
        rows["encoder max/mean in a group of 4 ranks, balanced"] = f"{encoder_imbalance(batches, assign_owners):.3f}"
        any_order, ordered, any_groups, ordered_groups = simulated(path)
        rows["simulated step time / ideal, 4 ranks, any order / costliest first"] = f"{any_order:.3f} / {ordered:.3f}"
        rows["encoder max/mean of a step's groups, any order / costliest first"] = (
            f"{any_groups:.2f} / {ordered_groups:.2f}"
        )
        for workers in (0, 2):
            shares = run_ranks(2, train, path, workers)
            rows[f"step time spent waiting, {workers} workers per rank"] = f"{max(shares):.1%}"
    table = Table(title=f"{SAMPLES} samples, lognormal")
    table.add_column("")
    table.add_column("measured", justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    main()
