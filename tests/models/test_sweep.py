"""Every model of the installed `transformers` is exact or refused by name; what the documentation says of each."""

import re
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bigmac_lightning.contracts.batch import Batch, Microbatch
from bigmac_lightning.models import HFDecoder, MultimodalLM
from tests.models import more_families, sweep, table, tiny, zoo

MULTIPLIER = re.compile("(multiplier|scale|scaling|scaling_factor|scale_emb|scale_depth|soft_?cap(ping)?|clip_qkv)$")
UNUSED = (
    "time_step_scale",
    "rope_scaling",
    "mtp_loss_scaling_factor",
)  # of a layer's initial weights; not in a forward


OTHER_CACHES = ("longcat_flash", "minimax", "moshi")
"""Models that keep no keys and values here: MiniMax has a cache of its own, Moshi gives other logits with a cache, also
in the library itself. The cache of LongCat-Flash, which has two entries for a layer, is kept only where one stage has
all layers."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hf.utils.logging.set_verbosity_error()


@pytest.mark.filterwarnings("ignore")  # of configs that are not ours
@pytest.mark.parametrize("name", sweep.DECODERS)
def test_decoder(name: str) -> None:
    verdict = sweep.decoder(name)
    assert not verdict.wrong
    assert verdict.keeps or not verdict.errors or name in OTHER_CACHES


@pytest.mark.filterwarnings("ignore")
def test_multipliers_are_not_one() -> None:
    """A multiplier of 1, or a cap that is not there, would let a stage apply it twice or never unseen."""
    found: dict[str, set[str]] = {}
    for name in sweep.DECODERS:
        try:
            config = tiny.tiny_config(name)
        except Exception:  # it is refused
            continue
        config.allow_global_per_layer_attribute_access = True
        for field in tiny.names_of(CONFIG_MAPPING[name]):
            value = getattr(config, field, None)
            if MULTIPLIER.search(field) and field not in UNUSED and not isinstance(value, bool | str | list | dict):
                assert value not in (None, 0, 1), f"{name}: {field} is {value}"
                found.setdefault(name, set()).add(field)
    assert found["granite"] == {
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
        "attention_multiplier",
    }
    assert len(found) > 40


@pytest.mark.parametrize("field", ["embedding_multiplier", "logits_scaling", "residual_multiplier", "scale_emb"])
def test_multipliers_matter(field: str) -> None:
    """The unsplit model's logits change with each of them."""

    def logits(**changes: Any) -> torch.Tensor:
        config = tiny.tiny_config("minicpm3" if field == "scale_emb" else "granite", **changes)
        torch.manual_seed(0)
        whole: Any = hf.AutoModelForCausalLM.from_config(config)
        return whole(input_ids=sweep.samples()[0][None]).logits

    assert not torch.allclose(logits(), logits(**{field: 1}), rtol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sweep.WITH_MEDIA)
def test_vision_language(name: str) -> None:
    verdict = sweep.vision_language(name)
    assert not verdict.wrong
    assert verdict.keeps or verdict.errors.keys() <= {"text alone"} or name in OTHER_CACHES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHER_CACHES)
def test_what_keeps_no_keys_and_values(name: str) -> None:
    """They run all tokens again for each one."""
    assert not sweep.decoder(name).keeps


def test_windows_of_what_is_written() -> None:
    """Unlimited-OCR sees the whole prompt, but of what it has written only the last tokens, as in the library."""
    config = more_families.ALL["unlimited_ocr"].config()
    whole = sweep._randomized(hf.AutoModelForImageTextToText, config, "sdpa").eval()
    ids, prompt = torch.randint(3, zoo.SPECIAL, (1, 18), generator=torch.Generator().manual_seed(1)), 6
    parts = sweep.Parts(HFDecoder(config), whole.state_dict()).parts
    cache, known = hf.DynamicCache(config=config.get_text_config()), list[torch.Tensor]()
    with torch.no_grad():
        for start, stop in ((0, prompt), *((k, k + 1) for k in range(prompt, ids.shape[1]))):
            known.append(whole(input_ids=ids[:, start:stop], cache=cache).logits[0, -1])
        everything = whole(input_ids=ids, use_cache=False).logits[0, -1]
    given, tokens = Batch([Microbatch({"input_ids": ids[:, :prompt]})]), ids[0, prompt:].tolist()
    error, keeps = sweep._writing_error([MultimodalLM(part) for part in parts], given, tokens, lambda t: known[len(t)])
    assert keeps
    assert error < 1e-6
    assert not torch.allclose(known[-1], everything, rtol=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_the_documentation() -> None:
    assert table.PAGE.read_text() == table.page(), "run: python -m tests.models.table"
