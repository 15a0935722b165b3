"""Attention implementations: packed samples stay apart with each kind, and what cannot be had is refused at once."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.contracts.components import Encoder
from bigmac_lightning.models import HFDecoder, HFVideoEncoder, HFVisionEncoder, MultimodalLM, VisionEncoder
from bigmac_lightning.models.llm.attention import sample_starts
from tests.models import more_families, zoo
from tests.models.parts import TOWER

PACKING = [name for name, model in zoo.MODELS.items() if model.packs]


def by_starts(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention as flash attention does it: without a mask, with the starts of samples in the flattened rows."""
    assert attention_mask is None
    rows, length = query.shape[0], query.shape[2]
    starts = [row * length for row in range(rows + 1)] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    assert cu_seq_lens_q is None or max(b - a for a, b in pairwise(starts)) <= max_length_q
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = []
    for start, stop in pairwise(starts):
        q_HLD, k_HLD, v_HLD = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        scores = q_HLD @ k_HLD.repeat_interleave(repeats, 0).transpose(1, 2) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (distance >= 0) & (distance < (sliding_window or stop))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out.append((weights @ v_HLD.repeat_interleave(repeats, 0)).transpose(0, 1))
    return torch.cat(out).view(query.shape[0], query.shape[2], q.shape[1], -1), None


AttentionInterface.register("by_starts", by_starts)


def packed_run(folder: Path, attention: str, device: str = "cpu", dtype: str = "float32") -> Any:
    """Loss and gradients of microbatches with two rows of two samples each, of a family's checkpoint."""
    given: dict[str, Any] = {"config": str(folder), "weights": str(folder), "dtype": dtype}
    llm = HFDecoder(**given, attn_implementation=attention)
    encoders: dict[str, Encoder] = {}
    if llm.family is not None:
        image = encoders["image"] = HFVisionEncoder(**given)
        if llm.family.video is not None:
            encoders["video"] = HFVideoEncoder(image)
    module = MultimodalLM(llm, encoders)
    module.configure_model()
    module.to(device)
    loss = module.pipeline(zoo.batch(zoo.MODELS[folder.name], True, PipelineLayout()).to(torch.device(device))).loss
    loss.backward()
    return loss, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PACKING)
def test_samples_stay_apart_without_masks(name: str, tmp_path: Path) -> None:
    """Every layer of every family gets the starts of samples, and the result is that of masks."""
    zoo.save(name, tmp_path)
    loss, gradients = packed_run(tmp_path / name, "by_starts")
    expected, others = packed_run(tmp_path / name, zoo.MODELS[name].attention)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == others.keys()
    for weight, gradient in gradients.items():
        assert (gradient - others[weight]).norm() <= 1e-5 * others[weight].norm() + 1e-9, weight


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_samples_stay_apart_on_a_gpu(attention: str, tmp_path: Path) -> None:
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("needs flash-attn")
    config = zoo.text(hf.LlamaConfig, hidden_size=128, head_dim=32)()  # these kernels want wide heads
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    loss, gradients = packed_run(tmp_path / "llama", attention, "cuda", "bfloat16")
    expected, others = packed_run(tmp_path / "llama", "sdpa", "cuda", "bfloat16")
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    for weight, gradient in gradients.items():
        assert (gradient - others[weight]).norm() <= 0.05 * others[weight].norm(), weight


def test_where_samples_start() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 0, 1, 0, 1]])
    assert sample_starts(positions).tolist() == [0, 3, 5, 10, 11, 13, 15], "a sample may have a single token"


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        pytest.param(
            "flash_attention_2",
            "'flash_attention_2' cannot be used for model_type '{}': pip install flash-attn",
            marks=pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed"),
        ),
        ("nonsense", "'nonsense' cannot be used for model_type '{}': use sdpa or eager"),
    ],
)
def test_what_is_not_there(attention: str, message: str) -> None:
    """Refused when a model is made, before any data or weights are read."""
    config = zoo.MODELS["llava"].config()
    makers: list[tuple[str, Any]] = [
        ("llava", lambda: HFDecoder(config, attn_implementation=attention)),
        ("llava", lambda: HFVisionEncoder(config, attn_implementation=attention)),
        ("siglip_vision_model", lambda: VisionEncoder(TOWER, 32, attn_implementation=attention)),
    ]
    for kind, make in makers:
        with pytest.raises(ValueError, match=message.format(kind)):
            make()


def test_components_of_one_config_have_implementations_of_their_own() -> None:
    config = zoo.MODELS["llava"].config()
    llm = HFDecoder(config, attn_implementation="eager")
    encoder = HFVisionEncoder(config, attn_implementation="sdpa")
    wholes = (llm._whole, encoder._unregistered[0])
    assert [whole.config.text_config._attn_implementation for whole in wholes] == ["eager", "sdpa"]


def test_what_a_model_cannot_use() -> None:
    with pytest.raises(ValueError, match="'sdpa' cannot be used for model_type 'gemma2': use eager"):
        HFDecoder(zoo.MODELS["gemma2"].config())
    with pytest.raises(ValueError, match="by a mask, which attn_implementation='by_starts' does not take"):
        HFDecoder(zoo.MODELS["gemma3"].config(), attn_implementation="by_starts")
    with pytest.raises(ValueError, match=r"'mllama' attends to images by a mask, which .*'by_starts' does not take"):
        HFDecoder(more_families.ALL["mllama"].config(), attn_implementation="by_starts")


def test_flex_attention_needs_a_gpu(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path)
    with pytest.raises(ValueError, match="'flex_attention' needs a GPU: use sdpa or eager"):
        packed_run(tmp_path / "llama", "flex_attention")
    encoder = VisionEncoder(TOWER, 32, attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="'flex_attention' needs a GPU"):
        encoder([torch.zeros(1, 8, 8)])
