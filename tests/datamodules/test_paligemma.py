"""PaliGemma, whose prompts see each other both ways, and whose processor has no chat template."""

import re
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import AutoProcessor

from bigmac_lightning.contracts.batch import Microbatch
from bigmac_lightning.datamodules import ChatOptions, Example, LoadingOptions, MultimodalDataModule, PackingOptions
from bigmac_lightning.models import MultimodalLM
from tests.datamodules.processors import write_model
from tests.datamodules.test_hf_visual import Given, picture, said
from tests.models import zoo

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TEMPLATE = re.findall(r"```jinja\n(.*?)\n```", PAGE.read_text(), re.DOTALL)[0]


def made_by_the_library(processor: Any, example: Example) -> dict[str, Any]:
    """Its processor's own way to fine-tune: images, a prompt and a suffix."""
    prompt, reply = (message.parts for message in example.messages)
    images = [PIL.Image.open(item.file.name).convert("RGB") for item in example.media]
    text = "<image>" * len(images) + "".join(part for part in prompt if isinstance(part, str))
    return dict(processor(images=[images], text=[text], suffix=[reply[0]], return_tensors="pt"))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in the library
def test_against_the_library(tmp_path: Path) -> None:
    a, b = picture(tmp_path, 37, 101), picture(tmp_path, 90, 31)
    examples = [
        Example(said(a, "what is it?", reply="noise")),
        Example(said(a, b, "are they the same?", reply="no, not at all")),
        Example(said(b, "name it", reply="grey")),
    ]
    folder = write_model("paligemma", tmp_path)
    processor = AutoProcessor.from_pretrained(folder)
    data = MultimodalDataModule(
        [Given(examples)],
        processor=str(folder),
        token_budget=200,
        microbatches=2,
        chat=ChatOptions(template=TEMPLATE),
        packing=PackingOptions(packed=False),
        loading=LoadingOptions(cache_dir=tmp_path / "cache"),
    )
    module = MultimodalLM.from_pretrained(str(folder))
    data.check(module)
    data.setup("fit")
    (batch,) = data.loader("train")
    module.configure_model()
    module.pipeline(batch).loss.backward()

    whole = zoo.load("paligemma", tmp_path, torch.float32)
    losses = []
    for microbatch in batch.microbatches:
        for origin, ids in zip(microbatch.origins, microbatch.inputs["input_ids"], strict=True):
            out = made_by_the_library(processor, examples[int(origin.name.split("sample ")[1])])
            assert ids[: origin.stop - origin.start].tolist() == out["input_ids"][0].tolist()
            losses.append(whole(**out, use_cache=False).loss * (out["labels"] != -100).sum())
    (torch.stack(losses).sum() / len(batch.labels)).backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    found = {
        name.removeprefix("llm.").removeprefix("encoders.image."): parameter.grad
        for name, parameter in module.named_parameters()
    }
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_packing_is_refused(tmp_path: Path) -> None:
    folder = write_model("paligemma", tmp_path)
    example = Example(said(picture(tmp_path, 37, 101), "what is it?", reply="noise"))
    data = MultimodalDataModule([Given([example])], processor=str(folder), chat=ChatOptions(template=TEMPLATE))
    with pytest.raises(ValueError, match=r"tokens of a prompt see each other.*packing\.packed to False"):
        data.check(MultimodalLM.from_pretrained(str(folder)))


def test_a_prompt_without_a_reply_ends_before_the_padding() -> None:
    given = Microbatch({"input_ids": torch.zeros(2, 5, dtype=torch.long), "token_mask": torch.ones(2, 5).long()})
    given.inputs["token_mask"][0, 3:] = 0
    assert given.with_prompt_tokens().inputs["prompt_tokens"].tolist() == [3, 5]
    given.labels, given.label_positions = torch.tensor([1, 1]), torch.tensor([6, 8])
    assert given.with_prompt_tokens().inputs["prompt_tokens"].tolist() == [3, 2]
