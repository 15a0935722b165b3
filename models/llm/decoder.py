"""The LLM of any Hugging Face model, text only or vision-language, as a `LanguageModel` that can be cut between layers.

The whole model is built on the meta device and costs nothing; `materialize` replaces what is not kept by pass-throughs
and gives the rest weights. Stages run Hugging Face's own forward through *shells*: shallow copies of the decoder that
share its submodules and pass through the layers of other stages. Layer indices (hence sliding-window patterns) and
parameter names stay those of the whole model. Knows nothing of ranks.

Shape suffixes: B samples, S tokens, D width, L labelled positions, V vocabulary, N media tokens, E experts.
"""

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from bigmac_lightning.contracts.components import LanguageModel
from bigmac_lightning.contracts.token_loss import chunked_gradients, fused_token_loss
from bigmac_lightning.estimates.partition import LayerCosts

from .. import surgery
from ..hf_component import HFComponent
from ..surgery import PassThrough
from . import attention, liger, probe
from .head import check_plain, logits_of
from .multimodal_inputs import bidirectional_masks, deepstack_arguments, multimodal_positions, text_positions
from .router import recorded_logits, routers_of
from .stage import Stage
from .work import attended, layer_work

ROUTER_LOSS = "router"


class HFDecoder(HFComponent, LanguageModel):
    """A decoder of the transformers library, alone (Qwen2/3, Llama, Mistral, Mixtral, Gemma 2, ...) or the one inside a
    vision-language model (Qwen3-VL, LLaVA, Gemma 3, ...).

    Parameters keep the names they have in the Hugging Face model ("model.layers.0.mlp.up_proj.weight", ...). A mixture
    of experts whose config has ``output_router_logits`` gets the loss "router", weighted by ``router_aux_loss_coef``.

    Attributes:
        config: its transformers config.
        source: the folder that its weights come from; ``None``: they are drawn.
    """

    exact_extras = (ROUTER_LOSS,)

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
            ValueError: a model that cannot be cut into stages, or whose losses cannot be made, with the reason; or an
                attention implementation that is not there.
        """
        super().__init__()
        self._configure(config, seed, attn_implementation, weights, dtype, gradient_checkpointing)
        self._fused = fused_loss
        if fused_loss == "liger":
            liger.check_installed()
        if self.family is not None and self.family.bidirectional_images and attn_implementation not in attention.MASKED:
            raise ValueError(
                f"model_type {self.config.model_type!r} lets tokens of an image see each other both ways, by a mask, "
                f"which attn_implementation={attn_implementation!r} does not take: use one of {attention.MASKED}"
            )
        whole = self._build_whole()
        self._names = surgery.names_of(whole)
        decoder = whole.get_submodule(self._names.decoder)
        text: Any = self.config.get_text_config()
        self.num_layers = len(decoder.layers)
        self.vocabulary, self.width = whole.get_input_embeddings().weight.shape
        self.tied = surgery.tied_output(whole)
        if self.family is None and (others := surgery.weights_beside(whole, decoder)):
            raise ValueError(
                f"model_type {self.config.model_type!r} has weights beside its decoder and output layer ({others[0]}, "
                "...), which no component here knows; its decoder alone may be one that can be trained: "
                "HFDecoder(config.get_text_config())"
            )
        if reason := probe.why_not_cut(decoder, self._names, self.width):
            raise ValueError(f"model_type {self.config.model_type!r} cannot be cut into stages: {reason}")
        self._output = surgery.path_of(whole.get_output_embeddings(), whole)
        if fused_loss:
            check_plain(whole, self._names.decoder, self._output)
        self.refuses_packing, self._gives_masks = self._look_at_packing(decoder)
        wanted = getattr(text, "output_router_logits", False)
        self._routers = routers_of(whole, decoder, text) if wanted else None
        self.auxiliary_losses = {ROUTER_LOSS: self._routers.coefficient} if self._routers is not None else {}
        self.placeholders = [
            getattr(self.config, name)
            for name in ("image_token_id", "video_token_id")
            if getattr(self.config, name, None) is not None
        ]
        self._layer_configs = [text.per_layer_config[k] for k in range(self.num_layers)]
        self._work = [layer_work(layer, c) for layer, c in zip(decoder.layers, self._layer_configs, strict=True)]
        self._stages: dict[range, Stage] = {}
        self._keep_language_model(whole, range(self.num_layers), embedding=True, head=True)
        self._drop_vision_parameters(whole)
        self._hold(whole)

    def _look_at_packing(self, decoder: Any) -> tuple[str, bool]:
        """Why rows must not hold several samples, and whether the decoder has to be given masks for them."""
        kind, rows = f"model_type {self.config.model_type!r}", 1
        if self.family is not None and self.family.bidirectional_images:
            return (
                f"{kind} lets tokens of an image see each other both ways, by a mask that cannot keep packed samples "
                "apart",
                False,
            )
        if self.family is not None and self.family.multimodal_positions:
            rows = 4
        takes_masks = self._attention in attention.MASKED
        reason, gives = probe.packing(decoder, self._names, self.width, rows, takes_masks)
        return reason and f"{kind}: {reason}", gives

    @property
    def _decoder(self) -> Any:
        return self._whole.get_submodule(self._names.decoder)

    # -- weights -----------------------------------------------------------------------------------------------------

    def materialize(self, layers: Collection[int], embedding: bool, head: bool) -> None:
        if not all(parameter.is_meta for parameter in self.parameters()):
            raise ValueError("this decoder has weights already: materialize it once")
        if outside := [k for k in layers if not 0 <= k < self.num_layers]:
            raise ValueError(f"layers {outside} do not exist: the decoder has layers 0..{self.num_layers - 1}")
        tie = head and bool(self.tied)
        keep = partial(self._keep_language_model, layers=layers, embedding=embedding or tie, head=head)
        whole = self._materialized(keep)
        if tie:
            whole.get_output_embeddings().weight = whole.get_input_embeddings().weight
        self._drop_vision_parameters(whole)
        if not embedding:  # the tied head, if it is here, starts from the embedding's weights
            surgery.drop(whole, f"{self._names.decoder}.{self._names.embedding}")
        self._hold(whole)

    def keep(self, layers: Collection[int], embedding: bool, head: bool) -> None:
        self._keep_language_model(self._whole, layers, embedding, head)
        self._stages.clear()

    def check_adapters(self, targets: Collection[str]) -> None:
        """
        Args:
            targets: linear layers that get low-rank adapters, by their names here.

        Raises:
            ValueError: the output layer is one of them, and cannot be.
        """
        if self._output not in targets:
            return
        if self.tied:
            raise ValueError(
                f"lora: {self._output} is tied to the embedding, which its adapter would not change: leave it out of "
                "target_modules, or set tie_word_embeddings to false in the config"
            )
        if self._fused:
            raise ValueError(f"lora: fused_loss needs {self._output} without an adapter: leave out one of the two")

    def _keep_language_model(self, whole: Any, layers: Collection[int], embedding: bool, head: bool) -> None:
        """Drop all but these parts of the decoder, whatever else there is (a vision tower, a projector)."""
        decoder = whole.get_submodule(self._names.decoder)
        around, _, name = self._names.decoder.rpartition(".")
        if around:
            parent = whole.get_submodule(around)
            for other, _ in list(parent.named_children()):
                if other != name:
                    surgery.drop(parent, other)
        for k in set(range(self.num_layers)) - set(layers):
            decoder.layers[k] = PassThrough(decoder.layers[k])
        if not head:
            if any(True for _ in decoder.get_submodule(self._names.norm).parameters()):  # others may be used elsewhere
                surgery.drop(decoder, self._names.norm)
            surgery.drop(whole, self._output)
        if not embedding:
            surgery.drop(decoder, self._names.embedding)
        if not (embedding and head):
            whole.all_tied_weights_keys = {}

    def _drop_vision_parameters(self, whole: Any) -> None:
        """What lies beside the decoder as a bare parameter (a separator of images) is the encoder's."""
        around = self._names.decoder.rpartition(".")[0]
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
        text_BS = text_positions(inputs["position_ids"])
        known = inputs.keys() & {"attention_mask", attention.STARTS}
        if self._attention not in attention.MASKED and not self.refuses_packing and not known:
            inputs[attention.STARTS] = attention.sample_starts(text_BS)
        mask_BS = inputs.get("attention_mask")
        if mask_BS is not None and mask_BS.shape != ids_BS.shape:
            raise ValueError(
                f"inputs['attention_mask'] has shape {tuple(mask_BS.shape)}, but input_ids {tuple(ids_BS.shape)}"
            )
        if (mask_BS is not None or self.refuses_packing) and attention.is_packed(text_BS, mask_BS):
            reason = self.refuses_packing or "with an attention_mask, transformers takes a packed row for one sample"
            raise ValueError(f"{reason}: give each sample a row of its own (packed=False)")
        if self.family is None:
            return inputs
        if self.family.multimodal_positions and inputs["position_ids"].ndim == 2:
            inputs["position_ids"] = multimodal_positions(self._whole.base_model, inputs)
        if self.family.bidirectional_images and "token_type_ids" not in inputs:
            inputs["token_type_ids"] = (ids_BS == self.placeholders[0]).long()
        return inputs

    def costs(self, sample_tokens: int = 0) -> LayerCosts:
        """Multiplications per token."""
        types = getattr(self.config.get_text_config(), "layer_types", None) or [None] * self.num_layers
        layers = tuple(
            work.multiplications + attended(config, kind, sample_tokens)
            for work, config, kind in zip(self._work, self._layer_configs, types, strict=True)
        )
        return LayerCosts(layers, head=float(self.vocabulary * self.width))

    def kept(self) -> LayerCosts:
        return LayerCosts(tuple(work.kept for work in self._work), head=2.0 * self.width)

    def parameters_of(self, layers: Collection[int], embedding: bool, head: bool) -> Iterator[nn.Parameter]:
        decoder, output = self._decoder, self._whole.get_output_embeddings()
        parts = [decoder.layers[k] for k in sorted(layers)]
        parts += [decoder.get_submodule(self._names.embedding)] * embedding
        parts += [decoder.get_submodule(self._names.norm), output] * head
        found = {id(parameter): parameter for part in parts for parameter in part.parameters()}
        yield from found.values()

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        ids_BS = inputs["input_ids"]
        for placeholder in self.placeholders:
            if placeholder >= self.vocabulary:  # features go there
                ids_BS = ids_BS.masked_fill(ids_BS == placeholder, 0)
        return self._decoder.get_submodule(self._names.embedding)(ids_BS)

    def extra_shapes(self, layer: int, media_rows: int, levels: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        if media_rows and levels - 1 > layer:
            shapes["features"] = (levels - 1 - layer, media_rows, self.width)
        if self._routers is not None:
            shapes[ROUTER_LOSS] = (2, self._routers.experts)
        return shapes

    def run_layers(self, h_BSD: Tensor, inputs: dict[str, Tensor], layers: range, extras: dict[str, Tensor]) -> Tensor:
        attention.check_device(self._attention, h_BSD.device)
        further: dict[str, Any] = {}
        if attention.STARTS in inputs:
            further = attention.sample_arguments(inputs[attention.STARTS], inputs["input_ids"].shape[-1])
        features = extras.pop("features", None)
        if features is not None:
            further.update(deepstack_arguments(features, inputs["media_positions"], h_BSD, layers))
            if len(features) > len(layers):
                extras["features"] = features[len(layers) :]
        mask: Any = inputs.get("attention_mask")
        if "token_type_ids" in inputs and self.family is not None and self.family.bidirectional_images:
            mask = bidirectional_masks(self._decoder.config, h_BSD, inputs)
        positions = inputs.get("position_ids")
        if mask is None and self._gives_masks and positions is not None:
            mask = attention.packed_masks(self._decoder.config, h_BSD, text_positions(positions))
        with recorded_logits(self._decoder, layers if self._routers is not None else range(0)) as router_logits:
            out = self._stage(layers)(h_BSD, position_ids=positions, attention_mask=mask, **further)
        if self._routers is not None:
            before = extras.get(ROUTER_LOSS, torch.zeros(2, self._routers.experts, device=h_BSD.device))
            counted = inputs.get("attention_mask", inputs.get(attention.TOKENS))
            extras[ROUTER_LOSS] = self._routers.add(before, router_logits, counted)
        return out

    def _stage(self, layers: range) -> Stage:
        if layers not in self._stages:
            decoder = self._decoder
            if absent := [k for k in layers if isinstance(decoder.layers[k], PassThrough)]:
                raise ValueError(f"run_layers({layers}) needs layers {absent}, which were not materialized here")
            self._stages[layers] = Stage(decoder, layers)
        stage = self._stages[layers]
        stage.shell.training = self.training
        return stage

    def logits(self, h_LD: Tensor) -> Tensor:
        return logits_of(self._whole, self._names.decoder, h_LD)

    def fused_loss(self, h_LD: Tensor, labels: Tensor) -> Tensor | None:
        if not self._fused:
            return None
        output = self._whole.get_output_embeddings()
        gradients = liger.liger_gradients if self._fused == "liger" else chunked_gradients
        return fused_token_loss(h_LD, output.weight, labels, gradients)

    def auxiliary(self, extras: dict[str, Tensor]) -> dict[str, Tensor]:
        return {} if self._routers is None else {ROUTER_LOSS: self._routers.loss(extras[ROUTER_LOSS])}
