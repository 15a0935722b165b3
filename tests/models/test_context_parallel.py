"""Stages on slices of rows, one rank for each slice, against the same decoder on whole rows in one process."""

from collections.abc import Callable, Sequence
from functools import partialmethod
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.contracts.parallel import ParallelSizes, StagePeers
from bigmac_lightning.contracts.slices import slice_of
from bigmac_lightning.models import HFDecoder, meta_model
from bigmac_lightning.models.llm import probe_context
from bigmac_lightning.models.llm.exchange import sum_of_ranks
from tests.models import sliced, sweep, test_attention, test_probe, tiny, zoo
from tests.models.more_families import MORE
from tests.ranks import run_ranks

Stages = Sequence[range]
assert test_attention.by_starts  # an implementation that takes no mask

FAMILIES = ("gemma2", "gemma3", "mixtral", "qwen2_5_vl", "llava")
DECODERS = ("gpt_oss", "granite_swa", "deepseek_v3")
REFUSED = ("qwen3_5", "qwen3_5_moe")


def wide(names: Sequence[str], few: Sequence[str]) -> list[Any]:
    return [*few, *(pytest.param(name, marks=pytest.mark.wide) for name in names if name not in few)]


def exact(make: Callable[[], Any], ranks: int = 2, split: bool = False) -> None:
    for errors in run_ranks(ranks, sliced.on_ranks, ranks, make, split):
        assert errors
        assert not any(errors), errors


def family(
    name: str, stages: Stages = (range(2), range(2, zoo.LAYERS)), packs: Sequence[bool] = (False, True), **options: Any
) -> tuple[sliced.Module, list[Batch], Stages]:
    model = zoo.KNOWN[name]
    module = sliced.Module(model.config(), **{"attn_implementation": model.attention, **options})
    batches = [zoo.batch(model, packed, PipelineLayout()) for packed in packs if model.packs or not packed]
    return module, [sliced.with_targets(batch) for batch in batches], stages


def decoder(config: Any, attention: str = "sdpa", **options: Any) -> tuple[sliced.Module, list[Batch], Stages]:
    module = sliced.Module(config, attn_implementation=attention, **options)
    batches = [sliced.texts(packed) for packed in (False, True) if not (packed and module.llm.refuses_packing)]
    return module, batches, [range(2), range(2, module.llm.num_layers)]


@pytest.mark.parametrize("name", wide([name for name in zoo.MODELS if name not in REFUSED], FAMILIES))
def test_families(name: str) -> None:
    """Padded and packed rows; media, labels and conditions wherever they fall; and the encoders' gradients."""
    exact(lambda: family(name))


@pytest.mark.wide
@pytest.mark.parametrize("name", MORE)
def test_more_families(name: str) -> None:
    """Exact, or refused by name."""
    model = MORE[name]
    llm = HFDecoder(model.config(), attn_implementation=model.attention)
    if reason := llm.why_not_parallel(ParallelSizes(context=2)):
        assert "context parallelism" in reason
        return
    exact(lambda: family(name))


@pytest.mark.filterwarnings("ignore")  # of configs that are not ours
@pytest.mark.parametrize("name", wide(sweep.DECODERS, DECODERS))
def test_decoders_of_the_library(name: str) -> None:
    verdict = None
    for more in ({}, {"output_router_logits": False}):
        config = sweep._tiny_config({"model_type": name, **more})
        made, verdict = sweep._first_built(config, ("sdpa", "eager"))
        if made is not None:
            break
    else:
        pytest.skip("it cannot be cut into stages")
    if made.family is not None:
        pytest.skip("see test_families")
    if reason := made.why_not_parallel(ParallelSizes(context=2)):
        assert name not in DECODERS
        pytest.skip(reason)
    exact(lambda: decoder(config, verdict.attention))


