"""What is told of a run before it runs, against what the run itself has and measures."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, PipelineLayout, TargetItem
from bigmac_lightning.contracts.owners import assign_owners
from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.contracts.slices import with_slices
from bigmac_lightning.estimates.costs import counts_multiplications
from bigmac_lightning.estimates.flops import TrainingFlops
from bigmac_lightning.estimates.microbatch import TypicalMicrobatch
from bigmac_lightning.estimates.partition import TrainedLayers
from bigmac_lightning.estimates.ranks import Precision, ranks_of
from bigmac_lightning.estimates.step import StepEstimate
from bigmac_lightning.estimates.table import as_text, partition_table
from bigmac_lightning.models import FlowGenerator, HFDecoder, MultimodalLM, VisionEncoder
from bigmac_lightning.runtime.gradients import accumulate_in
from bigmac_lightning.runtime.measure.memory import MemoryTracker
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.runtime.sharding import local
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.training.options import DEFAULT_COSTS, MANY_MICROBATCHES, PipelineOptions, ShardingOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of, peers_of, resolve_options
from tests.models.parts import counting
from tests.ranks import run_ranks
from tests.toy import ToyModule
from tests.training.trainers import strategy_of

TOKENS, WIDTH = 128, 64
TYPICAL = TypicalMicrobatch(TOKENS, media_rows=64, item_rows=32, targets=2, target_rows=4, target_shape=(1, 16, 16))
DECODER: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": WIDTH,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "tie_word_embeddings": False,
}
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ADAPTERS = {"llm": {"r": 2, "target_modules": ["q_proj", "o_proj", "down_proj"]}}
TOWER = {
    "model_type": "siglip_vision_model",
    "image_size": 16,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def built(
    checkpointing: bool = False, freeze: Any = (), lora: Any = None, dtype: str = "float32", **decoder: Any
) -> MultimodalLM:
    mmdit = {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6]}
    again = {"gradient_checkpointing": checkpointing}
    return MultimodalLM(
        HFDecoder({**DECODER, **decoder}, dtype=dtype, **again),
        {"image": VisionEncoder(TOWER, WIDTH, **again)},
        {"image": FlowGenerator(WIDTH, channels=1, config=mmdit, **again)},
        freeze=freeze,
        lora=lora,
    )


def options_of(**arguments: Any) -> PipelineOptions:
    return strategy_of(**arguments).options


def estimated(module: MultimodalLM, size: int = 2, microbatches: int = 8, **options: Any) -> StepEstimate:
    chosen, stages, _ = resolve_options(module, options_of(**options), size)
    module.adapt()
    return StepEstimate(module, chosen, stages, size, TYPICAL, microbatches, Precision())


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({}, {"tie_word_embeddings": True}),
        ({"partition": "auto"}, EXPERTS),
        ({"backbone": "zbv", "virtual_stages": 2}, {"tie_word_embeddings": True}),
        ({}, {"freeze": ["encoders.image.tower", "llm.model.layers.0"]}),
        ({}, {"lora": {"llm": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}}),
        ({}, {"dtype": "bfloat16"}),
    ],
    ids=["tied", "experts", "V-shaped", "frozen", "lora", "bfloat16"],
)
def test_parameters_and_static_memory_are_those_of_the_run(options: dict[str, Any], model: dict[str, Any]) -> None:
    """Weights, gradients and AdamW's moments of every rank, to the byte."""
    chosen, stages, _ = resolve_options(built(**model), options_of(**options), 2)
    told = built(**model)
    told.adapt()
    for rank, report in enumerate(ranks_of(told, chosen, stages, 2)):
        module = built(**model)
        module.part = part_of(rank, stages, chosen.stage_rank(2))
        module.configure_model()
        assert report.llm == sum(p.numel() for p in module.llm.parameters())
        assert report.llm + report.replicated == sum(p.numel() for p in module.parameters())
        optimizer = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        held = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)]
        held += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        bytes = sum(tensor.nbytes for tensor in held)
        assert report.static == report.summing(Precision(), MANY_MICROBATCHES).static == bytes
        summed = [p for p in module.parameters() if p.requires_grad]
        for parameter in summed:
            parameter.grad = None
        accumulate_in(torch.float32, summed)
        wider = sum(p.numel() * (p.grad_dtype.itemsize - p.itemsize) for p in summed if p.grad_dtype)
        assert report.summing(Precision(), MANY_MICROBATCHES + 1).static == bytes + wider


def test_more_microbatches_have_wider_gradients() -> None:
    """Only of what is trained and has 16 bits: here the LLM alone has them."""
    module = built(dtype="bfloat16", freeze=["llm.model.layers.0"])
    few, many = (estimated(module, 2, number).ranks for number in (MANY_MICROBATCHES, MANY_MICROBATCHES + 1))
    frozen = sum(p.numel() for p in module.llm.parameters_of((0,), False, False))
    assert [b.static - a.static for a, b in zip(few, many, strict=True)] == [
        2 * (rank.llm - frozen * (place == 0)) for place, rank in enumerate(few)
    ]


