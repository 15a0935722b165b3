"""Finds out what of a PipelineModule is trained, and lets all ranks of its pipeline agree on it: each rank has a part
of the LLM, and a callback may freeze or unfreeze any part between two steps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.runtime.gradients import SharedParameters
from bigmac_lightning.runtime.lowering import Needs
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.schedule.action import Kind
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.training.sharding import Sharding


@dataclass(frozen=True)
class Trained:
    """What is trained, as far as plans depend on it.

    Attributes:
        weights: per stage, whether it has trained weights; where not, a backward gives input gradients only.
        encoders: names of the encoders that are trained, at least in part.
        generator: whether any generator is trained.
        encoder_backward: the fraction of a whole encoder backward that is needed; below 1 if the encoder's lower part
            is frozen.
    """

    weights: tuple[bool, ...]
    encoders: frozenset[str] = frozenset()
    generator: bool = False
    encoder_backward: float = 1.0

    @classmethod
    def nothing(cls, stages: int) -> "Trained":
        return cls((False,) * stages)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what is trained."""
        llm = () if not any(self.weights) else ("llm",) if all(self.weights) else ("llm, some stages",)
        return (*llm, *(f"encoders.{name}" for name in sorted(self.encoders)), *(("generators",) * self.generator))

    def needs(self, batch: Batch) -> Needs:
        """Where gradients are needed in a training step on this batch."""
        encoded = (any(item.encoder in self.encoders for item in m.media) for m in batch.microbatches)
        return Needs(self.weights, tuple(encoded), self.generator)

    def costs(
        self, costs: Costs, stages_per_rank: int, needs: Needs, media: bool, targets: bool
    ) -> tuple[Costs, list[list[float]] | None]:
        """The costs of the actions that occur, and per stage the times of F, B, I and W if stages differ.

        Args:
            costs: F, B, I and W are those of all the stages of a rank together.
            media, targets: whether the batch has any.
        """
        passed = [needs.encoder or any(self.weights[: s + 1]) for s in range(len(self.weights))]
        costs = replace(costs, EB=costs.EB * self.encoder_backward)
        costs = costs.occurring(EF=media, EB=needs.encoder, G=targets, **dict.fromkeys("BIW", passed[-1]))
        if not passed[-1] or all(self.weights):
            return costs, None
        one = costs.per_stage(stages_per_rank)
        through = one.B * one.I / (one.I + one.W) if one.I + one.W else one.B
        rows = [
            [one.F, one.B, one.I, one.W]
            if weights
            else [one.F, through, one.I, 0.0]
            if has_backward
            else [one.F, 0.0, 0.0, 0.0]
            for weights, has_backward in zip(self.weights, passed, strict=True)
        ]
        return costs, rows


class SharedTrained:
    """A `Trained` in shared memory: the training process writes it, and the DataLoader's workers read it."""

    def __init__(self, encoders: Iterable[str], trained: Trained) -> None:
        self._encoders, self._stages = sorted(encoders), len(trained.weights)
        self._numbers = torch.zeros(self._stages + len(self._encoders) + 2, dtype=torch.float64).share_memory_()
        self.set(trained)

    def set(self, trained: Trained) -> None:
        numbers = [*trained.weights, *(name in trained.encoders for name in self._encoders)]
        self._numbers.copy_(torch.tensor([*numbers, trained.generator, trained.encoder_backward], dtype=torch.float64))

    def get(self) -> Trained:
        *flags, encoder_backward = self._numbers.tolist()
        weights, encoders, generator = flags[: self._stages], flags[self._stages : -1], flags[-1]
        names = frozenset(name for name, flag in zip(self._encoders, encoders, strict=True) if flag)
        return Trained(tuple(map(bool, weights)), names, bool(generator), encoder_backward)


