"""Tiny models of further families, which `more_families.py` adds to its own."""

from collections.abc import Callable
from random import Random
from typing import Any

import torch
import transformers as hf
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from tests.models.tiny import names_of, tiny_config
from tests.models.zoo import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    EXPERTS,
    GLM_TOWER,
    IMAGE,
    INDICATORS,
    LAYERS,
    LINEAR_ATTENTION,
    PARTIAL_MROPE,
    QWEN3_TOWER,
    QWEN_TOKENS,
    TOWER,
    VIDEO,
    VISION_END,
    VISION_START,
    WIDTH,
    Draw,
    Model,
    Picture,
    llm,
    mrope,
    pixels,
    qwen,
    square,
    text,
)

TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
INDICES = {"image_token_index": IMAGE, "video_token_index": VIDEO}
CLIP = {"model_type": "clip_vision_model", **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}
GRID_TOWER: dict[str, Any] = {**{k: v for k, v in TOWER.items() if k != "image_size"}, "patch_size": 4}
SAM: dict[str, Any] = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "window_size": 2,
    "global_attn_indexes": [0],
    "mlp_dim": 24,
    "initializer_range": 0.02,
}


def tiny_text(model_type: str, **changes: Any) -> Any:
    """A tiny LLM with every multiplier that it has."""
    types = {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}
    given = {"num_hidden_layers": LAYERS, "output_router_logits": False, **changes}
    return tiny_config(
        model_type, **(types if "layer_types" in names_of(CONFIG_MAPPING[model_type]) else {}) | given
    ).to_dict()


def config(model_type: str, **values: Any) -> Any:
    return lambda: AutoConfig.for_model(model_type, **{k: v() if callable(v) else v for k, v in values.items()})


def frames(rows: int, image: Draw, batched: bool = True) -> Draw:
    """Videos of two frames with these rows together, beside images."""

    def draw(random: Random) -> Picture:
        if random.random() < 0.6:
            return image(random)
        data = pixels(random, 2, 3, 8, 8)
        return Picture("video", data, rows, {"pixel_values_videos": data[None] if batched else data})

    return draw


def several(rows: int) -> Draw:
    def draw(random: Random) -> Picture:
        data = pixels(random, 2, 3, 8, 8)
        return Picture("image", data, rows, {"pixel_values": data[None]})

    return draw


def crops(random: Random) -> Picture:
    data: Any = {"pixel_values": pixels(random, 2, 3, 8, 8), "image_sizes": torch.tensor([8, 8])}
    return Picture("image", data, 16 + 4 * (4 + 1), {name: value[None] for name, value in data.items()})


TILES = ([1, 1], [1, 2], [1, 3], [2, 1], [3, 1])
"""The arrangements of tiles down and across of Llama 3.2 Vision here."""


def filled_tiles(random: Random) -> Picture:
    """Tiles, filled up to three with zeros."""
    number = random.randrange(len(TILES))
    down, across = TILES[number]
    present = (torch.arange(3) < down * across).long()
    data: Any = {
        "pixel_values": pixels(random, 3, 3, 8, 8) * present[:, None, None, None],
        "aspect_ratio_ids": torch.tensor(number + 1),
        "aspect_ratio_mask": present,
    }
    arguments = {
        **{name: value[None] for name, value in data.items()},
        "image_grid_thw": torch.tensor([[1, down, across]]),
    }
    return Picture("image", data, 3 * 5, arguments, tokens=[IMAGE], crosses=True)


def masked(random: Random) -> Picture:
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[:, 2 * random.randint(1, 4) :] = False
    data: Any = {"pixel_values": pixels(random, 3, 8, 8), "pixel_mask": mask}
    return Picture("image", data, 4, {name: value[None] for name, value in data.items()})


def with_local(side: int, small: int, rows: int, local_rows: int) -> Draw:
    """A whole image, and often a crop of it."""

    def draw(random: Random) -> Picture:
        data: Any = {"pixel_values": pixels(random, 3, side, side)}
        number = random.randint(0, 1)
        arguments = {"pixel_values": data["pixel_values"][None], "num_local_patches": torch.tensor([number])}
        if number:
            arguments["pixel_values_local"] = data["pixel_values_local"] = pixels(random, number, 3, small, small)
        return Picture("image", data, rows + number * local_rows, arguments)

    return draw


def two_resolutions(random: Random) -> Picture:
    data: Any = {"pixel_values": pixels(random, 3, 8, 8), "high_res_pixel_values": pixels(random, 3, 32, 32)}
    return Picture("image", data, 16, {name: value[None] for name, value in data.items()})