# -- numbers of ranks and heads, attention implementations ------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "heads", "key_heads", "attention"),
    [(3, 6, 2, "sdpa"), (3, 6, 2, "eager"), (4, 4, 1, "sdpa"), (2, 6, 3, "eager")],
)
def test_heads_of_keys_are_repeated_where_there_are_too_few(
    ranks: int, heads: int, key_heads: int, attention: str
) -> None:
    """Three slices of rows of 11 and of 26 tokens, too."""
    sizes = {"hidden_size": 48, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    config = zoo.text(hf.LlamaConfig, **sizes)()
    exact(lambda: decoder(config, attention), ranks)


@pytest.mark.parametrize("name", ["mistral", "qwen3_vl"])
def test_attention_without_masks(name: str) -> None:
    """It gets the places where samples start in whole rows; Mistral has a sliding window."""
    exact(lambda: family(name, attn_implementation="by_starts"))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_of_a_sample(kind: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 8}
    rope = {"rope_type": kind, "rope_theta": 100.0, "factor": 2.0, **(factors if kind == "longrope" else {})}
    config = zoo.text(hf.LlamaConfig, rope_parameters=rope, max_position_embeddings=8)()
    exact(lambda: decoder(config))


def test_a_mask_of_padding_on_the_left() -> None:
    def make() -> Any:
        module, (padded, _), stages = decoder(zoo.MODELS["mixtral"].config())
        inputs = padded.microbatches[0].inputs
        mask = inputs.pop("token_mask").flip(1)
        inputs["attention_mask"] = mask
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        labelled = (mask[:, 1:] * mask[:, :-1]).nonzero()
        microbatch = padded.microbatches[0]
        microbatch.label_positions = labelled[:, 0] * mask.shape[1] + labelled[:, 1]
        microbatch.labels = inputs["input_ids"].flatten()[microbatch.label_positions + 1]
        return module, [padded], stages

    exact(make)


def test_a_router_loss_of_all_tokens() -> None:
    """Without any mask, of rows that a slice has half of."""

    def make() -> Any:
        module, batches, stages = decoder(zoo.MODELS["mixtral"].config())
        for batch in batches:
            del batch.microbatches[0].inputs["token_mask"]
        return module, batches, stages

    exact(make)


# -- pairs with what else a stage does --------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_backwards(split: bool, checkpointing: bool) -> None:
    """Microbatches have rows of several lengths, and layers run again in the backward after all forwards."""
    exact(lambda: family("qwen3_vl_moe", gradient_checkpointing=checkpointing), split=split)


def test_layers_run_again_after_other_microbatches() -> None:
    """With the length of the rows that they ran with."""
    for loss, expected in run_ranks(2, _interleaved):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def _interleaved(rank: int) -> tuple[Tensor, Tensor]:
    module, batches, _ = decoder(zoo.MODELS["mistral"].config(), gradient_checkpointing=True)
    (whole,), (part,) = (module.parts([range(module.llm.num_layers)]) for _ in range(2))
    part.llm.parallelize(StagePeers(context=init_device_mesh("cpu", (2,), mesh_dim_names=("context",))))
    microbatches = [whole.prepare(batch).microbatches[0] for batch in batches]
    assert microbatches[0].shape != microbatches[1].shape
    gradients = []
    for model, given in ((whole, microbatches), (part, [slice_of(m, rank, 2) for m in microbatches])):
        outs = [model.run_stage(m, range(module.llm.num_layers), None, {}, None, "train") for m in given]
        for out in outs:  # the first one last, as no pipeline does
            out.losses["text"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    dist.all_reduce(gradients[1])
    return gradients[1], gradients[0]


def one_sided(media_first: bool) -> Batch:
    """A row that has media in one of its halves, and labels in the other."""
    random = Random(1)
    draw = zoo.MODELS["qwen3_vl"].draw
    assert draw is not None
    sample = zoo.sequence(random, draw)
    words, media = [random.randrange(3, 50) for _ in range(len(sample.tokens) + 5)], sample.tokens
    made = zoo.microbatch([[zoo.Sequence(media + words if media_first else words + media, sample.items)]])
    half = made.shape[1] // 2
    kept = (made.label_positions > half) == media_first
    made.labels, made.label_positions = made.labels[kept], made.label_positions[kept]
    for m in (slice_of(made, 0, 2), slice_of(made, 1, 2)):
        assert len(m.media_positions) in (0, len(made.media_positions))
        assert len(m.labels) in (0, len(made.labels))
    return Batch([made], PipelineLayout())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("freeze_llm", [False, True])
def test_slices_without_media_or_labels(freeze_llm: bool, fused: bool) -> None:
    """Deepstack features in one slice only. If the LLM is frozen, gradients reach the encoder from both slices."""
    model = zoo.MODELS["qwen3_vl"]
    options: dict[str, Any] = {"freeze_llm": freeze_llm, "fused_loss": fused}

    def make() -> Any:
        module = sliced.Module(model.config(), **options)
        stages = [range(zoo.LAYERS)] if freeze_llm else [range(1), range(1, zoo.LAYERS)]
        return module, [one_sided(True), one_sided(False)], stages

    exact(make)


def test_predictions() -> None:
    for whole, slices in run_ranks(2, _predictions):
        assert torch.equal(whole, slices)


def _predictions(rank: int) -> tuple[Tensor, Tensor]:
    module, (batch, _), _ = decoder(zoo.MODELS["qwen3"].config())
    (whole,), (part,) = (module.parts([range(module.llm.num_layers)]) for _ in range(2))
    part.llm.parallelize(StagePeers(context=init_device_mesh("cpu", (2,), mesh_dim_names=("context",))))
    microbatch = whole.prepare(batch).microbatches[0]
    mine = slice_of(microbatch, rank, 2)
    with torch.no_grad():
        expected = whole.run_stage(microbatch, range(zoo.LAYERS), None, {}, None, "predict").predictions
        found = part.run_stage(mine, range(zoo.LAYERS), None, {}, None, "predict").predictions
    assert expected is not None
    assert found is not None
    together = torch.zeros_like(expected).index_copy(0, mine.label_rows, found)
    dist.all_reduce(together)
    return expected, together


def test_what_is_made_of_a_sum_of_ranks_is_differentiated_once() -> None:
    gradients = run_ranks(3, _gradient_of_sum)
    assert gradients == [(36.0, 12.0)] * 3


def _gradient_of_sum(rank: int) -> tuple[float, float]:
    part = torch.tensor(float(rank + 1), requires_grad=True)
    loss = sum_of_ranks(part, dist.group.WORLD).square()
    loss.backward()
    assert part.grad is not None
    return loss.item(), part.grad.item()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3_5_text", "layer 0 is of the type linear_attention"),
        ("lfm2", "layer 0 is of the type conv"),
        ("deepseek_v32", "layer 0 is of the type indexed_attention"),
        ("doge", "layer 0 brings tokens together outside of its attention function"),
        ("jetmoe", "layer 0 does not call its attention function by the library's interface"),
    ],
)
def test_decoders_that_are_refused(name: str, reason: str) -> None:
    llm = HFDecoder(tiny.tiny_config(name, output_router_logits=False))
    assert not llm.why_not_parallel(ParallelSizes())
    assert reason in llm.why_not_parallel(ParallelSizes(context=2))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (ParallelSizes(context=3), "4 attention heads, which cannot be divided over 3 ranks"),
        (ParallelSizes(tensor=2, context=4), "over 4 ranks times 2 of tensor parallelism"),
        (ParallelSizes(tensor=2, context=2), ""),
        (ParallelSizes(context=4), ""),
    ],
)
def test_heads_that_cannot_be_divided(sizes: ParallelSizes, reason: str) -> None:
    found = HFDecoder(zoo.MODELS["llama"].config()).why_not_parallel(sizes)
    assert reason in found if reason else not found


