"""Decoders in slices on several ranks, against the same decoder in one process: loss and every gradient."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor

from bigmac_lightning.contracts.parallel import ParallelSizes, StagePeers
from bigmac_lightning.contracts.token_loss import token_loss
from bigmac_lightning.models import HFDecoder
from bigmac_lightning.models.lora import add_lora, targets_of
from bigmac_lightning.runtime.split_backward import backward_input, backward_weight
from tests.models import divided, sweep, zoo
from tests.models.parts import decoder_config
from tests.ranks import run_ranks

MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {**MOE, "output_router_logits": True, "router_aux_loss_coef": 0.1}


def build(model_type: str = "qwen3", config: dict[str, Any] | None = None, **arguments: Any) -> Callable[[], HFDecoder]:
    return lambda: HFDecoder(decoder_config(model_type, num_hidden_layers=4, **(config or {})), **arguments)


def lora(*names: str) -> Callable[[HFDecoder], None]:
    options = {"r": 4, "lora_alpha": 16, "target_modules": list(names)}

    def add(llm: HFDecoder) -> None:
        add_lora(llm, "llm", options, targets_of(HFDecoder(llm.config), "llm", options))

    return add


LATENT: dict[str, Any] = {
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim"), 8),
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
LINEAR = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")
CASES: dict[str, tuple[Callable[[], HFDecoder], dict[str, Any]]] = {
    "qwen3": (build(), {}),
    "tied": (build(config={"tie_word_embeddings": True}), {}),
    "biases": (build(config={"attention_bias": True}), {}),
    "batch": (build("llama", {"attention_bias": True, "mlp_bias": True}), {}),
    "padding": (build(config={"pad_token_id": 20}), {}),  # the first token of the second slice
    "soft caps": (build("gemma2", {"query_pre_attn_scalar": 8}, attn_implementation="eager"), {}),
    "scaled logits": (build("cohere", {"logit_scale": 0.3}), {}),
    "experts": (build("qwen3_moe", ROUTED), {}),
    "checkpointing": (build("qwen3_moe", ROUTED, gradient_checkpointing=True), {}),
    "fused": (build(fused_loss=True), {"fused": True}),
    "fused, tied": (build(config={"tie_word_embeddings": True}, fused_loss=True), {"fused": True}),
    "adapters": (build(), {"adapters": lora(*LINEAR, "lm_head")}),
    "adapters, tied": (build(config={"tie_word_embeddings": True}), {"adapters": lora(*LINEAR)}),
    "adapters, checkpointing": (build(gradient_checkpointing=True), {"adapters": lora(*LINEAR)}),
    "adapters, latent attention": (build("deepseek_v2", LATENT), {"adapters": lora("kv_a_proj_with_mqa", "kv_b_proj")}),
}


def _cases(rank: int, names: list[str]) -> dict[str, dict[str, float]]:
    peers = divided.tensor_peers(2)
    return {name: divided.wrong_of(CASES[name][0], peers, **CASES[name][1]) for name in names}


def test_against_one_process() -> None:
    for found in run_ranks(2, _cases, list(CASES)):
        assert not any(found.values()), found
