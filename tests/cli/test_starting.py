"""What is wrong with the data, the processor or its tokens ends every command in one line, before anything is measured,
read or trained."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from bigmac_lightning.datamodules import LoadingOptions, MessagesJSONL, MultimodalDataModule
from bigmac_lightning.models import MultimodalLM
from tests.cli.checkpoints import write_inputs
from tests.cli.test_commands import ROOT, refused
from tests.training.trainers import on_ranks, pipeline_trainer

CONFIG = ROOT / "configs" / "qwen3_vl.yaml"
MODEL, OTHER = "checkpoints/Qwen3-VL-4B-Instruct", "checkpoints/llava-onevision-qwen2-7b-ov-hf"
OPTIONS = ["--data.token_budget=256", "--data.num_workers=0", "--data.loading.cache_dir=cache"]
ONE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy.init_args.pipeline_parallel_size=1"]
AUDIO = {"class_path": "bigmac_lightning.datamodules.AudioProcessor"}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls its parser


@pytest.fixture(autouse=True)
def _no_group() -> Iterator[None]:
    """A process that is forked later makes a group of its own."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("qwen3_vl", "llava_onevision"):
        write_inputs((ROOT / "configs" / f"{name}.yaml").read_text(), folder)
    return folder


def _changed(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[], None]:
    """Changes a JSON file of the model."""

    def write() -> None:
        path = Path(MODEL, file)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write


def _swap(config: dict[str, Any]) -> None:
    config["image_token_id"], config["video_token_id"] = config["video_token_id"], config["image_token_id"]


def _written(file: str, text: str) -> Callable[[], None]:
    def write() -> None:
        Path(file).write_text(text)

    return write


def _source(kind: str, **arguments: Any) -> str:
    given = {"class_path": f"bigmac_lightning.datamodules.{kind}", "init_args": arguments}
    return f"--data.train={json.dumps([given])}"


def _nothing() -> None:
    pass


TEMPLATE, WEIGHTS = f"{MODEL}/chat_template.jinja", f"{MODEL}/model.safetensors"
OF_DATA: dict[str, tuple[Callable[[], None], list[str], str]] = {
    "no file": (lambda: os.remove("data/train.jsonl"), [], "MessagesJSONL: there is no file data/train.jsonl (in /"),
    "no validation": (lambda: os.remove("data/val.jsonl"), [], "MessagesJSONL: there is no file data/val.jsonl (in /"),
    "no media": (_nothing, [_source("MessagesJSONL", path="data/train.jsonl", media_root="no")], "no folder no (in /"),
    "no tars": (_nothing, [_source("WebDatasetTars", paths=["a.tar"])], "WebDatasetTars: there is no file a.tar (in /"),
    "no columns": (
        _nothing,
        [_source("HFDataset", path="parquet", data_files="no/*.parquet")],
        "there is no file no/*",
    ),
    "not there": (_nothing, [_source("LlavaJSON", path="memory://a/b.json")], "memory://a/b.json"),
}
OF_PROCESSOR: dict[str, tuple[Callable[[], None], list[str], str]] = {
    "another processor": (
        _nothing,
        [f"--data.processor={OTHER}"],
        "the model's config has image_token_id=3 ('<|image_pad|>'), and the processor has '<image>', with the id 262, "
        "for the features of images: give MultimodalDataModule the processor that belongs to the model",
    ),
    "tokens that are swapped": (_changed("config.json", _swap), [], "the model's config has image_token_id=4 ('<|vid"),
    "no tokenizer": (lambda: os.remove(f"{MODEL}/tokenizer.json"), [], f"processor='{MODEL}' cannot be loaded: Couldn"),
    "no template": (lambda: os.remove(TEMPLATE), [], "data/train.jsonl gives messages, and the processor's token"),
    "a broken template": (_written(TEMPLATE, "{% for"), [], "the tokenizer's chat template refuses a conversation: T"),
    "a template of nothing": (_written(TEMPLATE, "{% set a = 1 %}"), [], "chat template leaves out what is said: set"),
    "a token of its own": (
        _nothing,
        ["--data.chat.tokens={'image': '<picture>'}"],
        "chat.tokens['image']='<picture>': the processor has '<|image_pad|>' for this, so leave it out",
    ),
    "no such token": (
        _nothing,
        [f"--data.media={json.dumps({'audio': AUDIO})}"],
        "chat.tokens['audio']='<|audio_pad|>' is not one token for the tokenizer: name one of its added tokens",
    ),
    "no encoder": (
        _nothing,
        [f"--data.media={json.dumps({'audio': AUDIO})}", "--data.chat.tokens={'audio': '<|vision_start|>'}"],
        "media['audio'] of the DataModule is for the encoder 'audio', and the model has only image, video: leave",
    ),
    "a word": (
        _nothing,
        ["--data.target={'rows': 4}", "--data.chat.draw_token=a"],
        "chat.draw_token='a' is an ordinary word for the tokenizer",
    ),
    "a token twice": (_nothing, ["--data.chat.draw_token=<|video_pad|>"], "chat.draw_token='<|video_pad|>' stands for"),
    "no generator": (_nothing, ["--data.target={'rows': 4}"], "target of the DataModule is for the generator 'image'"),
    "a small vocabulary": (
        _changed("config.json", lambda config: config["text_config"].update(vocab_size=200)),
        [],
        "lie beyond the LLM's vocabulary of 200: give MultimodalDataModule the processor that belongs to the model",
    ),
    "padding": (
        _changed("tokenizer_config.json", lambda config: config.update(pad_token="<|image_pad|>")),
        [],
        "the tokenizer's pad_token is '<|image_pad|>', which stands for media: set another one",
    ),
}
OF_WEIGHTS: dict[str, tuple[Callable[[], None], list[str], str]] = {
    "no weights": (lambda: os.remove(WEIGHTS), [], f"{MODEL} has no weights: there is no model.safetensors or"),
    "cut weights": (
        lambda: os.truncate(WEIGHTS, os.path.getsize(WEIGHTS) - 9),
        [],
        f"{WEIGHTS} is not whole or no file of weights (",
    ),
    "no shard": (
        _written(f"{WEIGHTS}.index.json", '{"weight_map": {"a": "model.safetensors", "b": "b.safetensors"}}'),
        [],
        f"{MODEL} has not all of its weights: model.safetensors.index.json names b.safetensors, which is not there",
    ),
}
COMMANDS = ("fit", "validate", "test", "predict", "data")
TRIED = [(name, COMMANDS[number % 5]) for number, name in enumerate([*OF_DATA, *OF_PROCESSOR])]
TRIED += [(name, "plan") for name in list(OF_PROCESSOR)[::4]] + [(name, "fit") for name in OF_WEIGHTS]


