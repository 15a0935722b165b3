"""torch.distributed.pipelining, with the encoder in stage 0 and the generator in the last stage, as torchtitan does it.

Stages get the number of a microbatch, and look up the rest: so media may differ from microbatch to microbatch. Hidden
states have one shape, which their messages need.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from benchmarks.peers.case import Case
from benchmarks.peers.data import step_batch, step_loader
from benchmarks.peers.data_parallel import PeerModule, optimizer_of
from benchmarks.peers.measuring import Stopwatch
from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.estimates.partition import LayerCosts, make_stages
from bigmac_lightning.training.stages import part_of


class StageModule(nn.Module):
    """The layers of one stage; the encoder comes before the first, the generator after the last."""

    def __init__(self, module: PeerModule, layers: range) -> None:
        super().__init__()
        self.module, self.layers = module, layers
        self.batch, self.scales = Batch([]), Tensor()

    def load(self, batch: Batch) -> None:
        """The batch of the next step."""
        self.batch = batch
        self.scales = self.module.scales(torch.tensor(self.module.counts(batch)))

    def forward(self, hidden: Tensor, number: Tensor) -> Tensor:
        """h_BSD after this stage; or the loss, of shape (1,), after the last one."""
        module, microbatch = self.module, self.batch.microbatches[int(number)]
        first = self.layers.start == 0
        features = torch.cat(module.encode(microbatch.media)) if first and microbatch.media else None
        out = module.run_stage(microbatch, self.layers, None if first else hidden, {}, features, "train")
        if out.hidden is not None:
            return out.hidden
        losses = dict(out.losses)
        if out.conditions is not None:
            rows = list(out.conditions.split([item.rows for item in microbatch.targets]))
            losses |= module.generate(rows, microbatch.targets)
        scaled = [loss * self.scales[module.loss_names.index(name)] for name, loss in losses.items()]
        return torch.stack(scaled).sum().view(1)


class PipeliningPeer:
    """A model under one of torch's schedules."""

    def __init__(self, case: Case, rank: int, kind: str) -> None:
        self.case, self.rank = case, rank
        self.module, stages_per_rank = PeerModule(case), 2 if kind == "torch_interleaved" else 1
        stages = make_stages(LayerCosts((1.0,) * self.module.llm.num_layers), stages_per_rank * case.size)
        stage_rank = [s % case.size for s in range(len(stages))]
        self.module.part = part_of(rank, stages, stage_rank)
        self.module.configure_model()
        if rank != stage_rank[0]:
            self.module.encoders = nn.ModuleDict()
        if rank != stage_rank[-1]:
            self.module.generators = nn.ModuleDict()
        own = [s for s, owner in enumerate(stage_rank) if owner == rank]
        self.stages = [StageModule(self.module, stages[s]) for s in own]
        self.batch = self._whole(step_batch(case, 0, self.layout))
        made = [self._stage(stage, s, len(stages)) for stage, s in zip(self.stages, own, strict=True)]
        options = {"loss_fn": lambda output, _: output.sum(), "scale_grads": False}
        if stages_per_rank == 1:
            self._schedule = Schedule1F1B(made[0], case.microbatches, **options)
        else:
            self._schedule = ScheduleInterleaved1F1B(made, case.microbatches, **options)  # pyright: ignore
        self._first, self._last = rank == stage_rank[0], rank == stage_rank[-1]

    @property
    def layout(self) -> PipelineLayout:
        """Media lie on the rank of the first stage, and targets on that of the last one."""
        return PipelineLayout(
            self.case.size, self.rank, self.case.size, encoder_ranks=(0,), generator_ranks=(self.case.size - 1,)
        )

    def _whole(self, batch: Batch) -> Batch:
        return self.module.prepare(batch)

    def _stage(self, stage: StageModule, number: int, stages: int) -> PipelineStage:
        given = self.batch.microbatches[0]
        hidden, one = torch.zeros(*given.shape, self.module.llm.width), torch.zeros(1)
        first, last = number == 0, number == stages - 1
        return PipelineStage(
            stage,
            number,
            stages,
            torch.device("cpu"),
            input_args=(torch.zeros(1, dtype=torch.long) if first else hidden.requires_grad_(),),
            output_args=((one if last else hidden.clone()).requires_grad_(),),
        )

    def step(self) -> float:
        """Gradients of a step; returns the loss."""
        self.module.zero_grad(set_to_none=True)
        numbers, losses = torch.arange(self.case.microbatches), list[Tensor]()
        for stage in self.stages:
            stage.load(self.batch)
        given = (numbers,) if self._first else ()
        target = numbers if self._last else None
        self._schedule.step(*given, target=target, losses=losses, return_outputs=False, number=numbers)
        total = torch.stack(losses).sum().detach() if losses else torch.zeros(())
        dist.all_reduce(total)
        return float(total)

    def gradient_norm(self) -> float:
        squares = [p.grad.square().sum() for p in self.module.parameters() if p.grad is not None]
        total = torch.stack(squares).sum()
        dist.all_reduce(total)
        return float(total.sqrt())


def train(case: Case, rank: int, kind: str, steps: int, memory_step: int) -> Stopwatch:
    """Train with a loop of one's own, as there is no trainer for these schedules."""
    peer = PipeliningPeer(case, rank, kind)
    optimizer, watch = optimizer_of(peer.module), Stopwatch(peer.module, False, memory_step)
    for batch in step_loader(case, steps, peer.layout):
        watch.start()
        peer.batch = peer._whole(batch)
        watch.measured.losses.append(peer.step())
        if not watch.measured.gradient_norm:
            watch.measured.gradient_norm = peer.gradient_norm()
        optimizer.step()
        watch.stop()
    return watch
