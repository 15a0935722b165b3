"""The LLM of any Hugging Face model, text only or vision-language, as a `LanguageModel` that can be cut between layers.

The whole model is built on the meta device and costs nothing; `materialize` replaces what is not kept by pass-throughs
and gives the rest weights. Stages run Hugging Face's own forward through *shells*: shallow copies of the decoder that
share its submodules and pass through the layers of other stages. Layer indices (hence sliding-window patterns) and
parameter names stay those of the whole model. Knows nothing of ranks.

Shape suffixes: B samples, S tokens, D width, L labelled positions, V vocabulary, N media tokens, E experts.
"""

import copy
import math
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import MoeModelOutputWithPast

from bigmac_lightning.components import LanguageModel
from bigmac_lightning.partition import LayerCosts
from bigmac_lightning.token_loss import chunked_gradients, fused_token_loss
from bigmac_lightning.work import Work, attention_work

from . import attention, liger, surgery
from .families import Family, family_of
from .initialization import to_config
from .multimodal_inputs import bidirectional_masks, multimodal_positions, row_is_packed
from .router import add_router_sums, experts_of_routers, load_balancing_loss, recorded_logits
from .surgery import PassThrough

ROUTER_LOSS = "router"


class _Normed(nn.Module):
    """Stands for the decoder in front of the output weight: the hidden states are final already."""

    def forward(self, *, inputs_embeds: Tensor, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=cast(Any, inputs_embeds))


def _shell(module: nn.Module, **replaced: nn.Module) -> Any:
    """A shallow copy that shares all submodules but those replaced."""
    shell = copy.copy(module)
    shell._modules = {**module._modules, **replaced}
    return shell


def _work(layer: nn.Module, config: Any) -> Work:
    """Of a token with a layer's matrices; of stacked experts with those alone that it is routed to."""
    used = Work()
    for parameter in layer.parameters():
        if parameter.ndim > 1:
            times = config.num_experts_per_tok if parameter.ndim == 3 else 1
            used += Work(math.prod(parameter.shape[-2:]), sum(parameter.shape[-2:])) * times
    return used


def _why_not_packed(config: PreTrainedConfig, family: Family | None) -> str:
    if family is not None and family.bidirectional_images:
        return (
            f"model_type {config.model_type!r} lets tokens of an image see each other both ways, by a mask that cannot "
            "keep packed samples apart"
        )
    if "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        return f"model_type {config.model_type!r} has linear-attention layers, which cannot keep packed samples apart"
    return ""


