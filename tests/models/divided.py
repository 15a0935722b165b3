"""A decoder whose stages several ranks compute together, against the same decoder in one process.

``python -m tests.models.divided [--expert] [TYPE ...]`` prints whether each decoder of the library is exact on two
ranks.
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from bigmac_lightning.contracts.parallel import ParallelSizes, StagePeers
from bigmac_lightning.models import HFDecoder
from bigmac_lightning.models.llm.head import logits_of
from bigmac_lightning.models.meta_model import auto_class
from tests.models import sweep
from tests.ranks import run_ranks

Inputs = dict[str, Tensor]
Built = Callable[[], HFDecoder]


def tensor_peers(size: int) -> StagePeers:
    return StagePeers(tensor=init_device_mesh("cpu", (size,), mesh_dim_names=("tp",)))


def batches(llm: HFDecoder, seed: int = 0) -> list[Inputs]:
    """Two microbatches, of packed samples where the decoder takes them, with tokens at the ends of slices."""
    made, vocabulary = [], llm._outputs
    for microbatch in range(2):
        generator = torch.Generator().manual_seed(10 * seed + microbatch)
        ids = [torch.randint(0, vocabulary, (length,), generator=generator) for length in (9, 6)]
        ids[0][:5] = torch.tensor([0, 1, vocabulary // 2 - 1, vocabulary // 2, vocabulary - 1])
        positions = torch.cat([torch.arange(len(row)) for row in ids])
        if llm.refuses_packing:
            ids, positions = [ids[0]], torch.arange(9)
        made.append({"input_ids": torch.cat(ids)[None], "position_ids": positions[None]})
    return made


def loss_of(
    stages: list[tuple[HFDecoder, range]],
    inputs: Inputs,
    fused: bool = False,
    extras: dict[str, Tensor] | None = None,
) -> Tensor:
    """The loss of a microbatch, with the load balancing loss, stage after stage; from hidden states "h" if given."""
    first, last, extras = stages[0][0], stages[-1][0], dict(extras or {})
    h = inputs.get("h")
    inputs = {name: tensor for name, tensor in inputs.items() if name != "h"}
    inputs = first.prepare({**inputs, "media_positions": torch.empty(0, dtype=torch.long)})
    h = first.embed(inputs) if h is None else h
    for llm, layers in stages:
        h = llm.run_layers(h, inputs, layers, extras)
    labels = inputs["input_ids"][0].roll(-1)
    loss = last.fused_loss(h[0], labels) if fused else last.text_loss(h[0], labels, False)[0]
    assert loss is not None
    for value in last.auxiliary(extras).values():
        loss = loss + 3.0 * value
    return loss


def stages_of(
    built: Built, peers: StagePeers, weights: dict[str, Tensor], **after: Any
) -> list[tuple[HFDecoder, range]]:
    """Two stages, one after the other in this process, with slices of these weights."""
    made = []
    for upper in (False, True):
        llm = built()
        count = llm.num_layers
        layers = range(count // 2, count) if upper else range(count // 2)
        llm.materialize(layers, embedding=layers.start == 0, head=layers.stop == count)
        for change in after.values():
            change(llm)
        llm.load_state_dict({name: weights[name] for name in llm.state_dict()})
        llm.parallelize(peers)
        made.append((llm.train(), layers))
    return made


def one_process(built: Built, seed: int = 2, **after: Any) -> HFDecoder:
    """The whole decoder, with random weights, also of those that start as zeros or ones."""
    llm = built()
    llm.materialize(range(llm.num_layers), True, True)
    weights = (
        auto_class(llm.config).from_config(copy.deepcopy(llm.config)).state_dict()
    )  # some activations have weights of their own
    llm.load_state_dict({name: weights[name] for name in llm.state_dict()})
    for change in after.values():
        change(llm)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return llm.train()


def whole_gradients(stages: list[tuple[HFDecoder, range]], tied: dict[str, str]) -> dict[str, Tensor]:
    """The gradients of all stages, whole; those of tied copies are added, slice by slice."""
    found: dict[str, Tensor] = {}
    for llm, _ in stages:
        for name, parameter in llm.named_parameters():
            if parameter.grad is not None:
                name = tied.get(name, name)
                found[name] = found[name] + parameter.grad if name in found else parameter.grad
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor | None]) -> dict[str, float]:
    """Errors of gradients, relative to their norms, or to a thousandth of the largest norm (see `sweep`)."""
    floor = 1e-3 * max(float(g.norm()) for g in expected.values() if g is not None)
    return {name: sweep._error(found.get(name), g, floor) for name, g in expected.items()}


def compare(built: Built, peers: StagePeers, fused: bool = False, **after: Any) -> dict[str, float]:
    """The errors on this rank of the loss and of each gradient after two microbatches.

    Args:
        after: changes of a decoder after it has weights, such as adapters.
    """
    whole = one_process(built, **after)
    stages = stages_of(built, peers, {n: t.detach() for n, t in whole.state_dict().items()}, **after)
    apart = peers.expert is not None and not peers.experts_see_same_tokens
    found_loss = expected_loss = torch.zeros(())
    for inputs in batches(whole, peers.expert.get_local_rank() if peers.expert is not None and apart else 0):
        found_loss = found_loss + loss_of(stages, inputs, fused)
        expected_loss = expected_loss + loss_of([(whole, range(whole.num_layers))], inputs)
    found_loss.backward()
    expected_loss.backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}
    if apart:  # experts get the gradients of the tokens of all ranks
        assert peers.expert is not None
        sliced = {name for llm, _ in stages for name, p in llm.named_parameters() if _mesh_of(p) == peers.expert}
        assert sliced
        for name in sorted(sliced):
            dist.all_reduce(expected[name], group=peers.expert.get_group())
    found = whole_gradients(stages, whole.tied)
    zero = [name for name, gradient in found.items() if not gradient.any()]
    assert len(zero) < len(found) / 4, f"no gradients of {zero}"
    return {"loss": sweep._error(found_loss.detach(), expected_loss.detach()), **errors(found, expected)}


def _mesh_of(parameter: Tensor) -> Any:
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def slice_of_logits(llm: HFDecoder, h_LD: Tensor) -> Tensor:
    return logits_of(llm._whole, llm._names, h_LD)


def in_double(llm: HFDecoder) -> None:
    llm.double()
    llm._whole.set_experts_implementation("eager")  # other kernels have no float64


def wrong_of(built: Built, peers: StagePeers, **more: Any) -> dict[str, float]:
    """The errors of `compare` that are too large: above 1e-6, and not by rounding, as in double precision, too."""
    found = compare(built, peers, **more)
    worst = torch.tensor([error if error <= 1 else 1.0 for error in found.values()]).max()
    dist.all_reduce(worst, dist.ReduceOp.MAX)  # so that all ranks go on alike
    if worst <= 1e-6:
        return {}
    double = compare(built, peers, **more, double=in_double)
    return {name: error for name, error in found.items() if not (error <= 5e-5 and double[name] <= 1e-6)}


def decoder_of(model_type: str) -> Built | None:
    """Builds a decoder of the sweep; ``None`` if it is refused already without tensor parallelism."""
    for config in (sweep._tiny_config({"model_type": model_type}), {"model_type": model_type}):
        for router_loss in (True, False):
            if not router_loss and isinstance(config, dict):
                continue
            config = copy.deepcopy(config)
            if not router_loss:
                config.output_router_logits = False
            made, verdict = sweep._first_built(config, ("sdpa", "eager"))
            if made is not None:
                return lambda: sweep._first_built(copy.deepcopy(config), (verdict.attention,))[0]
    return None


def verdict(model_type: str, peers: StagePeers) -> str:
    built = decoder_of(model_type)
    if built is None:
        return "not cut"
    if built().family is not None:
        return "see test_vision_language_models"
    size = 2
    sizes = ParallelSizes(*(1 if m is None else size for m in (peers.tensor, peers.context, peers.expert)))
    if reason := built().why_not_parallel(sizes):
        return f"refused {reason}"
    try:
        found = wrong_of(built, peers)
    except Exception as problem:
        import traceback

        place = traceback.extract_tb(problem.__traceback__)[-1]
        return f"FAILED {type(problem).__name__}: {str(problem)[:200]} {place.filename.split('/')[-1]}:{place.lineno}"
    return f"WRONG {dict(list(found.items())[:6])} of {len(found)}" if found else "exact"


def all_verdicts(rank: int, names: list[str], expert: str) -> dict[str, str]:
    """The verdicts on decoders: with slices, or with experts on ranks that have the "same" tokens, "both", or with
    experts on ranks that have "different" tokens."""
    warnings.simplefilter("ignore")
    hf.utils.logging.set_verbosity_error()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    peers = {
        "": StagePeers(tensor=mesh),
        "same": StagePeers(expert=mesh, experts_see_same_tokens=True),
        "different": StagePeers(expert=mesh),
        "both": StagePeers(tensor=mesh, expert=mesh, experts_see_same_tokens=True),
    }[expert]
    found = {}
    for name in names:
        found[name] = verdict(name, peers)
        if not rank or found[name].startswith(("WRONG", "FAILED")):
            print(f"{name:24}", found[name], flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--expert", default="", choices=["", "same", "different", "both"])
    parser.add_argument("types", nargs="*")
    options = parser.parse_args()
    run_ranks(2, all_verdicts, options.types or sweep.DECODERS, options.expert, timeout=1800)
