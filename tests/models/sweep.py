"""Every decoder and vision-language model that the installed `transformers` has, cut after every layer, against the
library's unsplit model; also while it writes a text token by token, in one part and in all of these.

For a type there are two outcomes: exact, or refused by name when it is built. Logits, loss and all gradients are
compared: of padded rows, with and without a mask; of rows that hold several samples, against each sample alone; and of
the load balancing loss. Single precision, within 1e-6, or within three times the rounding that the unsplit model has
itself.

``python -m tests.models.sweep [--attention NAME] [TYPE ...]`` prints the verdicts.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers.models.auto import modeling_auto

from bigmac_lightning.contracts.batch import Batch, Microbatch, PipelineLayout
from bigmac_lightning.contracts.components import Encoder
from bigmac_lightning.contracts.growing_text import GrowingText
from bigmac_lightning.contracts.outputs import StageOutput
from bigmac_lightning.models import HFDecoder, HFVisionEncoder, MultimodalLM, meta_model
from bigmac_lightning.models.families import FAMILIES
from bigmac_lightning.models.vision.hf_encoders import encoders_of
from tests.models import more_families, tiny, zoo

DECODERS = list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VISION_LANGUAGE = list(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
OTHER_LLMS = {  # what families other than those of the zoo may have inside
    "llava with granite": zoo.with_llm("llava", hf.GraniteConfig, embedding_multiplier=3.0, logits_scaling=2.0),
    "gemma4 that sees images both ways": zoo.Model(
        lambda: more_families.gemma4(
            use_bidirectional_attention="vision",
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=24,
        ),
        more_families.placed,
        packs=False,
    ),
    "paligemma with gemma2": more_families.paligemma(
        hf.Gemma2Config, "eager", sliding_window=6, query_pre_attn_scalar=8, final_logit_softcapping=20.0
    ),
    "internvl with gpt_oss": zoo.with_llm("internvl", hf.GptOssConfig, "eager", num_local_experts=4, sliding_window=4),
}
WITH_MEDIA = list(dict.fromkeys((*VISION_LANGUAGE, *FAMILIES, *OTHER_LLMS)))
LENGTHS = (9, 6, 11)  # of samples
WRITTEN = 8
"""Number of tokens that are written after a prompt: more than the windows of sliding attention here."""
Gradients = dict[str, Tensor | None]


@dataclass
class Verdict:
    """The verdict on a model type.

    Attributes:
        refused: why it cannot be cut; empty: it can.
        packing: why a row must not hold several samples; empty: it may.
        router: why it has no load balancing loss; empty: it has one, or has no routers.
        attention: the implementation that was compared.
        errors: the largest error of each comparison, relative to the norm of what is compared.
        keeps: whether it keeps keys and values while it writes.
        rounding: the unsplit model's own error against double precision, once a comparison has needed it.
    """

    refused: str = ""
    packing: str = ""
    router: str = ""
    attention: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    keeps: bool = False
    rounding: float = 0.0

    @property
    def wrong(self) -> dict[str, float]:
        allowed = max(1e-6, 3 * self.rounding)
        # what is written token by token is computed by other formulas where layers have states
        return {
            name: error
            for name, error in self.errors.items()
            if not error <= (1e-5 if name.startswith("written") else allowed)
        }

    def allow_rounding(self, measure: Callable[[], float]) -> None:
        """Measure the unsplit model's own error, if anything would be wrong without it."""
        if self.wrong:
            self.rounding = max(self.rounding, measure())
            assert self.rounding < 1e-4, "the unsplit model is not the same twice: it draws random numbers"


# -- decoders ----------------------------------------------------------------------------------------------------------


