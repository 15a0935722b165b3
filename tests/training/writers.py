"""Modules that write after prompts, in one process or in any layout, for tests."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, PipelineLayout, TargetItem
from bigmac_lightning.datamodules import Collator, Sample
from bigmac_lightning.datamodules.loading.collate import make_batch
from bigmac_lightning.models import (
    HFDecoder,
    HFVisionEncoder,
    MultimodalLM,
    NoisyPictureEncoder,
    UnifiedDecoder,
    UnifiedLM,
    VelocityHead,
)
from bigmac_lightning.models.vision.hf_encoders import encoders_of
from bigmac_lightning.models.writing import Sampling, all_written
from tests.models import more_families, parts, tiny, zoo
from tests.toy import ToyModule

Module = Any
Prompts = list[Batch]
LENGTHS = (4, 9, 5, 1, 7, 6, 3, 8, 4, 11)  # more than are written at the same time
GREEDY, DRAWN = Sampling(7), Sampling(7, temperature=1.0, seed=3)


def texts(shortest: int = 1) -> Prompts:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 29, (1, max(length, shortest)), generator=generator) for length in LENGTHS]
    return [Batch([Microbatch({"input_ids": row})]) for row in rows]


def with_pictures() -> tuple[Module, Prompts]:
    """Text and pictures, tied embeddings, a generator that has nothing to do."""
    config = parts.decoder_config(tie_word_embeddings=True, initializer_range=0.3)
    asked = [replace(sample, labelled=[False] * len(sample.tokens)) for sample in parts.samples("rtrrttr")]
    return parts.model(llm=HFDecoder(config)), [make_batch([[sample]], PipelineLayout()) for sample in asked]


def decoder(model_type: str, attention: str = "sdpa") -> tuple[Module, Prompts]:
    """A decoder of the library with layers of several kinds, as tests of the library's models have it."""
    config = tiny.tiny_config(model_type, initializer_range=0.3)
    return MultimodalLM(HFDecoder(config, attn_implementation=attention)), texts(2)


class _OpenGates(HFDecoder):
    """One without gates that are closed at first, so that images matter."""

    def materialize(self, *args: Any, **kwargs: Any) -> None:
        super().materialize(*args, **kwargs)
        for name, parameter in self.named_parameters():
            if name.endswith("_gate"):
                torch.nn.init.ones_(parameter)


def family(name: str, **changes: Any) -> tuple[Module, Prompts]:
    """A model of the zoo: with pictures, if it has any, and texts alone."""
    model = more_families.KNOWN[name]
    config = model.config()
    for field, value in changes.items():
        setattr(config.get_text_config(), field, value)
    rows = [sample for row in zoo.sequences(model, packed=False) for [sample] in row]
    prompts = [Batch([replace(zoo.microbatch([[sample]]), **unlabelled())]) for sample in rows]
    encoders = None if model.draw is None else encoders_of(HFVisionEncoder(config))
    return MultimodalLM(_OpenGates(config), encoders), prompts


def unlabelled() -> dict[str, torch.Tensor]:
    nothing = torch.empty(0, dtype=torch.long)
    return {"labels": nothing, "label_positions": nothing}


def toy() -> tuple[Module, Prompts]:
    """A model of one's own, which has no cache."""
    prompts = texts(4)
    for prompt in prompts[::2]:
        item = MediaItem("image", 2, data=torch.randn(2, 5, generator=torch.Generator().manual_seed(1)))
        prompt.microbatches = [
            replace(m, media=[item], media_positions=torch.tensor([0, 2])) for m in prompt.microbatches
        ]
    return ToyModule(), prompts


def draws() -> tuple[Module, Prompts]:
    """An LLM that draws in its layers, which also writes after pictures that were drawn, and that it does not see."""
    drawn, prompts = 2, texts(4)
    for microbatch in (m for prompt in prompts[::2] for m in prompt.microbatches):
        microbatch.inputs["input_ids"][0, 1:3] = drawn
        microbatch.media, microbatch.targets = [MediaItem("drawn", 2)], [TargetItem("image", 2, (3, 2, 4))]
        microbatch.media_positions = microbatch.target_positions = torch.arange(1, 3)
    config = parts.decoder_config(tie_word_embeddings=True, initializer_range=0.3)
    encoder, head = NoisyPictureEncoder(parts.WIDTH), VelocityHead(parts.WIDTH)
    return UnifiedLM(UnifiedDecoder(config, drawn), {"drawn": encoder}, {"image": head}), prompts


class _HalfCached(HFDecoder):
    """Its first stage has a cache that works, and the others have none."""

    def new_cache(self, layers: range) -> Any:
        return None if layers.start else super().new_cache(layers)


MODELS: dict[str, Callable[[], tuple[Module, Prompts]]] = {
    "pictures": with_pictures,
    "qwen3_vl": lambda: family("qwen3_vl", num_hidden_layers=4),
    "images attended to": lambda: family("mllama", initializer_range=0.3),
    "shared keys": lambda: family("gemma3n_text", initializer_range=0.3),
    "shared keys, images": lambda: family("gemma4", initializer_range=0.3),
    "experts": lambda: decoder("qwen3_moe"),
    "windows": lambda: decoder("gemma2", "eager"),
    "states": lambda: decoder("qwen3_next"),
    "half a cache": lambda: (MultimodalLM(_HalfCached(parts.decoder_config(initializer_range=0.3))), texts()),
    "no cache": lambda: decoder("moshi"),
    "toy": toy,
    "draws": draws,
}


class _Writes(pl.Callback):
    """Lets a module write in a validation. Replica r of R has the prompts r, r + R, ...

    Attributes:
        written: by number of the prompt, its tokens, always the most likely ones, and drawn ones.
    """

    def __init__(self, prompts: Prompts) -> None:
        self.prompts, self.written = prompts, dict[int, list[list[int]]]()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        own = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        numbers = range(len(self.prompts))[own["rank"] :: own["num_replicas"]]
        prompts = [self.prompts[k] for k in numbers]
        plugin = trainer.precision_plugin
        with plugin.forward_context() if pl_module.runner is None else torch.no_grad():
            found = [all_written(pl_module, prompts, sampling, [5]) for sampling in (GREEDY, DRAWN)]
        self.written = {k: [*tokens] for k, *tokens in zip(numbers, *found, strict=True)}


class _Data(pl.LightningDataModule):
    """A batch of text, as a validation has at least one."""

    def val_dataloader(self) -> Any:
        assert self.trainer is not None
        layout = getattr(self.trainer.strategy, "pipeline_layout", PipelineLayout())
        batch = Collator(layout, 2)([Sample([3, 4, 5, 6], [False, False, True, True])] * 2)
        return DataLoader([batch], batch_size=None)  # pyright: ignore[reportArgumentType]


def written(trainer: pl.Trainer, name: str) -> dict[int, list[list[int]]]:
    """What a model of `MODELS` writes, by number of the prompt."""
    torch.manual_seed(0)
    module, prompts = MODELS[name]()
    writes = _Writes(prompts)
    trainer.callbacks.append(writes)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.validate(module, _Data(), verbose=False)
    return writes.written