@pytest.mark.parametrize(("name", "command"), TRIED)
def test_a_mistake_ends_in_one_line(
    name: str,
    command: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    change, options, message = (OF_DATA | OF_PROCESSOR | OF_WEIGHTS)[name]
    change()
    more = ONE if command not in ("data", "plan") else []
    assert refused(command, "--config", str(CONFIG), *OPTIONS, *more, *options) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(said) == 1, said
    assert said[0].startswith(f"bigmac {command}: error: ")
    assert message in said[0]
    assert not Path("cache").exists(), "nothing was measured"


def test_broken_examples_have_a_line_each(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    lines = Path("data/train.jsonl").read_text().splitlines()
    broken = [json.dumps({**json.loads(line), "images": ["gone.png"]}) for line in lines[:2]]
    Path("data/train.jsonl").write_text("\n".join([*broken, *lines[2:]]) + "\n")
    assert refused("fit", "--config", str(CONFIG), *OPTIONS, *ONE) == 2
    said = capsys.readouterr().err.splitlines()
    first = next(i for i, line in enumerate(said) if "train examples cannot be used" in line)
    assert said[first].startswith("bigmac fit: error: 2 of ")
    assert all("gone.png" in line for line in said[first + 1 : first + 3]), said


def test_without_the_command_line_every_rank_ends_alike(inputs: Path, tmp_path: Path) -> None:
    first, second = on_ranks(2, _fit, inputs, tmp_path)
    assert first == second
    assert first.startswith(
        "the model's config has image_token_id=3 ('<|image_pad|>'), and the processor has '<image>'"
    )
    assert not (tmp_path / "cache").exists(), "nothing was measured"


def _fit(rank: int, inputs: Path, folder: Path) -> str:
    model = MultimodalLM.from_pretrained(str(inputs / MODEL))
    source = MessagesJSONL(inputs / "data" / "train.jsonl")
    loading = LoadingOptions(cache_dir=folder / "cache")
    made = MultimodalDataModule([source], processor=str(inputs / OTHER), token_budget=256, loading=loading)
    with pytest.raises(ValueError, match=r"_token_id") as error:
        pipeline_trainer(2, {"pipeline_parallel_size": 2}, max_epochs=1).fit(model, made)
    return str(error.value)