@cache
def decoder(model_type: str, attentions: Sequence[str] = ("sdpa", "eager"), router_loss: bool = True) -> Verdict:
    """The verdict on a decoder, with the first of these attention implementations that it has.

    Raises:
        Exception: what is neither exact nor refused by name.
    """
    defaults: dict[str, Any] = {"model_type": model_type, **({} if router_loss else {"output_router_logits": False})}
    config, made, verdict = None, None, Verdict()
    for config in (_tiny_config(defaults), defaults):
        made, verdict = _first_built(config, attentions)
        if "transformers cannot build" not in verdict.refused:
            break
    if "output_router_logits" in verdict.refused and router_loss:
        without = decoder(model_type, attentions, router_loss=False)
        without.router = verdict.refused
        return without
    if made is not None and made.family is None:  # else see `vision_language`
        assert len(made.costs(64).layers) == len(made.saved_activations().layers) == made.num_layers
        assert not isinstance(config, dict), "it is not refused, and needs a row of SPECIAL in tests/models/tiny.py"
        _compare(made, verdict)
    return verdict


def _tiny_config(defaults: dict[str, Any]) -> Any:
    """A tiny config; the defaults of the type if the library takes no such config."""
    try:
        return tiny.tiny_config(**defaults)
    except Exception:
        return defaults


def _first_built(config: Any, attentions: Sequence[str]) -> tuple[HFDecoder | None, Verdict]:
    """A decoder with the first of these attention implementations that it has, or why it is refused."""
    verdict = Verdict()
    for attention in attentions:
        try:
            made = HFDecoder(config, attn_implementation=attention)
        except ValueError as problem:
            verdict.refused = str(problem)
            if "attn_implementation" not in verdict.refused:
                break
        else:
            return made, Verdict(packing=made.refuses_packing, attention=attention)
    return None, verdict


def _compare(made: HFDecoder, verdict: Verdict) -> None:
    attention = "sdpa" if verdict.attention == "by_starts" else verdict.attention
    whole = _randomized(hf.AutoModelForCausalLM, made.config, attention)
    parts = Parts(made, whole.state_dict())
    logits, loss = _alone(whole)
    loss.backward()
    expected = _taken(whole)

    def rounding() -> float:
        double = _randomized(hf.AutoModelForCausalLM, made.config, attention, experts_implementation="eager").double()
        exact, double_loss = _alone(double)
        double_loss.backward()
        return max(_largest(expected, _taken(double)), _error(logits, exact))

    def note(name: str, found: Tensor, found_loss: Tensor) -> None:
        found_loss.backward()
        verdict.errors[f"{name}: logits"] = _error(found, logits)
        verdict.errors[f"{name}: loss"] = _error(found_loss.detach(), loss.detach())
        verdict.errors[f"{name}: gradients"] = _largest(parts.gradients(), expected)

    rows = pad_sequence(samples(), batch_first=True)
    mask = pad_sequence([torch.ones_like(sample) for sample in samples()], batch_first=True)
    ids = torch.cat(samples())
    prompt = Batch([Microbatch({"input_ids": ids[None, :7]})])
    known = {k: whole(input_ids=ids[None, : 7 + k], use_cache=False).logits[0, -1].detach() for k in range(WRITTEN)}
    module = _whole_module(made, whole.state_dict())
    for name, modules in (("written", [module]), ("written in parts", [MultimodalLM(part) for part in parts.parts])):
        arguments = (prompt, ids[7 : 7 + WRITTEN].tolist(), lambda tokens: known[len(tokens)])
        verdict.errors[f"{name}: logits"], keeps = _writing_error(modules, *arguments)
        verdict.keeps = keeps and (verdict.keeps or name == "written")
    for name, given in (("padded", {}), ("masked", {"attention_mask": mask})):
        if name == "padded" or verdict.attention == attention:
            found, _ = parts.run({"input_ids": rows, **given})
            note(name, found[mask.bool()], _loss(found, rows, mask))
    if not verdict.packing:
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        found, _ = parts.run({"input_ids": torch.cat(samples())[None], "position_ids": positions[None]})
        unpacked = pad_sequence(list(found[0].split(list(LENGTHS))), batch_first=True)
        note("packed", found[0], _loss(unpacked, rows, mask))
    if coefficient := made.auxiliary_losses.get("router"):
        out = whole(input_ids=rows, attention_mask=mask, use_cache=False, output_router_logits=True)
        (_loss(out.logits, rows, mask) + coefficient * out.aux_loss).backward()
        routed = {"router": ({"input_ids": rows, "token_mask": mask}, out.aux_loss.detach(), _taken(whole))}
        if not verdict.packing:
            alone = _balancing_loss_alone(whole)
            alone.backward()
            packed = {"input_ids": torch.cat(samples())[None], "position_ids": positions[None]}
            routed["packed router"] = (packed, alone.detach(), _taken(whole))
        for name, (inputs, expected_loss, expected_gradients) in routed.items():
            found, losses = parts.run(inputs)
            text = _loss(found, rows, mask) if name == "router" else torch.zeros(())
            (text + (coefficient if name == "router" else 1.0) * losses["router"]).backward()
            verdict.errors[f"{name}: loss"] = _error(losses["router"].detach(), expected_loss)
            verdict.errors[f"{name}: gradients"] = _largest(parts.gradients(), expected_gradients)
    verdict.allow_rounding(rounding)


