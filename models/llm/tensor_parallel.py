"""Weights of a decoder in slices on several ranks that compute the same tokens: tensor parallelism (arXiv 1909.08053).

The library's own plan (`base_model_tp_plan` of a config) says which weight is cut and how, and its styles communicate.
A weight that is cut is a DTensor from then on. Every other weight is on all ranks, and its gradient is whole and the
same on all of them: the styles make sure of that, and tests look at every decoder of the library, because a plan may
leave out a weight of which each rank has a part of the gradient. Embedding and output layer are cut by the vocabulary
whatever the plan says (see vocabulary_parallel.py).
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel

from ..meta_model import Names
from ..pass_through import PassThrough
from .tensor_styles import NewOutput, OwnHeads, SparseSlices, SummedGradients
from .vocabulary_parallel import VocabularyEmbedding

Plan = dict[str, str]
"""The style of each parameter that is cut and of each module whose forward communicates, by name."""


_OWN_STYLES = {
    "replicated_with_grad_allreduce": SummedGradients(),
    "vocabulary_embedding": VocabularyEmbedding(),
    "new_output": NewOutput(),
    "own_heads": OwnHeads(),
    "sparse_slices": SparseSlices(),
}


def _usual(attention: str) -> Plan:
    """The rules of attention and MLP that most layers have."""
    columns = (f"{attention}.q", f"{attention}.k", f"{attention}.v", "mlp.gate", "mlp.up")
    rows = (f"{attention}.o", "mlp.down")
    return {**{f"{name}_proj": "colwise" for name in columns}, **{f"{name}_proj": "rowwise" for name in rows}}


_MISSING_RULES = {
    "apertus": {"mlp.act_fn": "replicated_with_grad_allreduce"},
    "apertus1p5_text": {"mlp.act_fn": "replicated_with_grad_allreduce"},
    "gemma3n_text": {"mlp": "sparse_slices"},
    "llama4_text": {"feed_forward.shared_expert": "new_output"},
    "mllama_text_model": {
        **_usual("self_attn"),
        **_usual("cross_attn"),
        **dict.fromkeys(("self_attn", "cross_attn"), "own_heads"),
    },
    "qwen3_vl_text": _usual("self_attn"),
}
"""What the library's plans have left out: parameters whose gradient would be another one on each rank; modules that
would take their slice for the whole; the layers of Qwen3-VL and of Llama 3.2 Vision, which has no plan."""
_HEAD_NORM = re.compile(r"(.*\.)(q|k|v|query|key|value)_(norm|layernorm)")
"""Norms of heads, which some of the library's plans have left out as well (those of sarvam_moe, qwen3_vl_moe)."""
_WRONG_PLANS = {"doge": "one that does not fit its attention"}
"""Plans of the library with which a model does not run."""


def _style(name: str) -> Any:
    return _OWN_STYLES.get(name) or ALL_PARALLEL_STYLES[name]


def plan_of(whole: Any, names: Names) -> Plan:
    """The plan of a model or of a part of it, for what is there; empty if the library has none.

    Args:
        whole: the model, with or without weights, before adapters are put in.
    """
    kind = whole.config.get_text_config().model_type
    missing = {f"{names.decoder}.layers.*.{rule}": style for rule, style in _MISSING_RULES.get(kind, {}).items()}
    rules = {**(whole.tp_plan or {}), **missing}
    if not rules:
        return {}
    plan: Plan = whole._expand_parallel_plan(rules)
    plan = {name: style for name, style in plan.items() if name.startswith((f"{names.decoder}.", names.output))}
    for path, _ in whole.named_modules():
        norm = _HEAD_NORM.fullmatch(path)
        if norm and path not in plan and plan.get(f"{norm[1]}{norm[2]}_proj") == "colwise":
            plan[path] = "replicated_with_grad_allreduce"
    tables = [f"{names.decoder}.{name}" for name in (names.embedding, *names.with_embedding)]
    tables = [path for path in tables if isinstance(whole.get_submodule(path), nn.Embedding)]
    for path, style in (*((path, "vocabulary_embedding") for path in tables), (names.output, "colwise")):
        for name in [name for name in plan if name == path or name.startswith(f"{path}.")]:
            del plan[name]
        module = whole.get_submodule(path)
        if not isinstance(module, PassThrough):
            plan.update({f"{path}.{name}": style for name, p in module._parameters.items() if p is not None})
            plan[path] = style
    return plan


