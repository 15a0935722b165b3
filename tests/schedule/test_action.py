"""Action texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigmac_lightning.schedule.action import Action

INDEX = st.integers(0, 10**6)
LLM = st.builds(Action, st.sampled_from(["F", "B", "I", "W"]), INDEX, INDEX)
NESTED = st.integers(1, 9).flatmap(
    lambda pieces: st.builds(
        Action,
        st.sampled_from(["EF", "EB", "G"]),
        INDEX,
        st.none(),
        st.integers(0, pieces - 1),
        st.just(pieces),
    )
)


@given(LLM | NESTED)
def test_text_round_trips(action):
    assert Action.parse(str(action)) == action
    assert action.nested == (action.kind in ("EF", "EB", "G"))


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Action("F", 0, 2), "2F0"),
        (Action("W", 11, 10), "10W11"),
        (Action("EF", 3), "EF3"),
        (Action("EF", 3, None, 1, 4), "EF3.1/4"),
    ],
)
def test_text(action, text):
    assert str(action) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "F0",
        "2F",
        "2X0",
        "2F0 ",
        "2f0",
        "02F0",
        "2F-1",
        "2EF0",
        "EF",
        "EF3.4/4",
        "EF3.0/1",
        "EF3.1",
        "2F0.1/4",
        "²F0",
    ],
)
def test_other_texts_are_refused_by_name(text):
    with pytest.raises(ValueError, match="is not an action") as raised:
        Action.parse(text)
    assert repr(text) in str(raised.value)
