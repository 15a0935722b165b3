"""A tiny model of every family that is supported, built from the real config classes, and batches for it.

A batch is made twice: as the pipeline's microbatches, and as arguments of the library's own forward for each sample.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
import transformers as hf
from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.mllama import processing_mllama

from bigmac_lightning.contracts.batch import Batch, MediaData, MediaItem, Microbatch, PipelineLayout
from bigmac_lightning.contracts.owners import assign_owners
from bigmac_lightning.models.meta_model import auto_class, implementations

WIDTH, VOCABULARY, LAYERS = 32, 64, 5
IMAGE, VIDEO, VISION_START, VISION_END = 60, 61, 58, 59
AUDIO, AUDIO_START, AUDIO_END = 57, 55, 56
SPECIAL = 50
"""Token ids of words are smaller."""
MEDIA = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
INDICATORS = range(50, 55)
"""Tokens of Ovis 2 among those of an image, which its features replace as well."""

TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 2,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
QWEN3_TOWER: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1, 2],
}
GLM_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
    "patch_size": 4,
    "image_size": 16,
}
QWEN3_5_TOWER = {name: value for name, value in QWEN3_TOWER.items() if name != "deepstack_visual_indexes"}
LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2) + ["linear_attention"] * (LAYERS % 2),
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def mrope(*section: int) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": list(section), "rope_theta": 10000.0}


PARTIAL_MROPE = {**mrope(2, 1, 1), "partial_rotary_factor": 1.0, "mrope_interleaved": True}


@dataclass
class Picture:
    """A media item, for both sides.

    Attributes:
        encoder: "image", "video" or "audio".
        data: what the pipeline's encoder gets.
        rows: tokens that it turns into.
        runs: how many runs of tokens these are, with others between them.
        tokens: its tokens, if they are not all the same.
        alone: whether its sample can have no other item.
        marked: whether the input token_type_ids says which tokens are its own, or around these.
        crosses: whether all of its rows belong to one token, which they do not replace.
        arguments: what the library's forward gets for this one item; arguments of all items are concatenated.
        asked: whether the words before the items of its sample, and the next one, are not learnt.
    """

    encoder: str
    data: MediaData
    rows: int
    arguments: dict[str, Tensor] = field(default_factory=dict)
    runs: int = 1
    tokens: list[int] = field(default_factory=list)
    alone: bool = False
    marked: bool = False
    asked: bool = False
    crosses: bool = False

    @property
    def token(self) -> int:
        return MEDIA[self.encoder]


Draw = Callable[[Random], Picture]


def pixels(random: Random, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(random.randrange(2**31)))


def qwen(patch: int, frames_apart: bool, videos: bool = True) -> Draw:
    def draw(random: Random) -> Picture:
        video = videos and random.random() < 0.4
        grid = (2 if video else 1, 2 * random.randint(1, 2), 2 * random.randint(1, 2))
        data = pixels(random, *grid, 3 * 2 * patch * patch)
        names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
        arguments = {names[0]: data.flatten(0, 2), names[1]: torch.tensor([grid])}
        rows = grid[0] * grid[1] * grid[2] // 4
        return Picture("video" if video else "image", data, rows, arguments, grid[0] if frames_apart else 1)

    return draw


def square(rows: int, crops: int = 0, side: int = 8) -> Draw:
    def draw(random: Random) -> Picture:
        number = random.randint(1, crops) if crops else 1
        data = pixels(random, number, 3, side, side)
        return Picture("image", data if crops else data[0], rows * number, {"pixel_values": data})

    return draw


def idefics(random: Random) -> Picture:
    data = pixels(random, 3, 8, 8)
    return Picture("image", data, 4, {"pixel_values": data[None]})


def sized(random: Random) -> Picture:
    data = pixels(random, 3, 8, 8)
    return Picture("image", data, 4, {"pixel_values": data[None], "image_sizes": torch.tensor([[8, 8]])})


def onevision(random: Random) -> Picture:
    if random.random() < 0.5:
        data = pixels(random, 2, 3, 8, 8)
        return Picture("video", data, 2 * 4 + 1, {"pixel_values_videos": data[None]})
    data = pixels(random, 3, 8, 8)
    return Picture("image", data, 16 + 1, {"pixel_values": data[None], "image_sizes": torch.tensor([[8, 8]])})


@dataclass(frozen=True)
class Model:
    """A family.

    Attributes:
        config: makes its config.
        draw: makes a media item; ``None``: text only.
        packs: whether several samples in a row are supported.
        attention: the implementation; sdpa where the library has it.
    """

    config: Callable[[], hf.PreTrainedConfig]
    draw: Draw | None = None
    packs: bool = True
    attention: str = "sdpa"


def save(name: str, folder: Path, config: Any = None) -> None:
    """A checkpoint of a family with random weights: also of those that start as zeros or ones."""
    config = KNOWN[name].config() if config is None else config
    auto = auto_class(config)
    torch.manual_seed(2)
    whole: Any = auto.from_config(config)
    draw_weights(whole, 0.01)
    whole.save_pretrained(folder / name)


def draw_weights(whole: Any, size: float) -> None:
    """Add random numbers to all weights; large ones to gates of a single number, which start closed."""
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            is_gate = "gate" in name and parameter.numel() == 1
            parameter.add_((0.5 if is_gate else size) * torch.randn_like(parameter))


def load(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The library's own model, unsplit."""
    auto = auto_class(KNOWN[name].config())
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}  # other kernels have no float64
    implementation = implementations(KNOWN[name].config(), KNOWN[name].attention)
    whole = auto.from_pretrained(folder / name, dtype=dtype, attn_implementation=implementation, **experts)
    for weight, parameter in whole.named_parameters():  # its constructor freezes them, and its loader forgets
        if weight.endswith("audio_tower.embed_positions.weight"):
            parameter.requires_grad_(False)
    return whole


