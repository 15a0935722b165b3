"""Every model of the installed `transformers` is exact or refused by name; what the documentation says of each."""

import pytest
import transformers as hf

from tests.models import sweep, table


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hf.utils.logging.set_verbosity_error()


@pytest.mark.filterwarnings("ignore")  # of configs that are not ours
@pytest.mark.parametrize("name", sweep.DECODERS)
def test_decoder(name: str) -> None:
    assert not sweep.decoder(name).wrong


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*sweep.VISION_LANGUAGE, *sweep.OTHER_LLMS])
def test_vision_language(name: str) -> None:
    assert not sweep.vision_language(name).wrong


@pytest.mark.filterwarnings("ignore")
def test_the_documentation() -> None:
    assert table.PAGE.read_text() == table.page(), "run: python -m tests.models.table"
