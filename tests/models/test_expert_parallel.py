"""Experts spread over ranks, with the same tokens or with different ones, against the same decoder in one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from bigmac_lightning.contracts.parallel import ParallelSizes, StagePeers
from bigmac_lightning.models import HFDecoder
from tests.models import divided, zoo
from tests.models.test_tensor_parallel import LATENT, MOE, ROUTED, build
from tests.ranks import run_ranks

GEMMA4 = {
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "enable_moe_block": True,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 16,
}
BUILT = {
    "qwen3_moe": build("qwen3_moe", ROUTED),
    "mixtral": build("mixtral", {**ROUTED, "num_local_experts": 4}),
    "deepseek_v3": build("deepseek_v3", LATENT),  # with a shared expert and a layer without a mixture
    "gpt_oss": build("gpt_oss", {"num_local_experts": 4, "sliding_window": 4}, attn_implementation="eager"),  # biases
    "checkpointing": build("qwen3_moe", ROUTED, gradient_checkpointing=True),
    "gemma4": build("gemma4_text", GEMMA4),  # whose plan names its dense part, too
    "tied": build("qwen3_moe", {**ROUTED, "tie_word_embeddings": True}),
}


def _two(rank: int) -> dict[str, dict[str, float]]:
    mesh = init_device_mesh("cpu", (2,))
    ways = {
        "same tokens": StagePeers(expert=mesh, experts_see_same_tokens=True),
        "different tokens": StagePeers(expert=mesh),
        "with slices": StagePeers(tensor=mesh, expert=mesh, experts_see_same_tokens=True),
    }
    return {
        f"{name}, {way}": divided.wrong_of(built, peers) for name, built in BUILT.items() for way, peers in ways.items()
    }


def test_against_one_process() -> None:
    for found in run_ranks(2, _two):
        assert not any(found.values()), found


def _four(rank: int) -> dict[str, dict[str, float]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    across = StagePeers(tensor=mesh["tp"], expert=mesh["dp"])  # the ranks of each tensor mesh have the same tokens
    return {name: divided.wrong_of(BUILT[name], across) for name in ("deepseek_v3",)}


def test_slices_within_and_experts_across_replicas() -> None:
    for found in run_ranks(4, _four):
        assert not any(found.values()), found


def _uneven(rank: int) -> dict[str, float]:
    def steer(llm: HFDecoder) -> None:
        for name, module in llm.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda module, args, out: (*out[:-1], out[-1] % 2))

    return divided.wrong_of(build("qwen3_moe", MOE), StagePeers(expert=init_device_mesh("cpu", (2,))), steer=steer)


def test_all_tokens_go_to_the_experts_of_one_rank() -> None:
    for wrong in run_ranks(2, _uneven):
        assert not wrong


def _slices(rank: int) -> tuple[int, set[str]]:
    llm = BUILT["qwen3_moe"]()
    llm.materialize(range(2), True, True, StagePeers(expert=init_device_mesh("cpu", (2,))))
    sliced = {name: p for name, p in llm.named_parameters() if isinstance(p, DTensor)}
    return sum(p.to_local().untyped_storage().nbytes() for p in sliced.values()), {n.rpartition(".")[2] for n in sliced}


def test_each_rank_has_its_experts_only() -> None:
    for size, names in run_ranks(2, _slices):
        assert size == 2 * 4 * 2 * (3 * 32 * 32)  # layers, bytes, experts, their weights
        assert names == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("model_type", "size", "text"),
    [
        ("qwen3", 2, "'qwen3' has no plan for it in transformers (base_model_ep_plan): leave expert out"),
        ("qwen3_moe", 3, "has 4 experts (model.layers.0.mlp.experts.gate_up_proj): choose a number of expert ranks"),
    ],
)
def test_refusals(model_type: str, size: int, text: str) -> None:
    assert text in build(model_type, MOE if "moe" in model_type else {})().why_not_parallel(ParallelSizes(expert=size))


def _read(rank: int, folders: list[Path]) -> list[str]:
    mesh, wrong = init_device_mesh("cpu", (2,)), []
    slices = StagePeers(tensor=mesh)
    for peers in (slices, StagePeers(tensor=mesh, expert=mesh, experts_see_same_tokens=True)):
        for folder in folders:
            llm = HFDecoder(str(folder), weights=str(folder))
            llm.materialize(range(1), embedding=False, head=False, peers=peers)
            stored = load_file(folders[0] / "model.safetensors")
            for name, part in llm.named_parameters():
                whole = part.full_tensor() if isinstance(part, DTensor) else part
                wrong += [f"{folder.name} {name}"] if not torch.equal(whole, stored[name]) else []
    return wrong


def test_slices_of_experts_that_are_stored_either_way(tmp_path: Path) -> None:
    """Published folders of Qwen3-VL-MoE have transposed matrices of experts; those of `transformers` have not."""
    for name in ("written", "published"):
        zoo.save("qwen3_vl_moe", tmp_path / name)
    folders = [tmp_path / name / "qwen3_vl_moe" for name in ("written", "published")]
    file = folders[1] / "model.safetensors"
    turned = {n: t.transpose(1, 2).contiguous() if "experts" in n else t for n, t in load_file(file).items()}
    save_file(turned, file, {"format": "pt"})
    for wrong in run_ranks(2, _read, folders):
        assert not wrong