def _writing_error(
    modules: Sequence[MultimodalLM], prompt: Batch, tokens: Sequence[int], expected: Callable[[Sequence[int]], Tensor]
) -> tuple[float, bool]:
    """The largest error of the next token's logits while tokens are written after a prompt, and whether keys and values
    are kept.

    Args:
        modules: one with all layers, or one for each layer.
        expected: the library's logits after the prompt and these tokens.
    """
    layers, errors = modules[0].llm.num_layers // len(modules), list[float]()
    stages = [(module.eval(), range(k * layers, (k + 1) * layers)) for k, module in enumerate(modules)]
    text, media = GrowingText(prompt), prompt.microbatches[0].media
    with torch.no_grad():
        caches = {own: module.llm.new_cache(own) for module, own in stages}
        features = torch.cat(modules[0].encode(media)) if media else None
        text.begin({} if None in caches.values() else caches, features)
        for k, token in enumerate(tokens):
            microbatch, out = text.upcoming(modules[0].llm), StageOutput()
            for module, own in stages:
                given = (out.hidden, out.extras, features if microbatch.media else None)
                with module.llm.using_cache(text.caches.get(own)):
                    out = module.run_stage(microbatch, own, *given, "evaluate")
            errors.append(_error(modules[-1].next_logits(out), expected(tokens[:k])))
            text.append(token)
    return max(errors), bool(text.caches)


def _whole_module(made: HFDecoder, weights: dict[str, Tensor], encoders: dict[str, Encoder] | None = None) -> Any:
    """A module with all layers of a decoder that has no weights yet."""
    llm = copy.deepcopy(made)
    llm.materialize(range(made.num_layers), embedding=True, head=True)
    llm.load_state_dict({name: weights[name] for name in llm.state_dict()})
    return MultimodalLM(llm, encoders)


def _balancing_loss_alone(whole: Any) -> Tensor:
    """The library's load balancing loss of all samples together, each of which has gone through the model alone."""
    outs = [whole(input_ids=sample[None], use_cache=False, output_router_logits=True) for sample in samples()]
    return zoo.balancing_loss(whole, [out.router_logits for out in outs])


class Parts:
    """A decoder in as many parts as it has layers. Each part has the weights of its own layer only."""

    def __init__(self, made: HFDecoder, weights: dict[str, Tensor]) -> None:
        last = made.num_layers - 1
        self.parts = [copy.deepcopy(made) for _ in range(last + 1)]
        for k, part in enumerate(self.parts):
            part.materialize([k], embedding=k == 0, head=k == last)
            part.load_state_dict({name: weights[name] for name in part.state_dict()})

    def run(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, S, V) and auxiliary losses."""
        first, last, extras = self.parts[0], self.parts[-1], dict[str, Tensor]()
        inputs = first.prepare(inputs)
        h = first.embed(inputs)
        for k, part in enumerate(self.parts):
            h = part.run_layers(h, inputs, range(k, k + 1), extras)
        return last.logits(h.flatten(0, 1)).unflatten(0, h.shape[:2]), last.auxiliary(extras)

    def gradients(self) -> Gradients:
        """The gradients by the names of the unsplit model, with those of tied copies added; they are removed here."""
        found: Gradients = {}
        for part in self.parts:
            for name, gradient in _taken(part).items():
                name = part.tied.get(name, name)
                gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                both = [g for g in (found.get(name), gradient) if g is not None]
                found[name] = torch.stack(both).sum(0) if both else None
        return found


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, tiny.VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def _alone(whole: Any) -> tuple[Tensor, Tensor]:
    """The logits of all samples' tokens, where each sample runs alone, and the loss."""
    logits = [whole(input_ids=sample[None], use_cache=False).logits for sample in samples()]
    losses = [_loss(row, s[None], torch.ones_like(s[None])) for row, s in zip(logits, samples(), strict=True)]
    return torch.cat(logits, 1)[0], torch.stack(losses).sum()


