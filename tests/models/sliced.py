"""A module's stages on slices of a batch, one rank for each slice, against the same module on the whole batch."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.distributed.device_mesh import init_device_mesh

from bigmac_lightning.contracts.batch import Batch, Microbatch, PipelineLayout, TargetItem
from bigmac_lightning.contracts.components import Encoder
from bigmac_lightning.contracts.outputs import StageOutput
from bigmac_lightning.contracts.parallel import ParallelSizes, StagePeers
from bigmac_lightning.contracts.slices import MicrobatchSlice, slice_of
from bigmac_lightning.models import HFDecoder, HFVisionEncoder, MultimodalLM
from bigmac_lightning.models.meta_model import auto_class
from bigmac_lightning.models.vision.hf_encoders import encoders_of
from bigmac_lightning.runtime.split_backward import backward_input, backward_weight
from tests.models import sweep

Results = dict[str, Tensor]


class Module:
    """A decoder, and the encoders of its family, with random weights, in one process or on slices.

    Attributes:
        whole: all of it, without weights.
    """

    def __init__(self, config: Any, freeze_llm: bool = False, **options: Any) -> None:
        llm = HFDecoder(config, **options)
        attention = options.get("attn_implementation", "sdpa")
        attention = attention if attention in ("sdpa", "eager") else "eager"
        encoders: dict[str, Encoder] = {}
        if llm.family is not None:
            encoders = encoders_of(HFVisionEncoder(config, attn_implementation=attention))
        self.whole, self.llm, self.freeze_llm = MultimodalLM(llm, encoders), llm, freeze_llm
        self.weights = sweep._randomized(auto_class(llm.config), llm.config, attention).state_dict()

    def parts(self, stages: Sequence[range]) -> list[MultimodalLM]:
        made = []
        for layers in stages:
            part = copy.deepcopy(self.whole)
            assert isinstance(part.llm, HFDecoder)
            part.llm.materialize(layers, layers.start == 0, layers.stop == self.llm.num_layers)
            part.llm.requires_grad_(not self.freeze_llm)
            for encoder in part.encoders.values():
                if isinstance(encoder, HFVisionEncoder):
                    encoder.materialize()
            for component in (part.llm, *part.encoders.values()):
                if isinstance(component, HFDecoder | HFVisionEncoder):
                    component.load_state_dict({name: self.weights[name] for name in component.state_dict()})
            made.append(part)
        return made

    def doubled(self) -> "Module":
        """The same module in double precision."""
        double = copy.deepcopy(self)
        double.llm.dtype = torch.float64
        double.llm._whole.set_experts_implementation("eager")  # other kernels have no float64
        for encoder in double.whole.encoders.values():
            if isinstance(encoder, HFVisionEncoder):
                encoder.dtype = torch.float64
        return double


def run(
    parts: list[MultimodalLM], stages: Sequence[range], microbatches: list[Any], whole: Batch, split: bool = False
) -> Results:
    """Losses, conditions, and the gradients of all weights, tied ones added up.

    Args:
        microbatches: those of `whole`, or slices of them.
        split: whether backwards are split.
    """
    names = parts[0].loss_names
    scales = parts[0].scales(torch.tensor(parts[0].counts(whole)))
    found: Results = {f"loss {name}": torch.zeros(()) for name in names}
    for m, microbatch in enumerate(microbatches):
        encoded = torch.cat(parts[0].encode(microbatch.media)) if microbatch.media else None
        features = None if encoded is None else encoded.detach().requires_grad_()
        hidden, extras, backwards = None, dict[str, Tensor](), list[tuple[list[Tensor], list[Tensor]]]()
        out = StageOutput()
        for part, layers in zip(parts, stages, strict=True):
            given = [features] if layers.start == 0 else [hidden, *extras.values()]
            out = part.run_stage(microbatch, layers, hidden, extras, features if layers.start == 0 else None, "train")
            leaves = [leaf for leaf in given if leaf is not None]
            if out.hidden is None:
                backwards.append((leaves, [_loss(out, microbatch, m, names, scales, found)]))
            else:
                shapes = {name: tuple(extra.shape) for name, extra in out.extras.items()}
                assert shapes == part.extra_shapes(microbatch, layers.stop)
                backwards.append((leaves, [out.hidden, *out.extras.values()]))
                hidden = out.hidden.detach().requires_grad_()
                extras = {name: extra.detach().requires_grad_() for name, extra in out.extras.items()}
        gradients: list[Tensor | None] = [None]
        for leaves, outputs in reversed(backwards):
            _backward(leaves, outputs, gradients, split)
            gradients = [leaf.grad for leaf in leaves]
        if features is not None and encoded is not None:
            encoded.backward(features.grad)
    for part in parts:
        for name, parameter in part.named_parameters():
            for output, embedding in part.llm.tied.items():
                name = name.replace(f"llm.{output}", f"llm.{embedding}")
            if parameter.grad is not None:
                found[name] = found.get(name, torch.zeros(())) + parameter.grad
    return found


def _loss(out: StageOutput, microbatch: Microbatch, m: int, names: list[str], scales: Tensor, found: Results) -> Tensor:
    losses = [loss * scales[names.index(name)] for name, loss in out.losses.items()]
    for name, loss in out.losses.items():
        found[f"loss {name}"] = found[f"loss {name}"] + loss.detach()
    if out.conditions is not None:
        rows = out.conditions
        rows = microbatch.in_whole(rows) if isinstance(microbatch, MicrobatchSlice) else rows
        found[f"conditions {m}"] = rows.detach()
        direction = torch.randn(rows.shape, generator=torch.Generator().manual_seed(5)) / rows.numel()
        losses.append((rows * direction).sum())
    return torch.stack(losses).sum()


def _backward(leaves: list[Tensor], outputs: list[Tensor], gradients: list[Tensor | None], split: bool) -> None:
    pairs = [(output, g) for output, g in zip(outputs, gradients, strict=True) if output.requires_grad]
    starts = [get_gradient_edge(output) for output, _ in pairs], [g for _, g in pairs]
    if not split:
        torch.autograd.backward(*starts)
    elif (deferred := backward_input(*starts, leaves, {}, 0)) is not None:
        backward_weight(deferred)


def errors(
    rank: int,
    size: int,
    module: Module,
    batch: Batch,
    stages: Sequence[range],
    split: bool = False,
) -> dict[str, float]:
    """The errors of losses and gradients, summed over the ranks, that are not within 1e-6 or twice the rounding of the
    module in one process. Gradients of weights are compared relative to their norm, or to a thousandth of the largest
    norm.

    Raises:
        ValueError: the decoder is refused.
    """
    if reason := module.llm.why_not_parallel(ParallelSizes(context=size)):
        raise ValueError(reason)
    whole, everything = module.whole.prepare(batch), [range(module.llm.num_layers)]
    expected = run(module.parts(everything), everything, whole.microbatches, whole)
    parts = module.parts(stages)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("context",))
    for part in parts:
        part.llm.parallelize(StagePeers(context=mesh))
    slices = [slice_of(microbatch, rank, size) for microbatch in whole.microbatches]
    found = run(parts, stages, slices, whole, split)
    assert found.keys() <= expected.keys(), "weights have a gradient on slices alone"
    for name, value in expected.items():
        found.setdefault(name, torch.zeros_like(value))
        if not name.startswith("loss ") or name == "loss text":  # other losses are the same on all ranks
            dist.all_reduce(found[name])
    if not (wrong := _compared(found, expected)):
        return {}
    double = module.doubled()
    exact = run(double.parts(everything), everything, whole.microbatches, whole)
    allowed = 2 * max(_compared(expected, exact).values(), default=0.0)
    return {name: error for name, error in wrong.items() if not error <= allowed}


def _compared(found: Results, expected: Results) -> dict[str, float]:
    floor = 1e-3 * max(float(value.norm()) for name, value in expected.items() if "loss" not in name)
    compared = {
        name: float((found[name].double() - value.double()).norm())
        / max(float(value.norm()), 0.0 if "loss" in name else floor, 1e-30)
        for name, value in expected.items()
    }
    return {name: error for name, error in compared.items() if not error <= 1e-6}


def on_ranks(
    rank: int, size: int, make: Callable[[], tuple[Module, list[Batch], Sequence[range]]], split: bool = False
) -> list[dict[str, float]]:
    """For `run_ranks`: the errors of each batch."""
    module, batches, stages = make()
    return [errors(rank, size, module, batch, stages, split) for batch in batches]


def with_targets(batch: Batch) -> Batch:
    """Gives the first microbatch targets, whose conditions are some hidden states in any order."""
    first = batch.microbatches[0]
    rows, tokens = first.shape
    first.targets = [TargetItem("none", 3, (1,)), TargetItem("none", 2, (1,))]
    first.target_positions = torch.tensor([tokens - 1, 1, tokens // 2, rows * tokens - 1, 0])
    return batch


def texts(packed: bool) -> Batch:
    """The samples of the sweep."""
    ids = sweep.samples()
    rows = [torch.cat(ids)] if packed else ids
    lengths = [[len(sample) for sample in ids]] if packed else [[len(sample)] for sample in ids]
    tokens = max(map(len, rows))
    made = Microbatch({"input_ids": torch.zeros(len(rows), tokens, dtype=torch.long)})
    positions, counted = torch.arange(tokens).repeat(len(rows), 1), torch.zeros(len(rows), tokens, dtype=torch.long)
    for b, (row, of_row) in enumerate(zip(rows, lengths, strict=True)):
        made.inputs["input_ids"][b, : len(row)], counted[b, : len(row)] = row, 1
        positions[b, : len(row)] = torch.cat([torch.arange(length) for length in of_row])
    labelled = ((counted > 0) & (positions > 0)).flatten().nonzero().flatten()
    made.inputs.update(position_ids=positions, token_mask=counted)
    made.labels, made.label_positions = made.inputs["input_ids"].flatten()[labelled], labelled - 1
    return Batch([made], PipelineLayout())
