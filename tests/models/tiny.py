"""A tiny config of any decoder of `transformers`, with everything that changes its forward different from its default.

Sizes go by the names of a config's fields; layer patterns are those of the default config, shortened; every
multiplier, scale, soft cap and window that the class offers is changed. What the names do not tell is in `SPECIAL`.
"""

import re
from dataclasses import fields, is_dataclass
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, WIDTH, VOCABULARY = 4, 32, 64

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("qk_head_dim",), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "n_group"), 2),
    **dict.fromkeys(("topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_groups"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 6,
    "num_kv_shared_layers": 2,
    "altup_num_inputs": 3,
    "laurel_rank": 8,
    "max_position_embeddings": 128,
    "output_router_logits": True,
    **dict.fromkeys(("router_aux_loss_coef", "aux_loss_coef"), 0.1),
    "index_topk": 6,
    "index_n_heads": 16,  # so many that no two keys get the same score, which might order them in any way
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "use_cache": True,
    "num_mtp_layers": 0,
    "zero_expert_num": 2,
    "mup_enabled": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
PATTERNS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "indexer_types",
    "no_rope_layers",
    "layer_rope_theta",
)
RANDOM = re.compile("drop|jitter|pdrop|prob|noise")
KEPT = re.compile("eps|initializer|init_|_std|epsilon|coef|theta|floor|_min|_max|limit|time_step|label|clamp")
CAPS = re.compile("soft_?cap|logit_scale|scale_depth|clip_qkv")

_ROPES = {kind: {"rope_type": "default", "rope_theta": 100.0} for kind in ("full_attention", "sliding_attention")}
_MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)

SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": _ROPES, "layer_types": _MIXED},
    "granitemoehybrid": {"layers_block_type": ["linear_attention", "full_attention"] * 2},
    "dots3_note_text": {
        "layer_types": ["sliding_attention", "indexed_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
        "shared_experts_intermediate_size": 24,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim")},
        **{f"swa_{name}": 8 for name in ("qk_nope_head_dim", "v_head_dim")},
    },
    **{kind: {"layer_types": ["conv", "full_attention"] * 2} for kind in ("lfm2", "lfm2_moe", "lfm3")},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mlp_multipliers": [0.8, 0.7],
        "ssm_multipliers": [0.9, 0.8, 0.7, 0.6, 0.5],
        "mamba_rms_norm": True,
    },
    "gemma4_text": {
        "global_head_dim": 16,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "use_double_wide_mlp": True,
        "layer_types": _MIXED,
    },
    "gemma4_unified_text": {"global_head_dim": 16, "num_global_key_value_heads": 1, "use_double_wide_mlp": True},
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": [48] * LAYERS,
        "altup_active_idx": 1,
        "num_hidden_layers": LAYERS,
    },
    "llama4_text": {"floor_scale": 2, "moe_layers": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_n_heads": 2,
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """
    Raises:
        Exception: the class does not accept these arguments together.
    """
    kind = CONFIG_MAPPING[model_type]
    return kind(**{**arguments(kind), **SPECIAL.get(model_type, {}), **changes})


def arguments(kind: Any) -> dict[str, Any]:
    """The arguments of a config class for a tiny model."""
    default = kind()
    default.allow_global_per_layer_attribute_access = True
    made: dict[str, Any] = {}
    for name in names_of(kind):
        value = getattr(default, name, None)
        if name in getattr(kind, "sub_configs", {}):
            sub = type(value) if value is not None else None
            if sub is not None and name in ("text_config", "decoder_config"):
                made[name] = arguments(sub)
        elif name in PATTERNS and isinstance(value, list) and value:
            kinds = list(dict.fromkeys(value))
            made[name] = [kinds[k % len(kinds)] for k in range(LAYERS)]
        elif RANDOM.search(name) and isinstance(value, float):
            made[name] = 0.0
        elif name == "rope_parameters":
            if value and "rope_theta" in value:
                made[name] = {**value, **SIZES[name]}
        elif name in SIZES and not isinstance(value, list | dict):
            made[name] = SIZES[name]
        elif KEPT.search(name):
            continue
        elif CAPS.search(name) and (value is None or isinstance(value, float)):
            made[name] = 0.7 * (value or 5.0)
        elif isinstance(value, float):
            made[name] = 0.8 * value if value else value
    if "kv_lora_rank" in made:  # multi-head latent attention: every head has keys of its own
        made["num_key_value_heads"] = made["num_attention_heads"]
    if made.get("layer_types") == ["full_attention"] * LAYERS and "sliding_window" in made:
        made["layer_types"] = _MIXED
    return made


def names_of(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)] if is_dataclass(kind) else []
