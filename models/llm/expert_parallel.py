"""The experts of a mixture spread over ranks: expert parallelism (GShard, arXiv 2006.16668), without a capacity limit.

The library's own plan (`base_model_ep_plan` of a config) names the experts. If the ranks have different tokens, each
token goes to the ranks of its experts and back. If they have the same tokens, each rank computes its own experts' part
for all tokens, and the parts are summed. The gradient of an expert comes from the tokens of all of these ranks; the
gradients of all other weights come from this rank's own tokens.
"""

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from .tensor_parallel import Plan, present


def plan_of(whole: Any) -> Plan:
    """The plan of a model or of a part of it, for what is there of experts; empty if the library has none.

    What it has besides (Gemma 4's dense part) belongs to tensor parallelism.
    """
    plan = whole._expand_parallel_plan(whole.ep_plan) if whole.ep_plan else {}
    others = without_experts(plan, plan)
    return {name: style for name, style in plan.items() if name not in others}


def without_experts(plan: Plan, expert_plan: Plan) -> Plan:
    """What remains of a plan of tensor parallelism if the experts are spread by a plan of their own."""
    experts = [name for name, style in expert_plan.items() if style == "ep_dispatch_experts"]
    return {
        name: style
        for name, style in plan.items()
        if not any(name == path or name.startswith(f"{path}.") for path in experts)
    }


def install(whole: Any, plan: Plan, mesh: DeviceMesh, same_tokens: bool) -> None:
    """Let the modules of experts communicate, after their weights have been cut."""
    for name, style_name in present(whole, plan).items():
        style = ALL_PARALLEL_STYLES[style_name]
        if isinstance(style, EpDispatchExpertsParallel):
            own, how = (mesh, "all_reduce") if same_tokens else (_alone(mesh), "all_to_all")
            style.install_forward(whole.get_submodule(name), mesh, tp_mesh=own, ep_implementation=how)


def _alone(mesh: DeviceMesh) -> DeviceMesh:
    """A mesh of this rank alone, which no other rank has to take part in making."""
    group: Any = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return DeviceMesh.from_group(group, mesh.device_type)


def why_not(whole: Any, plan: Plan, size: int) -> str:
    """Why the experts of a model cannot be spread over so many ranks; empty if they can.

    Args:
        whole: the whole model, without weights.
        plan: its plan.
    """
    kind = f"expert={size}: model_type {whole.config.model_type!r}"
    if not plan:
        return f"{kind} has no plan for it in transformers (base_model_ep_plan): leave expert out"
    for name, parameter in whole.named_parameters():
        if plan.get(name) == "grouped_gemm" and len(parameter) % size:
            return f"{kind} has {len(parameter)} experts ({name}): choose a number of expert ranks that divides it"
    return ""
