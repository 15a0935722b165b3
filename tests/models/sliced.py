"""A module's stages on slices of a batch, one rank for each slice, against the same module on the whole batch."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.distributed.device_mesh import init_device_mesh

from bigmac_lightning.contracts.batch import Batch, Microbatch, PipelineLayout, TargetItem
from bigmac_lightning.contracts.components import Encoder
from bigmac_lightning.contracts.parallel import ParallelSizes, StagePeers
from bigmac_lightning.contracts.slices import MicrobatchSlice, slice_of
from bigmac_lightning.models import HFDecoder, HFVideoEncoder, HFVisionEncoder, MultimodalLM
from bigmac_lightning.runtime.split_backward import backward_input, backward_weight
from tests.models import zoo

Results = dict[str, Tensor]


def module_of(config: Any, **options: Any) -> MultimodalLM:
    """A decoder, and the encoders of its family, on the meta device."""
    llm = HFDecoder(config, **options)
    encoders: dict[str, Encoder] = {}
    if llm.family is not None:
        image = encoders["image"] = HFVisionEncoder(config)
        if llm.family.video is not None:
            encoders["video"] = HFVideoEncoder(image)
    return MultimodalLM(llm, encoders)


def parts_of(module: MultimodalLM, stages: Sequence[range]) -> list[MultimodalLM]:
    """Its stages, each with the weights of its own layers: drawn, also where the library starts with ones or zeros."""
    last = module.llm.num_layers
    made = []
    for layers in stages:
        part = copy.deepcopy(module)
        if part.llm.dtype == torch.float64:  # other kernels have none
            part.llm._whole.set_experts_implementation("eager")
        part.llm.materialize(layers, embedding=layers.start == 0, head=layers.stop == last)
        for encoder in {id(e): e for e in part.encoders.values()}.values():
            assert isinstance(encoder, Encoder)
            encoder.materialize()
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(0.05 * noise.to(parameter.dtype))
        for output, embedding in part.llm.tied.items():
            names = dict(part.llm.named_parameters(remove_duplicate=False))
            if output in names and embedding in names:
                names[output].data = names[embedding].data
            elif output in names:
                whole = copy.deepcopy(module.llm)
                whole.materialize(range(1), embedding=True, head=False)
                weight = whole.get_parameter(embedding)
                generator = torch.Generator().manual_seed(sum(map(ord, f"llm.{embedding}")))
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
                names[output].data = weight.data + 0.05 * noise.to(weight.dtype)
        made.append(part)
    return made


def run(
    parts: list[MultimodalLM],
    stages: Sequence[range],
    microbatches: list[Microbatch],
    whole: Batch,
    split: bool = False,
) -> Results:
    """Losses, conditions and the gradients of all weights, tied ones added up.

    Args:
        microbatches: those of `whole`, or slices of them.
        split: whether backwards are split.
    """
    scales = parts[0].scales(torch.tensor(parts[0].counts(whole)))
    sums = {name: torch.zeros(()) for name in parts[0].loss_names}
    found: Results = {}
    for m, microbatch in enumerate(microbatches):
        encoded = parts[0].encode(microbatch.media) if microbatch.media else []
        features = torch.cat(encoded).detach().requires_grad_() if encoded else None
        hidden, extras, outs = None, dict[str, Tensor](), []
        leaves: list[list[Tensor]] = []
        for part, layers in zip(parts, stages, strict=True):
            out = part.run_stage(microbatch, layers, hidden, extras, features if layers.start == 0 else None, "train")
            leaves.append([t for t in (features if layers.start == 0 else hidden, *extras.values()) if t is not None])
            outs.append(out)
            if out.hidden is not None:
                expected = part.extra_shapes(microbatch, layers.stop)
                assert {name: tuple(extra.shape) for name, extra in out.extras.items()} == expected
                hidden = out.hidden.detach().requires_grad_()
                extras = {name: extra.detach().requires_grad_() for name, extra in out.extras.items()}
        last = outs[-1]
        losses = [loss * scales[parts[0].loss_names.index(name)] for name, loss in last.losses.items()]
        for name, loss in last.losses.items():
            sums[name] = sums[name] + loss.detach()
        if last.conditions is not None:
            rows = last.conditions
            given = microbatch.in_whole(rows) if isinstance(microbatch, MicrobatchSlice) else rows
            found[f"conditions {m}"] = given.detach()
            losses.append((given * _direction(given)).sum())
        starts = [(torch.stack(losses).sum(), None)]
        for part_leaves, out in zip(reversed(leaves), reversed(outs), strict=True):
            if out.hidden is not None:
                starts = list(zip([out.hidden, *out.extras.values()], starts, strict=True))
            starts = [(output, gradient) for output, gradient in starts if output.requires_grad]
            edges, gradients = [get_gradient_edge(output) for output, _ in starts], [g for _, g in starts]
            if split:
                deferred = backward_input(edges, gradients, part_leaves, dict[Any, Any](), 0)
                if deferred is not None:
                    backward_weight(deferred)
            else:
                torch.autograd.backward([output for output, _ in starts], gradients)
            starts = [leaf.grad for leaf in part_leaves]
        if features is not None:
            assert features.grad is not None
            torch.cat(encoded).backward(features.grad)
    for part in parts:
        for name, parameter in part.named_parameters():
            for output, embedding in part.llm.tied.items():
                name = name.replace(f"llm.{output}", f"llm.{embedding}")
            if parameter.grad is not None:
                found[name] = found.get(name, torch.zeros(())) + parameter.grad
    return {**found, **{f"loss {name}": value for name, value in sums.items()}}


def _direction(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(5)).to(like.dtype) / like.numel()


def errors_on_ranks(
    rank: int, size: int, config: Any, batch: Batch, stages: Sequence[range], split: bool = False, force: bool = False, **options: Any
) -> dict[str, float]:
    """The errors of losses and gradients, summed over the ranks; of weights relative to the gradient's norm, or to a
    thousandth of the largest norm."""
    module = module_of(config, **options)
    assert isinstance(module.llm, HFDecoder)
    if not force and (reason := module.llm.why_not_parallel(ParallelSizes(context=size))):
        raise ValueError(reason)
    whole = module.prepare(batch)
    layers = module.llm.num_layers
    expected = run(parts_of(module, [range(layers)]), [range(layers)], whole.microbatches, whole)
    parts = parts_of(module, stages)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("context",))
    for part in parts:
        part.llm.parallelize(StagePeers(context=mesh))
    slices: list[Microbatch] = [slice_of(microbatch, rank, size) for microbatch in whole.microbatches]
    found = run(parts, stages, slices, whole, split)
    for name in expected.keys() | found.keys():
        assert name in expected, f"{name} has a gradient on slices alone"
        value = found.get(name, torch.zeros_like(expected[name])).clone()
        if name.startswith("loss ") and name != "loss text":
            found[name] = value  # the same on all ranks
        else:
            dist.all_reduce(value)
            found[name] = value
    floor = 1e-3 * max(float(value.norm()) for name, value in expected.items() if "loss" not in name)
    return {
        name: float((found[name] - value).norm()) / max(float(value.norm()), 0.0 if "loss" in name else floor, 1e-30)
        for name, value in expected.items()
    }


def batch_of(name: str, packed: bool, model: zoo.Model | None = None) -> Batch:
    """The zoo's batch, with targets whose conditions are some of the hidden states of its first microbatch."""
    batch = zoo.batch(zoo.MODELS[name] if model is None else model, packed, PipelineLayout())
    first = batch.microbatches[0]
    first.targets = [TargetItem("none", 3, (1,)), TargetItem("none", 2, (1,))]
    rows, tokens = first.shape
    first.target_positions = torch.tensor([tokens - 1, 1, tokens // 2, rows * tokens - 1, 0])
    return batch
