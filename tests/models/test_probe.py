"""Decoders that must not be cut, or packed, and how it shows: real ones, and Llama with one thing changed."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.masking_utils import create_causal_mask

from bigmac_lightning.models import HFDecoder, meta_model
from bigmac_lightning.models.llm import probe_cut, probe_packing
from bigmac_lightning.models.llm.attention import packed_masks
from tests.models import test_attention, tiny, zoo

assert test_attention.by_starts  # an implementation that takes no mask


def built(config: Any = None, decoder: type[Any] | None = None) -> Any:
    """A model on the meta device, with another class of decoder if wanted."""
    whole = meta_model.build_on_meta(zoo.MODELS["llama"].config() if config is None else config, "eager")
    if decoder is not None:
        with torch.device("meta"):
            whole.model = decoder(whole.config)
    return whole


def why_not_cut(whole: Any) -> str:
    return probe_cut.why_not_cut(whole.get_decoder(), meta_model.names_of(whole), tiny.WIDTH)


def why_not_packed(whole: Any, masks: Any = None) -> str:
    return probe_packing.why_not_packed(whole.get_decoder(), meta_model.names_of(whole), tiny.WIDTH, masks=masks)


class Llama(hf.LlamaModel):
    """The library's forward in short, with places to change it."""

    def before(self, h: torch.Tensor, ids: Any) -> torch.Tensor:
        return h

    def between(self, k: int, h: torch.Tensor) -> torch.Tensor:
        return h

    def after(self, h: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return self.norm(h)

    def extra(self, k: int, h: torch.Tensor, start: torch.Tensor, ids: Any) -> dict[str, Any]:
        return {}

    def forward(
        self,
        input_ids: Any = None,
        inputs_embeds: Any = None,
        position_ids: Any = None,
        attention_mask: Any = None,
        **_: Any,
    ) -> Any:
        start = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = create_causal_mask(
            self.config, inputs_embeds=start, attention_mask=attention_mask, cache=None, position_ids=position_ids
        )
        positions = self.rotary_emb(start, position_ids)
        h = self.before(start, input_ids)
        for k, layer in enumerate(self.layers):
            h = self.between(k, h)
            more = self.extra(k, h, start, input_ids)
            h = layer(h, attention_mask=mask, position_embeddings=positions, position_ids=position_ids, **more)
        return (self.after(h, start),)


def changed(**methods: Any) -> type[Llama]:
    return type("Changed", (Llama,), methods)


MULTIPLIER = changed(before=lambda self, h, ids: h * 3.0)
"""What a decoder does once at its start is no reason."""
CHANGES: dict[str, Any] = {
    "it changes what goes from layer 1 to layer 2": changed(between=lambda self, k, h: h * 2 if k == 2 else h),
    "its final norm is used before the last layer": changed(before=lambda self, h, ids: self.norm(h)),
    "another shape or type than the embeddings": changed(before=lambda self, h, ids: h.float()),
    "layer 0 gets gate, which depends on hidden states": changed(
        extra=lambda self, k, h, start, ids: {"gate": start.mean()}
    ),
    "layer 2 gets first, which depends on hidden states": changed(
        extra=lambda self, k, h, start, ids: {"first": h if k == 2 else None}
    ),
    "layer 0 gets ids, which depends on the token ids": changed(extra=lambda self, k, h, start, ids: {"ids": ids}),
    "depends on more of the token ids than their embeddings": changed(
        before=lambda self, h, ids: h if ids is None else h + 1
    ),
    "layer 0 gets shared, by which layers can hand on": changed(extra=lambda self, k, h, start, ids: {"shared": {}}),
    "depends on more than what comes out of its last layer": changed(after=lambda self, h, start: self.norm(h + start)),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_is_seen_around_layers(reason: str) -> None:
    assert reason in why_not_cut(built(decoder=CHANGES[reason]))


@pytest.mark.parametrize("decoder", [Llama, MULTIPLIER])
def test_nothing_to_be_seen(decoder: type[Any]) -> None:
    whole = built(decoder=decoder)
    assert not why_not_cut(whole)
    assert not why_not_packed(whole)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dory", "it runs its 4 layers in another order"),
        ("glm_moe_dsa", "layer 1 gets prev_topk_indices, which depends on hidden states"),
        ("inkling2_text", "weights beside embedding, layers and final norm (final_input.query)"),
        ("zamba2", "layer 3 shares the weight shared_transformer"),
    ],
)
def test_real_decoders(name: str, reason: str) -> None:
    config = tiny.tiny_config(name, output_router_logits=False)
    with pytest.raises(ValueError, match=f"model_type '{name}' cannot be cut into stages: ") as error:
        HFDecoder(config, attn_implementation="eager")
    assert reason in str(error.value)