class HFDecoder(LanguageModel):
    """A decoder of the transformers library, alone (Qwen2/3, Llama, Mistral, Mixtral, Gemma 2, ...) or the one inside a
    vision-language model (Qwen3-VL, LLaVA, Gemma 3, ...).

    Parameters keep the names they have in the Hugging Face model ("model.layers.0.mlp.up_proj.weight", ...). A mixture
    of experts whose config has ``output_router_logits`` gets the loss "router", weighted by ``router_aux_loss_coef``.

    Attributes:
        config: its transformers config.
        source: the folder that its weights come from; ``None``: they are drawn.
    """

    def __init__(
        self,
        config: dict[str, Any] | str | PreTrainedConfig,
        seed: int = 0,
        attn_implementation: str = "sdpa",
        weights: str | None = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        fused_loss: bool | Literal["liger"] = False,
    ) -> None:
        """
        Args:
            config: ``{"model_type": "qwen3", "hidden_size": 64, ...}``, the library's defaults for what it leaves out;
                or the folder or name of a pretrained model, of which the config alone is read; or a ready config.
            seed: of the initial weights.
            attn_implementation: "sdpa", "eager", "flash_attention_2", "flex_attention", ..., whichever the library has
                for this model and is installed.
            weights: folder of a Hugging Face checkpoint, of which each process reads only its part; ``None``: initial
                weights.
            dtype: of the weights, "float32", "bfloat16", ...; "auto": as in the checkpoint.
            gradient_checkpointing: keep only each layer's input for the backward and run the layer again.
            fused_loss: make the gradients of the text loss together with it, which spares making the logits again where
                they are too many to be kept; holds the output weight's gradient until the backward. "liger": by the
                Liger kernels, on GPUs.

        Raises:
            ValueError: a model that cannot be cut into stages, or an attention implementation that is not there.
        """
        super().__init__()
        self.config = to_config(config)
        self.family = family_of(self.config)
        self.seed, self.source = seed, weights
        self.dtype = None if dtype == "auto" else getattr(torch, dtype)
        self.gradient_checkpointing, self._fused = gradient_checkpointing, fused_loss
        if fused_loss == "liger":
            liger.check_installed()
        whole: Any = surgery.build_on_meta(self.config, attn_implementation)
        self._attention = attn_implementation
        if self.family is not None and self.family.bidirectional_images and attn_implementation not in attention.MASKED:
            raise ValueError(
                f"model_type {self.config.model_type!r} lets tokens of an image see each other both ways, by a mask, "
                f"which attn_implementation={attn_implementation!r} does not take: use one of {attention.MASKED}"
            )
        decoder = whole.get_decoder()
        if missing := {"embed_tokens", "layers", "norm"} - dict(decoder.named_children()).keys():
            raise ValueError(
                f"{type(whole).__name__} (model_type {self.config.model_type!r}) cannot be cut into stages: "
                f"its decoder has no {sorted(missing)}; choose a decoder-only model such as qwen3, llama or mistral"
            )
        text = self.config.get_text_config()
        self.num_layers = len(decoder.layers)
        self.width = decoder.embed_tokens.embedding_dim
        self.vocabulary = text.vocab_size
        self.tied = dict(whole.all_tied_weights_keys) if whole.config.tie_word_embeddings else {}
        self._routers = experts_of_routers(decoder) if getattr(text, "output_router_logits", False) else []
        self.auxiliary_losses = {ROUTER_LOSS: text.router_aux_loss_coef} if self._routers else {}
        self._placeholders = [
            getattr(self.config, name)
            for name in ("image_token_id", "video_token_id")
            if getattr(self.config, name, None) is not None
        ]
        self.refuses_packing = _why_not_packed(self.config, self.family)
        self._work = [_work(layer, text) for layer in decoder.layers]
        self._decoder_name = surgery.path_of(decoder, whole)
        self._shells: dict[range, nn.Module] = {}
        self._unregistered = (whole,)  # in a tuple: its children are registered here, under their own names
        self._keep_language_model(whole, range(self.num_layers), embedding=True, head=True)
        self._drop_vision_parameters(whole)
        self._register_children()

    @property
    def _whole(self) -> Any:
        return self._unregistered[0]

    @property
    def _decoder(self) -> Any:
        return self._whole.get_submodule(self._decoder_name)

    def _register_children(self) -> None:
        for name, child in self._whole.named_children():
            self.add_module(name, child)

    # -- weights -----------------------------------------------------------------------------------------------------

    def materialize(self, layers: Collection[int], embedding: bool, head: bool) -> None:
        if not all(parameter.is_meta for parameter in self.parameters()):
            raise ValueError("this decoder has weights already: materialize it once")
        if outside := [k for k in layers if not 0 <= k < self.num_layers]:
            raise ValueError(f"layers {outside} do not exist: the decoder has layers 0..{self.num_layers - 1}")
        tie = head and bool(self.tied)
        keep = partial(self._keep_language_model, layers=layers, embedding=embedding or tie, head=head)
        whole = surgery.materialize(self._whole, keep, self.source, self.seed, self.dtype)
        if tie:
            whole.get_output_embeddings().weight = whole.get_submodule(self._decoder_name).embed_tokens.weight
        self._drop_vision_parameters(whole)
        if not embedding:  # the tied head, if it is here, starts from the embedding's weights
            surgery.drop(whole, f"{self._decoder_name}.embed_tokens")
        if self.gradient_checkpointing:
            whole.activation_checkpointing_enable({"use_reentrant": False})
        self._unregistered = (whole,)
        self._register_children()
        if head and self._fused:
            self._check_fused_loss()

    def keep(self, layers: Collection[int], embedding: bool, head: bool) -> None:
        self._keep_language_model(self._whole, layers, embedding, head)
        self._shells.clear()
        self._register_children()

    def _check_fused_loss(self) -> None:
        """
        Raises:
            ValueError: logits are more than hidden states times the output weight.
        """
        output = self._whole.get_output_embeddings()
        with torch.no_grad():
            h_LD = torch.linspace(-9, 9, self.width, dtype=output.weight.dtype)[None]
            if output.bias is None and torch.equal(self.logits(h_LD), output(h_LD)):
                return
        raise ValueError(
            f"fused_loss: the logits of model_type {self.config.model_type!r} are not those of its output weight "
            "alone (a soft cap, a scale, a bias): leave it out"
        )

    def _keep_language_model(self, whole: Any, layers: Collection[int], embedding: bool, head: bool) -> None:
        """Drop all but these parts of the decoder, whatever else there is (a vision tower, a projector)."""
        decoder = whole.get_submodule(self._decoder_name)
        around, _, name = self._decoder_name.rpartition(".")
        if around:
            parent = whole.get_submodule(around)
            for other, _ in list(parent.named_children()):
                if other != name:
                    surgery.drop(parent, other)
        for k in set(range(self.num_layers)) - set(layers):
            decoder.layers[k] = PassThrough()
        if not head:
            decoder.norm = PassThrough()
            surgery.drop(whole, surgery.path_of(whole.get_output_embeddings(), whole))
        if not embedding:
            decoder.embed_tokens = PassThrough()
        if not (embedding and head):
            whole.all_tied_weights_keys = {}

    def _drop_vision_parameters(self, whole: Any) -> None:
        """What lies beside the decoder as a bare parameter (a separator of images) is the encoder's."""
        around = self._decoder_name.rpartition(".")[0]
        if around:
            parent = whole.get_submodule(around)
            parent._parameters.update(dict.fromkeys(parent._parameters))

    # -- running -----------------------------------------------------------------------------------------------------

    def prepare(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds M-RoPE positions (4, B, S), text positions first, from (B, S) positions that start anew at each packed
        sample and from ``image_grid_thw`` and ``video_grid_thw`` of shape (items, 3); and Gemma 3's
        ``token_type_ids``.

        Raises:
            ValueError: something about the images is missing, or the model cannot keep packed samples apart.
        """
        inputs, ids_BS = dict(inputs), inputs["input_ids"]
        if "position_ids" not in inputs:
            inputs["position_ids"] = torch.arange(ids_BS.shape[1], device=ids_BS.device).repeat(len(ids_BS), 1)
        if self._attention not in attention.MASKED and not inputs.keys() & {"attention_mask", attention.STARTS}:
            positions = inputs["position_ids"]
            inputs[attention.STARTS] = attention.sample_starts(positions if positions.ndim == 2 else positions[0])
        if self.refuses_packing and row_is_packed(inputs["position_ids"]):
            raise ValueError(f"{self.refuses_packing}: give each sample a row of its own (packed=False)")
        if self.family is None:
            return inputs
        if self.family.multimodal_positions and inputs["position_ids"].ndim == 2:
            inputs["position_ids"] = multimodal_positions(self._whole.base_model, inputs)
        if self.family.bidirectional_images and "token_type_ids" not in inputs:
            inputs["token_type_ids"] = (ids_BS == self._placeholders[0]).long()
        return inputs

    def costs(self, sample_tokens: int = 0) -> LayerCosts:
        """Multiplications per token."""
        layers = tuple(work.multiplications + self._attended(k, sample_tokens) for k, work in enumerate(self._work))
        return LayerCosts(layers, head=float(self.vocabulary * self.width))

    def _attended(self, layer: int, sample_tokens: int) -> float:
        """Multiplications of the mean token of a sample with keys and values before it, as far as the layer looks."""
        text: Any = self.config.get_text_config()
        heads = text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
        types, seen = getattr(text, "layer_types", None), sample_tokens / 2
        if types is not None and types[layer] == "sliding_attention":
            seen = min(seen, text.sliding_window)
        return attention_work(width, 1, seen).multiplications

    def kept(self) -> LayerCosts:
        return LayerCosts(tuple(work.kept for work in self._work), head=2.0 * self.width)

    def parameters_of(self, layers: Collection[int], embedding: bool, head: bool) -> Iterator[nn.Parameter]:
        decoder, output = self._decoder, self._whole.get_output_embeddings()
        parts = [decoder.layers[k] for k in sorted(layers)]
        parts += [decoder.embed_tokens] * embedding + [decoder.norm, output] * head
        found = {id(parameter): parameter for part in parts for parameter in part.parameters()}
        yield from found.values()

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        ids_BS = inputs["input_ids"]
        for placeholder in self._placeholders:
            if placeholder >= self.vocabulary:  # features go there
                ids_BS = ids_BS.masked_fill(ids_BS == placeholder, 0)
        return self._decoder.embed_tokens(ids_BS)

    def extra_shapes(self, layer: int, media_rows: int, levels: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        if media_rows and levels - 1 > layer:
            shapes["features"] = (levels - 1 - layer, media_rows, self.width)
        if self._routers:
            shapes[ROUTER_LOSS] = (2, self._routers[0])
        return shapes

    def run_layers(self, h_BSD: Tensor, inputs: dict[str, Tensor], layers: range, extras: dict[str, Tensor]) -> Tensor:
        attention.check_device(self._attention, h_BSD.device)
        stage = self._stage(layers)
        stage.training = self.training
        further = attention.sample_arguments(inputs)
        if self._routers:
            further["output_router_logits"] = False  # they are recorded here
        features = extras.pop("features", None)
        if features is not None:
            further.update(self._deepstack(features, inputs["media_positions"], h_BSD, layers))
            if len(features) > len(layers):
                extras["features"] = features[len(layers) :]
        mask: Any = inputs.get("attention_mask")
        if "token_type_ids" in inputs and self.family is not None and self.family.bidirectional_images:
            mask = bidirectional_masks(self.config, h_BSD, inputs)
        positions = inputs.get("position_ids")
        with recorded_logits(self._decoder, layers if self._routers else range(0)) as router_logits:
            out = stage(inputs_embeds=h_BSD, position_ids=positions, attention_mask=mask, use_cache=False, **further)
        if self._routers:
            top_k = self.config.get_text_config().num_experts_per_tok
            before = extras.get(ROUTER_LOSS, torch.zeros(2, self._routers[0], device=h_BSD.device))
            extras[ROUTER_LOSS] = add_router_sums(before, router_logits, top_k, inputs.get("attention_mask"))
        return out.last_hidden_state

    def _deepstack(self, features: Tensor, positions_N: Tensor, h_BSD: Tensor, layers: range) -> dict[str, Any]:
        """The arguments by which Qwen3-VL adds features after its first layers; nothing for layers of other stages."""
        mask_BS = torch.zeros(h_BSD.shape[:2], dtype=torch.bool, device=h_BSD.device)
        mask_BS.view(-1)[positions_N] = True
        features = features[: len(layers), positions_N.argsort()]
        nothing = torch.zeros_like(features[0])
        return {"visual_pos_masks": mask_BS, "deepstack_visual_embeds": [*[nothing] * layers.start, *features]}

    def _stage(self, layers: range) -> nn.Module:
        """The decoder with these layers alone; the final norm belongs to the last one."""
        if layers not in self._shells:
            decoder = self._decoder
            kept = [decoder.layers[k] if k in layers else PassThrough() for k in range(self.num_layers)]
            if absent := [k for k in layers if isinstance(kept[k], PassThrough)]:
                raise ValueError(f"run_layers({layers}) needs layers {absent}, which were not materialized here")
            norm = decoder.norm if layers.stop == self.num_layers else PassThrough()
            self._shells[layers] = _shell(decoder, layers=nn.ModuleList(kept), norm=norm)
        return self._shells[layers]

    def logits(self, h_LD: Tensor) -> Tensor:
        if self.family is not None:
            return self._whole.get_output_embeddings()(h_LD)
        head = _shell(self._whole, **{self._decoder_name: _Normed()})  # with soft-capping, scaling, ... if it has any
        return head(inputs_embeds=h_LD[None], use_cache=False).logits[0]

    def fused_loss(self, h_LD: Tensor, labels: Tensor) -> Tensor | None:
        if not self._fused:
            return None
        output = self._whole.get_output_embeddings()
        if type(output) is not nn.Linear:
            raise ValueError(f"fused_loss needs a plain output layer, not a {type(output).__name__} (of lora?)")
        gradients = liger.liger_gradients if self._fused == "liger" else chunked_gradients
        return fused_token_loss(h_LD, output.weight, labels, gradients)

    def auxiliary(self, extras: dict[str, Tensor]) -> dict[str, Tensor]:
        return {ROUTER_LOSS: load_balancing_loss(extras[ROUTER_LOSS], len(self._routers))} if self._routers else {}
