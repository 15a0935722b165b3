"""The LLM of any Hugging Face model, text only or vision-language, as a `LanguageModel` that can be cut between layers.

Stages run Hugging Face's own forward (see stage.py), and what a stage does not hold is replaced by pass-throughs (see
meta_model.py). Layer indices, and with them the pattern of sliding windows, and parameter names stay those of the whole
model.

Shape suffixes: B samples, S tokens, D width, L labelled positions, V vocabulary, N media tokens, E experts.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from bigmac_lightning.contracts.components import LanguageModel
from bigmac_lightning.contracts.parallel import ParallelSizes, StagePeers
from bigmac_lightning.contracts.slices import WHOLE_POSITIONS
from bigmac_lightning.contracts.token_loss import chunked_gradients, fused_token_loss, token_loss
from bigmac_lightning.estimates.forward_cost import ForwardCost
from bigmac_lightning.estimates.partition import LayerCosts

from .. import meta_model
from ..families import token_of
from ..hf_component import HFComponent
from ..loading import rows_over
from ..pass_through import PassThrough
from . import attention, context_parallel, liger, probe_cache, probe_context, probe_cut, probe_packing
from .cross_attention import CrossAttention
from .division import Division
from .exchange import Exchange, sum_of_ranks
from .handed_on import Between, HandedOn
from .head import acts_on_each_logit, check_plain, logits_of
from .image_masks import token_kinds
from .layer_cost import layer_multiplications, matrix_costs
from .multimodal_inputs import (
    multimodal_positions,
    position_axes,
    text_positions,
    vision_arguments,
)
from .rope import lengths_without_padding
from .router import recorded_logits, routers_of
from .stage import Stage
from .stage_cache import StageCache
from .text_inputs import completed_inputs, known_samples

ROUTER_LOSS = "router"


class HFDecoder(HFComponent, LanguageModel):
    """A decoder of the transformers library, alone (Qwen2/3, Llama, Mistral, Mixtral, Gemma 2, ...) or the one inside a
    vision-language model (Qwen3-VL, LLaVA, Gemma 3, ...).

    Parameters keep the names they have in the Hugging Face model ("model.layers.0.mlp.up_proj.weight", ...). A mixture
    of experts whose config has ``output_router_logits`` gets the loss "router", weighted by ``router_aux_loss_coef``.

    Attributes:
        config: its transformers config.
        source: the folder that its weights are read from; ``None``: they are drawn.
        layers_with_features: the layers that take features besides the embeddings.
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
        trust_remote_code: bool = False,
    ) -> None:
        """
        Args:
            config: ``{"model_type": "qwen3", "hidden_size": 64, ...}``, with the library's defaults for what it leaves
                out; or the folder or name of a pretrained model, of which only the config is read; or a ready config.
            seed: the seed of the initial weights.
            attn_implementation: "sdpa", "eager", "flash_attention_2", "flex_attention", or any other that the library
                has for this model and that is installed.
            weights: the folder of a Hugging Face checkpoint, of which each process reads only its part; ``None``:
                initial weights.
            dtype: the type of the weights, such as "float32" or "bfloat16"; "auto": as in the checkpoint.
            gradient_checkpointing: whether to save only each layer's input for the backward and run the layer again.
            fused_loss: whether to make the gradients of the text loss together with the loss. This spares making the
                logits a second time where they are too many to be saved, but holds the output weight's gradient until
                the backward. "liger": do it with the Liger kernels, on GPUs.
            trust_remote_code: whether Python code that comes with the pretrained model may run, on every rank.

        Raises:
            ValueError: the model cannot be cut into stages, or its losses cannot be made (the message says why), or the
                attention implementation is not installed.
        """
        super().__init__()
        self._configure(config, seed, attn_implementation, weights, dtype, gradient_checkpointing, trust_remote_code)
        self._fused = fused_loss
        if fused_loss == "liger":
            liger.check_installed()
        self._takes_masks = attn_implementation in attention.MASKED
        family = self.family
        both_ways = family is not None and family.image_masks is not None and family.sees_both_ways(self.config)
        self._image_masks = family.image_masks if family is not None and both_ways else None
        self.adds_features = family is not None and family.adds_features
        self.sees_prompts = family is not None and family.sees_prompts
        if self._image_masks is not None and not self._takes_masks:
            raise ValueError(
                f"model_type {self.config.model_type!r} lets tokens of an image see each other both ways, by a mask, "
                f"which attn_implementation={attn_implementation!r} does not take: use one of {attention.MASKED}"
            )
        whole = self.build_whole()
        self._names = meta_model.names_of(whole)
        decoder = whole.get_submodule(self._names.decoder)
        meta_model.drop_towers(decoder)
        text: Any = self.config.get_text_config()
        self.num_layers = len(decoder.layers)
        self.vocabulary, self.width = whole.get_input_embeddings().weight.shape
        self._outputs = len(meta_model.output_layer(whole).weight)  # some models have more embeddings than logits
        self.tied = meta_model.tied_output(whole)
        self._check_stages(whole, decoder)
        self._handed_on = HandedOn(decoder)
        self.attends_to_features = family is not None and family.crosses
        self._cross = CrossAttention(self.config, decoder, attn_implementation) if self.attends_to_features else None
        self._deepstack = None if family is None else family.deepstack
        self.layers_with_features = () if self._deepstack is None else tuple(self._deepstack.layers(self.config))
        if fused_loss:
            check_plain(whole, self._names)
        self.refuses_packing, self._needs_masks = self._find_packing(decoder)
        has_router_loss = getattr(text, "output_router_logits", False)
        self._routers = routers_of(whole, decoder, self._names, text) if has_router_loss else None
        self.auxiliary_losses = {ROUTER_LOSS: self._routers.coefficient} if self._routers is not None else {}
        self.placeholders = {
            modality: token
            for modality in ("image", "video", "audio")
            if (token := token_of(self.config, modality)) is not None
        }
        self._layer_configs = [text.per_layer_config[k] for k in range(self.num_layers)]
        self._costs = matrix_costs(decoder.layers, self._layer_configs)
        self._stages: dict[range, Stage] = {}
        self._division = Division(whole, self._names, self._layer_configs)
        self._cache: StageCache | None = None
        self._keeps: dict[range, bool] = {}  # whether a cache of these layers works, once it was tried
        meta_model.keep_language_model(whole, self._names, range(self.num_layers), embedding=True, head=True)
        meta_model.drop_parameters_beside_decoder(whole, self._names)
        self._hold(whole)

    def _check_stages(self, whole: Any, decoder: Any) -> None:
        if self.family is None and (others := meta_model.weights_beside(whole, decoder)):
            raise ValueError(
                f"model_type {self.config.model_type!r} has weights beside its decoder and output layer ({others[0]}, "
                "...), which no component here knows; its decoder alone may be one that can be trained: "
                "HFDecoder(config.get_text_config())"
            )
        reason, self._names = probe_cut.cut(decoder, self._names, self.width)
        if reason:
            raise ValueError(f"model_type {self.config.model_type!r} cannot be cut into stages: {reason}")

    def _find_packing(self, decoder: Any) -> tuple[str, bool]:
        """Why rows must not hold several samples ("": they may), and whether the decoder has to be given masks then."""
        kind = f"model_type {self.config.model_type!r}"
        if self._image_masks is not None:
            which = "a prompt" if self.sees_prompts else "an image"
            return (
                f"{kind} lets tokens of {which} see each other both ways, by a mask that cannot keep packed samples "
                "apart",
                False,
            )
        reason, needs_masks = probe_packing.packing(decoder, self._names, self.width, self._rows, self._takes_masks)
        return reason and f"{kind}: {reason}", needs_masks

    @property
    def _rows(self) -> int:
        """Rows of position ids that the decoder takes."""
        if self.family is None or not self.family.multimodal_positions:
            return 1
        return position_axes(self.config) + self.family.takes_text_positions

    @property
    def _decoder(self) -> Any:
        return self._whole.get_submodule(self._names.decoder)

    # -- weights -----------------------------------------------------------------------------------------------------

    def materialize(
        self, layers: Collection[int], embedding: bool, head: bool, peers: StagePeers = StagePeers()
    ) -> None:
        if not all(parameter.is_meta for parameter in self.parameters()):
            raise ValueError("this decoder has weights already: materialize it once")
        if outside := [k for k in layers if not 0 <= k < self.num_layers]:
            raise ValueError(f"layers {outside} do not exist: the decoder has layers 0..{self.num_layers - 1}")
        tie = head and bool(self.tied)
        divided = peers.tensor is not None or peers.expert is not None  # slices are cut into shards afterwards
        whole = self._materialized(
            partial(
                meta_model.keep_language_model,
                names=self._names,
                layers=layers,
                embedding=embedding or tie,  # a tied head starts from the embedding's weights
                head=head,
            ),
            partial(self._division.cut, peers=peers) if divided else rows_over(self.shard_mesh),
        )
        if tie:
            meta_model.output_layer(whole).weight = whole.get_input_embeddings().weight
        meta_model.drop_parameters_beside_decoder(whole, self._names)
        if not embedding:
            for name in (self._names.embedding, *self._names.with_embedding):
                meta_model.drop(whole, f"{self._names.decoder}.{name}")
        self._hold(whole)

    def keep(self, layers: Collection[int], embedding: bool, head: bool) -> None:
        meta_model.keep_language_model(self._whole, self._names, layers, embedding, head)
        self._stages.clear()

    # -- several ranks -----------------------------------------------------------------------------------------------

    def why_not_parallel(self, sizes: ParallelSizes) -> str:
        kind = f"model_type {self.config.model_type!r}"
        if sizes.context > 1:
            decoder = self.build_whole().get_submodule(self._names.decoder)
            reason = probe_context.why_not_sliced(decoder, self._names, self.width, self._attention, sizes, self._rows)
            if reason:
                return f"{kind} cannot have context parallelism: {reason}"
        if sizes.tensor > 1:
            if reason := self._division.why_no_tensors(self._whole, sizes, kind):
                return reason
            if not acts_on_each_logit(self._whole, self._names):
                return f"tensor={sizes.tensor}: {kind} does not treat each logit alone: leave tensor out"
            if self._fused == "liger":
                return f"tensor={sizes.tensor}: fused_loss='liger' needs all logits on one rank: use fused_loss=True"
        if sizes.tensor > 1 and sizes.expert > 1 and self.config.get_text_config().model_type == "flint":
            # The ranks' collectives have been seen to get out of step after it; the cause is not known yet.
            return f"tensor={sizes.tensor}, expert={sizes.expert}: model_type 'flint' takes only one of them"
        return self._division.why_no_experts(self._whole, sizes) if sizes.expert > 1 else ""

    @property
    def _exchange(self) -> Exchange | None:
        return self._division.exchange

    def _ends(self, whole: Any) -> list[Any]:
        """The embedding and the output layer, or what stands in for them."""
        names = self._names
        return [whole.get_submodule(name) for name in (f"{names.decoder}.{names.embedding}", names.output)]

    def parallelize(self, peers: StagePeers) -> None:
        whole = self._whole
        tied = [module for module in self._ends(whole) if self.tied and not isinstance(module, PassThrough)]
        self._division.cut(whole, "", peers)
        if len(tied) == 2:
            tied[1].weight = tied[0].weight
        self._division.install(whole, peers, self._outputs, self._attention)
        if self._exchange is not None and self._cross is not None:
            self._cross.of_slices(self._decoder, self._exchange, self._attention)
        if self._exchange is not None and self.gradient_checkpointing:
            how = {"use_reentrant": False, "context_fn": self._exchange.checkpoint_contexts}
            whole.activation_checkpointing_enable(how)

    def check_adapters(self, targets: Collection[str]) -> None:
        """
        Args:
            targets: the names of the linear layers here that get low-rank adapters.

        Raises:
            ValueError: the output layer is one of them, and cannot be.
        """
        output = self._names.output
        if output not in targets:
            return
        if self.tied:
            raise ValueError(
                f"lora: {output} is tied to the embedding, which its adapter would not change: leave it out of "
                "target_modules, or set tie_word_embeddings to false in the config"
            )
        if self._fused:
            raise ValueError(f"lora: fused_loss needs {output} without an adapter: leave out one of the two")

    def parameters_of(self, layers: Collection[int], embedding: bool, head: bool) -> Iterator[nn.Parameter]:
        decoder, output = self._decoder, meta_model.output_layer(self._whole)
        parts = [decoder.layers[k] for k in sorted(layers)]
        names = self._names
        first, last = (names.embedding, *names.with_embedding), (names.norm, *names.with_norm)
        parts += [decoder.get_submodule(name) for name in first] * embedding
        parts += [*(decoder.get_submodule(name) for name in last), output] * head
        found = {id(parameter): parameter for part in parts for parameter in part.parameters()}
        yield from found.values()

    # -- estimates ---------------------------------------------------------------------------------------------------

    def costs(self, sample_tokens: int = 0) -> LayerCosts:
        """Multiplications per token."""
        return self.divided_costs(ParallelSizes(), sample_tokens)

    def saved_activations(self) -> LayerCosts:
        return self.divided_activations(ParallelSizes())

    def slices(self, sizes: ParallelSizes) -> dict[nn.Parameter, int]:
        return {parameter: n for parameter, (_, n) in self._division.cuts_of(self._whole, sizes).items()}

    def divided_costs(self, sizes: ParallelSizes, sample_tokens: int = 0) -> LayerCosts:
        text, heads = self.config.get_text_config(), self._division.heads(sizes)
        layers = layer_multiplications(self._divided(sizes), self._layer_configs, text, sample_tokens, heads)
        first, last = (self._matrices(names) for names in (self._names.with_embedding, self._names.with_norm))
        return LayerCosts(layers, first, (self.vocabulary * self.width + last) / sizes.tensor)

    def divided_activations(self, sizes: ParallelSizes) -> LayerCosts:
        return LayerCosts(tuple(cost.activations for cost in self._divided(sizes)), head=2.0 * self.width)

    def _divided(self, sizes: ParallelSizes) -> list[ForwardCost]:
        cuts = self._division.cuts_of(self._whole, sizes)
        return matrix_costs(self._decoder.layers, self._layer_configs, cuts) if cuts else self._costs

    def _matrices(self, names: Collection[str]) -> float:
        """The multiplications per token of modules in the decoder."""
        modules = (self._decoder.get_submodule(name) for name in names)
        return float(sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear)))

    # -- running -----------------------------------------------------------------------------------------------------

    def prepare(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds M-RoPE positions (4, B, S), text positions first, which are made of (B, S) positions that start anew at
        each packed sample and of ``image_grid_thw`` and ``video_grid_thw`` of shape (items, 3). Adds
        ``token_type_ids`` where masks are made of them.

        Raises:
            ValueError: a grid of an image is missing, or the model cannot keep packed samples apart.
        """
        inputs = completed_inputs(inputs, self._takes_masks, self.refuses_packing)
        if self.family is None:
            return inputs
        if self.family.multimodal_positions and inputs["position_ids"].ndim == 2:
            inputs["position_ids"] = multimodal_positions(self._whole.base_model, inputs, self.family)
        if self._cross is not None:
            self._cross.check(inputs)
        if self._image_masks is not None and "token_type_ids" not in inputs:
            tokens = [self.placeholders[name] for name in ("image", "video") if name in self.placeholders]
            inputs["token_type_ids"] = token_kinds(inputs, tokens, self.sees_prompts)
            if self.family.sees_around_images and inputs["token_type_ids"].any():
                raise ValueError(
                    f"model_type {self.config.model_type!r} needs inputs['token_type_ids'] (B, S), which is 1 for an "
                    "image's tokens and those around them: give what its processor calls mm_token_type_ids"
                )
        return inputs

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        h_BSD = self._decoder.get_submodule(self._names.embedding)(self._known_ids(inputs["input_ids"]))
        scale = 1.0 if self.family is not None else self._names.scale_of_ids  # a family gives its decoder embeddings
        return h_BSD if scale == 1.0 else h_BSD * scale

    def _known_ids(self, ids_BS: Tensor) -> Tensor:
        """Token ids, without placeholders that have no embedding; features replace these anyway."""
        for placeholder in self.placeholders.values():
            if placeholder >= self.vocabulary:
                ids_BS = ids_BS.masked_fill(ids_BS == placeholder, 0)
        return ids_BS

    def extra_shapes(
        self, layer: int, rows: tuple[int, int], media_rows: int, levels: int
    ) -> dict[str, tuple[int, ...]]:
        shapes = self._handed_on.shapes(layer, rows, self.width, self._division.tensor_ranks)
        if self._cross is not None:
            shapes |= self._cross.shapes(layer, media_rows, self.width)
        elif media_rows and (left := sum(k >= layer for k in self.layers_with_features[: levels - 1])):
            shapes["features"] = (left, media_rows, self.width)
        if self._routers is not None:
            shapes[ROUTER_LOSS] = (2, self._routers.experts)
        return shapes

    def run_layers(self, h_BSD: Tensor, inputs: dict[str, Tensor], layers: range, extras: dict[str, Tensor]) -> Tensor:
        attention.check_device(self._attention, h_BSD.device)
        further: dict[str, Any] = {}
        if self._cache is not None:
            further["cache"] = self._cache
        elif attention.STARTS in inputs:
            further = attention.sample_arguments(
                inputs[attention.STARTS], inputs.get(WHOLE_POSITIONS, inputs["input_ids"]).shape[-1]
            )
        if self.family is not None:
            further.update(vision_arguments(self.config, self.family, inputs["input_ids"]))
        features = extras.pop("features", None)
        if self._cross is not None:
            further.update(self._cross.arguments(features, inputs, layers, extras, self._cache))
        elif features is not None and features.shape[1]:  # a slice may have no rows of them
            assert self._deepstack is not None, "encoders whose features no layer takes are refused"
            given, left = self._deepstack.take(
                self.layers_with_features, layers, features, inputs["media_positions"], h_BSD
            )
            further.update(given)
            if len(left):
                extras["features"] = left
        recording = recorded_logits(self._decoder, layers if self._routers is not None else range(0))
        stage = self._stage(layers)
        whole_rows = context_parallel.whole_rows(self._exchange, stage.shell, h_BSD, inputs)
        lengths = lengths_without_padding(stage.shell, inputs.get(attention.TOKENS))
        with recording as router_logits, known_samples(inputs), whole_rows as whole_BSD, lengths:
            mask = self._mask(whole_BSD, inputs)
            before = self._before(h_BSD, inputs, layers, extras)
            after = stage(before, position_ids=self._positions(inputs), attention_mask=mask, **further)
            if self._routers is not None:
                sums_2E = extras.get(ROUTER_LOSS, torch.zeros(2, self._routers.experts, device=h_BSD.device))
                counted = context_parallel.counted_tokens(self._exchange, whole_BSD, inputs)
                extras[ROUTER_LOSS] = self._routers.add(sums_2E, router_logits, *counted)
        if self._cache is not None:
            self._cache.count(h_BSD)
        return after.hidden if layers.stop == self.num_layers else self._handed_on.handed(after, extras, layers.stop)

    def _before(self, h_BSD: Tensor, inputs: dict[str, Tensor], layers: range, extras: dict[str, Tensor]) -> Between:
        """What goes into a stage."""
        if layers.start:
            return self._handed_on.taken(h_BSD, extras, layers.start)
        between = Between(h_BSD)
        if self._handed_on.layer_inputs:
            ids_BS = inputs["input_ids"]
            for placeholder in self.placeholders.values():
                ids_BS = ids_BS.masked_fill(ids_BS == placeholder, self.config.get_text_config().pad_token_id)
            of_ids = self._decoder.get_per_layer_inputs(ids_BS)
            between.layer_inputs = self._decoder.project_per_layer_inputs(h_BSD, of_ids)
        return between

    def _positions(self, inputs: dict[str, Tensor]) -> Tensor | None:
        positions = inputs.get("position_ids")
        if positions is None or self.family is None or self.family.takes_text_positions:
            return positions
        return positions[1:] if positions.ndim == 3 else positions

    def _mask(self, h_BSD: Tensor, inputs: dict[str, Tensor]) -> Any:
        """What the decoder gets as its attention mask; ``None``: it makes its own."""
        if self._cache is not None and self._cache.get_seq_length():
            return None
        config = self._decoder.config
        if self._image_masks is not None and "token_type_ids" in inputs:
            return self._image_masks(config, h_BSD, inputs)
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is None and self._needs_masks and positions is not None:
            return attention.packed_masks(config, h_BSD, text_positions(positions))
        return mask

    def _stage(self, layers: range) -> Stage:
        if layers not in self._stages:
            decoder = self._decoder
            if absent := [k for k in layers if isinstance(decoder.layers[k], PassThrough)]:
                raise ValueError(f"run_layers({layers}) needs layers {absent}, which were not materialized here")
            self._stages[layers] = Stage(decoder, layers, self._names.returned)
        stage = self._stages[layers]
        stage.shell.training = self.training
        return stage

    def new_cache(self, layers: range) -> Any:
        decoder = self._decoder
        own = [k for k in layers if k not in getattr(decoder, "cross_attention_layers", ())]
        empty = partial(StageCache, decoder.config, own, self._handed_on.made_before(layers.start))
        if layers not in self._keeps:
            self._keeps[layers] = probe_cache.agrees(self, empty(), layers, next(self.parameters()).device)
        return empty() if self._keeps[layers] else None

    @contextmanager
    def using_cache(self, cache: Any) -> Iterator[None]:
        self._cache = cache
        try:
            yield
        finally:
            self._cache = None

    def logits(self, h_LD: Tensor) -> Tensor:
        logits = logits_of(self._whole, self._names, h_LD)
        own = self._division.vocabulary
        return logits if own is None else own.whole(logits)

    def text_loss(self, h_LD: Tensor, labels: Tensor, predict: bool) -> tuple[Tensor, Tensor | None]:
        own = self._division.vocabulary
        if own is None:
            return super().text_loss(h_LD, labels, predict)
        of_slice = partial(logits_of, self._whole, self._names)
        return token_loss(of_slice, h_LD, labels, own.size, predict, loss_of=own.loss)

    def fused_loss(self, h_LD: Tensor, labels: Tensor) -> Tensor | None:
        if not self._fused or not len(labels):  # a slice may have none, and kernels want some
            return None
        output = meta_model.output_layer(self._whole)
        if (own := self._division.vocabulary) is not None:
            return fused_token_loss(h_LD, output.weight.to_local(), labels, own.gradients)
        gradients = liger.liger_gradients if self._fused == "liger" else chunked_gradients
        return fused_token_loss(h_LD, output.weight, labels, gradients)

    def auxiliary(self, extras: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._routers is None:
            return {}
        sums_2E = extras[ROUTER_LOSS]
        if self._exchange is not None:
            sums_2E = sum_of_ranks(sums_2E, self._exchange.group)
        return {ROUTER_LOSS: self._routers.loss(sums_2E)}