SHARDINGS = [
    ShardingOptions("fsdp", "fsdp", "zero1"),
    ShardingOptions("zero1", "zero1", "ddp"),
    ShardingOptions("zero1", "fsdp", "zero1", master_weights=True),
    ShardingOptions(stages="fsdp"),
    ShardingOptions("fsdp", "zero1", "zero1", offload=("encoders", "stages")),
]


def precision_of(sharding: ShardingOptions) -> Precision:
    return Precision.of("bf16-true" if sharding.master_weights else "32-true")


def _stored(rank: int, pp: int) -> list[tuple[int, int, int]]:
    """For each kind of shards, the bytes between steps, of what is not offloaded and of what is, and those that zero1
    gathers at a time."""
    found: list[tuple[int, int, int]] = []
    for sharding in SHARDINGS:
        module = built(freeze=["encoders.image.tower"])
        options, stages, _ = resolve_options(module, PipelineOptions(sharding=sharding), pp)
        mesh = build_mesh(torch.device("cpu"), 2 // pp, pp, options.stage_rank(pp))
        module.part = part_of(rank % pp, stages, options.stage_rank(pp))
        module.configure_model()
        computing = torch.bfloat16 if sharding.master_weights else None
        runner = PipelineRunner(module, mesh, options, computing=computing)
        runner(batch(runner.layout, 4), "train")
        optimizer = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
        optimizer.step()
        held = {False: 0, True: 0}
        for name, parameter in module.named_parameters():
            state = [optimizer.state[parameter].get(key) for key in ("exp_avg", "exp_avg_sq")]
            tensors = [tensor for tensor in (parameter, parameter.grad, *state) if tensor is not None]
            held[sharding.offloads(name)] += sum(local(tensor).nbytes for tensor in tensors)
        runner.sharding.gather()
        zero1 = [p for name, p in runner.sharding.sharded.items() if not runner.sharding.meets(name)]
        whole = [p for part in zero1 for p in part.module.parameters()]
        assert not any(isinstance(parameter, DTensor) for parameter in whole)
        taken = sum(p.nbytes + p.requires_grad * p.numel() * p.grad_dtype.itemsize for p in whole)
        found.append((held[False], held[True], taken))
    return found


@pytest.mark.parametrize("pp", [1, 2])
def test_memory_of_shards_is_that_of_the_run(pp: int) -> None:
    """Shards of weights, gradients and moments of every rank, to the byte; and what zero1 gathers."""
    told = [built(freeze=["encoders.image.tower"]) for _ in SHARDINGS]
    for rank, results in enumerate(run_ranks(2, _stored, pp)):
        for sharding, module, (stored, offloaded, gathered) in zip(SHARDINGS, told, results, strict=True):
            options, stages, _ = resolve_options(module, PipelineOptions(sharding=sharding), pp)
            precision, masters = precision_of(sharding), sharding.master_weights
            report = ranks_of(module, options, stages, pp, precision, 2 // pp)[rank % pp]
            if rank < pp:  # the report is about the first pipeline
                assert report.static == stored
                assert report.offloaded == offloaded
            fsdp: list[Any] = [*module.encoders.values()] if sharding.encoders == "fsdp" else []
            fsdp += [*module.generators.values()] if sharding.generators == "fsdp" else []
            blocks = sum(
                precision.gathered(part, "fsdp", masters) for part in fsdp if pp > 1 or masters or sharding.offload
            )
            if sharding.stages == "fsdp" and pp == 1:
                blocks += precision.gathered_stages(module.llm, part_of(0, stages, [0]), "fsdp")
            assert report.gathered == gathered + blocks


PEERS: dict[str, tuple[ParallelSizes, ShardingOptions, dict[str, Any]]] = {
    "tensor": (ParallelSizes(tensor=2), ShardingOptions("fsdp", "zero1"), {}),
    "context": (ParallelSizes(context=2), ShardingOptions("zero1", "fsdp", "zero1"), {"tie_word_embeddings": True}),
    "experts": (ParallelSizes(tensor=2, expert=2), ShardingOptions(), EXPERTS),
    "adapters": (ParallelSizes(tensor=2), ShardingOptions(), {"lora": ADAPTERS}),
}


def _divided(rank: int, name: str) -> tuple[int, int, int, dict[str, int]]:
    """Parameters of the LLM and bytes between steps, and the peaks of activations."""
    sizes, sharding, model = PEERS[name]
    module = built(**model)
    options, stages, _ = resolve_options(module, PipelineOptions(sharding=sharding, parallel=sizes), 2)
    mesh = build_mesh(torch.device("cpu"), 1, 2, options.stage_rank(2), cp=sizes.context, tp=sizes.tensor)
    part = part_of(mesh.pp_rank, stages, options.stage_rank(2))
    module.part = replace(part, peers=peers_of(mesh, sizes))
    module.configure_model()
    module.train()
    llm = sum(local(parameter).numel() for parameter in module.llm.parameters())
    runner = PipelineRunner(module, mesh, options)
    memory = runner.executor.memory = MemoryTracker([*module.parameters(), *runner.sharding.whole()])
    given = module.prepare(batch(runner.layout, 4))
    runner(with_slices(given, mesh.cp_rank, mesh.cp_size) if mesh.cp_size > 1 else given, "train")
    optimizer = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
    optimizer.step()
    held = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)]
    held += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return mesh.pp_rank, llm, sum(local(tensor).nbytes for tensor in held), memory.peak


