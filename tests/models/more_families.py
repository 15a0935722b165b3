"""Tiny models of further families, beside those of the zoo. In CI they are cut after every layer in one process
(`sweep.py`); `pytest -m wide tests/runtime/test_families.py` runs them on several ranks."""

from dataclasses import replace
from random import Random
from typing import Any

import torch
import transformers as hf
from transformers.models.paddleocr_vl import PaddleOCRTextConfig

from tests.models.further_families import FURTHER
from tests.models.newest_families import NEWEST
from tests.models.zoo import (
    EXPERTS,
    GLM_TOWER,
    IMAGE,
    KNOWN,
    QWEN_TOKENS,
    TOWER,
    VIDEO,
    VISION_LANGUAGE,
    VOCABULARY,
    WIDTH,
    Draw,
    Model,
    Picture,
    idefics,
    llm,
    mrope,
    pixels,
    qwen,
    sized,
    square,
)

TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}
GRID_TOWER: dict[str, Any] = {**{k: v for k, v in TOWER.items() if k != "image_size"}, "patch_size": 4}
LATENT_ATTENTION: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
GROUPED_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}


def grid(patch: int, frames: int, flat: bool) -> Draw:
    """Pictures as patches; the library gets them flat, or as squares."""

    def draw(random: Random) -> Picture:
        shape = (1, 2 * random.randint(1, 2), 2 * random.randint(1, 2))
        data = pixels(random, *shape, 3 * frames * patch * patch)
        given = data.flatten(0, 2) if flat else data.flatten(0, 2).unflatten(-1, (3, patch, patch))
        arguments = {"pixel_values": given, "image_grid_thw": torch.tensor([shape])}
        return Picture("image", data, shape[1] * shape[2] // 4, arguments)

    return draw


def crops(random: Random) -> Picture:
    data: Any = {"pixel_values": pixels(random, 2, 3, 8, 8), "image_sizes": torch.tensor([8, 8])}
    return Picture("image", data, 16 + 4 * (4 + 1), {name: value[None] for name, value in data.items()})


def tile(random: Random) -> Picture:
    height, width = 2 * random.randint(1, 2), 2 * random.randint(1, 2)
    data: Any = {
        "pixel_values": pixels(random, 20, 3 * 2 * 2),
        "spatial_shapes": torch.tensor([height, width]),
        "pixel_attention_mask": (torch.arange(20) < height * width).int(),
    }
    return Picture("image", data, height * width // 4, {name: value[None] for name, value in data.items()})


def placed(random: Random) -> Picture:
    """Patches with their places, padded to 16; a video has 1 to 2 frames."""
    video, frames = random.random() < 0.4, random.randint(1, 2)
    width, height = 2 * random.randint(1, 2), 2 * random.randint(1, 2)
    places = torch.full((16, 2), -1)
    places[: width * height] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)
    made: Any = {"pixel_values": pixels(random, 16, 3 * 4 * 4), "image_position_ids": places}
    if not video:
        return Picture("image", made, width * height // 4, {name: value[None] for name, value in made.items()})
    made = {"pixel_values": pixels(random, frames, 16, 3 * 4 * 4), "image_position_ids": places.repeat(frames, 1, 1)}
    arguments = {
        "pixel_values_videos": made["pixel_values"],
        "video_position_ids": made["image_position_ids"],
        "num_frames_per_video": torch.tensor([frames]),
    }
    return Picture("video", made, frames * width * height // 4, arguments, frames)


def gemma4(audio: bool = False, **changes: Any) -> Any:
    """A config of Gemma 4; with `audio`, it has a tower that nothing here uses."""
    text = {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        "global_head_dim": 16,
        "sliding_window": 6,
    }
    vision = {**TOWER, "patch_size": 4, "head_dim": 8, "num_key_value_heads": 2, "pooling_kernel_size": 2}
    sounds = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
    return hf.Gemma4Config(
        text_config=llm(hf.Gemma4TextConfig, **{**text, **changes}),
        vision_config={**vision, "position_embedding_size": 280, "standardize": True},
        audio_config=sounds if audio else None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=57,
    )


def asked(random: Random) -> Picture:
    return replace(square(16)(random), asked=True)


def paligemma(text: Any, attention: str = "sdpa", **changes: Any) -> Model:
    def config() -> Any:
        return hf.PaliGemmaConfig(
            vision_config=SIGLIP,
            text_config=llm(text, **changes),
            projection_dim=WIDTH,
            image_token_id=IMAGE,
        )

    return Model(config, asked, packs=False, attention=attention)


MORE: dict[str, Model] = {
    "gemma4": Model(
        lambda: gemma4(True, hidden_size_per_layer_input=6, num_kv_shared_layers=3, use_double_wide_mlp=True), placed
    ),
    "glm4v_moe": Model(
        lambda: hf.Glm4vMoeConfig(
            text_config=llm(
                hf.Glm4vMoeTextConfig,
                rope_parameters={**mrope(1, 1, 2), "partial_rotary_factor": 1.0},
                **{**EXPERTS, **GROUPED_EXPERTS},
            ),
            vision_config=GLM_TOWER,
            **TOKENS,
        ),
        qwen(4, frames_apart=False, videos=False),
    ),
    "glm46v": Model(
        lambda: hf.Glm46VConfig(
            text_config=llm(hf.Glm4vTextConfig, rope_parameters=mrope(1, 1, 2)),
            vision_config={**GLM_TOWER, "model_type": "glm4v_vision"},
            **TOKENS,
        ),
        qwen(4, frames_apart=False, videos=False),
    ),
    "glm_ocr": Model(
        lambda: hf.GlmOcrConfig(
            text_config=llm(hf.GlmOcrTextConfig, rope_parameters=mrope(1, 1, 2)), vision_config=GLM_TOWER, **TOKENS
        ),
        qwen(4, frames_apart=False, videos=False),
    ),
    "paddleocr_vl": Model(
        lambda: hf.PaddleOCRVLConfig(
            text_config=llm(PaddleOCRTextConfig, rope_parameters=mrope(1, 1, 2)),
            vision_config={**GRID_TOWER, "image_size": 16},
            **QWEN_TOKENS,
        ),
        grid(4, 1, flat=False),
    ),
    "exaone4_5": Model(
        lambda: hf.Exaone4_5_Config(
            text_config=llm(
                hf.Exaone4Config,
                sliding_window=4,
                layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            ),
            vision_config={
                **{name: value for name, value in GLM_TOWER.items() if name != "image_size"},
                "num_key_value_heads": 1,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **TOKENS,
        ),
        qwen(4, frames_apart=False),
    ),
    "kimi_k25": Model(
        lambda: hf.Kimi_K25Config(
            text_config=llm(hf.DeepseekV3Config, **LATENT_ATTENTION, **GROUPED_EXPERTS),
            vision_config={**GRID_TOWER, "pos_emb_height": 4, "pos_emb_width": 4},
            projection_hidden_size=16,
            tie_word_embeddings=False,
            **QWEN_TOKENS,
        ),
        grid(4, 1, flat=False),
    ),
    "lfm3_vl": Model(
        lambda: hf.Lfm3VlConfig(
            text_config=llm(hf.Lfm3Config),
            vision_config={**GRID_TOWER, "num_key_value_heads": 1},
            projector_hidden_size=16,
            **QWEN_TOKENS,
        ),
        grid(4, 2, flat=True),
        packs=False,
    ),
    "lfm2_vl": Model(
        lambda: hf.Lfm2VlConfig(
            text_config=llm(
                hf.Lfm2Config,
                layer_types=["conv", "full_attention"] * 2 + ["conv"],
                block_ff_dim=48,
                block_auto_adjust_ff_dim=False,
            ),
            vision_config={
                **{name: value for name, value in TOWER.items() if name != "image_size"},
                "model_type": "siglip2_vision_model",
                "num_patches": 16,
                "vision_use_head": False,
            },
            image_token_id=IMAGE,
            projector_hidden_size=16,
        ),
        tile,
        packs=False,
    ),
    "vipllava": Model(
        lambda: hf.VipLlavaConfig(
            vision_config={"model_type": "clip_vision_model", **TOWER},
            text_config=llm(hf.LlamaConfig),
            image_token_index=IMAGE,
            vision_feature_layer=[-2, -1],
        ),
        square(16),
    ),
    "deepseek_vl": Model(
        lambda: hf.DeepseekVLConfig(vision_config=SIGLIP, text_config=llm(hf.LlamaConfig), image_token_id=IMAGE),
        square(16),
    ),
    "janus": Model(
        lambda: hf.JanusConfig(
            vision_config={
                **{name: value for name, value in TOWER.items() if name != "intermediate_size"},
                "mlp_ratio": 1.5,
                "projection_dim": WIDTH,
            },
            vq_config={
                "embed_dim": 4,
                "num_embeddings": 8,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": WIDTH,
                "image_token_embed_dim": WIDTH,
            },
            text_config=llm(hf.LlamaConfig),
            image_token_id=IMAGE,
        ),
        square(16),
    ),
    "got_ocr2": Model(
        lambda: hf.GotOcr2Config(
            vision_config={
                "hidden_size": 16,
                "output_channels": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 2,
                "window_size": 4,
                "global_attn_indexes": [1],
                "mlp_dim": 24,
                "initializer_range": 0.02,
            },
            text_config=llm(hf.Qwen2Config),
            image_token_index=IMAGE,
        ),
        square(16, side=32),
        attention="eager",
    ),
    "qianfan_ocr": Model(
        lambda: hf.QianfanOCRConfig(
            vision_config={**TOWER, "image_size": [8, 8], "patch_size": [2, 2], "drop_path_rate": 0.0},
            text_config=llm(hf.Qwen3Config),
            image_token_id=IMAGE,
        ),
        square(4, crops=3),
    ),
    "llava_next": Model(
        lambda: hf.LlavaNextConfig(
            vision_config={"model_type": "clip_vision_model", **TOWER},
            text_config=llm(hf.LlamaConfig),
            image_token_index=IMAGE,
            image_grid_pinpoints=[[8, 8], [16, 16]],
        ),
        crops,
    ),
    "lighton_ocr": Model(
        lambda: hf.LightOnOcrConfig(
            vision_config={"model_type": "pixtral", **TOWER, "head_dim": 8},
            text_config=llm(hf.Qwen3Config),
            image_token_id=IMAGE,
            spatial_merge_size=2,
        ),
        sized,
    ),
    "idefics2": Model(
        lambda: hf.Idefics2Config(
            vision_config=TOWER,
            perceiver_config={
                "hidden_size": WIDTH,
                "resampler_n_latents": 4,
                "resampler_depth": 2,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            },
            text_config=llm(hf.MistralConfig),
            image_token_id=IMAGE,
        ),
        idefics,
    ),
    "paligemma": paligemma(hf.GemmaConfig),
    **FURTHER,
    **NEWEST,
}

ALL: dict[str, Model] = {**VISION_LANGUAGE, **MORE}
KNOWN.update(MORE)
