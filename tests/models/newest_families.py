"""Tiny models of the newest families, which `more_families.py` adds to its own."""

from random import Random
from typing import Any

import torch
import transformers as hf

from tests.models.further_families import CLIP, GRID_TOWER, SAM, TOKENS, config, frame_patches, tiny_text
from tests.models.zoo import (
    AUDIO,
    IMAGE,
    TOWER,
    VIDEO,
    WIDTH,
    Model,
    Picture,
    llm,
    pixels,
    qwen,
    square,
)

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def with_grid(random: Random) -> Picture:
    """A whole image, and often crops of it, of which two or three lie beside each other or below one another."""
    across, down = random.choice([(0, 0), (2, 1), (1, 3), (2, 2)])
    data: Any = {"pixel_values": pixels(random, 3, 32, 32), "patches_grid": torch.tensor([across, down])}
    number = across * down
    arguments = {
        "pixel_values": data["pixel_values"][None],
        "num_local_patches": torch.tensor([number]),
        "patches_grid": data["patches_grid"][None],
    }
    if number:
        arguments["pixel_values_local"] = data["pixel_values_local"] = pixels(random, number, 3, 16, 16)
    rows = 2 * (2 + 1) + 1 + (down * (across + 1) if number else 0)
    return Picture("image", data, rows, arguments)


def crops(random: Random) -> Picture:
    """The whole picture, and a crop of it, whose lines of rows end with one more."""
    data: Any = {"pixel_values": pixels(random, 2, 3, 8, 8), "image_sizes": torch.tensor([8, 8])}
    return Picture("image", data, 4 + 2 * (2 + 1), {name: value[None] for name, value in data.items()})


