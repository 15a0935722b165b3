from itertools import combinations, pairwise
from random import Random

import pytest

from bigmac_lightning.models import HFDecoder
from bigmac_lightning.partition import LayerCosts, describe, make_stages


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
        dearest = min(max(map(costs.of, cut)) for cut in cuts(layers, stages))
        assert max(map(costs.of, made)) == pytest.approx(dearest)


def test_even_and_given() -> None:
    costs = LayerCosts((1.0,) * 7)
    assert make_stages(costs, 3) == [range(3), range(3, 5), range(5, 7)]
    assert make_stages(costs, 3, (1, 5, 1)) == [range(1), range(1, 6), range(6, 7)]
    assert "    1     0  1..5        71.4%" in describe(make_stages(costs, 3, (1, 5, 1)), [0, 0, 1], costs)


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
