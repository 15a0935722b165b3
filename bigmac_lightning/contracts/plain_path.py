"""The plain path: all microbatches of a batch in one process and one autograd graph, under any Lightning strategy."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.component_module import ComponentModule
from bigmac_lightning.contracts.growing_text import GrowingText
from bigmac_lightning.contracts.outputs import Mode, PipelineOutput
from bigmac_lightning.host import from_host


def run_plain(module: ComponentModule, batch: Batch, mode: Mode) -> PipelineOutput:
    """Run a batch as `PipelineModule.pipeline` does, in one process and one autograd graph."""
    sums = dict.fromkeys(module.loss_names, torch.zeros((), dtype=module.sum_dtype, device=module.device))
    predictions: list[Tensor] = []
    samples: list[Tensor] = []
    for microbatch in batch.microbatches:
        features = torch.cat(module.encode(microbatch.media)) if microbatch.media else None
        out = module.run_stage(microbatch, range(module.llm.num_layers), None, {}, features, mode)
        for name, loss in out.losses.items():
            sums[name] = sums[name] + loss
        if out.predictions is not None:
            predictions.append(out.predictions)
        if out.conditions is None:
            continue
        conditions = list(out.conditions.split([item.rows for item in microbatch.targets]))
        if mode == "sample":
            samples += module.sample(conditions, microbatch.targets)
        else:
            for name, loss in module.generate(conditions, microbatch.targets).items():
                sums[name] = sums[name] + loss
    local = torch.stack([sums[name].to(module.sum_dtype) for name in module.loss_names])
    counts, total = from_host(module.counts(batch), module.sum_dtype, module.device), local.detach()
    world = 1
    if mode == "train" and module._trainer is not None and module._trainer.world_size > 1:
        counts, total = _over_replicas(module._trainer, counts, total)
        # data-parallel strategies average gradients over their world: undo that, the counts are global already
        world = module._trainer.world_size
    loss = (local * module.scales(counts)).sum() * world
    if mode == "train" and not loss.requires_grad:
        loss.requires_grad_()  # a batch without anything to learn from: its backward does nothing
    return PipelineOutput(
        loss=loss,
        metrics=module.metrics(total, counts),
        predictions=None if mode == "train" else torch.cat([batch.labels.new_empty(0), *predictions]),
        samples=samples if mode == "sample" else None,
    )


def write_plain(
    module: ComponentModule, texts: Sequence[GrowingText], choose: Callable[[int, Tensor], int]
) -> list[int]:
    """Add the next token to each text as `PipelineModule.write` does, in one process."""
    llm, layers, tokens = module.llm, range(module.llm.num_layers), list[int]()
    for number, text in enumerate(texts):
        if not text.begun:
            media, cache = text.media_on(module.device), llm.new_cache(layers)
            text.begin({} if cache is None else {layers: cache}, torch.cat(module.encode(media)) if media else None)
        [microbatch] = Batch([text.upcoming(llm)]).to(module.device).microbatches
        with llm.using_cache(text.caches.get(layers)):
            features = text.features if microbatch.media else None
            out = module.run_stage(microbatch, layers, None, {}, features, "evaluate")
        tokens.append(choose(number, module.next_logits(out)))
        text.append(tokens[-1])
    return tokens


def _over_replicas(trainer: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    reduced = trainer.strategy.reduce(torch.stack(tensors), reduce_op="sum")
    assert isinstance(reduced, Tensor)
    return reduced.unbind()
