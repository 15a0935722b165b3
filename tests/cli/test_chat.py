"""A trained run, loaded without a Trainer: what it says and draws, from Python and from the command line."""

import io
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import yaml

import bigmac_lightning
from bigmac_lightning import cli
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.datamodules import DigitsDataModule, ExampleError
from bigmac_lightning.models import MultimodalLM
from tests.blocks import block_with
from tests.cli.commands import bigmac

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls its parser

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short trainings of two ranks: of digits; and of a config with a chat template, images and drawings."""
    folder = tmp_path_factory.mktemp("runs")
    bigmac(2, folder, "fit", "--config", str(CONFIGS / "digits.yaml"), *SHORT)
    mixed = yaml.safe_load((CONFIGS / "mixed.yaml").read_text())
    (folder / "mixed.yaml").write_text(yaml.safe_dump(mixed))
    bigmac(2, folder, "fit", "--config", "mixed.yaml", *SHORT, "--data.loading.cache_dir=cache")
    return folder


def _run(runs: Path, name: str) -> Path:
    [config] = (runs / "runs" / name).glob("*/config.yaml")
    return config.parent


def _png(size: int = 24) -> bytes:
    file = io.BytesIO()
    PIL.Image.radial_gradient("L").resize((size, size)).save(file, "PNG")
    return file.getvalue()


def _likely(run: Any, prompt: Any) -> int:
    """The most likely next token, by the module's own evaluation of a batch."""
    [microbatch] = prompt.microbatches
    last = torch.tensor([microbatch.inputs["input_ids"].numel() - 1])
    labelled = prompt.replace(
        microbatches=[bigmac_lightning.Microbatch(**{**vars(microbatch), "label_positions": last, "labels": last})]
    )
    with torch.no_grad():
        return int(run.module.pipeline(labelled).predictions[0])


def test_digits(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bigmac_lightning.load(_run(runs, "digits").absolute(), device="cpu")
    assert not run.module.training
    saved, state = CheckpointWeights(run.checkpoint).read(), run.module.state_dict()
    assert saved.keys() >= state.keys() - run.module.tied_copies.keys()
    assert all(torch.equal(state[name], saved[name]) for name in state.keys() & saved.keys())
    picture = PIL.Image.open(io.BytesIO(_png()))
    expected = _likely(run, run.prompt("<image> which digit is this ?", images=[picture]))
    reply = run.chat("<image> which digit is this ?", images=[picture])
    assert reply == run.data.reply([expected])
    (tmp_path / "x.png").write_bytes(_png())
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "which digit is this ?"}]
    assert run.chat([{"role": "user", "content": parts}]) == reply
    for images in ([tmp_path / "x.png"], tmp_path / "x.png", picture, _png()):
        assert run.chat("<image> which digit is this ?", images=images) == reply
    asked = {"messages": [{"role": "user", "content": "<image> which digit is this ?"}], "images": ["x.png"]}
    monkeypatch.chdir(tmp_path)
    assert run.chat(asked) == run.chat({**asked, "images": None, "image": picture}) == reply
    first, second = run.draw("draw a 3 :", number=2, seed=5)
    assert first.size == (8, 8)
    assert first.tobytes() != second.tobytes()
    assert run.draw("draw a 3 :", seed=6)[0].tobytes() == second.tobytes()
    with pytest.raises(ExampleError, match="does not know"):
        run.chat("hello there")


def test_the_documentation(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The program and the commands of the page run as they stand in the folder in which the quickstart was run."""
    monkeypatch.chdir(runs)
    program = block_with("docs/using.md", "bigmac_lightning.load")
    assert block_with("README.md", "bigmac_lightning.load") == program
    exec(program, {})
    assert capsys.readouterr().out.strip() in DigitsDataModule().reply([*range(39)]).split()
    assert (runs / "three.png").is_file()
    commands = block_with("docs/using.md", "bigmac draw").splitlines()
    monkeypatch.setattr(sys, "stdin", io.StringIO("what comes after 3 ?\n"))
    for command in commands:
        assert _main(monkeypatch, *shlex.split(command)[1:]) == 0


def test_a_chat_with_images(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bigmac_lightning.load(_run(runs, "mixed"), device="cpu")
    monkeypatch.setattr(run.data, "reply_ends", tuple)  # after so short a training it would end at once
    messages = [
        {"role": "user", "content": [{"type": "image", "image": _png(64)}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": "Which color?"},
    ]
    tokens = [*run.generate(run.prompt(messages), max_new_tokens=5)]
    assert tokens[0] == _likely(run, run.prompt(messages))
    pieces = [*run.stream(messages, max_new_tokens=5)]
    assert "".join(pieces) == run.data.reply(tokens) == run.chat(messages, max_new_tokens=5)
    with pytest.raises(ExampleError, match="ends with a message of the assistant"):
        run.chat(messages[:2])


def test_replies_to_examples(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each example, in order, with the reply that `chat` gives; pictures beside the file."""
    place = tmp_path / "x.jsonl"
    arguments = ["predict", str(_run(runs, "mixed")), "--output", str(place), "--max_new_tokens", "4", "--limit", "3"]
    monkeypatch.chdir(runs)
    assert _main(monkeypatch, *arguments, "--split", "train") == 0
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in place.read_text().splitlines()]
    run = bigmac_lightning.load(_run(runs, "mixed"))
    examples = [(source, i) for source in run.data.split_sources("train") for i in range(min(3, len(source)))]
    assert len(lines) == len(examples)
    right = []
    for line, (source, i) in zip(lines, examples, strict=True):
        example = source[i]
        assert line["name"] == f"{source.name}, sample {i}"
        if example.target is not None:
            assert Path(line["image"]).is_file()
            continue
        last = example.messages[-1]
        if last.role == "assistant":
            assert line["reference"] == "".join(last.parts)
            right.append(line["reply"] == line["reference"])
        assert line["reply"] == "".join(run.pieces(run.data.question(example)[0], max_new_tokens=4))
    assert right
    assert f"exact_match {sum(right) / len(right):.4g}, chrF " in said
    assert any("image" in line for line in lines)


