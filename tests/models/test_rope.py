"""Rotary embeddings whose frequencies depend on how long samples are: in any order of stages and microbatches, packed,
or padded."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from bigmac_lightning.models import HFDecoder
from tests.models.parts import LAYERS, VOCABULARY, decoder_config

LENGTHS = (13, 5, 21, 9, 30, 3)  # of samples; frequencies change above 8 tokens
ROPES: dict[str, dict[str, Any]] = {
    "llama": {"rope_type": "dynamic", "factor": 2.0},
    "qwen3": {"rope_type": "dynamic", "factor": 3.0},
    "phi3": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [3.0, 4.0, 5.0, 6.0],
        "factor": 8.0,
    },
}


def config(family: str) -> dict[str, Any]:
    longest = {"max_position_embeddings": 8}
    if family == "phi3":
        longest = {"max_position_embeddings": 64, "original_max_position_embeddings": 8}
    return decoder_config(family, rope_parameters={"rope_theta": 100.0, **ROPES[family]}, **longest)


def decoder(family: str, checkpointing: bool = False) -> HFDecoder:
    made = HFDecoder(config(family), seed=5, gradient_checkpointing=checkpointing)
    made.materialize(range(LAYERS), embedding=True, head=True)
    return made.train()


def ids(length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))


def weigh(logits: Tensor) -> Tensor:
    return (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(logits.shape[1]))).sum()


def expected(made: HFDecoder, family: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Of each sample in a model that has seen no other."""
    outcomes, gradients = [], dict[str, Tensor]()
    for length in LENGTHS:
        whole: Any = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**config(family)))
        whole.load_state_dict(made.state_dict())
        logits = whole(input_ids=ids(length)).logits
        weigh(logits).backward()
        outcomes.append(logits)
        for name, parameter in whole.named_parameters():
            gradients[name] = gradients.get(name, torch.zeros(())) + parameter.grad
    return outcomes, gradients


def compare(made: HFDecoder, family: str, found: Sequence[Tensor]) -> None:
    outcomes, gradients = expected(made, family)
    for logits, reference in zip(found, outcomes, strict=True):
        torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-6)
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).norm() <= 2e-6 * gradients[name].norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ROPES)
def test_stages_in_any_order(family: str, checkpointing: bool) -> None:
    """All microbatches go through one stage before the next, both on one rank, and backward from the last to the
    first."""
    made = decoder(family, checkpointing)
    inputs = [made.prepare({"input_ids": ids(length)}) for length in LENGTHS]
    hidden = [made.embed(given) for given in inputs]
    for layers in (range(2), range(2, LAYERS)):
        hidden = [made.run_layers(h, given, layers, {}) for h, given in zip(hidden, inputs, strict=True)]
    found = [made.logits(h[0])[None] for h in hidden]
    for logits in reversed(found):
        weigh(logits).backward()
    compare(made, family, found)


@pytest.mark.parametrize("family", ROPES)
def test_packed_samples_have_frequencies_of_their_own(family: str) -> None:
    made = decoder(family)
    assert not made.refuses_packing
    rows = [LENGTHS[:3], LENGTHS[3:]]
    found: list[Tensor] = []
    for row in rows:
        positions = torch.cat([torch.arange(length) for length in row])[None]
        given = {"input_ids": torch.cat([ids(length) for length in row], 1), "position_ids": positions}
        h = made.run_layers(made.embed(given), given, range(LAYERS), {})
        found += made.logits(h[0])[None].split(list(row), 1)
    torch.stack([weigh(logits) for logits in found]).sum().backward()
    compare(made, family, found)


@pytest.mark.parametrize("family", ROPES)
def test_padding_does_not_count(family: str) -> None:
    made = decoder(family)
    rows = torch.nn.utils.rnn.pad_sequence([ids(length)[0] for length in LENGTHS], batch_first=True)
    tokens = (torch.arange(rows.shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    inputs = made.prepare({"input_ids": rows, "token_mask": tokens})
    h = made.run_layers(made.embed(inputs), inputs, range(LAYERS), {})
    found = [made.logits(row[:length])[None] for row, length in zip(h, LENGTHS, strict=True)]
    torch.stack([weigh(logits) for logits in found]).sum().backward()
    compare(made, family, found)
