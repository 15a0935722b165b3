"""Conversations that cannot be learnt, at two pipeline ranks: all ranks name them in the error, or leave them out."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigmac_lightning.datamodules import (
    Example,
    ExampleError,
    Message,
    MessagesJSONL,
    MixtureOptions,
    PackingOptions,
    SourceError,
)
from bigmac_lightning.datamodules.sources.stream import SourceStream
from tests.datamodules.examples import data, model, said, write_jsonl
from tests.datamodules.test_multimodal_training import Losses
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
ASKED = {"role": "user", "content": "what?"}


def answer(**given: Any) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", "content": "this", **given}]}


CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "tools": ({**answer(), "tools": [{"function": {"name": "f"}}]}, "has tools, and the chat template leaves them out"),
    "tools that are none": ({**answer(), "tools": [{"type": "f"}]}, "has the tool {'type': 'f'}"),
    "tools that are no JSON": ({**answer(), "tools": "f()"}, "has tools that are not JSON"),
    "tool calls": (answer(content="", tool_calls=[CALL]), "leaves out an argument of a tool call"),
    "calls that are none": (answer(tool_calls=[{"name": "f"}]), "has the tool call {'name': 'f'}"),
    "reasoning": (answer(reasoning_content="I think."), "leaves out reasoning"),
    "reasoning of a user": ({"messages": [{**ASKED, "reasoning_content": "?"}, *said("a", "b")]}, "with reasoning"),
    "loss of a user": ({"messages": [{**ASKED, "loss": True}, *said("a", "b")]}, "only what the assistant says"),
    "weighted loss": (answer(loss=0.5), "message 2 with loss=0.5"),
    "no loss": (answer(loss=False), "has nothing to learn"),
    "an empty reply": (answer(content=""), "has nothing to learn"),
    "an empty reply that is to be learnt": (answer(content="", loss=True), "is to learn message 2 (assistant), whi"),
    "nothing said": (answer(content=None), "has message 2 without content"),
    "objects": ({**answer(), "objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}}, "has objects, which is not known"),
    "an unknown part": (answer(content=[{"type": "input_text"}]), "message 2 with a part of type 'input_text'"),
    "a variable": ({**answer(), "chat_template_kwargs": {"enable_thinking": True}}, "template has no such variable"),
    "a URL": (answer(content=[{"type": "image", "image": "https://x/a.png"}]), "nothing is downloaded"),
    "a broken URI": (answer(content=[{"type": "image", "url": "data:image/png"}]), "give data:image/...;base64"),
    "a file outside": (answer(content=[{"type": "video", "path": "../../v.mp4"}]), "leads out of the media root"),
    "a missing file": ({**answer(), "images": ["gone.png"]}, "gone.png cannot be read: FileNotFoundError"),
    "no image for a placeholder": ({"messages": said("<image>?", "a")}, "has 1 <image> placeholders for 0 images"),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "has chosen, rejected: preferences cannot be"),
    "a prompt alone": ({"prompt": "a"}, "has the prompt 'a' and the completion None"),
    "an empty completion": ({"prompt": [ASKED], "completion": answer(content="")["messages"][1:]}, "nothing to learn"),
    "a caption of nothing": ({"caption": "a"}, "no image, video or audio"),
    "no known form": ({"instruction": "a", "output": "b"}, "has no list of messages, but instruction, output"),
    "an empty text": ({"text": ""}, "is empty"),
    "nothing left to learn": ({"prompt": "a" * 200, "completion": "b"}, "cut to 100: nothing to learn would be left"),
    "a call that is none": ({"messages": [ASKED, {"role": "tool_call", "content": "f"}]}, "that are not JSON"),
    "a special token in a name": (answer(tool_calls=[{**CALL, "id": "<|im_end|>"}]), "has the special token <|im_end"),
}  # fmt: skip
CUT = PackingOptions(truncation="end")
SETTINGS: dict[str, Any] = {"target": None, "visual": None, "val": [], "microbatches": 2, "token_budget": 100,
                            "packing": CUT}  # fmt: skip


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bad ones between good ones."""
    records = [{"messages": said("Say", "a" * i)} for i in range(1, 3)]
    for i, (bad, _) in enumerate(CHATS.values()):
        records += [bad, {"messages": said("Say", "b" * (i % 5 + 1))}]
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", records)