def test_replies_that_cannot_be_given(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    for name, more, message in (
        ("digits", [], "DigitsDataModule has no sources of examples"),
        ("mixed", ["--split", "all"], "--split is 'all'; expected one of train, val, test, predict"),
        ("mixed", ["--split", "test"], "there is no source of examples of the split 'test'"),
        ("mixed", ["--temperature", "-1"], "temperature is -1.0; expected 0 or more"),
        ("mixed", ["--limit", "0"], "--limit is 0; expected at least 1"),
    ):
        assert _main(monkeypatch, "predict", str(_run(runs, name)), "--output", str(tmp_path / "x.jsonl"), *more) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()


def test_tools_and_variables_of_the_template(runs: Path) -> None:
    """A whole conversation has them, and they reach the template."""
    run = bigmac_lightning.load(_run(runs, "mixed"), device="cpu")
    run.data.encoder.tokenizer.chat_template += "{{ mood }}"
    messages = [{"role": "user", "content": "Hi."}]
    given = run.prompt({"messages": messages, "chat_template_kwargs": {"mood": "calm"}})
    assert run.data.reply(given.microbatches[0].inputs["input_ids"][0].tolist()).endswith("calm")
    with pytest.raises(ExampleError, match="tool"):
        run.chat({"messages": messages, "tools": [{"name": "f"}]})
    with pytest.raises(ExampleError, match="is empty: it has no message"):
        run.chat([])


def test_a_conversation_by_lines(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/imgae x.png\nwhat comes after 3 ?\n/new\n"))
    assert _main(monkeypatch, "chat", str(_run(runs, "digits"))) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert "there is no /imgae. A line is your next message; /image FILE" in said.err


def test_a_checkpoint_and_a_model_of_ones_own(runs: Path, tmp_path: Path) -> None:
    """Without a config.yaml, model and data are given."""
    checkpoint = bigmac_lightning.load(_run(runs, "digits")).checkpoint
    place = tmp_path / "copied.ckpt"
    shutil.copytree(checkpoint, place)
    with pytest.raises(ValueError, match=r"no config\.yaml of the run in the folders above"):
        bigmac_lightning.load(place)
    whole = bigmac_lightning.load(checkpoint)
    with pytest.raises(ValueError, match="is not of this model: "):
        bigmac_lightning.load(place, MultimodalLM(whole.module.llm.__class__(_other())), DigitsDataModule())
    damaged = next(place.glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-100] + bytes(100))
    with pytest.raises(ValueError, match="is damaged: its CRC-32"):
        bigmac_lightning.load(place, bigmac_lightning.load(checkpoint).module, DigitsDataModule())


def _other() -> dict[str, Any]:
    return {"model_type": "qwen3", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        bigmac_lightning.load(tmp_path / "nowhere")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint in"):
        bigmac_lightning.load(tmp_path)


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bigmac", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_commands(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = str(_run(runs, "digits"))
    assert _main(monkeypatch, "draw", run, "draw a 3 :", str(tmp_path / "x.png"), "--number", "2") == 0
    with PIL.Image.open(tmp_path / "x-1.png") as drawn:
        assert drawn.size == (8, 8)
    question = ["--message", "<image> which digit is this ?", "--images", str(tmp_path / "x-0.png")]
    capfd.readouterr()
    assert _main(monkeypatch, "chat", run, *question) == 0
    reply = capfd.readouterr().out.splitlines()[-1]
    lines = f"hello\n/image {tmp_path / 'x-0.png'}\nwhich digit is this ?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert _main(monkeypatch, "chat", run) == 0
    said = capfd.readouterr()
    assert said.out.splitlines()[-1] == reply
    assert "bigmac chat: has the words ['hello']" in said.err
    assert _main(monkeypatch, "chat", run, "--message", "hello") == 2
    assert _main(monkeypatch, "draw", str(tmp_path / "no"), "draw a 3 :", "x.png") == 2
    assert "bigmac draw: error: there is no checkpoint at" in capfd.readouterr().err