def test_hidden_states_of_another_type() -> None:
    """Which a message between ranks would round, in bfloat16."""
    with pytest.raises(
        ValueError, match=r"layer 3 returns torch.float32 where weights are torch.bfloat16.*residual_in"
    ):
        HFDecoder(tiny.tiny_config("mamba"), attn_implementation="eager")
    HFDecoder(tiny.tiny_config("mamba", residual_in_fp32=False), attn_implementation="eager")


def test_shared_and_left_out_layers() -> None:
    whole = built()
    whole.model.layers[3].mlp = whole.model.layers[1].mlp
    assert "layer 3 shares the weight mlp.gate_proj.weight with layer 1" in why_not_cut(whole)
    whole = built()
    whole.model.layers[2].own_embedding = nn.Linear(1, 1, bias=False, device="meta")
    whole.model.layers[2].own_embedding.weight = whole.model.embed_tokens.weight
    assert "layer 2 shares the weight own_embedding.weight with embed_tokens" in why_not_cut(whole)
    whole = built()
    whole.model.layerdrop = 0.1
    assert "leaves out layers at random" in why_not_cut(whole)


def test_masks_made_without_positions() -> None:
    """Can be given instead."""
    whole = built(tiny.tiny_config("gpt_oss"))
    assert "layer 0 gets attention_mask, by which samples in a packed row see one another" in why_not_packed(whole)
    assert not why_not_packed(whole, packed_masks)


def test_chunks_that_start_anywhere() -> None:
    """Chunks of attention begin at the row's start, not at the sample's."""

    def chunks(config: Any, h: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        places = torch.arange(h.shape[1])
        samples = (positions[0] == 0).cumsum(0)
        seen = (places[:, None] >= places) & (samples[:, None] == samples)
        return (seen & (places[:, None] // 4 == places // 4))[None, None]

    assert "gets another attention_mask in a packed row" in why_not_packed(built(), chunks)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("jamba", "layer 0 has a Conv1d"),
        ("minimax", "layer 1 is of the type linear_attention"),
        ("minimax_m3_vl_text", "layer 1 is of the type minimax_m3_sparse"),
    ],
)
def test_layers_that_mix_samples(name: str, reason: str) -> None:
    llm = HFDecoder(tiny.tiny_config(name, output_router_logits=False))
    assert reason in llm.refuses_packing


@pytest.mark.parametrize(("name", "gets_starts"), [("llama", True), ("nemotron", False), ("stablelm", False)])
def test_attention_that_does_not_get_the_starts_of_samples(name: str, gets_starts: bool) -> None:
    """It may take a mask, but not go without."""
    config = tiny.tiny_config(name)
    assert not HFDecoder(config, attn_implementation="eager").refuses_packing
    llm = HFDecoder(config, attn_implementation="by_starts")
    assert ("the attention of layer 0 does not get the starts of samples" in llm.refuses_packing) is not gets_starts
    assert llm._decoder.config._attn_implementation == "by_starts"


def test_large_models_cost_no_more() -> None:
    """No weights are made for it: 100 layers of 70 billion parameters."""
    config = hf.LlamaConfig(hidden_size=8192, num_hidden_layers=100, num_attention_heads=64, intermediate_size=28672)
    llm = HFDecoder(config)
    assert not llm.refuses_packing
    assert all(parameter.is_meta for parameter in llm.parameters())