def fit(trainer: Any, **given: Any) -> Any:
    losses = Losses()
    trainer.callbacks.append(losses)
    try:
        trainer.fit(model(encoders={}, generators={}), data(**{**SETTINGS, **given}))
    except (ExampleError, SourceError) as error:
        return str(error)
    return losses.losses


def streamed(path: Path) -> dict[str, Any]:
    stream = SourceStream(MessagesJSONL(path), seed=0, shuffle=False)
    return {
        "path": path,
        "train": [stream],
        "mixture": MixtureOptions(steps_per_epoch=2),
        "packing": replace(CUT, buffer_size=12),
    }


def _fit(rank: int, given: list[dict[str, Any]]) -> list[Any]:
    return [fit(pipeline_trainer(2, max_epochs=1, limit_val_batches=0), **each) for each in given]


def test_each_is_named_with_its_line(chats: Path) -> None:
    made = data(chats, **{**SETTINGS, "on_error": "skip"})
    made.setup("fit")
    (measured,) = made._measured["train"]
    assert list(measured.errors) == [2 + 2 * i for i in range(len(CHATS))]
    for (index, text), (case, (_, reason)) in zip(measured.errors.items(), CHATS.items(), strict=True):
        assert text.startswith(f"{chats}, sample {index} (line {index + 1}) "), case
        assert reason in text, case


def test_all_ranks_end_or_go_on_alike(chats: Path, tmp_path: Path) -> None:
    given = [{"path": chats}, streamed(chats)]
    silent = streamed(write_jsonl(tmp_path / "silent.jsonl", [CHATS["no loss"][0]] * 4))
    one, other = on_ranks(2, _fit, [*given, silent])
    assert one == other
    assert "has nothing to learn" in one[2]
    assert f"{len(CHATS)} of {2 * len(CHATS) + 2} train examples cannot be used" in one[0]
    assert "line 3" in one[0]
    assert "has tools, and the chat template leaves them out: f" in one[1]
    assert "line 3" in one[1]
    skipping = [{**each, "on_error": "skip"} for each in given]
    one, other = on_ranks(2, _fit, skipping)
    assert one == other
    for losses, each in zip(one, skipping, strict=True):
        assert len(losses) >= 2
        alone = fit(plain_trainer(max_epochs=1, limit_val_batches=0), **each)
        assert losses == pytest.approx(alone, rel=1e-5)


class Fickle(MessagesJSONL):
    """On one rank, one of its conversations has become another."""

    rank, bad = "", ""

    def __getitem__(self, index: int) -> Example:
        if os.environ.get("RANK") == self.rank and index == 3:
            record = json.dumps(CHATS[self.bad][0])
            return self._read(json.loads(record), "line 4")
        return super().__getitem__(index)


def _fit_fickle(rank: int, path: Path, bad: str, faulty_rank: str, stream: bool) -> Any:
    source = Fickle(path)
    source.bad = bad
    place, os.environ["RANK"] = os.environ["RANK"], "none"
    data(path, **{**SETTINGS, "train": [source]}).prepare_data()
    os.environ["RANK"], source.rank = place, faulty_rank
    given = (
        {**streamed(path), "train": [SourceStream(source, 0, False)]} if stream else {"path": path, "train": [source]}
    )
    return fit(pipeline_trainer(2, max_epochs=1, limit_val_batches=0), **given)


@pytest.mark.parametrize("faulty_rank", ["0", "1"])
@pytest.mark.parametrize(
    ("bad", "stream"), [("tools", False), ("objects", False), ("a URL", False), ("no loss", True), ("reasoning", True)]
)
def test_what_one_rank_alone_reads_ends_the_run_on_all(
    bad: str, stream: bool, faulty_rank: str, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": said("Say", "a" * i)} for i in range(1, 9)])
    one, other = on_ranks(2, _fit_fickle, path, bad, faulty_rank, stream)
    assert isinstance(one, str)
    assert one == other
    if stream:
        assert "the ranks have read different examples from the streams" in one
        return
    assert str(path) in one
    assert CHATS[bad][1] in one


def test_what_is_not_learnt_may_be_evaluated(tmp_path: Path) -> None:
    source = MessagesJSONL(write_jsonl(tmp_path / "chats.jsonl", [{"messages": said("Say", "a")}, CHATS["no loss"][0]]))
    made = data(source.path, **{**SETTINGS, "train": [], "val": [source]})
    made.setup("validate")
    assert not made._measured["val"][0].errors
    assert Message("user", ["Say"]) == source[0].messages[0]
