"""Refuses batches that do not fit the pipeline or the model."""

from dataclasses import replace

import torch

from bigmac_lightning.contracts.batch import Batch, MediaItem, PipelineLayout
from bigmac_lightning.contracts.components import LanguageModel
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.outputs import Mode


def check_batch(batch: object, mode: Mode, layout: PipelineLayout, module: PipelineModule) -> None:
    """Check a batch by metadata that all ranks have, so that all ranks refuse it.

    Args:
        layout: this process's place in its pipeline.

    Raises:
        TypeError, ValueError: the message names the microbatch and what to change.
    """
    if not isinstance(batch, Batch):
        raise TypeError(
            f"the pipeline got a {type(batch).__name__}; a DataModule for strategy='bigmac' "
            "must collate samples to a bigmac_lightning.Batch"
        )
    made_for = replace(batch.layout, rank=layout.rank, peer=layout.peer, microbatches=layout.microbatches)
    if made_for != layout:
        raise ValueError(
            f"the DataModule made this batch for {batch.layout}, but the pipeline is {layout}: "
            "let its collate function use the layout of trainer.strategy.pipeline_layout"
        )
    if not batch.microbatches:
        raise ValueError("the batch has no microbatches")
    if problem := batch.problem(layout.size):
        raise ValueError(problem)
    wanted = layout.microbatches
    if mode == "train" and wanted is not None and len(batch) != wanted:
        raise ValueError(
            f"the strategy was given microbatches={wanted}, but the batch has {len(batch)}: change "
            "microbatches or the DataModule's batch size (a last, smaller batch: drop_last=True)"
        )
    for m, microbatch in enumerate(batch.microbatches):
        for what, items, positions, known in (
            ("media", microbatch.media, microbatch.media_positions, module.encoders),
            ("target", microbatch.targets, microbatch.target_positions, module.generators),
        ):
            if (rows := sum(item.rows for item in items)) != len(positions):
                raise ValueError(f"microbatch {m}: {what} items have {rows} rows, but {len(positions)} positions")
            for item in items:
                name = item.encoder if isinstance(item, MediaItem) else item.generator
                if name not in known:
                    raise ValueError(f"microbatch {m}: no {what} component {name!r}; the model has {list(known)}")


def check_ids(batch: Batch, llm: LanguageModel, device: torch.device) -> None:
    """Check that the LLM knows all tokens and labels.

    Raises:
        ValueError: the message names the microbatch and what to change.
    """
    vocabulary, known = llm.vocabulary, torch.tensor([*llm.placeholders.values()], device=device)
    for m, microbatch in enumerate(batch.microbatches if vocabulary else ()):
        ids = microbatch.inputs["input_ids"].flatten()
        for what, given in (("token", ids[~torch.isin(ids, known)]), ("label", microbatch.labels)):
            if len(given) and not 0 <= int(given.min()) <= int(given.max()) < vocabulary:
                raise ValueError(
                    f"microbatch {m} has {what} ids from {int(given.min())} to {int(given.max())}, but the LLM's "
                    f"vocabulary has {vocabulary}: use the tokenizer that belongs to the model, or set vocab_size"
                )
