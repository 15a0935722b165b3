"""A process has a part of a PipelineModule: it takes that part before a run, and refuses after the run whatever needs
the whole model."""

from typing import Any, NoReturn

from torch import nn
from torch.distributed.tensor import DTensor

from bigmac_lightning.contracts.module import Part, PipelineModule


def is_whole(module: PipelineModule, part: Part) -> bool:
    """Whether a part is the whole LLM."""
    return part.layers is None or (len(part.layers) == module.llm.num_layers and part.embedding and part.head)


def take_part(module: PipelineModule, part: Part) -> None:
    """Let a module have only a part of the LLM.

    If the module has no weights yet, it will get only those of this part. If it has all of them, it drops the others.

    Raises:
        ValueError: it has another part already, or its LLM cannot drop layers.
    """
    if module._materialized and not _same(module, part):
        if not is_whole(module, module.part):
            raise ValueError(
                f"{_held(module)}, from an earlier run, and is to hold {_layers(part)} now: save a checkpoint, and "
                f"give a new {type(module).__name__} to this run, with ckpt_path"
            )
        module.llm.keep(part.layers or (), part.embedding, part.head)
    module.part = part


def close(module: PipelineModule) -> None:
    """Let `state_dict` and `pipeline` raise errors until `open_again`, if this process has only a part of the model."""
    module.runner = None
    if not module._materialized or (is_whole(module, module.part) and not _in_shards(module)):
        return
    text = (
        f"{_held(module)}, as the others are on other ranks: trainer.save_checkpoint(PATH) writes the whole model, and "
        f"{type(module).__name__}.load_from_checkpoint(PATH) reads it"
    )
    module.runner = _Refusal(text)
    if not any(isinstance(hook, _Refusal) for hook in module._state_dict_pre_hooks.values()):
        module.register_state_dict_pre_hook(_Refusal(text))


def open_again(module: PipelineModule) -> None:
    """Undo `close`, for a run or a save."""
    hooks: dict[int, Any] = module._state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Refusal)]:
        del hooks[key]
    if isinstance(module.runner, _Refusal):
        module.runner = None


class _Refusal:
    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(self.text)

    gradient_norm = write = __call__


def _same(module: PipelineModule, part: Part) -> bool:
    if is_whole(module, module.part) or is_whole(module, part):
        return is_whole(module, module.part) and is_whole(module, part)
    assert module.part.layers is not None
    assert part.layers is not None
    ends = (module.part.embedding, module.part.head) == (part.embedding, part.head)
    return ends and set(module.part.layers) == set(part.layers)


def _held(module: nn.Module) -> str:
    assert isinstance(module, PipelineModule)
    shards = "shards of " if _in_shards(module) else ""
    return f"this process holds {shards}{_layers(module.part)} of {type(module).__name__}"


def _in_shards(module: nn.Module) -> bool:
    """Whether some weights are not whole on this rank."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _layers(part: Part) -> str:
    layers = sorted(part.layers or ())
    return f"layers {layers[0]} to {layers[-1]}" if layers else "no layers"
