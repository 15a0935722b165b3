"""A small multimodal model in plain torch: real layers, uneven sizes, nothing of transformers.

Shape suffixes as in module.py.
"""

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, PipelineLayout, TargetItem
from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.owners import assign_owners
from bigmac_lightning.estimates.partition import LayerCosts, make_stages

VOCABULARY = 29
WIDTH = 12
PIXELS = {"image": 5, "audio": 3}
TARGET = 4


def seeded(name: str) -> None:
    torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))


def split_layers(layers: int, stages: int) -> list[range]:
    """Consecutive stages with nearly equal numbers of layers."""
    return make_stages(LayerCosts((1.0,) * layers), stages)


def through(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class ToyLayer(nn.Module):
    """Causal mixing over positions, so that every later token depends on every earlier one."""

    def __init__(self, shared_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.norm2 = self.norm if shared_norm else nn.LayerNorm(WIDTH)  # a weight used twice cannot be split
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, h_BSD: Tensor) -> Tensor:
        seen = torch.arange(1, h_BSD.shape[1] + 1, dtype=h_BSD.dtype, device=h_BSD.device).view(1, -1, 1)
        h_BSD = h_BSD + self.mix(self.norm(h_BSD)).cumsum(1) / seen
        return h_BSD + self.down(nn.functional.gelu(self.up(self.norm2(h_BSD))))


class ToyLLM(LanguageModel):
    def __init__(self, layers: int = 4, tied: bool = False, checkpointed: Collection[int] = ()) -> None:
        super().__init__()
        self.num_layers, self.width, self.checkpointed = layers, WIDTH, checkpointed
        self.tied = {"head.weight": "embedding.weight"} if tied else {}

    def materialize(self, layers: Collection[int], embedding: bool, head: bool) -> None:
        self.layers = nn.ModuleDict()
        for i in sorted(layers):
            seeded(f"layer {i}")
            self.layers[str(i)] = ToyLayer(shared_norm=i == 1)
        seeded("embedding")
        weights = nn.Embedding(VOCABULARY, WIDTH)
        if embedding:
            self.embedding = weights
        if head:
            seeded("head")
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
            if self.tied:
                self.head.weight = weights.weight

    def keep(self, layers: Collection[int], embedding: bool, head: bool) -> None:
        for i in set(range(self.num_layers)) - set(layers):
            del self.layers[str(i)]
        if not embedding:
            del self.embedding
        if not head:
            del self.norm, self.head

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.embedding(inputs["input_ids"])

    def run_layers(self, h_BSD: Tensor, inputs: dict[str, Tensor], layers: range, extras: dict[str, Tensor]) -> Tensor:
        for i in layers:
            layer = self.layers[str(i)]
            h_BSD = checkpoint(layer, h_BSD, use_reentrant=False) if i in self.checkpointed else layer(h_BSD)
        return self.norm(h_BSD) if layers.stop == self.num_layers else h_BSD

    def logits(self, h_LD: Tensor) -> Tensor:
        return self.head(h_LD)


class ToyEncoder(Encoder):
    """Items are (rows, channels); each row becomes a feature that sees its whole item."""

    def __init__(self, name: str) -> None:
        super().__init__()
        seeded(name)
        self.channels = PIXELS[name]
        self.tower = nn.ModuleList([nn.Linear(PIXELS[name], 7), nn.Tanh(), nn.Linear(7, 7)])  # fsdp's blocks
        self.projector = nn.Linear(7, WIDTH)
        self.unused = nn.Linear(2, 2)  # as the pooling heads of real towers

    def forward(self, pixels: list[Tensor]) -> Tensor:
        hidden = [through(self.tower, item) for item in pixels]
        return torch.cat([self.projector(h + h.mean(0)) for h in hidden])

    def batches(self, pixels: Sequence[Tensor]) -> list[list[int]]:
        return [[i] for i in range(len(pixels))]

    def smallest(self) -> Tensor:
        return torch.zeros(1, self.channels, dtype=self.input_dtype())


class ToyGenerator(Generator):
    def __init__(self, name: str) -> None:
        super().__init__()
        seeded(name)
        self.net = nn.ModuleList([nn.Linear(WIDTH + TARGET, 9), nn.Tanh(), nn.Linear(9, TARGET)])

    def forward(self, conditions: list[Tensor], items: list[TargetItem]) -> Tensor:
        total = conditions[0].new_zeros(())
        for condition, item in zip(conditions, items, strict=True):
            assert item.data is not None
            noise = torch.randn(item.shape, generator=torch.Generator().manual_seed(item.seed)).to(condition)
            given = torch.cat([condition.mean(0).expand(item.shape[0], -1), noise + item.data], -1)
            total = total + (through(self.net, given) - item.data).square().mean()
        return total

    def batches(self, items: Sequence[TargetItem]) -> list[list[int]]:
        return [[i] for i in range(len(items))]

    def smallest(self) -> tuple[Tensor, TargetItem]:
        data = torch.zeros(1, TARGET, dtype=self.input_dtype())
        return torch.zeros(1, WIDTH, dtype=self.input_dtype()), TargetItem("", 1, (1, TARGET), data=data)

    def sample(self, conditions: list[Tensor], items: list[TargetItem]) -> list[Tensor]:
        made = []
        for condition, item in zip(conditions, items, strict=True):
            noise = torch.randn(item.shape, generator=torch.Generator().manual_seed(item.seed)).to(condition)
            made.append(through(self.net, torch.cat([condition.mean(0).expand(item.shape[0], -1), noise], -1)))
        return made


class ToyModule(PipelineModule):
    """All components; `freeze` names prefixes of parameters that are not trained, `checkpointed` the LLM's layers that
    recompute their activations."""

    def __init__(
        self,
        layers: int = 4,
        tied: bool = False,
        freeze: Sequence[str] = (),
        optimizer: str = "adamw",
        lr: float = 1e-2,
        checkpointed: Collection[int] = (),
    ) -> None:
        super().__init__(
            ToyLLM(layers, tied, checkpointed),
            {"image": ToyEncoder("image"), "audio": ToyEncoder("audio")},
            {"drawing": ToyGenerator("drawing"), "sketch": ToyGenerator("sketch")},
            loss_weights={"text": 0.7, "drawing": 1.9},
        )
        self.freeze_names, self.optimizer_name, self.lr = tuple(freeze), optimizer, lr
        self.losses: list[float] = []

    def configure_model(self) -> None:
        with torch.random.fork_rng(devices=[]):
            super().configure_model()
        for name, parameter in self.named_parameters():
            if name.startswith(self.freeze_names or "-"):
                parameter.requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        out = self.pipeline(batch)
        self.log_dict({f"train/{name}": value for name, value in out.metrics.items()}, batch_size=batch.samples)
        self.losses.append(out.metrics["loss"].item())
        return out.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        out = self.pipeline(batch)
        assert out.predictions is not None
        metrics = {f"val/{name}": value for name, value in out.metrics.items()}
        metrics["val/accuracy"] = (out.predictions == batch.labels).float().mean()
        self.log_dict(metrics, batch_size=batch.samples, sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Tensor] | None:
        return self.pipeline(batch, sample=True).samples

    def configure_optimizers(self):
        groups = [{"params": [p for p in self.parameters() if p.requires_grad]}]
        if self.optimizer_name == "sgd":
            optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def toy_batch(
    microbatches: int,
    layout: PipelineLayout,
    seed: int = 0,
    text_only: Collection[int] = (),
    media: bool = True,
    targets: bool = True,
    dtype: torch.dtype = torch.float32,
    costs: bool = False,
) -> Batch:
    """Microbatches of different size and length, 0..3 items of two encoders, 0..2 targets of two generators.

    `text_only` microbatches have neither. Data stays only with the owner, as a DataModule leaves it. With `costs`,
    items and microbatches have costs of their own, some of which are 0.
    """
    random = torch.Generator().manual_seed(1000 * seed + 7)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    made = []
    for m in range(microbatches):
        batch, tokens = integer(1, 2), integer(16, 24)
        total = batch * tokens
        ids = torch.randint(VOCABULARY, (batch, tokens), generator=random)
        labelled = torch.randperm(total, generator=random)[: integer(0 if m % 3 == 1 else 3, 9)].sort().values
        microbatch = Microbatch(
            inputs={"input_ids": ids},
            label_positions=labelled,
            labels=torch.randint(VOCABULARY, (len(labelled),), generator=random),
        )
        plain = m in text_only
        for _ in range(integer(1, 3)):
            encoder = ("image", "audio")[integer(0, 1)]
            rows = integer(1, 4)
            data = torch.randn(rows, PIXELS[encoder], generator=random).to(dtype)
            if media and not plain:
                microbatch.media.append(MediaItem(encoder, rows, cost=float(rows), data=data))
        for _ in range(integer(0, 2)):
            generator = ("drawing", "sketch")[integer(0, 1)]
            rows, height = integer(1, 3), integer(2, 3)
            data = torch.randn(height, TARGET, generator=random).to(dtype)
            if targets and not plain:
                item = TargetItem(generator, rows, (height, TARGET), seed=integer(0, 999), cost=height, data=data)
                microbatch.targets.append(item)
        used = sum(item.rows for item in microbatch.media)
        microbatch.media_positions = torch.randperm(total, generator=random)[:used]
        read = sum(item.rows for item in microbatch.targets)
        microbatch.target_positions = torch.randperm(total, generator=random)[:read]
        if costs:
            microbatch.llm_cost = integer(1, 9) / 3
            for item in [*microbatch.media, *microbatch.targets]:
                item.cost = float(integer(0, 3))
        made.append(microbatch)
    assign_owners(made, layout)
    for microbatch in made:
        for item in [*microbatch.media, *microbatch.targets]:
            if not layout.owns(item):
                item.data = None
    return Batch(made, layout)


class ToyData(pl.LightningDataModule):
    """Endless different toy batches. Replica r of n trains on batches r, r + n, ...; one process alone on all of them.

    Args:
        replicas: data-parallel replicas that one process stands for (in the reference run).
    """

    def __init__(
        self, microbatches: int = 3, steps: int = 20, replicas: int = 1, text_only: Collection[int] = (), **kwargs: Any
    ) -> None:
        super().__init__()
        self.microbatches, self.steps, self.replicas, self.text_only = microbatches, steps, replicas, text_only
        self.kwargs = kwargs

    @property
    def layout(self) -> PipelineLayout:
        assert self.trainer is not None
        return getattr(self.trainer.strategy, "pipeline_layout", PipelineLayout())

    def collate(self, indices: list[int]) -> Batch:
        assert self.trainer is not None
        (index,) = indices
        world = getattr(self.trainer, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        seeds = [index * self.replicas + r for r in range(self.replicas)]
        if world["num_replicas"] > 1:
            seeds = [index * world["num_replicas"] + world["rank"]]
        text_only = self.text_only if index % 2 else ()  # the shape of batches changes
        batches = [
            toy_batch(self.microbatches, self.layout, seed=seed, text_only=text_only, **self.kwargs) for seed in seeds
        ]
        return Batch([m for batch in batches for m in batch.microbatches], self.layout)

    def loader(self, steps: int, first: int = 0) -> torch.utils.data.DataLoader[Any]:
        return torch.utils.data.DataLoader(range(first, first + steps), batch_size=1, collate_fn=self.collate)

    def train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        return self.loader(self.steps)

    def val_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        return self.loader(2, first=1000)

    def test_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        return self.loader(3, first=2000)

    def predict_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        return self.loader(2, first=3000)
