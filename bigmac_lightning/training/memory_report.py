"""Says what takes a process's memory once it has run out, and which settings lower that."""

import resource
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bigmac_lightning.runtime.lowering import Compute
from bigmac_lightning.runtime.sharding import local
from bigmac_lightning.schedule.budget import size_text

NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory")
"""What torch and the operating system say when memory has run out, besides their own types of errors."""

HELP = {
    "encoder": "a smaller schedule.group_size; schedule.pieces; gradient_checkpointing of the encoder; "
    "schedule.policy recompute; sharding.encoders fsdp; sharding.offload; smaller media (a limit of pixels or frames)",
    "LLM": "fewer tokens in a microbatch; gradient_checkpointing of the LLM; schedule.backbone 1f1b, which keeps the "
    "fewest microbatches alive; sharding.stages zero1 or fsdp; sharding.offload; tensor_parallel_size; more stages",
    "generator": "a smaller schedule.group_size; schedule.pieces; gradient_checkpointing of the generator; "
    "sharding.generators fsdp; sharding.offload; smaller targets",
    "": "sharding zero1 or fsdp; sharding.offload; tensor_parallel_size; more pipeline ranks; an optimizer with fewer "
    "states; precision bf16-true",
}
"""By the component that ran out of memory ("": none of them), the settings that lower its needs."""

BEGINNING = "memory of this process: "
"""How the note of such an error begins."""

COMPONENT_OF = {"EF": "encoder", "EB": "encoder", "G": "generator"}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, of a device or of the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in NO_MEMORY)
    )


def component_of(doing: object) -> str:
    """The component that an instruction runs, as a key of `HELP`."""
    return COMPONENT_OF.get(doing.action.kind, "LLM") if isinstance(doing, Compute) else ""


def has_report(error: BaseException) -> bool:
    """Whether an error has a note of `add_report`."""
    return any(note.startswith(BEGINNING) for note in getattr(error, "__notes__", ()))


def add_report(
    error: BaseException,
    module: nn.Module | None,
    optimizers: Sequence[Optimizer],
    device: torch.device,
    doing: object,
) -> None:
    """Add to an error what takes the memory of this process, and what lowers it.

    Args:
        error: after which memory has run out.
        module: the module; ``None``: there is none any more.
        optimizers: its optimizers.
        device: the device of this process.
        doing: the instruction or the words of `Progress.doing`.
    """
    component = component_of(doing)
    help = "; ".join(filter(None, (HELP[component], HELP[""] * bool(component))))
    error.add_note(
        f"{BEGINNING}{_in_use(module or nn.Module(), optimizers, device)}\n"
        f"what lowers it{f', most of the {component}' * bool(component)}: {help}; "
        "`bigmac plan --config FILE` estimates each rank's needs"
    )


def _in_use(module: nn.Module, optimizers: Sequence[Optimizer], device: torch.device) -> str:
    """What takes this process's memory: weights, gradients, optimizer states, and all the rest."""
    parameters = list(module.parameters())
    tensors: dict[str, list[Tensor]] = {
        "weights": [*parameters, *module.buffers()],
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer states": [
            v for o in optimizers for state in o.state.values() for v in state.values() if isinstance(v, Tensor)
        ],
    }
    sizes = {name: _bytes(own, device.type) for name, own in tensors.items()}
    parts = _listed(sizes)
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
        free, whole = torch.cuda.mem_get_info(device)
        held = f"{size_text(used)} in tensors ({size_text(torch.cuda.memory_reserved(device))} reserved)"
        rest = f"activations and temporary tensors {size_text(max(0, used - sum(sizes.values())))}"
        offloaded = {name: _bytes(own, "cpu") for name, own in tensors.items()}
        there = f"; offloaded to the CPU's memory: {_listed(offloaded)}" if offloaded["weights"] else ""
        return f"{held}: {parts}, {rest}; {size_text(free)} of the device's {size_text(whole)} are free{there}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{parts}; the process has used {size_text(peak)} at most, with everything that it has loaded"


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items())


def _bytes(tensors: Iterable[Tensor], device: str) -> int:
    mine = [local(tensor) for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in mine if tensor.device.type == device)