def text(kind: type[Any], **changes: Any) -> Callable[[], Any]:
    return lambda: kind(**{**TEXT, **changes})


def llm(kind: type[Any] = hf.Qwen2Config, **changes: Any) -> dict[str, Any]:
    return kind(**{**TEXT, **changes}).to_dict()


DECODERS: dict[str, Model] = {
    "qwen2": Model(text(hf.Qwen2Config, tie_word_embeddings=True)),
    "qwen3": Model(text(hf.Qwen3Config, tie_word_embeddings=True)),
    "qwen3_moe": Model(
        text(hf.Qwen3MoeConfig, num_experts=4, moe_intermediate_size=24, mlp_only_layers=[1], **EXPERTS)
    ),
    "llama": Model(text(hf.LlamaConfig)),
    "mistral": Model(text(hf.MistralConfig, sliding_window=4)),
    "mixtral": Model(text(hf.MixtralConfig, num_local_experts=4, **EXPERTS)),
    "gemma2": Model(text(hf.Gemma2Config, sliding_window=4, query_pre_attn_scalar=8), attention="eager"),
    "gemma3_text": Model(text(hf.Gemma3TextConfig, sliding_window=4, query_pre_attn_scalar=8)),
    "gemma3n_text": Model(
        text(
            hf.Gemma3nTextConfig,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=6,
            intermediate_size=[48] * LAYERS,
            activation_sparsity_pattern=[0.5] + [0.0] * (LAYERS - 1),
            layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            num_kv_shared_layers=3,
            altup_num_inputs=3,
            laurel_rank=8,
            sliding_window=4,
        )
    ),
    "gemma4_text": Model(
        text(
            hf.Gemma4TextConfig,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=6,
            layer_types=["sliding_attention", "full_attention"] * 2 + ["full_attention"],
            num_kv_shared_layers=3,
            global_head_dim=16,
            use_double_wide_mlp=True,
            sliding_window=4,
        )
    ),
}

