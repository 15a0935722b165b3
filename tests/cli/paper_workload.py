"""configs/qwen3_moe_vit_mmdit.yaml on two CPU processes: the same classes in small, and files where it expects them."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

SMALL: dict[str, dict[str, Any]] = {
    "llm": {
        "model_type": "qwen3_moe",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 262,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "output_router_logits": True,
        "tie_word_embeddings": False,
    },
    "encoders.image": {
        "model_type": "siglip_vision_model",
        "image_size": 56,
        "patch_size": 14,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "generators.image": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 48,
        "axes_dims_rope": [4, 6, 6],
    },
}
CODEC = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "latent_channels": 4,
    "norm_num_groups": 4,
}
TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=2",
    "--trainer.num_nodes=1",
    "--trainer.precision=32-true",
    "--trainer.strategy.init_args.pipeline_parallel_size=2",
    *(f"--model.init_args.{name}.init_args.config={json.dumps(config)}" for name, config in SMALL.items()),
    "--model.init_args.encoders.image.init_args.width=32",
    "--model.init_args.generators.image.init_args.width=32",
    f"--model.init_args.generators.image.init_args.codec.init_args.config={json.dumps(CODEC)}",
    "--data.init_args.processor=bytes",
    "--data.init_args.target.rows=4",
    "--data.init_args.target.shape=[3,16,16]",
    "--data.init_args.token_budget=256",
    "--data.init_args.microbatches=4",
    "--data.init_args.num_workers=0",
    "--data.init_args.loading.cache_dir=cache",
]


def write_files(folder: Path) -> None:
    """data/ with pictures of one colour, questions about them, and wishes for them."""
    data = folder / "data"
    data.mkdir()
    lines: list[str] = []
    for i, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (56, 28 * (1 + i % 2)), colour).save(data / f"{i}.png")
        asked = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": colour}]
        lines.append(json.dumps({"messages": asked, "images": [f"{i}.png"]}))
        wished = [{"role": "user", "content": f"Draw {colour}."}]
        lines.append(json.dumps({"messages": wished, "target": f"{i}.png"}))
    (data / "train.jsonl").write_text("\n".join(8 * lines))
    (data / "val.jsonl").write_text("\n".join(lines))
    (data / "draw.jsonl").write_text("\n".join(lines[1::2]))