def test_a_decoder_that_has_weights_is_looked_at_as_well() -> None:
    llm = HFDecoder(zoo.MODELS["llama"].config())
    llm.materialize([1], embedding=False, head=False)
    assert "over 3 ranks" in llm.why_not_parallel(ParallelSizes(context=3))
    assert not llm.why_not_parallel(ParallelSizes(context=2))


def test_whole_rows_and_slices_are_not_taken_for_one_another() -> None:
    module, (batch, _), _ = decoder(zoo.MODELS["llama"].config())
    (part,) = module.parts([range(zoo.LAYERS)])
    microbatch = part.prepare(batch).microbatches[0]
    with pytest.raises(ValueError, match="slices of rows are for ranks of context parallelism"):
        part.run_stage(slice_of(microbatch, 0, 2), range(zoo.LAYERS), None, {}, None, "train")


def why_not_sliced(whole: Any, context: int = 2) -> str:
    sizes = ParallelSizes(context=context)
    names = meta_model.names_of(whole)
    return probe_context.why_not_sliced(whole.get_decoder(), names, zoo.WIDTH, "eager", sizes)


AROUND: dict[str, Any] = {
    "what goes into layer 0 depends on where": test_probe.changed(before=lambda self, h, ids: h.cumsum(1)),
    "what it makes at its end depends on where": test_probe.changed(
        after=lambda self, h, start: self.norm(h) + h.mean(1, keepdim=True)
    ),
    "layer 0 gets another ramp for a slice": test_probe.changed(
        extra=lambda self, k, h, start, ids: {"ramp": torch.arange(h.shape[1])}
    ),
}


