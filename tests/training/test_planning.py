"""Plans made by the DataLoader's workers, for each batch's own work, and for what is trained."""

import pickle
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from bigmac_lightning import BigMacStrategy
from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.datamodules import Collator
from bigmac_lightning.estimates.partition import LayerCosts, make_stages
from bigmac_lightning.models import HFDecoder
from bigmac_lightning.runtime.lowering import Needs, Send
from bigmac_lightning.schedule.backbones import BACKBONES
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.placing.uneven_shares import balanced_shares
from bigmac_lightning.schedule.plan import Costs
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.planner import PlannedBatch, Planner
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.trained import Trained, backward_share
from tests.models import parts
from tests.toy import ToyData, ToyModule, toy_batch
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

ENCODERS = frozenset({"image", "audio"})


class _InWorkers(ToyData):
    def loader(self, steps: int, first: int = 0) -> torch.utils.data.DataLoader[Any]:
        indices = range(first, first + steps)
        return torch.utils.data.DataLoader(indices, batch_size=1, collate_fn=self.collate, num_workers=1)


def _train(rank: int, data: type[ToyData]) -> tuple[list[float], int, int]:
    module = ToyModule()
    trainer = pipeline_trainer(2, max_epochs=1)
    trainer.fit(module, data(steps=4, microbatches=5))
    pipeline = trainer.strategy.runner
    assert isinstance(pipeline, PipelineRunner)
    return module.losses, len(pipeline.planner.known), len(pipeline.evaluation_planner.known)


def test_workers_plan_what_the_pipeline_runs() -> None:
    """The training process itself makes no plan; losses are those of one process."""
    module = ToyModule()
    plain_trainer(max_epochs=1).fit(module, ToyData(steps=4, microbatches=5))
    for losses, made, evaluated in on_ranks(2, _train, _InWorkers):
        torch.testing.assert_close(losses, module.losses, rtol=1e-5, atol=0)
        assert made == 0
        assert evaluated == 0
    for _, made, _ in on_ranks(2, _train, ToyData):
        assert made == 4  # without workers in the process itself


def test_workers_send_a_rank_its_own_program_alone() -> None:
    """The lists of the other ranks travel as text, which nobody parses unless the plan is asked for."""
    planner = Planner(PipelineOptions(ScheduleOptions("filled", pieces=2)), 3, 1, Trained((True,) * 3, ENCODERS, True))
    planned = planner(toy_batch(7, planner.layout).useful())
    sent = pickle.dumps(planned)
    arrived: PlannedBatch = pickle.loads(sent)
    assert isinstance(arrived.source, str)
    assert arrived.plan == planned.plan
    assert arrived.plan is arrived.plan
    whole = replace(planned, source=arrived.source)
    assert arrived == whole
    for kind in ("EF", "G"):
        assert arrived.pieces[kind] == planned.plan.pieces(kind)
    assert len(pickle.dumps(arrived)) < 1.05 * len(sent)  # also after it was parsed


def _plan(trained: Trained, backbone: str = "1f1b", rank: int = 0, media: bool = True) -> Counter[str]:
    planner = Planner(PipelineOptions(ScheduleOptions(backbone=backbone)), 2, rank, trained, ENCODERS)
    batch = toy_batch(5, PipelineLayout(2, rank, 2), media=media).useful()
    planned = planner(batch)
    assert planner(batch) is planned  # remembered
    return Counter(
        f"{action.stage if action.stage is not None else ''}{action.kind}"
        for actions in planned.plan.ranks
        for action in actions
    )


def test_plans_have_no_useless_backward() -> None:
    everything = Trained((True, True), ENCODERS, generator=True)
    assert {"EB", "0B", "1B", "G"} <= _plan(everything).keys()
    frozen_encoder = Trained((True, True), generator=True)
    assert "EB" not in _plan(frozen_encoder)
    frozen_llm = Trained((False, False), ENCODERS, generator=True)
    split = _plan(frozen_llm, "zb1p")
    assert {"0I", "1I", "EB"} <= split.keys()
    assert not {"0W", "1W"} & split.keys()
    frozen_below = Trained((False, True), generator=True)
    assert {"0B", "0I", "EB"}.isdisjoint(_plan(frozen_below))
    assert "1B" in _plan(frozen_below)
    only_generator = Trained((False, False), generator=True)
    assert _plan(only_generator).keys() == {"EF", "0F", "1F", "G"}


