"""Loss and every gradient of the pipeline against the same model in one process without a pipeline."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.runtime.gradients import global_norm, reduce_gradients
from bigmac_lightning.runtime.lowering import lower
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.plan import Costs, Plan
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.schedule.verify import verify
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.planner import PlannedBatch
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.ranks import run_ranks
from tests.toy import ToyModule, split_layers, toy_batch

TOLERANCE = 1e-6
BACKBONES_AND_STAGES = (
    ("zb1p", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 3),
    ("looped_bfs", 2),
    ("zbv", 2),
    ("dualpipev", 2),
)


@dataclass(frozen=True)
class Case:
    """One combination; the whole model is the same for all."""

    pp: int
    microbatches: int
    group_size: int | None = None
    dp: int = 1
    policy: str = "nested"
    backbone: str = "1f1b"
    virtual_stages: int = 1
    freeze: tuple[str, ...] = ()
    media: bool = True
    targets: bool = True
    text_only: tuple[int, ...] = ()
    unlabelled: tuple[int, ...] = ()
    tied: bool = False
    pieces: int = 1
    checkpointed: tuple[int, ...] = ()
    fine: bool = False  # ramp groups, pieces as planned, long encoders, a slow last stage

    @property
    def layers(self) -> int:
        return max(4, self.pp * self.virtual_stages)

    @property
    def options(self) -> PipelineOptions:
        options = PipelineOptions(
            ScheduleOptions(self.policy, self.backbone, self.group_size, virtual_stages=self.virtual_stages)
        )
        if not self.fine:
            return options
        factors = (*[1.0] * (self.pp * self.virtual_stages - 1), 1.7)
        schedule = replace(options.schedule, ramp=True, pieces=3, costs=Costs(EF=5, EB=10, G=3))
        return replace(options, schedule=schedule, stage_factors=factors)

    def __str__(self) -> str:
        parts = [f"P{self.pp}", f"M{self.microbatches}", f"g{self.group_size or self.pp}", self.policy, self.backbone]
        parts += [f"V{self.virtual_stages}"] * (self.virtual_stages > 1)
        parts += [f"dp{self.dp}"] * (self.dp > 1) + [f"no-{name}" for name in self.freeze]
        parts += ["tied"] * self.tied + ["no-media"] * (not self.media) + ["no-targets"] * (not self.targets)
        parts += [f"unlabelled{''.join(map(str, self.unlabelled))}"] * bool(self.unlabelled)
        parts += [f"checkpointed{''.join(map(str, self.checkpointed))}"] * bool(self.checkpointed)
        parts += ["fine"] * self.fine + [f"pieces{self.pieces}"] * (self.pieces > 1)
        parts += [f"text{''.join(map(str, self.text_only))}"] * bool(self.text_only)
        return "-".join(parts)


def cases() -> list[Case]:
    found = []
    for pp in (1, 2, 3, 4):
        for m in (1, 2, 5, 8):
            for group_size in sorted({1, 2, pp}):
                found += [Case(pp, m, group_size), Case(pp, m, group_size, backbone="gpipe", targets=False)]
            found += [
                Case(pp, m, policy="upfront"),
                Case(pp, m, policy="filled", text_only=(1,)),
                Case(pp, m, policy="first_stage", tied=True),
            ]
            found.append(Case(pp, m, min(2, pp), text_only=tuple(range(0, m, 2)), tied=True))
        base = Case(pp, 5, min(2, pp))
        frozen = [
            ("encoders",),
            ("llm",),
            ("generators",),
            ("encoders", "llm"),
            ("encoders", "generators"),
            ("llm", "generators"),
            ("encoders.image",),
            # projector only
            ("encoders.image.tower", "encoders.audio.tower", "llm", "generators"),
            # the lower part of the LLM
            ("encoders", "llm.embedding", "llm.layers.0", "llm.layers.1"),
        ]
        for freeze in frozen:
            found += [replace(base, freeze=freeze, policy=policy) for policy in ("nested", "upfront", "first_stage")]
        found += [replace(base, text_only=(0, 1), policy=policy) for policy in ("nested", "upfront", "first_stage")]
        found += [replace(base, media=False), replace(base, targets=False), replace(base, media=False, targets=False)]
        # microbatches, or whole batches, from which nothing can be learnt
        found += [replace(base, unlabelled=(0, 3)), replace(base, unlabelled=(4,), text_only=(0, 1, 2, 3))]
        found += [replace(base, unlabelled=(0, 1, 2, 3, 4))]
        found += [replace(base, tied=True), replace(base, tied=True, backbone="gpipe")]
    for pp in (1, 2, 3, 4):
        for backbone, virtual_stages in BACKBONES_AND_STAGES:
            base = Case(pp, 5, min(2, pp), backbone=backbone, virtual_stages=virtual_stages)
            found += [replace(base, microbatches=m) for m in (1, 2, 5, 8)]
            found += [replace(base, policy=policy) for policy in ("upfront", "first_stage", "filled")]
            found += [replace(base, tied=True), replace(base, targets=False, text_only=(0, 1), group_size=pp)]
            found += [replace(base, freeze=freeze) for freeze in (("encoders",), ("llm",), ("generators",))]
    for pp in (1, 2, 3, 4):
        for policy in ("nested", "upfront", "filled", "recompute"):
            base = Case(pp, 5, min(2, pp), policy=policy, pieces=3)
            found += [base, replace(base, microbatches=8, group_size=pp, text_only=(0, 1), tied=True)]
        for m in (1, 2, 5, 8):
            found.append(Case(pp, m, policy="filled", fine=True))
        found.append(Case(pp, 8, policy="filled", backbone="zb1p", fine=True, text_only=(0,), targets=False))
        found.append(Case(pp, 5, policy="filled", backbone="zbv", virtual_stages=2, fine=True))
        found.append(Case(pp, 5, fine=True, tied=True))
        base = Case(pp, 5, pp, pieces=5)
        found += [replace(base, freeze=freeze) for freeze in (("encoders",), ("llm",), ("encoders.image",))]
        found += [replace(base, backbone="zbv", virtual_stages=2), replace(base, targets=False)]
        base = Case(pp, 5, min(2, pp), policy="recompute")
        found += [replace(base, microbatches=m) for m in (1, 2, 5, 8)]
        found += [replace(base, freeze=freeze) for freeze in (("encoders",), ("llm",), ("encoders.image",))]
        found += [replace(base, text_only=(0, 1), tied=True)]
    for pp in (2, 4):
        for backbone in ("1f1b", "zb1p", "zbv"):
            stages = 2 if backbone == "zbv" else 1
            found += [Case(pp, 5, 2, backbone=backbone, virtual_stages=stages, checkpointed=(0, 2), tied=True)]
    for pp in (2, 3, 4):
        base = Case(pp, 5, min(2, pp), policy="disaggregated", targets=pp > 2)
        found += [replace(base, microbatches=m, group_size=g) for m in (1, 2, 5, 8) for g in sorted({1, 2, pp})]
        freezes = [("encoders",), ("llm",), ("generators",), ("encoders.image",), ("encoders", "llm")]
        found += [replace(base, freeze=freeze) for freeze in freezes]
        found += [replace(base, freeze=("encoders", "llm.embedding", "llm.layers.0", "llm.layers.1"))]
        found += [replace(base, text_only=(0, 1), tied=True), replace(base, unlabelled=(0, 3)), replace(base, pieces=3)]
        found += [replace(base, targets=False), replace(base, media=False, targets=True)]
        found += [replace(base, media=False, targets=False)]
        for backbone, virtual_stages in (("gpipe", 1), *BACKBONES_AND_STAGES):
            found.append(replace(base, backbone=backbone, virtual_stages=virtual_stages, tied=True))
    for pp in (1, 2, 3, 4):
        for backbone, virtual_stages in BACKBONES_AND_STAGES:
            found.append(Case(pp, 5, min(2, pp), policy="recompute", backbone=backbone, virtual_stages=virtual_stages))
        base = Case(pp, 5, min(2, pp), text_only=(2, 3))
        for policy in ("upfront", "first_stage", "filled", "recompute"):
            found += [
                replace(base, policy=policy, backbone="gpipe"),
                replace(base, policy=policy, backbone="looped_bfs", virtual_stages=3),
            ]
    for policy in ("nested", "upfront", "first_stage"):
        for m in (1, 3, 8):
            found += [Case(2, m, 2, dp=2, policy=policy, tied=True), Case(2, m, 1, dp=2, policy=policy, text_only=(0,))]
    found += [Case(2, 3, 2, dp=2, policy="disaggregated", targets=False, tied=True)]
    return found


ALL = cases()


def reference(case: Case) -> tuple[float, float, dict[str, torch.Tensor | None]]:
    """The plain path in this process, over the batches of all replicas at once."""
    module = ToyModule(case.layers, case.tied, case.freeze, checkpointed=case.checkpointed)
    module.configure_model()
    batches = [whole(case, replica) for replica in range(case.dp)]
    batch = batches[0].replace(microbatches=[m for b in batches for m in b.microbatches])
    module.pipeline(batch).loss.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
    norm = torch.nn.utils.get_total_norm([g for g in gradients.values() if g is not None]).item()
    return module.pipeline(batch).loss.item(), norm, gradients


def whole(case: Case, replica: int) -> Any:
    return make(case, PipelineLayout(), replica)


def make(case: Case, layout: PipelineLayout, replica: int) -> Any:
    batch = toy_batch(
        case.microbatches, layout, seed=replica, text_only=case.text_only, media=case.media, targets=case.targets
    )
    for m in case.unlabelled:
        microbatch = batch.microbatches[m]
        nothing = torch.empty(0, dtype=torch.long)
        batch.microbatches[m] = replace(
            microbatch, labels=nothing, label_positions=nothing, targets=[], target_positions=nothing
        )
    return batch


def pipelined(
    rank: int, todo: list[Case]
) -> list[tuple[float, float, dict[str, torch.Tensor | None], dict[int, bool]]]:
    """Every case on this rank."""
    first = todo[0]
    meshes = {}
    results = []
    for case in todo:
        options = case.options.resolved(first.pp, case.layers, case.media, case.targets)[0]
        stage_rank = options.stage_rank(first.pp)
        if tuple(stage_rank) not in meshes:
            meshes[tuple(stage_rank)] = build_mesh(torch.device("cpu"), first.dp, first.pp, stage_rank)
        mesh = meshes[tuple(stage_rank)]
        module = ToyModule(case.layers, case.tied, case.freeze, checkpointed=case.checkpointed)
        module.part = part_of(mesh.pp_rank, split_layers(case.layers, len(stage_rank)), stage_rank)
        module.configure_model()
        runner = PipelineRunner(module, mesh, options)
        try:
            batch = make(case, runner.layout, mesh.dp_rank)
            if case.pieces > 1:
                batch.planned = planned_in_pieces(runner, batch.useful(), case.pieces)
            out = runner(batch, "train")
            assert case.pieces == 1 or runner.last_plan is None or runner.last_plan is batch.planned.plan
        except Exception as error:
            error.add_note(f"case {case}")
            raise
        reduce_gradients(runner.places, mesh)
        gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        results.append((out.loss.item(), global_norm(runner.places, mesh).item(), gradients, splits_by_stage(runner)))
    return results


def splits_by_stage(runner: PipelineRunner) -> dict[int, bool]:
    """Whether the stages of this rank have been split: all of their graphs, or none."""
    found: dict[int, set[bool]] = defaultdict(set)
    for (stage, _), split in runner.executor.splits.items():
        found[stage].add(split is not None)
    return {stage: min(answers) for stage, answers in found.items()}


def planned_in_pieces(runner: PipelineRunner, batch: Any, pieces: int) -> PlannedBatch:
    """The batch's plan with nested actions in up to `pieces` pieces, on every rank in another number of them."""
    planner = runner.planner
    planned = planner(batch)
    plan = in_pieces(planned.plan, pieces)
    timeline = verify(plan)
    program = lower(plan, timeline.order, planned.needs)[planner.rank]
    return PlannedBatch.of(
        planned.key, plan, program, planned.needs, timeline, False, planned.workload, runner.mesh.pp_rank
    )