@pytest.mark.parametrize("reason", AROUND)
def test_what_is_seen_around_layers(reason: str) -> None:
    assert reason in why_not_sliced(test_probe.built(decoder=AROUND[reason]))
    assert not why_not_sliced(test_probe.built(decoder=test_probe.Llama))


class _Changed(nn.Module):
    """In place of a layer's MLP."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


INSIDE: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "mean over tokens": (lambda h: h - h.mean(1, keepdim=True), True),
    "mean over everything": (lambda h: h / h.abs().mean(), True),
    "mean over width": (lambda h: h - h.mean(-1, keepdim=True), False),
    "shift": (lambda h: torch.cat([h[:, :1], h[:, :-1]], 1), True),
    "padded shift": (lambda h: nn.functional.pad(h, (0, 0, 1, 0))[:, :-1], True),
    "roll": (lambda h: h.roll(1, 1), True),
    "running sum": (lambda h: h.cumsum(1), True),
    "softmax over tokens": (lambda h: h.softmax(1), True),
    "softmax over width": (lambda h: h.softmax(-1), False),
    "convolution": (lambda h: nn.functional.conv1d(h.transpose(1, 2), h.new_empty(32, 1, 1), groups=32), True),
    "scores": (lambda h: (h @ h.transpose(1, 2)).tril() @ h, True),
    "a state": (lambda h: h @ (h.transpose(1, 2) @ h), True),
    "attention of its own": (lambda h: nn.functional.scaled_dot_product_attention(h, h, h), True),
    "best tokens": (lambda h: h * h.topk(3, 1).values.sum(), True),
    "halves of the width": (lambda h: torch.cat([h[..., 16:], h[..., :16]], -1), False),
    "nothing": (lambda h: h.flatten(0, 1).view_as(h), False),
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_seen_inside_layers(name: str) -> None:
    function, mixes = INSIDE[name]
    whole = test_probe.built()
    whole.model.layers[1].mlp = _Changed(function)
    found = why_not_sliced(whole)
    assert ("layer 1 brings tokens together outside of its attention function" in found) == mixes, found
    assert bool(found) == mixes


def test_attention_of_its_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the function that the library's interface gives."""
    whole = test_probe.built()
    kind: Any = type(whole.model.layers[0].self_attn)
    monkeypatch.setattr(kind, "forward", lambda self, hidden_states, **kwargs: (self.o_proj(hidden_states), None))
    assert "layer 0 does not call its attention function by the library's interface" in why_not_sliced(whole)


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"bias": torch.ones(4)}, "attention gets bias"), ({"s_aux": torch.ones(3)}, "sinks of shape"), ({}, "")],
)
def test_further_arguments_of_attention(monkeypatch: pytest.MonkeyPatch, given: dict[str, Tensor], reason: str) -> None:
    whole = test_probe.built()
    kind: Any = type(whole.model.layers[0])
    monkeypatch.setattr(kind, "forward", partialmethod(kind.forward, **given))
    found = why_not_sliced(whole)
    assert reason in found if reason else not found
