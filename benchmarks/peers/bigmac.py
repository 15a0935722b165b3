"""The policies of this framework, each of which is a schedule option of strategy="bigmac"."""

import torch

from benchmarks.peers.case import INTERLEAVED, MEASURING, Case
from benchmarks.peers.data import step_batch
from benchmarks.peers.data_parallel import PeerModule
from bigmac_lightning.runtime.mesh import PipelineMesh, build_mesh
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.schedule.simulate import simulate
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of, resolve_options

Meshes = dict[tuple[int, ...], PipelineMesh]
"""The process groups that were made, by the rank of each stage."""


def schedule_of(kind: str, costs: Costs) -> ScheduleOptions:
    """The options of a peer."""
    if kind == INTERLEAVED:
        return ScheduleOptions("filled", "interleaved_1f1b", virtual_stages=2, costs=costs)
    if kind == MEASURING:
        return ScheduleOptions("filled", costs="auto")
    return ScheduleOptions(kind, costs=costs)


class BigMacPeer:
    """Sleeping layers in a pipeline, run as the strategy runs them."""

    def __init__(self, case: Case, rank: int, kind: str, meshes: Meshes) -> None:
        self.module = PeerModule(case)
        options = PipelineOptions(schedule_of(kind, case.costs), microbatches=case.microbatches)
        options, stages, _ = resolve_options(self.module, options, case.size)
        stage_rank = tuple(options.stage_rank(case.size))
        if stage_rank not in meshes:
            meshes[stage_rank] = build_mesh(torch.device("cpu"), 1, case.size, stage_rank)
        self.module.part = part_of(rank, stages, stage_rank)
        self.module.configure_model()
        self.runner = PipelineRunner(self.module, meshes[stage_rank], options)
        self._batch = step_batch(case, 0, self.runner.layout)

    def step(self) -> float:
        """Gradients of a step; returns the loss."""
        self.module.zero_grad(set_to_none=True)
        return float(self.runner(self._batch, "train", reduce=True).loss)

    def simulated(self) -> float:
        """Time of the step before by its plan, in units."""
        planned = self.runner.last_planned
        assert planned is not None
        return simulate(planned.plan, planned.workload).makespan

    def gradient_norm(self) -> float:
        return float(self.runner.gradient_norm())