def grid(random: Random) -> Picture:
    shape = (1, 2 * random.randint(1, 2), 2 * random.randint(1, 2))
    data = pixels(random, *shape, 3 * 4 * 4)
    arguments = {"pixel_values": data.flatten(0, 2), "image_grid_thw": torch.tensor([shape])}
    return Picture("image", data, shape[1] * shape[2] // 4, arguments)


def patches_alone(random: Random) -> Picture:
    data = pixels(random, random.randint(1, 4), 2, 4, 4, 3)
    return Picture("image", data, len(data), {"pixel_values": data})


def dots(random: Random) -> Picture:
    """Images, videos, and sounds of one or two chunks."""
    if random.random() < 0.6:
        return frame_patches(random)
    samples = torch.tensor([*[48] * random.randint(0, 1), random.randint(8, 48)])
    data: Any = {"input_features": pixels(random, len(samples), 8, 24), "chunk_sample_lengths": samples}
    return Picture("audio", data, int((-(-samples // 16)).sum()), data)


def unified(random: Random) -> Picture:
    """Images and videos of patches with their places, and sounds of frames, padded."""
    kind, number = random.choice(["image", "video", "audio"]), random.randint(1, 6)
    if kind == "audio":
        sound: Any = {"input_features": pixels(random, 1, 6, 8), "input_features_mask": torch.arange(6)[None] < number}
        return Picture("audio", sound, number, sound)
    places = torch.tensor([[k % 3, k // 3] if k < number else [-1, -1] for k in range(6)])
    frames = 2 if kind == "video" else 1
    data: Any = {
        "pixel_values": pixels(random, frames, 6, 3 * 4 * 4),
        "image_position_ids": places.repeat(frames, 1, 1),
    }
    if kind == "image":
        return Picture("image", {name: value[0] for name, value in data.items()}, number, data)
    arguments = {
        "pixel_values_videos": data["pixel_values"],
        "video_position_ids": data["image_position_ids"],
        "num_frames_per_video": torch.tensor([frames]),
    }
    return Picture("video", data, frames * number, arguments, frames)


NEWEST: dict[str, Model] = {
    "pp_chart2table": Model(
        config(
            "pp_chart2table",
            vision_config={**SAM, "image_size": 32, "patch_size": 2, "window_size": 4, "global_attn_indexes": [1]},
            text_config=lambda: llm(hf.Qwen2Config),
            image_token_index=IMAGE,
        ),
        square(16, side=32),
        attention="eager",
    ),
    "dots3_note": Model(
        config(
            "dots3_note",
            vision_config={
                **GRID_TOWER,
                "moe_intermediate_size": 24,
                "mlp_layer_types": ["dense", "sparse"],
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "adapter_in_dim": 16,
                "adapter_out_dim": WIDTH,
            },
            audio_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "feature_size": 8,
                "hop_length": 2,
                "downsample_hidden_size": 8,
                "adapter_input_size": 16,
                "adapter_out_dim": WIDTH,
            },
            text_config=lambda: tiny_text(
                "dots3_note_text",
                layer_types=["sliding_attention", "indexed_attention"] * 2 + ["sliding_attention"],
                mlp_layer_types=["dense"] + ["sparse"] * 4,
            ),
            audio_token_id=AUDIO,
            **TOKENS,
        ),
        dots,
    ),
    "muse_spark": Model(
        config(
            "muse_spark",
            vision_config={**GRID_TOWER, "pos_emb_height": 4, "pos_emb_width": 4},
            audio_config={
                "patch_sizes": [2, 2],
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "out_hidden_size": WIDTH,
            },
            text_config=lambda: tiny_text(
                "muse_spark_text",
                moe_hidden_size=16,
                layer_rope_theta=[100.0, 0.0] * 2 + [100.0],
                mlp_layer_types=["dense"] + ["sparse"] * 4,
                qk_scale_factor=1.5,
            ),
            out_hidden_size=64,
            projector_hidden_size=16,
            audio_token_id=AUDIO,
            **TOKENS,
        ),
        qwen(4, frames_apart=False),
    ),
    "granite4_vision": Model(
        config(
            "granite4_vision",
            vision_config={**CLIP, "hidden_size": 64},
            qformer_config={"num_hidden_layers": 1, "intermediate_size": 24, **dict.fromkeys(DROPOUTS, 0.0)},
            text_config=lambda: tiny_text("granite4_vision_text"),
            image_token_index=IMAGE,
            image_grid_pinpoints=[[8, 8], [16, 16]],
            downsample_rate="1/2",
            deepstack_layer_map=[[-2, 3], [-1, 1], [0, 4]],
            spatial_vision_layer=-2,
            spatial_target_layers=[0, 1, 3, 9],
            projector_dropout=0.0,
        ),
        crops,
    ),
    "nemotron_h_omni": Model(
        config(
            "nemotron_h_omni",
            vision_config={
                **GRID_TOWER,
                "mlp_ratio": 1.5,
                "max_img_size": 32,
                "num_cls_tokens": 2,
                "num_registers": 1,
                "video_temporal_patch_size": 2,
            },
            audio_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_mel_bins": 16,
                "subsampling_conv_channels": 8,
                "projection_hidden_size": 16,
                "projection_bias": False,
            },
            text_config=lambda: tiny_text(
                "nemotron_h", layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"]
            ),
            vision_hidden_size=16,
            projector_hidden_size=24,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
        ),
        grid,
        packs=False,
    ),
    "inkling_mm_model": Model(
        config(
            "inkling_mm_model",
            vision_config={"patch_size": 4, "temporal_patch_size": 2, "num_hidden_layers": 2, "hidden_size": 16},
            audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
            text_config=lambda: tiny_text(
                "inkling_text",
                layer_types=["hybrid_sliding", "hybrid"] * 2 + ["hybrid_sliding"],
                mlp_layer_types=["dense"] + ["sparse"] * 4,
            ),
            image_token_id=IMAGE,
            audio_token_id=AUDIO,
        ),
        patches_alone,
        packs=False,
    ),
    "unlimited_ocr": Model(
        config(
            "unlimited_ocr",
            vision_config={
                "sam_config": {**SAM, "image_size": 32, "patch_size": 4, "downsample_channels": [8, 16]},
                "encoder_config": {**TOWER, "image_size": 32, "patch_size": 16},
            },
            text_config=lambda: tiny_text(
                "unlimited_ocr_text",
                layer_types=["reference_sliding_attention", "full_attention"] * 2 + ["reference_sliding_attention"],
                mlp_layer_types=["dense"] + ["sparse"] * 4,
            ),
            image_token_id=IMAGE,
        ),
        with_grid,
    ),
    "gemma4_unified": Model(
        config(
            "gemma4_unified",
            vision_config={
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 16,
                "mm_posemb_size": 80,
                "output_proj_dims": 16,
            },
            audio_config={"audio_embed_dim": 8},
            text_config=lambda: tiny_text(
                "gemma4_unified_text",
                layer_types=["sliding_attention", "full_attention"] * 2 + ["full_attention"],
                num_kv_shared_layers=3,
            ),
            audio_token_id=AUDIO,
            **TOKENS,
        ),
        unified,
        packs=False,
    ),
}
