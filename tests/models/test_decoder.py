import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from bigmac_lightning.models import HFDecoder
from bigmac_lightning.models.initialization import allocate_and_initialize
from tests.models import tiny
from tests.models.parts import LAYERS, VOCABULARY, WIDTH, decoder_config

FAMILIES = [("qwen3", True), ("qwen3", False), ("llama", True), ("llama", False), ("qwen2", False), ("mistral", True)]
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma2": {},  # soft-capped logits, sliding layers, scaled embedding
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.3, "logits_scaling": 4.0},
    "nanochat": {},  # a norm before the layers, the same as after them
    "starcoder2": {},
}
EAGER = ("gemma2",)
SPLITS = [range(2), range(2, 3), range(3, LAYERS)]


def build(family: str = "qwen3", tied: bool = True, **changes: object) -> HFDecoder:
    changes = {**SPECIAL.get(family, {}), **changes}
    return HFDecoder(decoder_config(family, tie_word_embeddings=tied, **changes), 5, attention(family))


def attention(family: str) -> str:
    return "eager" if family in EAGER else "sdpa"


def whole(family: str = "qwen3", tied: bool = True, **changes: object) -> HFDecoder:
    decoder = build(family, tied, **changes)
    decoder.materialize(range(LAYERS), embedding=True, head=True)
    return decoder


def ids(batch: int = 3, length: int = 11) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def run(decoder: HFDecoder, inputs: dict[str, Tensor], splits: list[range]) -> Tensor:
    h, extras = decoder.embed(inputs), {}
    for layers in splits:
        h = decoder.run_layers(h, inputs, layers, extras)
    return decoder.logits(h.flatten(0, 1)).unflatten(0, h.shape[:2])