def present(whole: Any, plan: Plan) -> Plan:
    """What of the plan of a whole model concerns a part of it."""
    modules = dict(whole.named_modules())

    def is_here(name: str) -> bool:
        if name in modules:
            return not isinstance(modules[name], PassThrough)
        path, _, own = name.rpartition(".")
        return path in modules and own in getattr(modules[path], "base_layer", modules[path])._parameters

    return {name: style for name, style in plan.items() if is_here(name)}


def cut(whole: Any, plan: Plan, mesh: DeviceMesh, inside: str = "") -> None:
    """Replace the parameters that the plan cuts by DTensors of this rank's slices. No rank has to wait for another.

    Args:
        whole: a model with the same weights on all ranks, or without weights.
        inside: the name of the module whose parameters are cut; all by default.
    """
    for name, style in present(whole, plan).items():
        path, _, own = name.rpartition(".")
        if inside and not name.startswith(f"{inside}."):
            continue
        module = _adapted(whole, path)
        parameter = module._parameters.get(own)
        if parameter is not None and not isinstance(parameter, DTensor):
            _style(style).shard_param(module, own, mesh)
        _release(module._parameters.get(own))


def _release(parameter: Any) -> None:
    """Let a slice have memory of its own, so that the whole tensor, of which it is a view, can be freed."""
    if isinstance(parameter, DTensor):
        local = parameter._local_tensor
        if not local.is_meta and local.untyped_storage().nbytes() > local.nbytes:
            parameter._local_tensor = local.clone()


def install(whole: Any, plan: Plan, mesh: DeviceMesh) -> None:
    """Let the modules of a plan communicate. Low-rank adapters beside linear layers are cut and communicate as well.

    Raises:
        ValueError: an adapter has dropout.
    """
    for name, style in present(whole, plan).items():
        if name.rpartition(".")[2] in _adapted(whole, name.rpartition(".")[0])._parameters:
            continue
        module, base = whole.get_submodule(name), _adapted(whole, name)
        if style == "mla_kv_a_proj":
            base = module  # what it does to the output concerns an adapter's part of it as well
            module.config = whole.config.get_text_config()
        _style(style).install_forward(base, mesh)
        if base is not module:
            _install_adapters(module, _style(style), mesh)


def _install_adapters(layer: Any, style: Any, mesh: DeviceMesh) -> None:
    """Cut the adapters of a linear layer, y = x W' + x A' B'. If each rank has a slice of y, it has these columns of
    B'; if each rank has a slice of x, it has these rows of A'."""
    if any(_random(layer.lora_dropout)):
        raise ValueError("lora_dropout: ranks that have slices of the same activations cannot draw it: set it to 0")
    for adapter in _cut_adapters(layer, style):
        for own in list(adapter._parameters):
            style.shard_param(adapter, own, mesh)
        style.install_forward(adapter, mesh)


def _cut_adapters(layer: Any, style: Any) -> list[Any]:
    """Those parts of a linear layer's adapters that are cut."""
    if isinstance(style, ColwiseParallel) and style.output_layouts.is_shard():
        return list(layer.lora_B.values())
    if isinstance(style, RowwiseParallel) and style.input_layouts.is_shard():
        return list(layer.lora_A.values())
    return []


def _adapted(whole: nn.Module, name: str) -> Any:
    """The module of this name, or if it has an adapter, the layer beside which the adapter is."""
    module = whole.get_submodule(name)
    return getattr(module, "base_layer", module)


# -- what cannot be cut ------------------------------------------------------------------------------------------------