def in_pieces(plan: Plan, most: int) -> Plan:
    ranks: list[list[Action]] = []
    for rank, actions in enumerate(plan.ranks):
        row: list[Action] = []
        for action in actions:
            count = 1 + (rank + action.index) % most if action.nested else 1
            made = [replace(action, piece=piece, pieces=count) for piece in range(count)]
            if action.kind == "EF" and count > 1 and row and not row[-1].nested:
                row.insert(-1, made.pop(0))  # the first piece earlier than the others
            row += made
        ranks.append(row)
    assert any(action.pieces > 1 for row in ranks for action in row)
    return replace(plan, ranks=ranks)


@pytest.fixture(scope="module")
def executed() -> dict[Case, list[Any]]:
    """Results of all cases by rank; cases of one world share their processes."""
    worlds: dict[tuple[int, int], list[Case]] = defaultdict(list)
    for case in ALL:
        worlds[case.dp, case.pp].append(case)
    results: dict[Case, list[Any]] = {}
    for (dp, pp), todo in worlds.items():
        by_rank = run_ranks(dp * pp, pipelined, todo)
        results.update({case: [rank[i] for rank in by_rank] for i, case in enumerate(todo)})
    return results


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_one_process(case: Case, executed: dict[Case, list[Any]]) -> None:
    loss, norm, gradients = reference(case)
    seen: set[str] = set()
    for rank, (rank_loss, rank_norm, rank_gradients, _) in enumerate(executed[case]):
        assert rank_loss == pytest.approx(loss, rel=TOLERANCE), f"loss on rank {rank}"
        assert rank_norm == pytest.approx(norm, rel=TOLERANCE), f"gradient norm on rank {rank}"
        for name, gradient in rank_gradients.items():
            seen.add(name)
            expected = gradients[name if name in gradients else "llm.embedding.weight"]
            if expected is None:
                assert gradient is None, f"{name} on rank {rank} has a gradient, but none is due"
                continue
            assert gradient is not None, f"{name} on rank {rank} has no gradient"
            error = (gradient - expected).norm() / expected.norm().clamp(min=1e-30)
            assert error <= TOLERANCE or (gradient - expected).abs().max() < 1e-9, f"{name} on rank {rank}: {error:.1e}"
    assert seen >= gradients.keys(), "a parameter is trained on no rank"


