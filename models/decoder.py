"""Any Hugging Face decoder as a `LanguageModel` that can be cut between layers.

The whole ForCausalLM is built on the meta device and costs nothing; `materialize` replaces what is not kept by
pass-throughs and allocates the rest. Stages run Hugging Face's own forward through *shells*: shallow copies of the
decoder that share its submodules and pass through the layers of other stages. Layer indices (hence sliding-window
patterns) and parameter names stay those of the whole model. Knows nothing of ranks. Auxiliary losses of mixture-of-
experts routers are not computed.

Shape suffixes: B samples, S tokens, D width, L labelled positions, V vocabulary.
"""

import copy
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_outputs import MoeModelOutputWithPast

from bigmac_lightning.module import LanguageModel

from .initialization import allocate_and_initialize, to_config


class _PassThrough(nn.Module):
    """Stands where another stage's layer, or norm, would be."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


class _Normed(nn.Module):
    """Stands for the decoder in front of the output weight: the hidden states are final already."""

    def forward(self, *, inputs_embeds: Tensor, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=cast(Any, inputs_embeds))


def _shell(module: nn.Module, **replaced: nn.Module) -> Any:
    """A shallow copy that shares all submodules but those replaced."""
    shell = copy.copy(module)
    shell._modules = {**module._modules, **replaced}
    return shell


class HFDecoder(LanguageModel):
    """A decoder-only model of the transformers library: Qwen2/3, Llama, Mistral, Gemma 2, ...

    Parameters keep the names they have in the Hugging Face model ("model.layers.0.mlp.up_proj.weight", ...).

    Attributes:
        config: its transformers config.
    """

    def __init__(
        self, config: dict[str, Any] | str | PreTrainedConfig, seed: int = 0, attn_implementation: str = "sdpa"
    ) -> None:
        """
        Args:
            config: ``{"model_type": "qwen3", "hidden_size": 64, ...}``, the library's defaults for what it leaves out;
                or the folder or name of a pretrained model, of which the config alone is read; or a ready config.
            seed: of the initial weights.
            attn_implementation: "sdpa", "eager", "flash_attention_2", ...
        """
        super().__init__()
        self.config = to_config(config)
        self.seed = seed
        with torch.device("meta"):
            whole: Any = AutoModelForCausalLM.from_config(self.config, attn_implementation=attn_implementation)
        decoder = whole.get_decoder()
        if missing := {"embed_tokens", "layers", "norm"} - dict(decoder.named_children()).keys():
            raise ValueError(
                f"{type(whole).__name__} (model_type {self.config.model_type!r}) cannot be cut into stages: "
                f"its decoder has no {sorted(missing)}; choose a decoder-only model such as qwen3, llama or mistral"
            )
        self.num_layers = len(decoder.layers)
        self.width = decoder.embed_tokens.embedding_dim
        self.tied = {} if not self.config.tie_word_embeddings else dict(whole.all_tied_weights_keys)
        self._decoder_name = next(name for name, child in whole.named_children() if child is decoder)
        self._shells: dict[range, nn.Module] = {}
        self._unregistered = (whole,)  # in a tuple: its children are registered here, under their own names
        self._register_children()

    @property
    def _whole(self) -> Any:
        return self._unregistered[0]

    @property
    def _decoder(self) -> Any:
        return getattr(self._whole, self._decoder_name)

    def _register_children(self) -> None:
        for name, child in self._whole.named_children():
            self.add_module(name, child)

    def materialize(self, layers: Collection[int], embedding: bool, head: bool) -> None:
        if not all(parameter.is_meta for parameter in self.parameters()):
            raise ValueError("this decoder has weights already: materialize it once")
        if outside := [k for k in layers if not 0 <= k < self.num_layers]:
            raise ValueError(f"layers {outside} do not exist: the decoder has layers 0..{self.num_layers - 1}")
        whole, decoder = self._whole, self._decoder
        for k in set(range(self.num_layers)) - set(layers):
            decoder.layers[k] = _PassThrough()
        if not head:
            decoder.norm = _PassThrough()
            whole.set_output_embeddings(_PassThrough())
        tie = head and bool(self.tied)
        if not embedding and not tie:
            decoder.embed_tokens = _PassThrough()
        allocate_and_initialize(whole, self.seed)
        if tie:
            whole.get_output_embeddings().weight = decoder.embed_tokens.weight
        if not embedding:
            decoder.embed_tokens = _PassThrough()  # the tied head, if it is here, starts from the embedding's weights
        self._register_children()

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._decoder.embed_tokens(inputs["input_ids"])

    def run_layers(self, h_BSD: Tensor, inputs: dict[str, Tensor], layers: range) -> Tensor:
        stage = self._stage(layers)
        stage.training = self.training
        return stage(
            inputs_embeds=h_BSD,
            position_ids=inputs.get("position_ids"),
            attention_mask=inputs.get("attention_mask"),
            use_cache=False,
        ).last_hidden_state

    def _stage(self, layers: range) -> nn.Module:
        """The decoder with these layers alone; the final norm belongs to the last one."""
        if layers not in self._shells:
            decoder = self._decoder
            kept = [decoder.layers[k] if k in layers else _PassThrough() for k in range(self.num_layers)]
            if absent := [k for k in layers if isinstance(kept[k], _PassThrough)]:
                raise ValueError(f"run_layers({layers}) needs layers {absent}, which were not materialized here")
            norm = decoder.norm if layers.stop == self.num_layers else _PassThrough()
            self._shells[layers] = _shell(decoder, layers=nn.ModuleList(kept), norm=norm)
        return self._shells[layers]

    def logits(self, h_LD: Tensor) -> Tensor:
        head = _shell(self._whole, **{self._decoder_name: _Normed()})  # with soft-capping, scaling, ... if it has any
        return head(inputs_embeds=h_LD[None], use_cache=False).logits[0]