def strips(factor: int) -> Draw:
    """Slices of several sizes; a row of features for each square of `factor` x `factor` patches."""

    def draw(random: Random) -> Picture:
        video = random.random() < 0.4
        size = [factor * random.randint(1, 2), factor * random.randint(1, 2)]
        sizes = torch.tensor([size] * 2 if video else [size, [factor, factor]][: random.randint(1, 2)])
        patches = int(sizes.prod(1).sum())
        data = pixels(random, 3, 2, 2 * patches)
        given: Any = {"pixel_values": data, "target_sizes": sizes}
        end = "_videos" if video else ""
        arguments = {f"pixel_values{end}": data[None], f"target_sizes{end}": sizes}
        return Picture("video" if video else "image", given, patches // factor**2, arguments)

    return draw


def merged(random: Random) -> Picture:
    video = random.random() < 0.5
    side = 2 if video else 1
    grid = (2 if video else 1, 2 * random.randint(1, 2), 2 * random.randint(1, 2))
    data: Any = {"pixel_values": pixels(random, *grid, 3 * 4 * 4), "merge_sizes": torch.tensor(side)}
    rows = grid[0] * grid[1] * grid[2] // side**2
    kind = "video" if video else "image"
    arguments = {
        "pixel_values_videos" if video else "pixel_values": data["pixel_values"].flatten(0, 2),
        f"{kind}_grid_thw": torch.tensor([grid]),
        f"{kind}_merge_sizes": torch.tensor([side]),
    }
    if video:
        data["compression_mask"] = arguments["video_compression_mask"] = pixels(random, rows) < 0.7
        rows = int(data["compression_mask"].sum())
    return Picture(kind, data, rows, arguments)


def hunyuan(random: Random) -> Picture:
    grid = (1, 2 * random.randint(1, 2), 2 * random.randint(1, 3))
    data = pixels(random, *grid, 3 * 4 * 4)
    rows = grid[1] // 2 * (grid[2] // 2 + 1) + 2
    return Picture("image", data, rows, {"pixel_values": data.flatten(0, 2), "image_grid_thw": torch.tensor([grid])})


def frame_patches(random: Random) -> Picture:
    """As `qwen`, with the frames of a video apart and a patch of one frame."""
    video = random.random() < 0.4
    grid = (2 if video else 1, 2 * random.randint(1, 2), 2 * random.randint(1, 2))
    data = pixels(random, *grid, 3 * 4 * 4)
    kind, end = ("video", "_videos") if video else ("image", "")
    arguments = {f"pixel_values{end}": data.flatten(0, 2), f"{kind}_grid_thw": torch.tensor([grid])}
    return Picture(kind, data, grid[0] * grid[1] * grid[2] // 4, arguments, runs=grid[0])


def ernie(random: Random) -> Picture:
    """Videos join every two time steps, of a video's four."""
    video = random.random() < 0.5
    grid = (4 if video else 1, 2 * random.randint(1, 2), 2 * random.randint(1, 2))
    data = pixels(random, *grid, 3 * 4 * 4)
    kind, end = ("video", "_videos") if video else ("image", "")
    arguments = {f"pixel_values{end}": data.flatten(0, 2), f"{kind}_grid_thw": torch.tensor([grid])}
    return Picture(kind, data, grid[0] * grid[1] * grid[2] // (8 if video else 4), arguments)


def sound(columns: int, rows: Callable[[int], int], shortest: int = 8, windows: int = 1) -> Draw:
    """Sounds of several lengths, which are padded to this number of columns."""

    def draw(random: Random) -> Picture:
        number = random.randint(1, windows)
        lengths = [*[columns] * (number - 1), random.randint(shortest, columns)]
        data = {
            "input_features": pixels(random, number, 8, columns),
            "input_features_mask": (torch.arange(columns) < torch.tensor(lengths)[:, None]).long(),
        }
        return Picture("audio", data, sum(map(rows, lengths)), data)

    return draw


def omni(sound: Draw) -> Draw:
    see = qwen(4, frames_apart=False)

    def draw(random: Random) -> Picture:
        if random.random() < 0.4:
            return sound(random)
        drawn = see(random)
        if drawn.encoder == "video":
            drawn.arguments["second_per_grid_ts"] = torch.tensor([random.choice([0.3, 1.0])])
        return drawn

    return draw


def eighth(columns: int) -> int:
    """Three convolutions make 13 rows of each 100 columns."""
    return columns // 100 * 13 + -(-(columns % 100) // 8)


QWEN3_AUDIO: dict[str, Any] = {"n_window": 50, "n_window_infer": 100, "output_dim": WIDTH, "downsample_hidden_size": 8}


def ovis(random: Random) -> Picture:
    """One to three crops, with indicators around each of them."""
    crops = random.randint(1, 3)
    kinds = [0, *([-1] * 16 + [random.randrange(1, 4)]) * crops, 4]
    data: Any = {"pixel_values": pixels(random, crops, 3, 8, 8), "indicators": torch.tensor(kinds)}
    tokens = [IMAGE if kind < 0 else INDICATORS[kind] for kind in kinds]
    return Picture("image", data, len(kinds), {"pixel_values": data["pixel_values"]}, tokens=tokens)


def molmo(random: Random) -> Picture:
    """An image of one or two crops, or a video of two frames; some rows are made of fewer patches than others."""
    video, number = random.random() < 0.4, random.randint(1, 2)
    pooling = torch.randint(-1, 16 * (2 if video else number), (6, 4), generator=torch.Generator().manual_seed(number))
    pooling[:, 0] = pooling[:, 0].clamp(min=0)
    kind, end = ("video", "_videos") if video else ("image", "")
    data: Any = {
        "pixel_values": pixels(random, 2 if video else number, 16, 3 * 2 * 2),
        f"{kind}_token_pooling": pooling,
        f"{kind}_grids": torch.tensor([2, 1, 3] if video else [1, 2, 2, 2]),
    }
    arguments = {name: value[None] if name.endswith("grids") else value for name, value in data.items()}
    arguments[f"pixel_values{end}"] = arguments.pop("pixel_values")
    return Picture(kind, data, 6, arguments, tokens=[IMAGE] * 6, alone=video, marked=True)


def tiles(random: Random) -> Picture:
    data = pixels(random, 2, 3, 8, 8)
    arguments = {"pixel_values": data[None], "pixel_attention_mask": torch.ones(1, 2, dtype=torch.bool)}
    return Picture("image", data, 2 * 4, arguments)


def phi4(random: Random) -> Picture:
    """A picture of one to three crops behind the whole one, with padding at one side, or a sound with padding."""
    if random.random() < 0.5:
        columns = random.randint(5, 40)
        data: Any = {
            "input_features": pixels(random, 40, 16),
            "input_features_mask": torch.arange(40) < columns,
            "beside_images": torch.tensor(False),  # until its sample is known
        }
        rows = -(-columns // 8)
        arguments = {
            "audio_input_features": data["input_features"][None],
            "audio_attention_mask": data["input_features_mask"][None],
            "audio_embed_sizes": torch.tensor([rows]),
        }
        return Picture("audio", data, rows, arguments)
    down, across = random.choice([(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)])
    whole, seen = torch.ones(4, 4, 4), torch.ones(4 * down, 4 * across)
    seen[4 * down - random.randint(0, 3) :] = 0
    if seen.all():
        seen[:, 4 * across - random.randint(0, 3) :] = 0
    whole[1 : 1 + down * across] = seen.unflatten(1, (across, 4)).unflatten(0, (down, 4)).transpose(1, 2).flatten(0, 1)
    filled = pixels(random, 4, 3, 8, 8)
    crops, size = 1 + down * across, torch.tensor([8 * down, 8 * across])
    filled[crops:] = 0
    data = {"pixel_values": filled[:crops], "image_sizes": size, "image_attention_mask": whole[:crops]}
    height, width = (int(side) for side in (seen[::2, 0].sum(), seen[0, ::2].sum()))
    arguments = {"image_pixel_values": filled[None], "image_sizes": size[None], "image_attention_mask": whole[None]}
    return Picture("image", data, height * (width + 1) + 1 + 2 * 3, arguments)


AUDIO_TOWER: dict[str, Any] = {
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "max_source_positions": 12,
}
OMNI_TOKENS = {
    **QWEN_TOKENS,
    "image_token_index": IMAGE,
    "video_token_index": VIDEO,
    "audio_token_index": AUDIO,
    "audio_token_id": AUDIO,
    "audio_start_token_id": AUDIO_START,
    "audio_end_token_id": AUDIO_END,
}

FURTHER: dict[str, Model] = {
    "qwen2_5_omni_thinker": Model(
        config(
            "qwen2_5_omni_thinker",
            text_config=lambda: llm(hf.Qwen2_5OmniTextConfig, rope_parameters=mrope(1, 1, 2)),
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": WIDTH,
                "patch_size": 4,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            audio_config={**AUDIO_TOWER, "n_window": 8, "output_dim": WIDTH},
            **OMNI_TOKENS,
        ),
        omni(sound(30, lambda columns: ((columns - 1) // 2 + 1 - 2) // 2 + 1)),
    ),
    "qwen3_omni_moe_thinker": Model(
        config(
            "qwen3_omni_moe_thinker",
            text_config=lambda: llm(
                hf.Qwen3OmniMoeTextConfig,
                rope_parameters=mrope(2, 1, 1),
                num_experts=4,
                moe_intermediate_size=24,
                **EXPERTS,
            ),
            vision_config=QWEN3_TOWER,
            audio_config={**AUDIO_TOWER, **QWEN3_AUDIO, "max_source_positions": 16},
            **OMNI_TOKENS,
        ),
        omni(sound(230, eighth)),
    ),
    "qwen2_audio": Model(
        config(
            "qwen2_audio",
            audio_config=AUDIO_TOWER,
            text_config=lambda: llm(hf.Qwen2Config),
            audio_token_index=AUDIO,
        ),
        sound(24, lambda columns: ((columns - 1) // 2 + 1 - 2) // 2 + 1),
    ),
    "audioflamingo3": Model(
        config(
            "audioflamingo3",
            audio_config=AUDIO_TOWER,
            text_config=lambda: llm(hf.Qwen2Config),
            audio_token_id=AUDIO,
        ),
        sound(24, lambda columns: ((columns - 1) // 2 + 1 - 2) // 2 + 1, windows=2),
    ),
    "voxtral": Model(
        config(
            "voxtral",
            audio_config={**AUDIO_TOWER, "encoder_ffn_dim": 64},
            text_config=lambda: llm(hf.LlamaConfig),
            audio_token_id=AUDIO,
        ),
        sound(24, lambda columns: 3, windows=2),
    ),
    "glmasr": Model(
        config(
            "glmasr",
            audio_config={**TOWER, "intermediate_size": 64, "num_mel_bins": 8, "num_key_value_heads": 2},
            text_config=lambda: llm(hf.LlamaConfig),
            audio_token_id=AUDIO,
        ),
        sound(24, lambda columns: ((columns - 1) // 2 + 1 - 4) // 4 + 1, windows=2),
    ),
    "qwen3_asr": Model(
        config(
            "qwen3_asr",
            audio_config={**AUDIO_TOWER, **QWEN3_AUDIO},
            text_config=lambda: llm(hf.Qwen3Config),
            audio_token_id=AUDIO,
        ),
        sound(200, eighth, windows=2),
    ),
    "hunyuan_vl": Model(
        config(
            "hunyuan_vl",
            vision_config={
                **GRID_TOWER,
                "num_key_value_heads": 2,
                "out_hidden_size": WIDTH,
                "text_hidden_size": WIDTH,
                "max_image_size": 32,
                "min_image_size": 4,
            },
            text_config=lambda: llm(
                hf.HunYuanVLTextConfig,
                rope_parameters={**mrope(1, 1, 1, 1), "rope_type": "dynamic", "alpha": 50.0, "factor": 1.0},
            ),
            image_token_id=IMAGE,
        ),
        hunyuan,
    ),
    "ernie4_5_vl_moe": Model(
        config(
            "ernie4_5_vl_moe",
            vision_config=GLM_TOWER,
            text_config=lambda: llm(
                hf.Ernie4_5_VLMoeTextConfig,
                rope_parameters=mrope(1, 1, 2),
                moe_intermediate_size=[24, 16],
                moe_num_experts=4,
                moe_k=2,
                moe_num_shared_experts=1,
                output_router_logits=True,
                router_aux_loss_coef=0.1,
                mlp_layer_types=["dense"] + ["sparse"] * 4,
            ),
            image_start_token_id=VISION_START,
            image_end_token_id=VISION_END,
            video_start_token_id=VISION_START,
            video_end_token_id=VISION_END,
            **TOKENS,
        ),
        ernie,
    ),
    "llava_next_video": Model(
        config(
            "llava_next_video",
            vision_config=CLIP,
            text_config=lambda: llm(hf.LlamaConfig),
            image_grid_pinpoints=[[8, 8], [16, 16]],
            **INDICES,
        ),
        frames(8, crops),
    ),
    "video_llava": Model(
        config("video_llava", vision_config=CLIP, text_config=lambda: llm(hf.LlamaConfig), **INDICES),
        frames(34, square(16)),
    ),
    "perception_lm": Model(
        config(
            "perception_lm",
            vision_config={**SIGLIP, "model_args": {"embed_dim": 16}},
            text_config=lambda: llm(hf.LlamaConfig),
            projector_pooling_ratio=2,
            vision_use_cls_token=False,
            **TOKENS,
        ),
        frames(8, several(8)),
    ),
    "aria": Model(
        config(
            "aria",
            vision_config={**TOWER, "model_type": "idefics3_vision"},
            text_config=lambda: llm(hf.AriaTextConfig, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=2),
            projector_patch_to_query_dict={16: 4},
            vision_feature_layer=-2,
            image_token_index=IMAGE,
        ),
        masked,
    ),
    "deepseek_ocr2": Model(
        config(
            "deepseek_ocr2",
            vision_config={
                "sam_config": {**SAM, "image_size": 64, "patch_size": 4, "downsample_channels": [8, 16]},
                "encoder_config": {
                    **TOWER,
                    "num_key_value_heads": 1,
                },
            },
            text_config=lambda: tiny_text("deepseek_ocr2_text", mlp_layer_types=["dense"] + ["sparse"] * 4),
            image_token_id=IMAGE,
        ),
        with_local(64, 64, 145, 144),
    ),
    "step3p7": Model(
        config(
            "step3p7",
            vision_config={**{k: v for k, v in TOWER.items() if k != "intermediate_size"}, "mlp_ratio": 1.5},
            text_config=lambda: tiny_text("step3p5", mlp_layer_types=["dense"] + ["sparse"] * 4),
            image_token_id=IMAGE,
        ),
        with_local(8, 8, 1, 1),
    ),
    "deepseek_vl_hybrid": Model(
        config(
            "deepseek_vl_hybrid",
            vision_config=SIGLIP,
            high_res_vision_config={"model_type": "sam_vision_model", **SAM, "image_size": 32, "patch_size": 2},
            text_config=lambda: llm(hf.LlamaConfig),
            image_token_id=IMAGE,
        ),
        two_resolutions,
    ),
    "minicpmv4_6": Model(
        config(
            "minicpmv4_6",
            vision_config={**TOWER, "image_size": 16, "insert_layer_id": 0},
            text_config=lambda: llm(hf.Qwen3_5TextConfig, rope_parameters=PARTIAL_MROPE, **LINEAR_ATTENTION),
            insert_layer_id=0,
            **TOKENS,
        ),
        strips(4),
        packs=False,
    ),
    "minicpm_ocr": Model(
        config(
            "minicpm_ocr",
            vision_config={**TOWER, "image_size": 16, "insert_layer_id": 0},
            text_config=lambda: llm(hf.Qwen3Config),
            **TOKENS,
        ),
        strips(2),
    ),
    "video_llama_3": Model(
        config("video_llama_3", vision_config=GRID_TOWER, text_config=lambda: llm(hf.Qwen2Config), **TOKENS), merged
    ),
    "cohere_compass": Model(
        config(
            "cohere_compass",
            vision_config=QWEN3_TOWER,
            text_config=lambda: tiny_text("cohere_compass_text"),
            **QWEN_TOKENS,
        ),
        qwen(4, frames_apart=True),
    ),
    "minimax_m3_vl": Model(
        config(
            "minimax_m3_vl",
            vision_config=GRID_TOWER,
            text_config=lambda: tiny_text(
                "minimax_m3_vl_text",
                output_router_logits=True,
                layer_types=["full_attention", "minimax_m3_sparse"] * 2 + ["full_attention"],
                mlp_layer_types=["dense"] + ["sparse"] * 4,
            ),
            projector_hidden_size=16,
            **INDICES,
        ),
        qwen(4, frames_apart=False),
        packs=False,
    ),
    "glmga": Model(
        config(
            "glmga",
            text_config=lambda: llm(hf.Glm4vTextConfig, rope_parameters=mrope(1, 1, 2)),
            vision_config={**GLM_TOWER, "model_type": "glm4v_vision"},
            **TOKENS,
        ),
        qwen(4, frames_apart=False, videos=False),
    ),
    "cosmos3_edge": Model(
        config(
            "cosmos3_edge",
            vision_config={**GRID_TOWER, "num_patches": 16},
            text_config=lambda: tiny_text("cosmos3_edge_text", rope_parameters=mrope(2, 1, 1)),
            **QWEN_TOKENS,
        ),
        frame_patches,
    ),
    "cosmos3_omni": Model(
        config(
            "cosmos3_omni",
            text_config=lambda: llm(hf.Qwen3VLTextConfig, rope_parameters=mrope(2, 1, 1)),
            vision_config=QWEN3_TOWER,
            **QWEN_TOKENS,
        ),
        qwen(4, frames_apart=True),
    ),
    "muse_glimmer": Model(
        config(
            "muse_glimmer",
            vision_config={**GRID_TOWER, "pos_emb_height": 4, "pos_emb_width": 4},
            text_config=lambda: tiny_text("muse_glimmer_text", layer_rope_theta=[100.0, 10.0] * 2 + [100.0]),
            out_hidden_size=64,
            projector_hidden_size=16,
            **TOKENS,
        ),
        qwen(4, frames_apart=False),
    ),
    "hyperclovax_vision_v2": Model(
        config(
            "hyperclovax_vision_v2",
            vision_config={
                "model_type": "qwen2_5_vl_vision",
                **{k: v for k, v in GLM_TOWER.items() if k != "image_size"},
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            text_config=lambda: tiny_text("hyperclovax"),
            **TOKENS,
        ),
        qwen(4, frames_apart=False),
    ),
    "llama4": Model(
        config(
            "llama4",
            vision_config={
                **{k: v for k, v in TOWER.items() if k != "intermediate_size"},
                "intermediate_size": 64,
                "vision_output_dim": 24,
                "projector_input_dim": 24,
                "projector_output_dim": 24,
            },
            text_config=lambda: tiny_text(
                "llama4_text",
                layer_types=["chunked_attention", "full_attention"] * 2 + ["full_attention"],
                no_rope_layers=[1, 0, 1, 0, 1],
                moe_layers=[1, 3],
            ),
            image_token_index=IMAGE,
        ),
        square(4, crops=3),
        packs=False,
    ),
    "molmo2": Model(
        config(
            "molmo2",
            vision_config={
                **TOWER,
                "image_size": [8, 8],
                "num_position_embeddings": 16,
                "num_key_value_heads": 2,
                "head_dim": 8,
            },
            adapter_config={
                "vision_feature_layer": [1, 0],
                "hidden_size": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "intermediate_size": 24,
                "text_hidden_size": WIDTH,
            },
            text_config=lambda: tiny_text("molmo2_text", additional_vocab_size=4),
            image_patch_id=IMAGE,
        ),
        molmo,
        packs=False,
    ),
    "ovis2": Model(
        config(
            "ovis2",
            vision_config={**TOWER, "vocab_size": 24},
            text_config=lambda: llm(hf.Qwen2Config),
            hidden_size=32,
            vocab_size=64,
            image_token_id=IMAGE,
            visual_indicator_token_ids=list(INDICATORS),
        ),
        ovis,
    ),
    "granite_docling": Model(
        config(
            "granite_docling",
            vision_config={
                **TOWER,
                "num_hidden_layers": 3,
                "out_hidden_size": WIDTH,
                "scale_factor": 2,
                "deepstack_visual_indexes": [0, 2],
            },
            text_config=lambda: tiny_text("granite_docling_text"),
            image_token_id=IMAGE,
        ),
        tiles,
    ),
    "phi4_multimodal": Model(
        text(
            hf.Phi4MultimodalConfig,
            vision_config={  # its weights are drawn so large that more of them would round too much
                **TOWER,
                "hidden_size": 8,
                "intermediate_size": 8,
                "crop_size": 8,
                "image_token_id": IMAGE,
            },
            audio_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_blocks": 2,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 16,
                "depthwise_separable_out_channel": 16,
                "nemo_conv_channels": 8,
                "input_size": 16,
                "bias_max_distance": 3,
                "audio_token_id": AUDIO,
            },
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
                "factor": 4.0,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 6.0],
            },
            sliding_window=12,
            original_max_position_embeddings=20,
            tie_word_embeddings=True,
        ),
        phi4,
    ),
    "mllama": Model(
        lambda: hf.MllamaConfig(
            vision_config={
                **{k: v for k, v in TOWER.items() if k != "num_attention_heads"},
                "attention_heads": 2,
                "patch_size": 4,
                "num_global_layers": 1,
                "intermediate_layers_indices": [0, 1],
                "vision_output_dim": 3 * 16,
                "max_num_tiles": 3,
                "supported_aspect_ratios": list(TILES),
            },
            text_config=llm(MllamaTextConfig, cross_attention_layers=[1, 3]),
            image_token_index=IMAGE,
        ),
        filled_tiles,
    ),
}
