"""What of a PipelineModule is trained, as all ranks of its pipeline see it: each rank holds a part of the LLM, and a
callback may freeze or unfreeze any of it between two steps.

Knows parameters and the mesh; knows nothing of plans or batches.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from bigmac_lightning.module import PipelineModule
from bigmac_lightning.planning import Trained
from bigmac_lightning.runtime.gradients import ParameterPlaces
from bigmac_lightning.runtime.mesh import PipelineMesh


class TrainedParts:
    """Follows what is trained.

    Attributes:
        now: as it was found last.
        places: where this rank's trained parameters live elsewhere too.

    Args:
        module: with this rank's part of the LLM.
        stage_rank: the pipeline rank of each stage.
    """

    def __init__(self, module: PipelineModule, mesh: PipelineMesh, stage_rank: Sequence[int]) -> None:
        self._module, self._mesh, self._stage_rank = module, mesh, tuple(stage_rank)
        self.now, self.places = Trained.nothing(len(stage_rank)), ParameterPlaces()
        self._flags: list[bool] | None = None
        apart = self._stage_rank[0] != self._stage_rank[-1]
        copies = {name: pair for pair, names in enumerate(module.llm.tied.items()) for name in names}
        self._tied = {
            f"llm.{name}": (copies[name], parameter)
            for name, parameter in module.llm.named_parameters()
            if apart and name in copies
        }
        self._tied_trained = [True] * len(module.llm.tied)

    def refresh(self) -> bool:
        """Look again, and tell whether anything has changed on any rank. Collective over the pipeline."""
        changed = self._flags != self._own_flags()
        if self._agree([changed]) == [False]:
            return False
        self._agree_on_tied()
        self._flags = self._own_flags()
        self.now, self.places = self._find(), self._find_places()
        return True

    def _own_flags(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._module.parameters()]

    def _agree(self, flags: Sequence[bool]) -> list[bool]:
        """Whether any rank of the pipeline says so."""
        if self._mesh.pp_size == 1:
            return list(flags)
        numbers = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._mesh.host_group)
        return [bool(number) for number in numbers.tolist()]

    def _agree_on_tied(self) -> None:
        """Two copies that lie apart are one parameter: what is done to one of them is done to both."""
        if not self._module.llm.tied:
            return
        turned = [False] * len(self._tied_trained)
        for pair, parameter in self._tied.values():
            turned[pair] |= parameter.requires_grad != self._tied_trained[pair]
        turned = self._agree(turned)
        self._tied_trained = [is_trained != turn for is_trained, turn in zip(self._tied_trained, turned, strict=True)]
        for pair, parameter in self._tied.values():
            parameter.requires_grad_(self._tied_trained[pair])

    def _find(self) -> Trained:
        own = self._trained_stages()
        weights = self._agree([own.get(stage, False) for stage in range(len(self._stage_rank))])
        encoders = dict(self._module.encoders.items())
        names = {name for name, encoder in encoders.items() if _is_trained(encoder)}
        if names:  # one without parameters of its own works with another's
            names |= {name for name, encoder in encoders.items() if next(encoder.parameters(), None) is None}
        generator = _is_trained(self._module.generators)
        return Trained(tuple(weights), frozenset(names), generator, backward_share(encoders.values()))

    def _trained_stages(self) -> dict[int, bool]:
        """Of this rank's stages, which have trained weights; they share one answer."""
        trained = _is_trained(self._module.llm)
        return {stage: trained for stage, rank in enumerate(self._stage_rank) if rank == self._mesh.pp_rank}

    def _find_places(self) -> ParameterPlaces:
        replicated, stage, tied = dict[str, nn.Parameter](), dict[str, nn.Parameter](), dict[str, nn.Parameter]()
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                kind = replicated if not name.startswith("llm.") else tied if name in self._tied else stage
                kind[name] = parameter
        return ParameterPlaces(replicated, stage, tied)


def backward_share(encoders: Iterable[nn.Module]) -> float:
    """The share of the encoders' backward that reaches down to the first trained parameter, by parameters."""
    whole = needed = 0
    for encoder in encoders:
        reached = False
        for parameter in encoder.parameters():
            reached = reached or parameter.requires_grad
            whole += parameter.numel()
            needed += parameter.numel() if reached else 0
    return needed / whole if needed else 1.0


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
