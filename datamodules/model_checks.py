"""Checks that the model which a Trainer trains can take the batches of a DataModule."""

from typing import Any

from bigmac_lightning.contracts.module import PipelineModule


def _module_of(trainer: Any) -> PipelineModule | None:
    """The model that is trained, if it is one that pipelines can split."""
    module = getattr(trainer, "lightning_module", None)
    return module if isinstance(module, PipelineModule) else None


def refused_packing(trainer: Any) -> str:
    """Why the model cannot keep packed samples apart; empty: it can, or there is no model yet."""
    module = _module_of(trainer)
    return "" if module is None else module.llm.refuses_packing


def check_vocabulary(trainer: Any, tokenizer: Any) -> None:
    """
    Raises:
        ValueError: the tokenizer has tokens that the model has no embedding for.
    """
    module = _module_of(trainer)
    if module is None or not module.llm.vocabulary:
        return
    llm, ids = module.llm, tokenizer.get_vocab()
    beyond = sorted(token for token, i in ids.items() if i >= llm.vocabulary and i not in llm.placeholders)
    if beyond:
        raise ValueError(
            f"{len(beyond)} tokens of the tokenizer, such as {beyond[0]!r} with the id {ids[beyond[0]]}, lie "
            f"beyond the LLM's vocabulary of {llm.vocabulary}: give MultimodalDataModule the processor that "
            "belongs to the model, or the model a larger vocab_size"
        )