@pytest.mark.parametrize("name", PEERS)
def test_ranks_of_several_processes(name: str) -> None:
    """Parameters, and memory between steps to the byte, of that process of each rank that has most; activations as
    near as those of single processes are."""
    sizes, sharding, model = PEERS[name]
    told = built(**model)
    options, stages, _ = resolve_options(told, PipelineOptions(sharding=sharding, parallel=sizes), 2)
    told.adapt()
    step = StepEstimate(told, options, stages, 2, TYPICAL, 4, Precision())
    measured = run_ranks(4, _divided, name)
    for pp_rank, told_of in enumerate(step.ranks):
        found = [(llm, stored, peak) for rank, llm, stored, peak in measured if rank == pp_rank]
        assert told_of.llm == found[0][0]
        assert told_of.static == max(stored for _, stored, _ in found)
        activations = {**told_of.activations, "llm": told_of.activations["LLM"] + told_of.activations["logits"]}
        for kind in found[0][2]:
            size = max(peak[kind] for *_, peak in found)
            close = 0.6 * size <= activations[kind] <= 1.3 * size
            assert close or (name == "adapters" and kind == "llm"), (kind, pp_rank)  # frozen matrices count as trained


def batch(layout: PipelineLayout, microbatches: int) -> Batch:
    """Of what is typical."""
    made: list[Microbatch] = []
    for m in range(microbatches):
        generator = torch.Generator().manual_seed(m)
        made.append(
            Microbatch(
                {"input_ids": torch.randint(200, (1, TOKENS), generator=generator)},
                label_positions=torch.arange(TOKENS),
                labels=torch.randint(200, (TOKENS,), generator=generator),
                media=[MediaItem("image", 32, data=torch.randn(1, 16, 8, generator=generator)) for _ in range(2)],
                media_positions=torch.arange(64),
                targets=[TargetItem("image", 4, (1, 16, 16), data=torch.randn(1, 16, 16)) for _ in range(2)],
                target_positions=torch.arange(TOKENS - 8, TOKENS),
            )
        )
    assign_owners(made, layout)
    return Batch(made, layout)


MEASURED: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": EXPERTS,
    "checkpointed": {"checkpointing": True},
    "frozen": {"freeze": ["encoders", "llm.model.embed_tokens", *(f"llm.model.layers.{k}" for k in range(3))]},
}


def _measured(rank: int) -> list[dict[str, int]]:
    found: list[dict[str, int]] = []
    for model in MEASURED.values():
        module = built(**model)
        options, stages, _ = resolve_options(module, PipelineOptions(), 2)
        mesh = build_mesh(torch.device("cpu"), 1, 2, options.stage_rank(2))
        module.part = part_of(rank, stages, options.stage_rank(2))
        module.configure_model()
        module.train()
        runner = PipelineRunner(module, mesh, options)
        memory = runner.executor.memory = MemoryTracker(module.parameters())
        runner(batch(runner.layout, 8), "train")
        found.append(memory.peak)
    return found


def test_activations_are_near_those_measured() -> None:
    """0.6 to 1.3 times what the executor measures, which does not see what one layer recomputes."""
    for rank, peaks in enumerate(run_ranks(2, _measured)):
        for (name, model), peak in zip(MEASURED.items(), peaks, strict=True):
            told = estimated(built(**model)).ranks[rank].activations
            told["llm"] = told.pop("LLM") + told.pop("logits")
            for kind, size in peak.items():
                close = 0.6 * size <= told[kind] <= 1.3 * size
                assert close or (name == "checkpointed" and size < told[kind] < 4 * size), (name, kind, rank)