def test_gradients_travel_for_microbatches_that_need_them() -> None:
    """Below a trained projector, in a frozen LLM, those with features of it alone."""
    trained, layout = Trained((False, False), frozenset({"image"})), PipelineLayout(2, 1, 2)
    batch = toy_batch(6, layout, text_only=(1, 4), targets=False).useful()
    encoded = [any(item.encoder == "image" for item in m.media) for m in batch]
    assert {True, False} == set(encoded)
    program = Planner(PipelineOptions(), 2, 1, trained)(batch).program
    sent = {i.message.index for i in program if isinstance(i, Send) and i.message.kind == "hidden_grad"}
    assert sent == {m for m, is_encoded in enumerate(encoded) if is_encoded}


def test_a_plan_belongs_to_what_it_is_trained_for() -> None:
    """Two batches alike in costs and owners, with items of a trained and of a frozen encoder."""
    planner = Planner(PipelineOptions(), 2, 0, Trained((False, False), frozenset({"image"})))
    one, other = (toy_batch(4, PipelineLayout(2, 0, 2)).useful() for _ in range(2))
    for microbatch in one:
        for item in microbatch.media:
            item.encoder = "image"
    for microbatch in other:
        for item in microbatch.media:
            item.encoder = "audio"
    assert planner(one).needs.encoder
    assert not planner(other).needs.encoder
    assert planner(one) is planner(one)


def test_a_projector_alone_has_a_short_backward() -> None:
    module = ToyModule(freeze=("encoders.image.tower", "encoders.audio.tower"))
    module.configure_model()
    share = backward_share(module.encoders.values())
    whole = sum(p.numel() for p in module.encoders.parameters())
    assert share == 1 - sum(p.numel() for e in module.encoders.values() for p in e.tower.parameters()) / whole
    costs, _ = Trained((True,), ENCODERS, True, share).costs(
        PipelineOptions().costs, 1, Needs((True,), (True,), True), True, True
    )
    assert 2 * share == costs.EB


def test_plans_follow_the_work_of_each_microbatch() -> None:
    """A microbatch with much media and many tokens takes longer in the plan, in which ranks own different shares."""
    trained = Trained((True, True), ENCODERS, generator=True)
    batch = toy_batch(6, PipelineLayout(2, 0, 2), text_only=(4, 5)).useful()
    plan = Planner(PipelineOptions(), 2, 0, trained, ENCODERS)(batch).plan
    assert plan.encoder_shares[-1] == [0.0, 0.0]
    cost = {r: sum(i.cost for m in batch.microbatches[:2] for i in m.media if i.owner == r) for r in (0, 1)}
    assert plan.encoder_shares[0] == [cost[0] / sum(cost.values()), cost[1] / sum(cost.values())]
    even = Planner(PipelineOptions(), 2, 0, trained, ENCODERS)
    for microbatch in batch.microbatches:
        ids = microbatch.inputs["input_ids"]
        microbatch.inputs["input_ids"] = ids.new_zeros(1, 10)
    assert even(batch).plan.makespan != plan.makespan


def test_auto_is_named_alike_and_explained() -> None:
    options = PipelineOptions(ScheduleOptions(backbone="auto", group_size="auto", max_encoder_units=2))
    named, reason = options.resolved(4, layers=8, encoder=True, generator=True)
    assert named == options.resolved(4, layers=8, encoder=True, generator=True)[0]
    assert named.schedule.backbone in BACKBONES
    assert named.schedule.group_size in (2, 4, 8)
    assert reason.startswith(f"chosen for policy nested: {named.schedule.backbone}")
    assert "refused" in reason
    assert named.resolved(4, layers=8, encoder=True, generator=True) == (named, "")
    few, _ = options.resolved(4, layers=4, encoder=True, generator=True)
    assert few.schedule.stages_per_rank == 1
    assert options.resolved(4, layers=10, encoder=True, generator=True)[0].schedule.stages_per_rank == 1
    without, _ = PipelineOptions(ScheduleOptions(group_size="auto")).resolved(
        4, layers=4, encoder=False, generator=False
    )
    schedule = without.schedule
    assert (schedule.backbone, schedule.stages_per_rank, schedule.group_size) == ("1f1b", 1, 4)


