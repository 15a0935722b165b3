from itertools import combinations, pairwise
from random import Random

import pytest

from bigmac_lightning.estimates.partition import LayerCosts, TrainedLayers, make_stages
from bigmac_lightning.models import HFDecoder, MultimodalLM


def cuts(layers: int, stages: int) -> list[list[range]]:
    inner = combinations(range(1, layers), stages - 1)
    return [[range(a, b) for a, b in pairwise((0, *bounds, layers))] for bounds in inner]


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_auto_is_the_best_of_all_cuts(stages: int) -> None:
    random = Random(stages)
    for _ in range(20):
        layers = random.randint(stages, 8)
        costs = LayerCosts(tuple(random.uniform(1, 3) for _ in range(layers)), random.random(), 4 * random.random())
        made = make_stages(costs, stages, "auto")
        assert [layer for stage in made for layer in stage] == list(range(layers))
        assert all(made)
        least = min(max(map(costs.of, cut)) for cut in cuts(layers, stages))
        assert max(map(costs.of, made)) == pytest.approx(least)


def test_even_and_given() -> None:
    costs = LayerCosts((1.0,) * 7)
    assert make_stages(costs, 3) == [range(3), range(3, 5), range(5, 7)]
    assert make_stages(costs, 3, (1, 5, 1)) == [range(1), range(1, 6), range(6, 7)]


@pytest.mark.parametrize("given", [(3, 3), (3, 3, 2), (7, 0, 0), (4, 4, -1)])
def test_partitions_that_do_not_fit(given: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="3 stages of at least one layer must have 7 layers together"):
        make_stages(LayerCosts((1.0,) * 7), 3, given)
    with pytest.raises(ValueError, match="7 layers, too few for 8 pipeline stages"):
        make_stages(LayerCosts((1.0,) * 7), 8, given)


def test_costs_of_a_decoder_count_the_head_and_the_experts_in_use() -> None:
    """A multiplication by every weight that a token meets."""
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 100}
    attention = 8 * (8 + 4 + 4 + 8)
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 5, "mlp_only_layers": [0]}
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "intermediate_size": 12, **small, **experts}
    costs = HFDecoder(config).costs()
    assert costs.layers == (attention + 3 * 8 * 12, attention + 8 * 6 + 2 * 3 * 8 * 5)
    assert (costs.embedding, costs.head) == (0.0, 800.0)


def test_attention_counts_at_the_length_of_samples() -> None:
    """Twice heads * width of a head for each of the tokens before; sliding windows see no further."""
    config = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "vocab_size": 100,
              "intermediate_size": 12, "num_hidden_layers": 2}  # fmt: skip
    plain = HFDecoder({"model_type": "qwen3", **config})
    assert plain.costs(40).layers == tuple(cost + 2 * 12 * 20 for cost in plain.costs().layers)
    window = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    mixed = HFDecoder({"model_type": "gemma3_text", **config, **window})
    near, far = (a - b for a, b in zip(mixed.costs(40).layers, mixed.costs().layers, strict=True))
    assert (near, far) == (2 * 12 * 8, 2 * 12 * 20)


def test_frozen_layers_take_less() -> None:
    """By hand: 1 forward, 1 input gradients from the lowest trained part on, 1 weight gradients where trained."""
    forward = LayerCosts((1.0,) * 6, embedding=0.5, head=4.0)
    everything = TrainedLayers.all(6)
    assert everything.step(forward) == LayerCosts((3.0,) * 6, 1.5, 12.0)
    upper = TrainedLayers((0, 0, 0, 0, 1, 0.5, 1, 0))  # embedding, six layers, head
    assert upper.step(forward) == LayerCosts((1.0, 1.0, 1.0, 3.0, 2.5, 3.0), 0.5, 8.0)
    assert make_stages(upper.step(forward), 2, "auto") == [range(5), range(5, 6)]
    assert make_stages(everything.step(forward), 2, "auto") == [range(5), range(5, 6)]
    head_alone = TrainedLayers((0,) * 7 + (1,))
    assert head_alone.step(forward) == LayerCosts((1.0,) * 6, 0.5, 12.0)
    frozen_with_encoder = TrainedLayers((0,) * 8, below=True, recomputed=True)
    assert frozen_with_encoder.step(forward) == LayerCosts((3.0,) * 6, 1.0, 8.0)
    assert frozen_with_encoder.times(forward)[2] == LayerCosts((0.0,) * 6)


def test_what_is_frozen_is_known_before_there_are_weights() -> None:
    tied = {"model_type": "qwen3", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100}  # fmt: skip
    freeze = ["llm.model.embed_tokens", "llm.model.layers.0", "llm.model.layers.1", "llm.lm_head", "llm.model.norm"]
    module = MultimodalLM(HFDecoder(tied), freeze=freeze)
    assert module.trained_layers == TrainedLayers((0, 0, 0, 1, 1, 0))
    step = module.trained_layers.step(LayerCosts((1.0,) * 4))
    assert make_stages(step, 2, "auto") == [range(3), range(3, 4)]  # 1 + 1 + 3 and 3
    module.configure_model()
    assert [name for name, p in module.named_parameters() if p.requires_grad] == [
        name for name, _ in module.named_parameters() if ".layers.2." in name or ".layers.3." in name
    ]
    adapted = MultimodalLM(HFDecoder(tied), lora={"llm": {"r": 2, "target_modules": ["q_proj"]}})
    assert adapted.trained_layers == TrainedLayers((0,) * 6, below=True)
