"""The models of the cases, and their batches. A model keeps what is compared while it trains."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import Batch, PipelineLayout, TargetItem
from bigmac_lightning.contracts.owners import assign_owners
from bigmac_lightning.datamodules.examples.digits import DigitsDataModule
from bigmac_lightning.datamodules.loading.collate import Collator
from bigmac_lightning.models import (
    FlowGenerator,
    HFDecoder,
    HFVideoEncoder,
    HFVisionEncoder,
    MultimodalLM,
    VisionEncoder,
)
from tests.layouts.cases import MICROBATCHES, Case
from tests.models import zoo
from tests.runtime.test_real_models import MMDIT, TOWER
from tests.toy import seeded
from tests.training.trainers import weights, whole

LAYERS = 4
SAMPLES = 12
EXPERTS: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "output_router_logits": True,
}
DECODERS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied": {"tie_word_embeddings": True},
    "experts": EXPERTS,
    "spread experts": EXPERTS,
}
ADAPTERS = {"r": 2, "target_modules": ["q_proj", "k_proj", "o_proj"]}


@dataclass
class Record:
    """What is compared of a run on one rank.

    Attributes:
        start, end: weights before the first step and after the last one.
        losses, norms, clipped: of each step; the norm of all gradients before and after clipping.
        gradients: of the first step, before clipping.
        validated: the losses of the validation after the last step.
    """

    start: dict[str, Tensor]
    end: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    clipped: list[float]
    gradients: dict[str, Tensor | None]
    validated: list[float]


class RecordedLM(MultimodalLM):
    """Keeps its losses, norms, the gradients of the first step, and the weights from which it starts.

    Attributes:
        given: weights to start from; empty: its own.
    """

    def on_fit_start(self) -> None:
        self.record = Record({}, {}, [], [], [], {}, [])
        if self.given:
            own = dict(self.named_parameters())
            with torch.no_grad():
                for name, value in self.given.items():
                    own[name].copy_(value)
        self.record.start = weights(self)

    given: dict[str, Tensor] = {}
    record: Record

    def adapt(self) -> None:
        """Adapters already do something: each of them has a gradient."""
        super().adapt()
        for name, parameter in self.named_parameters():
            if ".lora_B." in name:
                seeded(name)
                torch.nn.init.normal_(parameter, std=0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.record.losses.append(float(loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.record.norms.append(float(self.gradient_norm()))
        if not self.record.gradients:
            found = {name: whole(p.grad) for name, p in self.named_parameters() if p.requires_grad}
            self.record.gradients = {name: None if g is None else g.clone() for name, g in found.items()}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.record.clipped.append(float(self.gradient_norm()))


def module_of(case: Case) -> RecordedLM:
    generators: Any = {} if case.generators == "none" else {"image": FlowGenerator(32, channels=1, config=MMDIT)}
    first_layer = "llm.model.layers.0"
    if case.decoder == "qwen3_vl":
        first_layer = "llm.model.language_model.layers.0"
        config = zoo.MODELS["qwen3_vl"].config()
        config.get_text_config().num_hidden_layers = LAYERS
        image = HFVisionEncoder(config)
        llm, encoders = HFDecoder(config), {"image": image, "video": HFVideoEncoder(image)}
    else:
        config = {"model_type": "qwen3", **zoo.TEXT, "num_hidden_layers": LAYERS, "tie_word_embeddings": False}
        llm, encoders = HFDecoder({**config, **DECODERS[case.decoder]}), {"image": VisionEncoder(TOWER, width=32)}
    frozen = {"encoders, layer 0": ["encoders", first_layer], "LLM": ["llm"]}.get(case.frozen, [])
    lora = {"llm": ADAPTERS} if case.frozen == "LLM but adapters" else None
    return RecordedLM(llm, encoders, generators, freeze=frozen, lora=lora, learning_rate=1e-3, schedule="constant")


def batch_of(case: Case, layout: PipelineLayout, seed: int) -> Batch:
    """Unequal microbatches, one or more of text alone."""
    batch = _rows(layout, seed) if case.decoder == "qwen3_vl" else _digits(layout, seed)
    if case.generators == "none":
        nothing = torch.empty(0, dtype=torch.long)
        batch = batch.replace(
            microbatches=[replace(m, targets=[], target_positions=nothing) for m in batch.microbatches]
        )
    return batch


@cache
def _digits_dataset() -> Any:
    data = DigitsDataModule(batch_size=SAMPLES, microbatches=MICROBATCHES, image_rows=16)
    data.setup("fit")
    return data.train_dataloader().dataset


def _digits(layout: PipelineLayout, seed: int) -> Batch:
    """Questions about digits and wishes for them. That of seed 0 has both."""
    return Collator(layout, MICROBATCHES)([_digits_dataset()[1, 31 * i + 1 + seed] for i in range(SAMPLES)])


def _rows(layout: PipelineLayout, seed: int) -> Batch:
    """Two rows of two samples each, with images and videos; targets after the first samples."""
    made = [zoo.microbatch(rows) for rows in zoo.sequences(zoo.MODELS["qwen3_vl"], True, seed)[1:]]
    for m, microbatch in enumerate(made):
        microbatch.targets = [TargetItem("image", 3, (1, 8, 8), seed=8 * seed + m + i) for i in range(m % 3)]
        microbatch.target_positions = microbatch.label_positions[: 3 * len(microbatch.targets)]
        for item in microbatch.targets:
            item.data = torch.randn(item.shape, generator=torch.Generator().manual_seed(item.seed))
    assign_owners(made, layout)
    for item in (item for m in made for item in (*m.media, *m.targets)):
        item.data = item.data if layout.owns(item) else None
    return Batch(made, layout)


class Data(pl.LightningDataModule):
    """New batches in each step, for a number of replicas. A single pipeline gets those of all of them."""

    def __init__(self, case: Case, steps: int, replicas: int) -> None:
        super().__init__()
        self.case, self.steps, self.replicas = case, steps, replicas

    def collate(self, indices: list[int]) -> Batch:
        assert self.trainer is not None
        layout = getattr(self.trainer.strategy, "pipeline_layout", PipelineLayout())
        replicas, (step,) = self.replicas, indices
        own = getattr(self.trainer, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        chosen = [own["rank"]] if own["num_replicas"] > 1 else range(replicas)
        batches = [batch_of(self.case, layout, replicas * step + replica) for replica in chosen]
        return batches[0].replace(microbatches=[m for batch in batches for m in batch.microbatches])

    def train_dataloader(self) -> Any:
        return self._loader(range(self.steps))

    def val_dataloader(self) -> Any:
        return self._loader(range(self.steps, self.steps + 1))

    def _loader(self, steps: Any) -> Any:
        return torch.utils.data.DataLoader(steps, batch_size=1, collate_fn=self.collate)