def _loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    labelled = mask[:, 1:].bool()
    return cross_entropy(logits[:, :-1][labelled], ids[:, 1:][labelled], reduction="sum")


# -- vision-language models --------------------------------------------------------------------------------------------


@cache
def vision_language(name: str, change: Callable[[HFDecoder], None] = lambda part: None) -> Verdict:
    """The verdict on a vision-language model, from pictures to the loss.

    Args:
        change: is done to each part of the LLM.

    Raises:
        Exception: what is neither exact nor refused by name.
    """
    if name not in FAMILIES and name not in OTHER_LLMS:
        reasons = []
        for component in (HFDecoder, HFVisionEncoder):
            try:
                component({"model_type": name})
            except ValueError as problem:
                reasons.append(str(problem))
        return Verdict(refused=reasons[0]) if len(reasons) == 2 else Verdict(errors={"text alone": 0.0})
    model = {**more_families.ALL, **OTHER_LLMS}[name]
    config, attention = model.config(), model.attention
    auto = meta_model.auto_class(config)
    whole = _randomized(auto, config, attention)
    made = HFDecoder(config, attn_implementation=attention)
    verdict = Verdict(packing=made.refuses_packing, attention=attention)
    parts = Parts(made, whole.state_dict())
    for part in parts.parts:
        change(part)
    image = HFVisionEncoder(config, attn_implementation=attention)
    image.materialize()
    image.load_state_dict({weight: whole.state_dict()[weight] for weight in image.state_dict()})
    encoders = encoders_of(image)
    for packed in (False,) if verdict.packing else (False, True):
        loss = zoo.reference_loss(whole, model, packed)
        loss.backward()
        expected = _taken(whole)
        found = _stage_by_stage([MultimodalLM(part, encoders) for part in parts.parts], model, packed)
        found.backward()
        kind = "packed" if packed else "padded"
        verdict.errors[f"{kind}: loss"] = _error(found.detach(), loss.detach())
        verdict.errors[f"{kind}: gradients"] = _largest({**parts.gradients(), **_taken(image)}, expected)

        def rounding(packed: bool = packed, expected: Gradients = expected) -> float:
            double = _randomized(auto, config, attention, experts_implementation="eager")
            zoo.reference_loss(double.double(), model, packed).backward()
            return _largest(expected, _taken(double))

        verdict.allow_rounding(rounding)
    module = _whole_module(made, whole.state_dict(), encoders)
    in_parts = [MultimodalLM(part, encoders) for part in parts.parts]
    whole.eval()
    for sample in (rows[0][0] for rows in zoo.sequences(model, packed=False)):
        prompt, tokens = Batch([zoo.microbatch([[sample]])]), sample.tokens[:WRITTEN:2]
        words = [token for token in tokens if token < zoo.SPECIAL]

        def expected_logits(more: Sequence[int], sample: zoo.Sequence = sample) -> Tensor:
            longer = zoo.Sequence([*sample.tokens, *more], sample.items)
            given = zoo.microbatch([[longer]])
            given.inputs["prompt_tokens"] = torch.tensor([len(sample.tokens)])
            return zoo.forward(whole, longer, given).logits[0, -1].detach()

        for written, modules in (("written", [module]), ("written in parts", in_parts)):
            error, keeps = _writing_error(modules, prompt, words, expected_logits)
            verdict.errors[f"{written}: logits"] = max(error, verdict.errors.get(f"{written}: logits", 0.0))
            verdict.keeps = keeps and (verdict.keeps or written == "written")
    return verdict


