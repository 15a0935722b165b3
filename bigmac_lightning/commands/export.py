"""The command `bigmac export`: writes a training checkpoint as a Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.commands.answer import answer, parser_of


def export_checkpoint(checkpoint: str, output: str, source: str | None = None, dtype: str | None = None) -> list[str]:
    """Write a folder that `transformers` loads.

    Args:
        checkpoint: Checkpoint of a run, a folder or a file.
        output: Folder to write; must be new or empty.
        source: Folder to copy processor and tokenizer from; by default the one that training started from.
        dtype: Type of the written weights, such as bfloat16; by default the type that the checkpoint
            has, which is float32 with master weights.

    Returns: names of the tensors that are not part of the Hugging Face model; they are written to a file beside it.

    Raises:
        ValueError, FileNotFoundError: this is not a checkpoint, or not one of a model that can be exported.
    """
    # imported here because it imports transformers, which the other commands do not need
    from bigmac_lightning.models.export import export  # pyright: ignore[reportMissingImports]

    stored = CheckpointWeights(checkpoint)
    described = stored.rest().get("hugging_face")
    if described is None:
        raise ValueError(
            f"{checkpoint} does not say which Hugging Face model it is of: export works for runs of a MultimodalLM "
            "whose llm is an HFDecoder"
        )
    folder = source or described["source"]
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder} to copy the processor from: give --source")
    kind = None if dtype is None else getattr(torch, dtype)
    files = None if folder is None else Path(folder)
    return export(stored.read(), described["config"], files, Path(output), kind, described["lora"])


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = parser_of("export", "Write a Hugging Face folder.", export_checkpoint)

    def run() -> None:
        options = vars(parser.parse_args(list(argv)))
        others = export_checkpoint(**options)
        more = f"; {len(others)} tensors of other components beside it" if others else ""
        Console().print(f"{options['output']}: a Hugging Face folder{more}", highlight=False, soft_wrap=True)

    return answer("export", run)
