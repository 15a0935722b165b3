"""Llama 3.2 Vision: what tokens see of images, against the library on each sample alone; and what is refused."""

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch

from bigmac_lightning import BigMacStrategy
from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.models import HFDecoder, HFVisionEncoder, MultimodalLM, meta_model
from bigmac_lightning.training.options import ShardingOptions
from tests.models import more_families, sweep, zoo
from tests.models.zoo import IMAGE

MLLAMA = more_families.ALL["mllama"]
TOKENS = (
    (1, IMAGE, IMAGE, 5, 6, IMAGE, 7, 8),  # two images that are seen together, and one that is seen alone
    (3, 4, 5, 6),
    (1, 4, 7, IMAGE),
    (IMAGE, 9, IMAGE, IMAGE, IMAGE, 4),
    (IMAGE, 5, 8),
)


def _samples() -> list[zoo.Sequence]:
    random, draw = Random(1), MLLAMA.draw
    assert draw is not None
    return [zoo.Sequence([*tokens], [draw(random) for _ in range(tokens.count(IMAGE))]) for tokens in TOKENS]


def _module(whole: Any, attention: str = "sdpa") -> MultimodalLM:
    """One with the weights of the library's model."""
    weights = whole.state_dict()
    llm, image = (kind(MLLAMA.config(), attn_implementation=attention) for kind in (HFDecoder, HFVisionEncoder))
    llm.materialize(range(llm.num_layers), embedding=True, head=True)
    image.materialize()
    for part in (llm, image):
        part.load_state_dict({name: weights[name] for name in part.state_dict()})
    return MultimodalLM(llm, {"image": image})


def _batch(*rows: Sequence[zoo.Sequence]) -> Batch:
    return Batch([zoo.microbatch([list(row) for row in rows])], PipelineLayout())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_several_samples_with_and_without_images(attention: str) -> None:
    whole = sweep._randomized(meta_model.auto_class(MLLAMA.config()), MLLAMA.config(), attention)
    samples = _samples()
    losses, labels = [], 0
    for sample in samples:
        given = zoo.microbatch([[sample]])
        logits = zoo.forward(whole, sample, given).logits[0, given.label_positions]
        losses.append(torch.nn.functional.cross_entropy(logits, given.labels, reduction="sum"))
        labels += len(given.labels)
    expected = torch.stack(losses).sum() / labels
    expected.backward()
    module = _module(whole, attention)
    found = module.pipeline(_batch(samples[:3], samples[3:])).loss
    found.backward()
    assert torch.allclose(found, expected, rtol=1e-6)
    gradients = {
        name.removeprefix("llm.").removeprefix("encoders.image."): p.grad for name, p in module.named_parameters()
    }
    assert sweep._largest(gradients, {name: p.grad for name, p in whole.named_parameters()}) < 5e-6


@pytest.mark.parametrize("keeps", [True, False])
def test_writing_after_a_prompt_as_short_as_a_grid(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not keeps:
        monkeypatch.setattr(HFDecoder, "new_cache", lambda *_: None)
    whole = sweep._randomized(meta_model.auto_class(MLLAMA.config()), MLLAMA.config(), "sdpa").eval()
    random, draw = Random(0), MLLAMA.draw
    assert draw is not None
    wide = next(item for item in iter(lambda: draw(random), None) if item.arguments["image_grid_thw"][0, 2] == 2)
    sample = zoo.Sequence([IMAGE, 5, 8], [wide])

    def expected(more: Sequence[int]) -> torch.Tensor:
        longer = zoo.Sequence([*sample.tokens, *more], sample.items)
        return zoo.forward(whole, longer, zoo.microbatch([[longer]])).logits[0, -1].detach()

    error, kept = sweep._writing_error([_module(whole)], _batch([sample]), [7, 3, 9, 4], expected)
    assert error < 1e-5
    assert kept == keeps


def test_a_missing_grid() -> None:
    llm = HFDecoder(MLLAMA.config())
    with pytest.raises(ValueError, match=r"has 2 image tokens, but 0 images in inputs\['image_grid_thw'\]: give one"):
        llm.prepare({"input_ids": torch.tensor([[1, IMAGE, IMAGE, 3]])})


def test_shards_of_layers_that_not_every_rank_runs() -> None:
    strategy = BigMacStrategy(1, sharding=ShardingOptions(stages="fsdp"))
    strategy.parallel_devices = [torch.device("cpu")] * 2
    with pytest.raises(
        ValueError, match=r"stages is fsdp, but layers of this LLM attend to images .* use zero1 or ddp"
    ):
        strategy.mesh_shape(MultimodalLM(HFDecoder(MLLAMA.config())))
