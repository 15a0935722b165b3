"""What goes from stage to stage in one message: a microbatch's hidden states and their extras."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import Microbatch
from bigmac_lightning.contracts.component_module import ComponentModule
from bigmac_lightning.contracts.outputs import StageOutput
from bigmac_lightning.training.exact import apart, parts_of, together


class HiddenMessages:
    """Packs and unpacks messages between stages. With extras, a message is one flat tensor.

    Args:
        stages: layers of each stage.
        dtype: type of messages.
    """

    def __init__(self, module: ComponentModule, stages: Sequence[range], dtype: torch.dtype) -> None:
        self._module, self._stages, self._dtype = module, stages, dtype

    def shape(self, microbatch: Microbatch, stage: int) -> tuple[int, ...]:
        """The shape of the message that goes into a stage."""
        shape, extras = self._shapes(microbatch, stage)
        return (shape.numel() + sum(self._sizes(extras)),) if extras else shape

    def unpack(self, message: Tensor, microbatch: Microbatch, stage: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The hidden states and extras of the message that goes into a stage."""
        shape, extras = self._shapes(microbatch, stage)
        if not extras:
            return message, {}
        hidden, *others = message.split([shape.numel(), *self._sizes(extras)])
        exact, made = self._module.llm.exact_extras, dict[str, Tensor]()
        for (name, extra), part in zip(extras.items(), others, strict=True):
            made[name] = (together(part) if name in exact else part).view(extra)
        return hidden.view(shape), made

    def pack(self, out: StageOutput, microbatch: Microbatch, stage: int) -> Tensor:
        """The message that goes into a stage, of the output of the stage before."""
        assert out.hidden is not None, "the last stage sends no hidden states"
        _, extras = self._shapes(microbatch, stage)
        assert extras.keys() == out.extras.keys(), (extras.keys(), out.extras.keys())
        if not extras:
            return out.hidden.to(self._dtype)
        exact, parts = self._module.llm.exact_extras, [out.hidden.to(self._dtype).flatten()]
        for name in extras:
            extra = out.extras[name]
            parts.append(apart(extra, self._dtype) if name in exact else extra.to(self._dtype).flatten())
        return torch.cat(parts)

    def _shapes(self, microbatch: Microbatch, stage: int) -> tuple[torch.Size, dict[str, torch.Size]]:
        """Shapes of the hidden states and of the extras that go into a stage."""
        extras = self._module.extra_shapes(microbatch, self._stages[stage].start)
        hidden = torch.Size((*microbatch.shape, self._module.llm.width))
        return hidden, {name: torch.Size(shape) for name, shape in extras.items()}

    def _sizes(self, extras: dict[str, torch.Size]) -> list[int]:
        """How many numbers each extra takes in a message."""
        exact = self._module.llm.exact_extras
        return [extra.numel() * (parts_of(self._dtype) if name in exact else 1) for name, extra in extras.items()]
