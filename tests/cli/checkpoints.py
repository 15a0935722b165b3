"""What the configs of real models name, tiny: model folders with their processors, and conversations about pictures."""

import re
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from bigmac_lightning.datamodules import byte_tokenizer
from tests.datamodules.examples import pictures, said, write_jsonl
from tests.datamodules.format_table import add, parquet
from tests.datamodules.processors import write_model
from tests.models import zoo

QWEN3_TEMPLATE = (  # for text only, as such models have
    "{% for m in messages %}{% if m.content is string %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

STRATEGY = "--trainer.strategy.init_args"
PEERS = {
    "qwen3_vl_long": [f"{STRATEGY}.context_parallel_size=2"],
    "qwen3_vl_moe": [f"{STRATEGY}.tensor_parallel_size=2", f"{STRATEGY}.expert_parallel_size=2"],
}
"""By config, how two processes share a stage where the config says four."""
BUFFERS = {"qwen3_vl_streams": ["--data.packing.buffer_size=16", "--data.mixture.stream_parts=2"]}
"""By config, buffers for data that are few."""


def write_inputs(config: str, folder: Path) -> None:
    """Everything below ``checkpoints/`` and ``data/`` that a config's text names, at these paths in a folder."""
    for name in sorted(set(re.findall(r"(?:path|config|weights): checkpoints/([\w.-]+)", config))):
        path = folder / "checkpoints" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            (write,) = (write for prefix, write in MODELS.items() if name.startswith(prefix))
            write(path)
    for name in sorted(set(re.findall(r"path: data/([\w.]+)", config))):
        write_conversations(folder / "data" / name)
    for name in sorted(set(re.findall(r"(?:paths|data_files): data/(\w+/\*\.\w+)", config))):
        write_many(folder / "data" / name)


def write_conversations(path: Path, number: int = 40) -> None:
    """About one, two or no pictures, in turn."""
    path.parent.mkdir(exist_ok=True)
    records: list[dict[str, Any]] = []
    for i, picture in enumerate(pictures(number)):
        names = [f"{i}.png", f"{(i + 1) % number}.png"][: i % 3]
        (path.parent / f"{i}.png").write_bytes(picture.read_bytes())
        records.append({"messages": said("<image>" * len(names) + "What?", "x" * (1 + i % 4)), "images": names})
    write_jsonl(path, records)


def write_many(pattern: Path, files: int = 2, number: int = 12) -> None:
    """Files that a pattern fits: conversations in Parquet, captions in tars, or texts."""
    for i in range(files):
        folder, records = pattern.parent, list(enumerate(pictures(number)))
        folder.mkdir(parents=True, exist_ok=True)
        if pattern.suffix == ".parquet":
            rows = [{"messages": said("<image>What?", "x" * (1 + n % 4)), "images": [_content(p)]} for n, p in records]
            Path(parquet(folder, rows)).rename(folder / f"{i}.parquet")
        elif pattern.suffix == ".tar":
            with tarfile.open(folder / f"{i}.tar", "w") as tar:
                for n, picture in records:
                    add(tar, f"{n:03}.png", picture.read_bytes())
                    add(tar, f"{n:03}.txt", f"shape {n}")
        else:
            (folder / f"{i}.txt").write_text("\n\n".join(f"text {i} {n}" for n in range(number)))


def _content(picture: Path) -> dict[str, Any]:
    return {"bytes": picture.read_bytes(), "path": picture.name}


def _save(model: Any, folder: Path) -> None:
    torch.manual_seed(0)
    model.save_pretrained(folder)


def _vision_language(family: str, folder: Path) -> None:
    write_model(family, folder.parent).rename(folder)


def _qwen3(folder: Path) -> None:
    """As wide as the real one, which the config says."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = QWEN3_TEMPLATE
    tokenizer.save_pretrained(folder)
    text = {**zoo.TEXT, "hidden_size": 2560, "vocab_size": len(tokenizer), "tie_word_embeddings": True}
    _save(hf.Qwen3ForCausalLM(hf.Qwen3Config(**text)), folder)


def _siglip2(folder: Path) -> None:
    tower = {**zoo.TOWER, "image_size": 64, "patch_size": 16}
    text = {name: zoo.TOWER[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    text |= {"num_attention_heads": 2, "vocab_size": 8, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.SiglipConfig(vision_config=tower, text_config=text)
    _save(hf.SiglipModel(config), folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "Qwen3-VL-30B-A3B": partial(_vision_language, "qwen3_vl_moe"),
    "Qwen3-VL-4B": partial(_vision_language, "qwen3_vl"),
    "Qwen2.5-VL": partial(_vision_language, "qwen2_5_vl"),
    "llava-onevision": partial(_vision_language, "llava_onevision"),
    "gemma-3": partial(_vision_language, "gemma3"),
    "Qwen3-4B": _qwen3,
    "siglip2": _siglip2,
}
