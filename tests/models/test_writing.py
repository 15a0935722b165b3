"""Texts that a trained module writes token by token. Every model of the library is in sweep.py."""

import copy
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from bigmac_lightning.contracts.batch import Batch, Microbatch
from bigmac_lightning.contracts.growing_text import next_positions
from bigmac_lightning.models import HFDecoder, HFVisionEncoder, MultimodalLM, meta_model
from bigmac_lightning.models.vision.hf_encoders import encoders_of
from bigmac_lightning.models.writing import Sampling, all_written, written
from tests.models import more_families, sweep, tiny, zoo
from tests.models.parts import decoder_config
from tests.toy import ToyModule

PROMPT = torch.tensor([[5, 9, 3, 17]])


def _prompt() -> Batch:
    return Batch([Microbatch({"input_ids": PROMPT.clone()})])


def _both(**changes: Any) -> tuple[MultimodalLM, Any]:
    """A module, and the library's model with the same weights, which are so large that likely tokens differ."""
    config = hf.AutoConfig.for_model(**decoder_config(initializer_range=0.5, **changes))
    module = MultimodalLM(HFDecoder(copy.deepcopy(config)))
    module.configure_model()
    whole = hf.AutoModelForCausalLM.from_config(config)
    whole.load_state_dict(module.llm.state_dict())
    return module.eval(), whole.eval()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.5},
    ],
)
def test_as_the_library_generates(given: dict[str, float]) -> None:
    """Always the most likely token."""
    module, whole = _both()
    expected = whole.generate(PROMPT, do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0, **given)
    assert [*written(module, _prompt(), Sampling(max_new_tokens=20, **given))] == expected[0, 4:].tolist()


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text", "mllama"])
def test_as_the_library_generates_with_its_cache(name: str) -> None:
    """Where later layers use keys and values again, or layers attend to images."""
    model, found = more_families.KNOWN[name], set[int]()
    whole = sweep._randomized(meta_model.auto_class(model.config()), model.config(), "sdpa").eval()
    zoo.draw_weights(whole, 0.3)
    image = HFVisionEncoder(model.config()) if model.draw else None
    module = MultimodalLM(HFDecoder(model.config()), encoders_of(image) if image else None)
    module.configure_model()
    for part in (module.llm, *([image] if image else [])):
        part.load_state_dict({weight: whole.state_dict()[weight] for weight in part.state_dict()})
    for [sample], _ in zoo.sequences(model, packed=False):
        given = zoo.microbatch([[sample]])
        suppressed = [*module.llm.placeholders.values()] or None
        how = {"do_sample": False, "max_new_tokens": 12, "suppress_tokens": suppressed, "pad_token_id": 0}
        arguments = {**zoo.arguments(whole, sample, given), "use_cache": True}
        arguments.pop("image_grid_thw", None)
        expected = whole.generate(**arguments, **how, eos_token_id=None)[0, len(sample.tokens) :].tolist()
        assert [*written(module.eval(), Batch([given]), Sampling(12))] == expected
        found |= {*expected}
    assert len(found) > 4


