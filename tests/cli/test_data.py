"""`bigmac data`: what the model will see of a run's data."""

import json
import re
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml

from bigmac_lightning.commands.data import main
from tests.datamodules.examples import said, write_jsonl, write_mixed

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls it


@pytest.fixture(autouse=True)
def _there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(path: Path, **changes: Any) -> list[str]:
    """Options that read a config of some data and a tiny model."""
    source = {"class_path": "bigmac_lightning.datamodules.MessagesJSONL", "init_args": {"path": str(path)}}
    visual = {
        "class_path": "bigmac_lightning.datamodules.PatchProcessor",
        "init_args": {"patch_size": 8, "max_rows": 24, "fps": 1, "max_frames": 3, "max_video_rows": 48},
    }
    arguments = {
        "train": [source],
        "visual": visual,
        "target": {"rows": 3, "shape": [3, 8, 8]},
        "token_budget": 160,
        "microbatches": 3,
        "loading": {"cache_dir": "cache"},
        **changes,
    }
    data = {"class_path": "bigmac_lightning.datamodules.MultimodalDataModule", "init_args": arguments}
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    parts = {
        "llm": ("HFDecoder", {"config": {"model_type": "qwen3", **size, "vocab_size": 262}}),
        "image": ("VisionEncoder", {"width": 16, "config": {"model_type": "siglip_vision_model", **size}}),
        "drawn": ("FlowGenerator", {"width": 16, "channels": 3}),
    }
    made = {k: {"class_path": f"bigmac_lightning.models.{n}", "init_args": given} for k, (n, given) in parts.items()}
    model_arguments = {"llm": made["llm"], "encoders": {"image": made["image"]}, "generators": {"image": made["drawn"]}}
    model = {"class_path": "bigmac_lightning.models.MultimodalLM", "init_args": model_arguments}
    Path("run.yaml").write_text(yaml.safe_dump({"data": data, "model": model}))
    return ["--config", "run.yaml"]


def test_samples_sources_and_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_mixed(tmp_path, 20)
    assert main([*config_of(path, mixture={"val_split": 4}), "--samples=5", "--output=seen.png"]) == 0
    shown = capsys.readouterr().out
    rows = re.findall(r"│ (train|val) +│ \S+ +│ +(\d+) │ +0 │ +([\d,]+) │ +([\d,]+) │", shown)
    assert [(split, int(number)) for split, number, *_ in rows] == [("train", 16), ("val", 4)]
    assert all(int(tokens.replace(",", "")) > int(learnt.replace(",", "")) > 0 for *_, tokens, learnt in rows)
    assert re.search(r"first step of \d+ in an epoch", shown)
    assert "of token_budget=160 are used; packed into one row" in shown
    assert shown.count("of them learnt") == 5
    assert len(re.findall(r"⟦[^⟧]+<\|im_end\|>⟧", shown)) >= 3
    assert re.search(r"<image 1: \d+ tokens>", shown)
    assert re.search(r"image 1: \S+\.png, \d+ x \d+, \d+ tokens", shown)
    count = re.search(r"seen.png: (\d+) images, as decoded", shown)
    assert count
    with PIL.Image.open("seen.png") as picture:
        assert picture.width > 300


def test_a_wrong_template_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that writes parts as JSON would teach the model JSON: it shows, or is refused."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": said("a", "b")}] * 3)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m | tojson }}<|im_end|>{% endfor %}"
    assert main(config_of(path, chat={"template": template})) == 0
    shown = capsys.readouterr().out
    assert "cannot be used" in shown or '"content"' in shown


def test_what_is_refused_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"messages": said("a", "b" * 500)}] * 7 + [{"messages": said("a", "b")}, {"wrong": 1}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    assert main([*config_of(path), "--refused=2"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "train: 8 of 9 examples of" in shown
    assert "the run would end with this error; on_error=skip leaves them out" in shown
    assert "7 x has N tokens, more than a microbatch may have" in shown
    assert "sample 0 (line 1) has 5" in shown
    assert "... and 6 more (--refused 8 lists all)" in shown
    assert main([*config_of(path, on_error="skip")]) == 0
    assert "(left out)" in capsys.readouterr().out


def test_shipped_configs(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data.train_questions=300", "--data.val_questions=20", "--data.loading.cache_dir=cache", "--samples=2"]
    assert main(["--config", str(CONFIGS / "easy_vqa.yaml"), *options]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"⟦ \w+⟧", shown)) == 2
    assert main(["--config", str(CONFIGS / "video_caption.yaml"), "--data.loading.cache_dir=cache", "--samples=1"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"video 1: \S+\.mp4, \d+ x \d+, \d+ frames in [\d.]+ s, \d+ tokens", shown)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ("digits", [], "data is DigitsDataModule, which makes its tokens itself"),
        ("easy_vqa", ["--output=x.gif"], "--output is 'x.gif'; expected a name that ends with .png, .svg, .pdf"),
        ("easy_vqa", ["--split=nothing"], "nothing"),
        ("easy_vqa", ["--replicas=0"], "--replicas is 0; expected an integer of at least 1"),
        (
            "easy_vqa",
            ["--split=test", "--data.train_questions=9", "--data.val_questions=5", "--data.loading.cache_dir=cache"],
            "--split is 'test', for which the DataModule has no sources; it has ['train', 'val']",
        ),
        ("easy_vqa", ["--data.token_budge=3"], "token_budge"),
        ("easy_vqa", ["--data.packing.bufer_size=3"], "packing.bufer_size"),
        ("easy_vqa", ["--data.chat={'lern': 'last'}"], "lern"),
        ("easy_vqa", ["--data.packing.buffer_size=0"], "packing.buffer_size=0: it must be at least 1"),
        ("nowhere", [], "nowhere.yaml"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    config: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(CONFIGS / f"{config}.yaml"), *arguments]) == 2
    shown = capsys.readouterr()
    assert re.fullmatch(r"bigmac data: error: .*\n", shown.err)
    assert message in shown.err
    assert json.dumps(shown.out) == '""'