def _stage_by_stage(stages: list[MultimodalLM], model: zoo.Model, packed: bool) -> Tensor:
    """The loss of the zoo's batch, stage after stage in one process."""
    given = stages[0].prepare(zoo.batch(model, packed, PipelineLayout()))
    sums = {name: torch.zeros(()) for name in stages[0].loss_names}
    for microbatch in given.microbatches:
        features = torch.cat(stages[0].encode(microbatch.media)) if microbatch.media else None
        hidden, extras, losses = None, dict[str, Tensor](), dict[str, Tensor]()
        for k, stage in enumerate(stages):
            out = stage.run_stage(microbatch, range(k, k + 1), hidden, extras, features, "train")
            hidden, extras, losses, features = out.hidden, out.extras, out.losses, None
        sums = {name: total + losses.get(name, torch.zeros(())) for name, total in sums.items()}
    scales = stages[0].scales(torch.tensor(stages[0].counts(given)))
    return (torch.stack(list(sums.values())) * scales).sum()


# -- comparing ---------------------------------------------------------------------------------------------------------


def _randomized(auto: Any, config: Any, attention: str, **more: Any) -> Any:
    """The library's model with random weights, also of those that start as zeros or ones; so are buffers that it
    saves."""
    torch.manual_seed(2)
    implementations = meta_model.implementations(config, attention)
    whole: Any = auto.from_config(copy.deepcopy(config), attn_implementation=implementations, **more).float()
    zoo.draw_weights(whole, 0.05)
    with torch.no_grad():
        kept = whole.state_dict()
        for name, buffer in whole.named_buffers():
            if name in kept and buffer.is_floating_point():
                buffer.mul_(1.1)
    return whole.train()


def _taken(module: torch.nn.Module) -> Gradients:
    """The gradients, which are removed from the module."""
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return found


def _error(found: Tensor | None, expected: Tensor | None, floor: float = 0.0) -> float:
    if expected is None or not expected.any():
        return 0.0 if found is None or found.norm() < 1e-9 else float("inf")
    if found is None:
        return float("inf")
    return float((found.double() - expected.double()).norm() / max(float(expected.double().norm()), floor))


def _largest(found: Gradients, expected: Gradients) -> float:
    """The largest error of a gradient, relative to its norm, or to a thousandth of the largest norm: the gradients of
    the biases of keys are zero but for rounding."""
    floor = 1e-3 * max(float(gradient.norm()) for gradient in expected.values() if gradient is not None)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(_error(found[name], gradient, floor) for name, gradient in expected.items())


def main() -> None:
    warnings.simplefilter("ignore")
    hf.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser()
    parser.add_argument("--attention", nargs="*", default=["sdpa", "eager"])
    parser.add_argument("types", nargs="*")
    options, counts = parser.parse_args(), dict.fromkeys(("exact", "refused", "WRONG"), 0)
    for look, name in [*((decoder, name) for name in DECODERS), *((vision_language, name) for name in WITH_MEDIA)]:
        if options.types and name not in options.types:
            continue
        start = time.perf_counter()
        try:
            verdict = look(name, tuple(options.attention)) if look is decoder else look(name)
            kind = "refused" if verdict.refused else "WRONG" if verdict.wrong else "exact"
            reasons = [verdict.refused, str(verdict.wrong or ""), verdict.packing, verdict.router]
        except Exception as problem:
            kind, reasons = "WRONG", [f"{type(problem).__name__}: {problem}"]
        counts[kind] += 1
        taken = time.perf_counter() - start
        print(f"{kind:8}{name:26}{taken:5.1f} s ", " | ".join(filter(None, reasons))[:300], flush=True)
    print(counts)


if __name__ == "__main__":
    main()
