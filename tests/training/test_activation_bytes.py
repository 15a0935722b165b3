"""Bytes of activations that are expected of plans."""

import pytest

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.schedule.measured_costs import MeanWork, MeasuredCosts
from bigmac_lightning.training.activation_bytes import KEPT, ActivationBytes, rows_of, work_of

TRAINED = ("llm",)


def test_bytes_of_a_row_are_learned_for_what_is_trained() -> None:
    known = ActivationBytes()
    assert known.expected(TRAINED, [0.0, 10.0, 3.0]) == {"encoder": 0.0}, "nothing was measured"
    known.add(TRAINED, [0.0, 10.0, 4.0], {"llm": 1000, "generator": 80})
    known.add(TRAINED, [0.0, 20.0, 0.0], {"llm": 4000})
    assert known.expected(TRAINED, [0.0, 30.0, 1.0]) == {"encoder": 0.0, "llm": 4500.0, "generator": 20.0}
    assert known.expected(("encoders.image",), [5.0, 30.0, 1.0]) == {}, "of something else, nothing is known"
    for _ in range(KEPT):
        known.add(TRAINED, [0.0, 10.0, 0.0], {"llm": 10})
    assert known.expected(TRAINED, [0.0, 30.0, 0.0])["llm"] == 30.0, "old peaks are forgotten"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_costs_file_tells_them_from_the_first_batch_on(rank: int) -> None:
    work = MeanWork(tokens=50, llm=50, items=2, rows=32, media=2, targets=1, target_cost=1, target_rows=4)
    file = MeasuredCosts(
        {}, work, (2, 2), 2, trained=TRAINED, encoder_unit=3200.0, generator_unit=40.0, rank_microbatches=(500.0, 400.0)
    )
    known = ActivationBytes()
    known.take(file, rank, 2)
    assert known.expected(TRAINED, [64.0, 100.0, 2.0]) == {
        "encoder": 6400.0,
        "llm": (1000.0, 800.0)[rank],
        "generator": 20.0,
    }
    other = ActivationBytes()
    other.take(file, rank, 4)
    assert "llm" not in other.expected(TRAINED, [64.0, 100.0, 2.0]), "these are other stages"


def test_a_batch_of_nothing() -> None:
    assert rows_of(work_of(Batch([]))) == (0.0, 0.0, 0.0)