class TrainedParts:
    """Follows what is trained during a run.

    Attributes:
        now: what is trained, as `refresh` found it last.
        places: which ranks have which of this rank's trained parameters.

    Args:
        module: the module with this rank's part of the LLM.
        stage_rank: the pipeline rank of each stage.
        sharding: which components lie in shards.
    """

    def __init__(
        self, module: PipelineModule, mesh: PipelineMesh, stage_rank: Sequence[int], sharding: Sharding
    ) -> None:
        self._sharding, self.places = sharding, list[SharedParameters]()
        self._module, self._mesh, self._stage_rank = module, mesh, tuple(stage_rank)
        self.now = Trained.nothing(len(stage_rank))
        self._flags: list[bool] | None = None
        apart = self._stage_rank[0] != self._stage_rank[-1]
        copies = {name: pair for pair, names in enumerate(module.llm.tied.items()) for name in names}
        self._tied = {
            f"llm.{name}": (copies[name], parameter)
            for name, parameter in module.llm.named_parameters()
            if apart and name in copies
        }

    def refresh(self, within_step: bool = False) -> bool:
        """Look again. Collective over the pipeline.

        Args:
            within_step: whether batches of the current optimizer step have run already.

        Returns: whether anything has changed on any rank.

        Raises:
            ValueError: something was frozen within a step; or one copy of a tied parameter is trained and the other is
                not; or what is trained has no master weights, though they are wanted. Raised on all ranks.
        """
        flags = self._own_flags()
        changed = self._flags != flags
        if self._agree([changed]) == [False]:
            return False
        frozen = any(before and not now for before, now in zip(self._flags or (), flags, strict=False))
        if within_step and self._agree([frozen]) == [True]:
            raise ValueError(
                "a parameter was frozen between two batches of one optimizer step (accumulate_grad_batches), though "
                "it has gradients of the first ones: freeze it before the first batch of a step"
            )
        self._check_tied()
        self._check_masters()
        self._flags = flags
        self.now, self.places = self._find(), self._find_places()
        return True

    def check_any(self) -> None:
        """Check that something is trained on some rank.

        Raises:
            ValueError: nothing is trained; raised on all ranks.
        """
        if not (any(self.now.weights) or self.now.encoders or self.now.generator):
            raise ValueError("nothing is left to train: every parameter of the model is frozen")

    def _own_flags(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._module.parameters()]

    def _agree(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on any rank of the pipeline. Collective."""
        if self._mesh.host_group is None:
            return list(flags)
        numbers = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._mesh.host_group)
        return [bool(number) for number in numbers.tolist()]

    def _check_tied(self) -> None:
        """Two copies on different ranks are one parameter, so both must be trained, or none."""
        pairs = list(self._module.llm.tied.items())
        flags = [[False, False] for _ in pairs]
        for pair, parameter in self._tied.values():
            flags[pair][parameter.requires_grad] = True
        agreed = self._agree([flag for row in flags for flag in row])
        for (copy, canonical), frozen, trained in zip(pairs, agreed[::2], agreed[1::2], strict=True):
            if frozen and trained:
                raise ValueError(
                    f"llm.{copy} and llm.{canonical} are one tied parameter, of which the first and the last stage "
                    "hold copies: one is trained and the other is frozen. Freeze or unfreeze both names"
                )

    def _check_masters(self) -> None:
        trained = {name for name, parameter in self._module.named_parameters() if parameter.requires_grad}
        for kind in ("encoders", "generators", "llm"):
            lacking = any(name.startswith(f"{kind}.") and self._sharding.lacks_master(name) for name in trained)
            if self._agree([lacking]) == [True]:
                option = "stages" if kind == "llm" else kind
                raise ValueError(
                    f"sharding.master_weights is true, but {kind} is trained and sharding.{option} is ddp, so that its "
                    f"weights would be 16-bit: set sharding.{option} to zero1 or fsdp, or freeze {kind}"
                )

    def _find(self) -> Trained:
        own = self._trained_stages()
        return trained_with(
            self._module, self._agree([own.get(stage, False) for stage in range(len(self._stage_rank))])
        )

    def _trained_stages(self) -> dict[int, bool]:
        """For each stage of this rank, whether the rank has trained LLM weights; its stages are not told apart."""
        trained = _is_trained(self._module.llm)
        return {stage: trained for stage, rank in enumerate(self._stage_rank) if rank == self._mesh.pp_rank}

    def _find_places(self) -> list[SharedParameters]:
        trained = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        return self._sharding.places(trained, self._tied)


def trained_with(module: PipelineModule, weights: Sequence[bool]) -> Trained:
    """What of a module is trained.

    Args:
        weights: whether each stage has trained weights.
    """
    encoders = dict(module.encoders.items())
    names = {name for name, encoder in encoders.items() if _is_trained(encoder)}
    if names:  # an encoder without parameters of its own uses those of another one
        names |= {name for name, encoder in encoders.items() if next(encoder.parameters(), None) is None}
    generator = _is_trained(module.generators)
    return Trained(tuple(weights), frozenset(names), generator, backward_share(encoders.values()))


def nested_kinds(module: PipelineModule) -> list[Kind]:
    """The kinds of forwards that a model has beside those of the LLM."""
    kinds: list[Kind] = ["EF"] if module.encoders else []
    return [*kinds, "G"] if module.generators else kinds


def backward_share(encoders: Iterable[nn.Module]) -> float:
    """The fraction of the encoders' backward that is needed, by numbers of parameters: from the output down to the
    first trained parameter."""
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