VISION_LANGUAGE: dict[str, Model] = {
    "qwen2_vl": Model(
        lambda: hf.Qwen2VLConfig(
            text_config=llm(hf.Qwen2VLTextConfig, rope_parameters=mrope(1, 1, 2)),
            vision_config={
                "depth": 2,
                "embed_dim": 16,
                "mlp_ratio": 2,
                "num_heads": 2,
                "hidden_size": WIDTH,
                "patch_size": 4,
            },
            **QWEN_TOKENS,
        ),
        qwen(4, frames_apart=False),
    ),
    "qwen2_5_vl": Model(
        lambda: hf.Qwen2_5_VLConfig(
            text_config=llm(hf.Qwen2_5_VLTextConfig, rope_parameters=mrope(1, 1, 2)),
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
            **QWEN_TOKENS,
        ),
        qwen(4, frames_apart=False),
    ),
    "qwen3_vl": Model(
        lambda: hf.Qwen3VLConfig(
            text_config=llm(hf.Qwen3VLTextConfig, rope_parameters=mrope(2, 1, 1), tie_word_embeddings=True),
            vision_config=QWEN3_TOWER,
            tie_word_embeddings=True,
            **QWEN_TOKENS,
        ),
        qwen(4, frames_apart=True),
    ),
    "qwen3_vl_moe": Model(
        lambda: hf.Qwen3VLMoeConfig(
            text_config=llm(
                hf.Qwen3VLMoeTextConfig,
                rope_parameters=mrope(2, 1, 1),
                num_experts=4,
                moe_intermediate_size=24,
                **EXPERTS,
            ),
            vision_config=QWEN3_TOWER,
            **QWEN_TOKENS,
        ),
        qwen(4, frames_apart=True),
    ),
    "qwen3_5": Model(
        lambda: hf.Qwen3_5Config(
            text_config=llm(hf.Qwen3_5TextConfig, rope_parameters=PARTIAL_MROPE, **LINEAR_ATTENTION),
            vision_config=QWEN3_5_TOWER,
            **QWEN_TOKENS,
        ),
        qwen(4, frames_apart=True),
        packs=False,
    ),
    "qwen3_5_moe": Model(
        lambda: hf.Qwen3_5MoeConfig(
            text_config=llm(
                hf.Qwen3_5MoeTextConfig,
                rope_parameters=PARTIAL_MROPE,
                num_experts=4,
                moe_intermediate_size=24,
                shared_expert_intermediate_size=16,
                **LINEAR_ATTENTION,
                **EXPERTS,
            ),
            vision_config=QWEN3_5_TOWER,
            **QWEN_TOKENS,
        ),
        qwen(4, frames_apart=True),
        packs=False,
    ),
    "glm4v": Model(
        lambda: hf.Glm4vConfig(
            text_config=llm(hf.Glm4vTextConfig, rope_parameters=mrope(1, 1, 2)),
            vision_config=GLM_TOWER,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        qwen(4, frames_apart=False, videos=False),
    ),
    "aya_vision": Model(
        lambda: hf.AyaVisionConfig(
            vision_config={"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False},
            text_config=llm(hf.Cohere2Config, sliding_window=4, logit_scale=0.5),
            image_token_index=IMAGE,
        ),
        square(4, crops=3),
    ),
    "cohere2_vision": Model(
        lambda: hf.Cohere2VisionConfig(
            vision_config={"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False},
            text_config=llm(hf.Cohere2Config, sliding_window=4, logit_scale=0.5),
            image_token_id=IMAGE,
            alignment_intermediate_size=24,
        ),
        square(4, crops=3),
    ),
    "llava": Model(
        lambda: hf.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **TOWER},
            text_config=llm(hf.LlamaConfig),
            image_token_index=IMAGE,
            image_token_id=IMAGE,
        ),
        square(16),
    ),
    "llava_onevision": Model(
        lambda: hf.LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False},
            text_config=llm(hf.Qwen2Config),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[8, 8], [16, 16]],
            vision_feature_layer=-1,
        ),
        onevision,
    ),
    "internvl": Model(
        lambda: hf.InternVLConfig(
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": [8, 8],
                "patch_size": [2, 2],
            },
            text_config=llm(hf.Qwen2Config),
            image_token_id=IMAGE,
        ),
        square(4, crops=3),
    ),
    "mistral3": Model(
        lambda: hf.Mistral3Config(
            vision_config={"model_type": "pixtral", **TOWER, "head_dim": 8},
            text_config=llm(hf.MistralConfig),
            image_token_index=IMAGE,
            image_token_id=IMAGE,
            spatial_merge_size=2,
        ),
        sized,
    ),
    "idefics3": Model(
        lambda: hf.Idefics3Config(
            vision_config=TOWER, text_config=llm(hf.LlamaConfig), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
        ),
        idefics,
    ),
    "smolvlm": Model(
        lambda: hf.SmolVLMConfig(
            vision_config=TOWER, text_config=llm(hf.LlamaConfig), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
        ),
        idefics,
    ),
    "gemma3": Model(
        lambda: hf.Gemma3Config(
            vision_config={"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False},
            text_config=llm(hf.Gemma3TextConfig, sliding_window=4, query_pre_attn_scalar=8),
            mm_tokens_per_image=4,
            image_token_id=IMAGE,
            image_token_index=IMAGE,
        ),
        square(4),
        packs=False,
    ),
}

