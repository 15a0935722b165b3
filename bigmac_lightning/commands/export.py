"""The command `bigmac export`: writes a training checkpoint as a Hugging Face folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from bigmac_lightning.checkpoints.fetching import local_folder
from bigmac_lightning.checkpoints.remote import RemotePath, at
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.commands.answer import answer, parser_of
from bigmac_lightning.run_config import CONFIG, config_of, write_exported

LAST = ("config.json", "adapter_config.json")
"""The file by which a folder is known as a model or as adapters."""


def export_checkpoint(
    checkpoint: str, output: str, source: str | None = None, dtype: str | None = None, adapters: bool = False
) -> list[str]:
    """Write a folder that `transformers` loads, and `bigmac_lightning.load`, if there is a config.yaml of the run.

    Args:
        checkpoint: Checkpoint of a run, a folder or a file, local or remote.
        output: Folder to write, local or remote; must be new or empty. A remote one is made in a temporary folder
            first, and its config.json is uploaded when all other files are there.
        source: Folder to copy processor and tokenizer from; by default the one that training started from,
            whose files are all copied but those with weights.
        dtype: Type of the written weights, such as bfloat16; by default the type that the checkpoint
            has, which is float32 with master weights.
        adapters: Write the low-rank adapters alone, for peft, and not folded into the weights.

    Returns: names of the tensors that are not part of the Hugging Face model; they are written to a file beside it. Of
        adapters alone: names of the tensors of components without adapters, which are not written.

    Raises:
        ValueError, FileNotFoundError: this is not a checkpoint, it is damaged, or it is not one of a model that can be
            exported.
    """
    place = at(output)
    if isinstance(place, Path):
        return _exported(checkpoint, place, source, dtype, adapters)
    if place.exists():
        raise ValueError(f"{place} is there already: give --output a new folder")
    with TemporaryDirectory(prefix="bigmac-") as folder:
        made = Path(folder, "exported")
        others = _exported(checkpoint, made, source, dtype, adapters)
        _upload(made, place)
    return others


def _upload(folder: Path, place: RemotePath) -> None:
    """Upload a folder. Without its config, which comes last, it is no model for anybody."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.parent == folder and path.name in LAST, path)):
        target = place
        for name in path.relative_to(folder).parts:
            target /= name
        target.upload(path)


def _exported(checkpoint: str, output: Path, source: str | None, dtype: str | None, adapters: bool) -> list[str]:
    """See `export_checkpoint`."""
    # imported here because it imports transformers, which the other commands do not need
    from bigmac_lightning.models.export import export, export_adapters  # pyright: ignore[reportMissingImports]

    stored = CheckpointWeights(checkpoint)
    described = stored.rest().get("hugging_face")
    if described is None:
        raise ValueError(
            f"{checkpoint} does not say which Hugging Face model it is of: export works for runs of a MultimodalLM "
            "whose llm is an HFDecoder"
        )
    if not isinstance(described, dict) or not {"config", "source", "lora"} <= described.keys():
        raise ValueError(f"{checkpoint} is damaged: what it says of its Hugging Face model is {described!r}")
    folder = source or described["source"]
    files = None if folder is None else Path(local_folder(folder))
    if files is not None and not files.is_dir():
        raise ValueError(f"there is no folder {folder} to copy the processor from: give --source")
    if source is None and files is not None:
        _check_source(files, described["config"], checkpoint)
    stored.check()
    kind = None if dtype is None else getattr(torch, dtype)
    if adapters:
        if not described.get("source_is_base", True):
            raise ValueError(
                "training did not start from the weights of one folder but from other weights, too (init_from), so "
                "peft could not load adapters beside it: leave out --adapters"
            )
        return export_adapters(stored.read(), described["config"], files, output, kind, described["lora"])
    others = export(stored.read(), described["config"], files, output, kind, described["lora"])
    if config := config_of(at(checkpoint)):
        write_exported(config, described["source"], output)
    return others


def _check_source(folder: Path, config: dict[str, Any], checkpoint: str) -> None:
    """A checkpoint may come from a stranger, and the folder that it names is copied: it must be one of its model.

    Raises:
        ValueError: it is not.
    """
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found is None or found != config.get("model_type"):
        raise ValueError(
            f"{checkpoint} names the folder {folder} to copy the processor from, which has no config.json of "
            f"model_type {config.get('model_type')!r}: give --source if you want its files to be copied"
        )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = parser_of("export", "Write a Hugging Face folder.", export_checkpoint)

    def run() -> None:
        options = vars(parser.parse_args(list(argv)))
        others = export_checkpoint(**options)
        if options["adapters"]:
            what, more = "adapters for peft", f"; not written: {len(others)} tensors of components without adapters"
        else:
            what, more = "a Hugging Face folder", f"; {len(others)} tensors of other components beside it"
        more = more if others else ""
        if (at(options["output"]) / CONFIG).is_file():
            more += f", and {CONFIG} for `bigmac chat`, `draw` and `predict`"
        Console().print(f"{options['output']}: {what}{more}", highlight=False, soft_wrap=True)

    return answer("export", run)