@pytest.mark.parametrize(
    ("given", "likely"),
    [
        ({"temperature": 1.0}, lambda p: p > 0),
        ({"temperature": 1.0, "top_k": 3}, lambda p: p >= p.topk(3).values[-1]),
        ({"temperature": 1.0, "min_p": 0.2}, lambda p: p >= 0.2 * p.max()),
        ({"temperature": 1.0, "top_p": 0.3}, lambda p: torch.stack([p[p > own].sum() < 0.3 for own in p])),
        ({"temperature": 0.01}, lambda p: p >= p.max() * 0.9),
    ],
)  # fmt: skip
def test_drawn_tokens(given: dict[str, Any], likely: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """As often as they are likely, and none that is left out."""
    module, whole = _both(vocab_size=12)
    probabilities = whole(PROMPT % 12).logits[0, -1].softmax(-1).detach()
    prompt = Batch([Microbatch({"input_ids": PROMPT % 12})])
    drawn = [next(written(module, prompt, Sampling(seed=seed, max_new_tokens=1, **given))) for seed in range(300)]
    allowed = likely(probabilities)
    expected = torch.where(allowed, probabilities, 0)
    expected /= expected.sum()
    counts = torch.bincount(torch.tensor(drawn), minlength=12) / 300
    assert not counts[~allowed].any()
    assert (counts - expected).abs().max() < 0.12


def test_a_seed_gives_the_same_text() -> None:
    module, _ = _both()
    texts = [[*written(module, _prompt(), Sampling(10, temperature=1.0, seed=seed))] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_end() -> None:
    """It is not a part of the text."""
    module, _ = _both()
    free = [*written(module, _prompt(), Sampling(20))]
    end = free[5]
    assert [*written(module, _prompt(), Sampling(20), [end])] == free[: free.index(end)]


def test_placeholders_of_features_are_never_written() -> None:
    module, _ = _both()
    first = next(written(module, _prompt(), Sampling(1)))
    module.llm.placeholders = {"image": first, "video": 10**6}
    assert first not in [*written(module, _prompt(), Sampling(20))]


def test_a_model_without_a_cache() -> None:
    """A language model of one's own runs all tokens again."""
    module = ToyModule()
    module.configure_model()
    ids, found = PROMPT.clone(), list[int]()
    for _ in range(6):
        inputs = module.llm.prepare({"input_ids": ids})
        hidden = module.llm.run_layers(module.llm.embed(inputs), inputs, range(module.llm.num_layers), {})
        found.append(int(module.llm.logits(hidden[0, -1:]).argmax()))
        ids = torch.cat([ids, torch.tensor([[found[-1]]])], dim=1)
    assert [*islice(written(module.eval(), _prompt(), Sampling()), 6)] == found


def test_several_texts() -> None:
    """Each as if it were written alone, also if there are more than are written at the same time."""
    module, _ = _both()
    prompts = [Batch([Microbatch({"input_ids": torch.arange(3, 5 + k)[None]})]) for k in range(11)]
    free = [[*written(module, prompt, Sampling(9, temperature=0.5))] for prompt in prompts]
    ends = {free[2][4], free[7][0]}
    alone = [[*written(module, prompt, Sampling(9, temperature=0.5), ends)] for prompt in prompts]
    assert len({len(tokens) for tokens in alone}) > 2
    assert all_written(module, iter(prompts), Sampling(9, temperature=0.5), ends) == alone


@pytest.mark.parametrize("model_type", ["gemma2", "qwen3_next"])
def test_a_stage_knows_how_many_tokens_there_are(model_type: str) -> None:
    """Also if the layers that a decoder asks for it are in other stages: of windows, states, and all tokens."""
    llm = HFDecoder(tiny.tiny_config(model_type), attn_implementation="eager")
    llm.materialize(range(4), embedding=True, head=True)
    ids, caches = torch.arange(3, 10)[None], list[Any]()
    for layers in (range(4), range(2, 3)):
        caches.append(llm.new_cache(layers))
        for start, stop in ((0, 6), (6, 7)):
            inputs = llm.prepare({"input_ids": ids[:, start:stop], "position_ids": torch.arange(start, stop)[None]})
            with llm.using_cache(caches[-1]), torch.no_grad():
                llm.run_layers(llm.embed(inputs), inputs, layers, {})
    whole, stage = caches
    assert stage.get_seq_length() == whole.get_seq_length() == 7
    for k in range(4):
        if isinstance(whole.layers[k], LinearAttentionCacheLayerMixin):
            assert stage.has_previous_state(k)
        else:
            assert stage.get_mask_sizes(1, k) == whole.get_mask_sizes(1, k)


def test_next_positions() -> None:
    assert next_positions(torch.tensor([[0, 1, 2]])).tolist() == [[3]]
    rows = torch.tensor([[[0, 1, 2, 3]], [[0, 1, 1, 2]], [[0, 1, 5, 2]], [[0, 1, 1, 2]]])
    assert next_positions(rows).flatten().tolist() == [4, 6, 6, 6]


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 1.0),
     ("repetition_penalty", 0.0)],
)  # fmt: skip
def test_wrong_options(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        Sampling(**{name: value})