def test_time_of_each_rank_by_hand() -> None:
    """Everything trained: three times the forward of what a rank does."""
    module = built()
    step = estimated(module)
    forward = module.llm.costs()
    per_step = 8 * TOKENS * 2 / 1e12
    image = module.encoders["image"].forward_cost(32).multiplications * 2 * 2 / 1e12
    (target,) = (g.forward_cost((1, 16, 16), 4).multiplications * 2 * 2 / 1e12 for g in module.generators.values())
    assert pytest.approx((image, 2 * image)) == (step.costs.EF, step.costs.EB)
    nested = 4 * (3 * image + step.costs.G)
    assert step.ranks[0].tflop == pytest.approx(3 * per_step * sum(forward.layers[:2]) + nested)
    assert step.ranks[1].tflop == pytest.approx(3 * per_step * (sum(forward.layers[2:]) + forward.head) + nested)
    assert 2.5 * target < step.costs.G < 3 * target  # a part of its last block is not trained
    busy = [step.timeline.makespan - bubble for bubble in step.timeline.bubbles]
    assert busy == pytest.approx([rank.tflop for rank in step.ranks])


def test_frozen_parts_take_no_time() -> None:
    module = built(freeze=["encoders", "llm.model.embed_tokens", "llm.model.layers.0", "llm.model.layers.1"])
    step = estimated(module)
    assert module.trained_layers == TrainedLayers((0, 0, 0, 1, 1, 1))
    kinds = [{action.kind for action in actions} for actions in step.plan.ranks]
    assert kinds == [{"EF", "F", "G"}, {"EF", "F", "B", "G"}]
    busy = [step.timeline.makespan - bubble for bubble in step.timeline.bubbles]
    assert busy == pytest.approx([rank.tflop for rank in step.ranks])
    again = estimated(built(checkpointing=True))
    assert pytest.approx(1.5 * estimated(built()).costs.B) == again.costs.B


def test_costs_of_layers_against_counted_operations() -> None:
    """Multiplications against those that torch counts in a real forward."""
    module = built()
    module.configure_model()
    given = batch(PipelineLayout(), 1).microbatches[0]
    hidden = torch.randn(1, TOKENS, WIDTH)
    inputs = module.llm.prepare(given.inputs)
    with counting() as counted:
        module.llm.run_layers(hidden, inputs, range(4), {})
    seen = sum(module.llm.costs(2 * TOKENS).layers)  # it counts the upper triangle, too
    assert TOKENS * seen == pytest.approx(counted.get_total_flops() / 2, rel=0.01)


@pytest.mark.parametrize("freeze", [(), ["llm"], ["encoders", "generators"]], ids=str)
def test_operations_of_a_batch_against_counted_ones(freeze: Any) -> None:
    """Those that torch counts in a real forward and backward, in one process. It counts the upper triangle of attention
    as well, which is a small part here; and gradients of the first layers' inputs are not needed."""
    module = built(freeze=freeze)
    flops = TrainingFlops(module)
    module.configure_model()
    given = batch(PipelineLayout(), 2)
    with counting() as counted:
        module.pipeline(given).loss.backward()
    assert flops.of(given) == pytest.approx(counted.get_total_flops(), rel=0.12)
    assert counts_multiplications(module.llm)
    assert not counts_multiplications(ToyModule().llm)


def test_precisions() -> None:
    assert Precision.of(None) == Precision.of("32-true") == Precision()
    assert Precision.of("bf16-true") == Precision(2, 2)
    assert Precision.of("bf16-mixed") == Precision.of(16) == Precision(None, 2)
    assert Precision.of("64-true") == Precision.of(64) == Precision(8, 8)
    assert [Precision.of(None, wide, 4).many for wide in (None, True, False)] == [MANY_MICROBATCHES / 4, 0, math.inf]


def test_the_table_of_the_strategy_has_no_memory() -> None:
    module = built()
    options, stages, _ = resolve_options(module, PipelineOptions(partition=(1, 3)), 2)
    text = as_text(partition_table(ranks_of(module, options, stages, 2)))
    assert "1..3" in text
    assert "memory" not in text
    with pytest.raises(ValueError, match=r"microbatch.item_rows is 0; expected at least 1"):
        replace(TYPICAL, item_rows=0)


def test_first_plans_are_made_from_estimates() -> None:
    """Where the data say what a microbatch holds; a decoder that does not say its costs leaves them guessed."""
    module = built()
    chosen, _, _ = resolve_options(module, options_of(), 2, TYPICAL)
    assert chosen.costs == estimated(module).costs
    assert resolve_options(module, options_of(), 2)[0].costs == DEFAULT_COSTS
    assert resolve_options(module, options_of(costs=Costs(F=7)), 2, TYPICAL)[0].costs == Costs(F=7)
    assert resolve_options(ToyModule(), options_of(), 2, TYPICAL)[0].costs == DEFAULT_COSTS