@pytest.mark.parametrize("backbone", ["zb1p", "zbv", "dualpipev"])
def test_backwards_are_split_where_they_can_be(backbone: str, executed: dict[Case, list[Any]]) -> None:
    """Layer 1 uses its norm twice; every other stage is split."""
    stages = dict(BACKBONES_AND_STAGES)[backbone]
    case = Case(4, 5, 2, backbone=backbone, virtual_stages=stages)
    splittable = {stage: split for *_, by_stage in executed[case] for stage, split in by_stage.items()}
    assert splittable == {stage: stage != 1 for stage in splittable}
    assert len(splittable) > 2


def test_checkpointed_stages_are_not_split(executed: dict[Case, list[Any]]) -> None:
    case = Case(4, 5, 2, backbone="zb1p", checkpointed=(0, 2), tied=True)
    splittable = {stage: split for *_, by_stage in executed[case] for stage, split in by_stage.items()}
    assert splittable == {0: False, 1: False, 2: False, 3: True}


def test_cases_cover_what_they_name() -> None:
    """The toy data really has what the cases are about."""
    batch = whole(Case(4, 8), 0)
    assert len({m.shape for m in batch.microbatches}) > 3
    assert {i.encoder for m in batch.microbatches for i in m.media} == {"image", "audio"}
    assert {i.generator for i in batch.targets} == {"drawing", "sketch"}
    assert any(not len(m.labels) for m in whole(Case(4, 5), 0).microbatches)
    assert any(not m.targets for m in batch.microbatches)
    assert not dist.is_initialized()