@pytest.mark.parametrize(("family", "tied"), [*FAMILIES, *((family, True) for family in SPECIAL)])
def test_against_hugging_face(family: str, tied: bool) -> None:
    """Logits and gradients of a staged decoder equal those of the library's model with the same weights."""
    decoder = whole(family, tied)
    reference = AutoModelForCausalLM.from_config(copy.deepcopy(decoder.config), attn_implementation=attention(family))
    assert list(decoder.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(decoder.state_dict())
    expected = reference(input_ids=ids()).logits
    got = run(decoder, {"input_ids": ids()}, SPLITS)
    assert torch.equal(got, expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * direction).sum().backward()
    (got * direction).sum().backward()
    gradients = dict(decoder.named_parameters())
    assert gradients.keys() == dict(reference.named_parameters()).keys()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_every_part_has_the_weights_of_the_whole(family: str, tied: bool) -> None:
    expected = whole(family, tied).state_dict()
    seen: set[str] = set()
    for layers, embedding, head in [
        ([0, 1, 4], True, False),
        ([2], False, False),
        ([3], False, True),
        ([], True, True),
    ]:
        part = build(family, tied)
        torch.manual_seed(len(layers))  # must not matter
        part.materialize(layers, embedding, head)
        state = part.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
        assert ("model.embed_tokens.weight" in state) == embedding
        assert ("lm_head.weight" in state) == ("model.norm.weight" in state) == head
        assert {int(name.split(".")[2]) for name in state if name.startswith("model.layers.")} == set(layers)
        assert not any(tensor.is_meta for tensor in [*part.parameters(), *part.buffers()])
        seen |= state.keys()
    assert seen == expected.keys()


def test_weights_depend_on_seed_and_name() -> None:
    one, other = whole(), HFDecoder(decoder_config(tie_word_embeddings=True), seed=6)
    other.materialize(range(LAYERS), True, True)
    weights = dict(one.named_parameters())
    matrices = [name for name, weight in weights.items() if weight.ndim == 2]
    assert not any(torch.equal(weights[name], other.get_parameter(name)) for name in matrices)
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"])


def test_materialize_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    whole()
    assert torch.equal(torch.get_rng_state(), before)


def test_tied_weights_are_one_parameter_only_where_both_are_kept() -> None:
    decoder = whole(tied=True)
    assert decoder.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert decoder.get_parameter("lm_head.weight") is decoder.get_parameter("model.embed_tokens.weight")
    head = build(tied=True)
    head.materialize([LAYERS - 1], embedding=False, head=True)
    assert torch.equal(head.get_parameter("lm_head.weight"), decoder.get_parameter("model.embed_tokens.weight"))
    assert not head.get_parameter("lm_head.weight")[0].any()  # the padding token's row
    assert whole(tied=False).tied == {}


def test_more_layers_kept_than_run() -> None:
    """As with several stages per rank; stages that share nothing must not disturb one another."""
    decoder, part = whole("llama"), build("llama")
    part.materialize([0, 1, 3, 4], embedding=True, head=True)
    inputs = {"input_ids": ids(), "position_ids": torch.arange(11).repeat(3, 1)}
    h = part.run_layers(part.embed(inputs), inputs, range(2), {})
    h = decoder.run_layers(h, inputs, range(2, 3), {})
    for _ in range(2):
        got = part.logits(part.run_layers(h, inputs, range(3, LAYERS), {}).flatten(0, 1))
    assert torch.equal(got, run(decoder, inputs, [range(LAYERS)]).flatten(0, 1))
    assert list(part.state_dict()) == [k for k in decoder.state_dict() if "layers.2." not in k]


def test_packed_rows_and_masks_reach_the_layers() -> None:
    decoder = whole("mistral", sliding_window=4)
    packed = {"input_ids": ids(1, 9), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    alone = {"input_ids": packed["input_ids"][:, 4:]}
    torch.testing.assert_close(run(decoder, packed, SPLITS)[:, 4:], run(decoder, alone, SPLITS))
    masked = {"input_ids": ids(1, 9), "attention_mask": torch.tensor([[0] * 4 + [1] * 5])}
    assert not torch.allclose(
        run(decoder, masked, SPLITS)[:, 4:], run(decoder, {"input_ids": ids(1, 9)}, SPLITS)[:, 4:]
    )


def test_inputs_that_would_be_taken_for_something_else() -> None:
    decoder = whole("llama")
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="with an attention_mask, transformers takes a packed row for one sample"):
        decoder.prepare({"input_ids": ids(1, 5), "position_ids": packed, "attention_mask": torch.ones(1, 5)})
    with pytest.raises(ValueError, match=r"'attention_mask'\] has shape \(1, 1, 5, 5\), but input_ids \(1, 5\)"):
        decoder.prepare({"input_ids": ids(1, 5), "attention_mask": torch.ones(1, 1, 5, 5)})
    with pytest.raises(ValueError, match=r"'position_ids'\] has shape \(3, 1, 5\): give \(B, S\)"):
        decoder.prepare({"input_ids": ids(1, 5), "position_ids": packed.expand(3, 1, 5)})
    left = {"position_ids": torch.tensor([[1, 1, 0, 1, 2]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    decoder.prepare({"input_ids": ids(1, 5), **left})


def test_what_a_forward_returns_does_not_change_stages() -> None:
    """Settings of the config that only say what else the library is to return."""
    returned = {"output_hidden_states": True, "return_dict": False, "use_cache": True, "num_labels": 7}
    expected = run(whole("llama"), {"input_ids": ids()}, SPLITS)
    assert torch.equal(run(whole("llama", **returned), {"input_ids": ids()}, SPLITS), expected)
    decoder = build("llama", output_attentions=True, attn_implementation="eager", **returned)
    decoder.materialize(range(LAYERS), True, True)
    assert torch.allclose(run(decoder, {"input_ids": ids()}, SPLITS), expected, rtol=1e-5, atol=1e-6)


def test_no_gradient_checkpointing() -> None:
    config = tiny.tiny_config("jetmoe", output_router_logits=False)
    with pytest.raises(ValueError, match="has no gradient checkpointing for JetMoeForCausalLM"):
        HFDecoder(config, gradient_checkpointing=True)


def test_quantized_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="has a quantization_config: quantized weights cannot be trained"):
        build("llama", quantization_config={"quant_method": "fp8"})


def test_a_copy_is_independent() -> None:
    decoder = whole()
    inputs = {"input_ids": ids()}
    expected = run(decoder, inputs, SPLITS)
    other = copy.deepcopy(decoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert torch.equal(run(decoder, inputs, SPLITS), expected)
    assert not torch.equal(run(other, inputs, SPLITS), expected)


def test_stages_learn_the_mode() -> None:
    """Shells follow train() and eval() of the decoder that they share."""
    decoder = whole()
    for training in (True, False):
        decoder.train(training)
        run(decoder, {"input_ids": ids()}, SPLITS)
        assert {decoder._stage(layers).shell.training for layers in SPLITS} == {training}


def test_config_objects_and_folders(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    assert HFDecoder(config).num_layers == HFDecoder(str(tmp_path)).num_layers == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 8}, 'needs a "model_type"'),
        ({"model_type": "gpt2"}, "cannot be cut into stages.*has no layers"),
    ],
)
def test_a_config_that_cannot_be_used(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HFDecoder(config)


def test_misuse() -> None:
    decoder = build()
    with pytest.raises(ValueError, match=r"layers \[7\] do not exist: the decoder has layers 0\.\.4"):
        decoder.materialize([0, 7], True, False)
    decoder.materialize([0, 1], True, False)
    with pytest.raises(ValueError, match="materialize it once"):
        decoder.materialize([0, 1], True, False)
    with pytest.raises(ValueError, match=r"needs layers \[2\]"):
        decoder.run_layers(torch.zeros(1, 2, WIDTH), {}, range(1, 3), {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma2", "attn_logit_softcapping": None}, "'gemma2' are not those of its output weight"),
        ({"model_type": "granite", "logits_scaling": 4.0}, "'granite' are not those of its output weight"),
    ],
)
def test_logits_that_cannot_be_fused(config: dict[str, Any], message: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
    with pytest.raises(ValueError, match=message):
        HFDecoder({**sizes, **config}, fused_loss=True, attn_implementation="eager")


def test_values_that_no_rule_sets() -> None:
    """The activation of Apertus sets its parameters in its constructor, which does not run on the CPU."""
    made = HFDecoder(tiny.tiny_config("apertus"))
    made.materialize(range(1), True, True)
    activation = made.get_submodule("model.layers.0.mlp.act_fn")
    for name, tensor in type(activation)().state_dict().items():
        assert torch.equal(activation.state_dict()[name], tensor.float()), name

    class Unknown(torch.nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(size))

    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(tiny.tiny_config("qwen3"))
        whole.model.layers[0].mlp.act_fn = Unknown(3)
    with pytest.raises(ValueError, match=r"no rule for the initial values of model.layers.0.mlp.act_fn"):
        allocate_and_initialize(whole, 0)