def _auto(rank: int) -> tuple[str, int, int | str | None]:
    trainer = pipeline_trainer(2, {"backbone": "auto", "memory": MemoryBudget("4GiB", "1GiB", "100MiB")}, max_epochs=1)
    trainer.fit(ToyModule(), ToyData(steps=1))
    assert isinstance(trainer.strategy, BigMacStrategy)
    plan = trainer.strategy.runner.last_plan
    assert plan is not None
    return plan.backbone, plan.virtual_stages, trainer.strategy.runner.options.schedule.group_size


def test_the_strategy_runs_what_auto_has_named() -> None:
    first, second = on_ranks(2, _auto)
    assert first == second
    assert first[0] in BACKBONES
    assert first[2] == 2


def test_shares_in_pieces_ramp_groups_and_slow_stages() -> None:
    """As the options say; a rank whose stage is slow does less of the encoders' work, and no item is cut."""
    trained = Trained((True, True), ENCODERS, generator=True)
    options = PipelineOptions(
        ScheduleOptions("filled", ramp=True, pieces=4, costs=Costs(EF=8, EB=16, G=1), max_encoder_units=8),
        stage_factors=(1.0, 3.0),
    )
    batch = toy_batch(12, options.layout(2, 0)).useful()
    plan = Planner(options, 2, 0, trained)(batch).plan
    assert [len(group) for group in plan.groups] == [
        1,
        1,
        *[2] * ((len(batch) - 4) // 2),
        *[1] * (len(batch) % 2),
        1,
        1,
    ]
    assert plan.stage_costs[1] == [3 * time for time in plan.stage_costs[0]]
    pieces = {(rank, a.index): a.pieces for rank, row in enumerate(plan.ranks) for a in row if a.kind == "EF"}
    assert max(pieces.values()) > 1
    load = [0.0, 0.0]
    for group, members in enumerate(plan.groups):
        owned = [item for m in members for item in batch.microbatches[m].media]
        for rank in (0, 1):
            assert pieces.get((rank, group), 0) <= sum(item.owner == rank for item in owned)
            load[rank] += sum(item.cost for item in owned if item.owner == rank)
    wanted = balanced_shares([3, 9], 25)
    assert wanted[1] < 0.5
    assert load[1] / sum(load) == pytest.approx(wanted[1], abs=0.05)


def test_stage_factors_estimated_from_layers() -> None:
    costs = LayerCosts((1.0,) * 4, head=2.0)
    options = PipelineOptions(ScheduleOptions("filled"), stage_factors="auto").resolved(
        2, 4, encoder=True, generator=True
    )[0]
    options = options.estimated(costs, make_stages(costs, 2))
    assert options.stage_factors == pytest.approx((2 / 3, 4 / 3))
    weights = options.layout(2, 0).weights
    assert weights is not None
    assert weights[0] > 0.5 > weights[1]


def test_stage_factors_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"factors=\[1.0\] must have one number for each of 2 stages"):
        PipelineOptions(stage_factors=(1.0,)).resolved(2, 4, encoder=True, generator=True)
    with pytest.raises(ValueError, match=r"factors=.* of stages do not go with policy disaggregated"):
        PipelineOptions(ScheduleOptions("disaggregated"), stage_factors=(1.0,)).resolved(
            3, 4, encoder=True, generator=True
        )


def _balanced(rank: int) -> list[list[range]]:
    freeze = ["encoders", "llm.model.embed_tokens", *(f"llm.model.layers.{k}" for k in range(3))]
    module = parts.model(llm=HFDecoder(parts.decoder_config(tie_word_embeddings=False)), freeze=freeze)
    trainer = pipeline_trainer(2, {"partition": "auto"}, max_epochs=1, limit_val_batches=1)
    assert isinstance(trainer.strategy, BigMacStrategy)
    strategy, found = trainer.strategy, list[list[range]]()

    def collate(indices: list[int]) -> Any:
        return Collator(strategy.pipeline_layout, 4)(parts.samples("rdtrdr"))

    loader = torch.utils.data.DataLoader([0, 1], collate_fn=collate)
    for run in (partial(trainer.fit, module, loader, loader), partial(trainer.validate, module, loader)):
        run()
        found.append(strategy.runner.stages)
    assert len(list(module.llm.parameters())) > 0
    return found


def test_stages_are_balanced_by_what_is_trained() -> None:
    """Three frozen layers at the bottom take 1 each, two trained ones 3; and the same once there are weights."""
    for found in on_ranks(2, _balanced):
        assert found == [[range(4), range(4, 5)]] * 2