MODELS = {**DECODERS, **VISION_LANGUAGE}
KNOWN = dict(MODELS)
"""These, and those of `more_families.py`, once it is imported."""


def with_llm(name: str, kind: type[Any], attention: str = "sdpa", **changes: Any) -> Model:
    """A family with another LLM inside."""

    def config() -> Any:
        made = MODELS[name].config().to_dict()
        return hf.AutoConfig.for_model(**{**made, "text_config": llm(kind, **changes)})

    return replace(MODELS[name], config=config, attention=attention)


@dataclass
class Sequence:
    """One sample: tokens with its items' placeholders among them."""

    tokens: list[int]
    items: list[Picture]


def sequence(random: Random, draw: Draw | None) -> Sequence:
    words = [random.randrange(3, SPECIAL) for _ in range(random.randint(4, 9))]
    if draw is None:
        return Sequence(words, [])
    items = [draw(random) for _ in range(random.randint(1, 2))]
    items = [item for item in items if item.alone][:1] or items
    tokens = words[:2]
    for item in items:
        for _ in range(item.runs):
            start, end = (AUDIO_START, AUDIO_END) if item.encoder == "audio" else (VISION_START, VISION_END)
            placed = item.tokens or [item.token] * (item.rows // item.runs)
            tokens += [start, *placed, end, random.randrange(3, SPECIAL)]
    return with_neighbours(Sequence(tokens + words[2:], items))


def with_neighbours(sample: Sequence) -> Sequence:
    """Tell the sounds of Phi-4-multimodal whether their sample has images."""
    images = any(item.encoder == "image" for item in sample.items)
    for item in sample.items:
        if isinstance(item.data, dict) and "beside_images" in item.data:
            item.data["beside_images"] = torch.tensor(images)
    return sample


def microbatch(rows: list[list[Sequence]]) -> Microbatch:
    """Rows of samples, one after another, padded on the right; each predicts its words but the first, or but those
    that are asked."""
    length = max(sum(len(sample.tokens) for sample in row) for row in rows)
    made = Microbatch({"input_ids": torch.zeros(len(rows), length, dtype=torch.long)})
    positions, tokens = torch.arange(length).repeat(len(rows), 1), torch.zeros(len(rows), length, dtype=torch.long)
    labelled, media = [], []
    grids = {name: [] for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
    for b, row in enumerate(rows):
        start = 0
        for sample in row:
            asked = max((s for s, token in enumerate(sample.tokens) if token >= SPECIAL), default=0) + 2
            asked = asked if any(item.asked for item in sample.items) else 1
            for s, token in enumerate(sample.tokens):
                flat = b * length + start + s
                made.inputs["input_ids"].view(-1)[flat] = token
                positions.view(-1)[flat], tokens.view(-1)[flat] = s, 1
                if token in (*MEDIA.values(), *INDICATORS):
                    media += [flat] * (sample.items[0].rows if sample.items[0].crosses else 1)
                elif s >= asked:
                    labelled.append(flat)
            start += len(sample.tokens)
            for item in sample.items:
                made.media.append(MediaItem(item.encoder, item.rows, float(item.rows), data=item.data))
                for name in grids.keys() & item.arguments.keys():
                    grids[name].append(item.arguments[name])
        positions[b, start:] = torch.arange(length - start) if len(row) > 1 else positions[b, start:]
    if any(item.marked for row in rows for sample in row for item in sample.items):
        marked = torch.tensor([IMAGE, VISION_START, VISION_END])
        made.inputs["token_type_ids"] = torch.isin(made.inputs["input_ids"], marked).long()
    made.inputs["position_ids"] = positions
    made.inputs["token_mask"] = tokens
    made.inputs.update({name: torch.cat(parts) for name, parts in grids.items() if parts})
    made.labels = made.inputs["input_ids"].view(-1)[torch.tensor(labelled)]
    made.label_positions = torch.tensor(labelled) - 1
    made.media_positions = torch.tensor(media, dtype=torch.long)
    return made


def sequences(model: Model, packed: bool, seed: int = 3) -> list[list[list[Sequence]]]:
    """Rows of samples of each microbatch: unequal ones, one of text alone, and several samples per row if packed."""
    random = Random(seed)
    several = 2 if packed else 1
    draws = [model.draw, model.draw, None, model.draw]
    return [[[sequence(random, draw) for _ in range(several)] for _ in range(2)] for draw in draws]


def batch(model: Model, packed: bool, layout: PipelineLayout) -> Batch:
    microbatches = [microbatch(rows) for rows in sequences(model, packed)]
    assign_owners(microbatches, layout)
    for given in microbatches:
        for item in given.media:
            item.data = item.data if item.owner == layout.rank else None
    return Batch(microbatches, layout)


def _crossed(grids: Tensor, made: dict[str, Any]) -> dict[str, Tensor]:
    """The arguments of Llama 3.2 Vision for the images of a sample, with the mask that its processor makes."""
    ids, masks = made["input_ids"], made["aspect_ratio_mask"]
    seen = processing_mllama.get_cross_attention_token_mask(ids[0].tolist(), IMAGE)
    mask = processing_mllama.convert_sparse_cross_attention_mask_to_dense(
        [seen], [grids.prod(1).tolist()], masks.shape[1], ids.shape[1]
    )
    of_sample = {name: made[name][None] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    return {**of_sample, "cross_attention_mask": torch.from_numpy(mask)}


def reference_loss(whole: Any, model: Model, packed: bool) -> Tensor:
    """The loss by the library's own forward of each sample alone, so that no sample can see another one or any padding.

    The load balancing loss of a microbatch is the library's function of the router logits of all its samples.
    """
    text = whole.config.get_text_config()
    coefficient = text.router_aux_loss_coef if getattr(text, "output_router_logits", False) else 0.0
    losses, auxiliary, labels = [], [], 0
    for rows in sequences(model, packed):
        router_logits = []
        for sample in (sample for row in rows for sample in row):
            given = microbatch([[sample]])
            out = forward(whole, sample, given)
            logits = out.logits.flatten(0, 1)[given.label_positions]
            losses.append(torch.nn.functional.cross_entropy(logits, given.labels, reduction="sum"))
            labels += len(given.labels)
            router_logits += [out.router_logits] if coefficient else []
        auxiliary += [balancing_loss(whole, router_logits)] if coefficient else []
    loss = torch.stack(losses).sum() / labels
    return loss + coefficient * torch.stack(auxiliary).mean() if auxiliary else loss


def balancing_loss(whole: Any, router_logits: list[Any]) -> Tensor:
    """The library's load balancing loss of the router logits of several samples, each a tuple with one for each
    layer."""
    text = whole.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    experts = next(getattr(text, name) for name in names if getattr(text, name, None) is not None)
    per_token = next(n for name in ("num_experts_per_tok", "moe_k") if (n := getattr(text, name, None)) is not None)
    library = sys.modules[type(whole).__module__].load_balancing_loss_func
    return library(tuple(torch.cat(layer) for layer in zip(*router_logits, strict=True)), experts, per_token)


def forward(whole: Any, sample: Sequence, given: Microbatch) -> Any:
    """What the library's forward returns for one sample."""
    # Llama 4 fails when it makes its output, because its decoder's has no such field.
    with patch.object(MoeCausalLMOutputWithPast, "image_outputs", None, create=True):
        return whole(**arguments(whole, sample, given))


def arguments(whole: Any, sample: Sequence, given: Microbatch) -> dict[str, Any]:
    """The arguments of the library's forward for one sample, as the model's processor would make them."""
    ids = given.inputs["input_ids"]
    made: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    items = [item.arguments for item in sample.items]
    for name in {name for item in items for name in item}:
        strips = whole.config.model_type.startswith("minicpm") and name.startswith("pixel_values")
        joined = torch.cat([item[name] for item in items if name in item], -1 if strips else 0)
        made[name] = joined.to(whole.dtype) if joined.is_floating_point() else joined
    if whole.config.model_type == "mllama":
        return made if not items else {**made, **_crossed(made.pop("image_grid_thw"), made)}
    kinds = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    kind = whole.config.model_type
    if kind.endswith(("omni_thinker", "omni_moe_thinker")):
        made["attention_mask"] = torch.ones_like(ids)  # without one, it has the positions of text
        if "input_features_mask" in made:
            made["feature_attention_mask"] = made.pop("input_features_mask")
        if "second_per_grid_ts" in made:
            made["video_second_per_grid"] = made.pop("second_per_grid_ts")
        return made
    if kind == "molmo2":
        made["mm_token_type_ids"] = given.inputs.get("token_type_ids", torch.zeros_like(ids))
        before, pooling = 0, list[Tensor]()
        for item in items if "image_token_pooling" in made else ():
            pooling.append(item["image_token_pooling"] + before * (item["image_token_pooling"] >= 0))
            before += item["pixel_values"].shape[:2].numel()
        made.update({"image_token_pooling": torch.cat(pooling)} if pooling else {})
    if kind == "nemotron_h_omni" and items:
        made["image_grid_hw"] = made.pop("image_grid_thw")[:, 1:]
    if kind == "unlimited_ocr":
        made.update({name: made[name].tolist() for name in ("num_local_patches", "patches_grid") if name in made})
    if kind == "ernie4_5_vl_moe":
        made["moe_mm_token_type_ids"] = (ids >= SPECIAL).int()
    if kind == "qwen2_audio" and "input_features" in made:
        made["feature_attention_mask"] = made.pop("input_features_mask")
    if kind == "voxtral":
        made.pop("input_features_mask", None)
    if "image_grid_thw" in made or "video_grid_thw" in made:
        made["mm_token_type_ids"] = kinds
    if whole.config.model_type == "gemma3":
        made["token_type_ids"] = kinds
    if whole.config.model_type == "paligemma":
        prompt = given.inputs.get("prompt_tokens", given.label_positions.min() + 1)
        made["token_type_ids"] = (torch.arange(ids.shape[1]) >= prompt).long()[None]
    if whole.config.model_type in ("gemma4", "gemma4_unified"):
        made["mm_token_type_ids"] = kinds
    if whole.config.model_type == "llava_onevision" and "image_sizes" in made:
        made["batch_num_images"] = [max(2, len(made["image_sizes"]))]
    if whole.config.model_type in ("idefics2", "idefics3", "smolvlm") and "pixel_values" in made:
        made["pixel_values"] = made["pixel_values"][None]
    if whole.config.model_type in ("qwen3_vl_moe", "qwen3_5_moe"):
        made["output_router_logits"] = True  # its forward does not look into its text config
    return made