def why_not(whole: Any, names: Names, plan: Plan, layer_configs: list[Any], size: int) -> str:
    """Why a model cannot be cut for so many ranks; empty if it can.

    Args:
        whole: the whole model, without weights.
        plan: its plan.
        layer_configs: the config of each layer.
    """
    kind = f"tensor={size}: model_type {whole.config.model_type!r}"
    if not plan:
        return f"{kind} has no plan for it in transformers (base_model_tp_plan): leave tensor out"
    config = whole.config.get_text_config()
    if problem := _WRONG_PLANS.get(config.model_type, ""):
        return f"{kind} has a plan in transformers, but {problem}: leave tensor out"
    if getattr(config, "clip_qkv", None) is not None and config.model_type in ("olmo", "olmoe"):
        return f"{kind} changes slices in place: set clip_qkv to null in the config, or leave tensor out"
    for reason in (*_odd_sizes(whole, names, plan, size), *_odd_heads(plan, layer_configs, size)):
        return f"{kind} has {reason}: choose a number of tensor ranks that divides it"
    embedding = whole.get_submodule(f"{names.decoder}.{names.embedding}")
    if not isinstance(embedding, nn.Embedding) or len(list(embedding.parameters())) > 1:
        return f"{kind} has an embedding that is more than a table ({type(embedding).__name__}): leave tensor out"
    for name, value in _random(whole.get_submodule(names.decoder)):
        return (
            f"{kind} has {name} = {value}, but ranks that have slices of the same activations cannot draw the random "
            "numbers of one process: set it to 0 in the config"
        )
    return ""


def _odd_sizes(whole: Any, names: Names, plan: Plan, size: int) -> Iterator[str]:
    """Dimensions that are cut into unequal slices."""
    embedding = f"{names.decoder}.{names.embedding}.weight"
    for name, style in plan.items():
        path, _, own = name.rpartition(".")
        parameter = whole.get_submodule(path)._parameters.get(own)
        if parameter is None:
            continue
        dimension, packed = _cut_dimension(style, own, parameter.ndim)
        if dimension is None or parameter.shape[dimension] % (size * packed) == 0:
            continue
        length = parameter.shape[dimension] // packed
        if name == embedding or path == names.output:
            yield f"a vocabulary of {length} tokens"
        yield f"{length} {'rows' if dimension == 0 else 'columns'} in {name}"


def cuts_of(whole: Any, plan: Plan, size: int) -> Iterator[tuple[nn.Parameter, tuple[int, int]]]:
    """The parameters that a plan cuts into `size` slices, adapters among them, each with the dimension that is cut,
    counted from the last one (-1), and the number of slices."""
    for name, style in present(whole, plan).items():
        path, _, own = name.rpartition(".")
        parameter = _adapted(whole, path)._parameters.get(own)
        if parameter is not None:
            dimension, _ = _cut_dimension(style, own, parameter.ndim)
            if dimension is not None:
                yield parameter, (dimension - parameter.ndim, size)
        elif hasattr(whole.get_submodule(name), "base_layer"):
            for adapter in _cut_adapters(whole.get_submodule(name), _style(style)):
                yield from ((p, (-2 if "colwise" in style else -1, size)) for p in adapter.parameters())


def _cut_dimension(style: str, parameter: str, ndim: int) -> tuple[int | None, int]:
    """The dimension along which a style cuts a parameter, and how many matrices lie one after another in it."""
    if style in ("vocabulary_embedding", "grouped_gemm"):  # the latter cuts between experts
        return 0, 1
    packed = 2 if style.startswith("packed_") and ndim > 1 else 1
    if "colwise" in style:
        return max(0, ndim - 2), packed
    if "rowwise" in style and (ndim > 1 and parameter != "bias"):
        return ndim - 1, packed
    return None, 1


def _odd_heads(plan: Plan, layer_configs: list[Any], size: int) -> Iterator[str]:
    """Numbers of heads that cannot be shared out among ranks each of which computes some heads."""
    if not cuts_heads(plan):
        return
    for config in layer_configs:
        for field in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, field, None)
            if isinstance(heads, int) and heads % size:
                yield f"{field} = {heads}"


def cuts_heads(plan: Plan) -> bool:
    """Whether each rank computes some of the heads of attention."""
    names = [name for name, style in plan.items() if style == "colwise"]
    return any(re.search(r"(attn|attention)\..*\.weight$", name) for name in names)


def _random(decoder: nn.Module) -> Iterator[tuple[str, float]]:
    """Dropout and the like of a decoder."""
    for name, module in decoder.named_modules():
        found = {"p": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else vars(module)
        for own, value in found.items():
            if re.search("^p$|drop|jitter", own) and isinstance(value, float) and value > 0:
                yield f"{name}.{own}", value
