"""Every fenced block of README.md, CONTRIBUTING.md and docs/ is run or checked: one of which no test knows is an error.

Commands of `bigmac` that need seconds are run here, in one process, in a folder that has what they name. Those that
would train for minutes, or on many processes, are parsed by the real parsers. YAML is parsed as a config or as its
part. Python is run by the test that `RUN_BY` names, which reads it from its page.
"""

import importlib.util
import inspect
import json
import re
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import transformers
import yaml
from jsonargparse import ArgumentError
from jsonargparse._util import import_object
from packaging.requirements import Requirement
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.run import get_args_parser

from bigmac_lightning import cli
from bigmac_lightning.commands.answer import parser_of
from bigmac_lightning.commands.chat import chat
from bigmac_lightning.commands.export import export_checkpoint
from bigmac_lightning.commands.plan_config import RunReader
from bigmac_lightning.datamodules import MessagesJSONL, MultimodalDataModule
from bigmac_lightning.models import FlowGenerator, HFDecoder, LatentCodec, MultimodalLM, VisionEncoder
from tests.blocks import PAGES, ROOT, Block, block_with, blocks_of, has
from tests.cli.commands import bigmac, run
from tests.cli.test_launch_files import _Parsed
from tests.datamodules.examples import VOCABULARY, pictures, said, write_jsonl
from tests.models import zoo
from tests.models.test_flow import codec_config
from tests.training.trainers import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls its parser

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
WHOLE_PAGE = ""

RUN_BY = {
    ("README.md", "digits.py"): "tests/test_blocks.py",
    ("docs/data.md", "class LabelledFolder"): "tests/datamodules/test_documentation.py",
    ("docs/data.md", "class Records"): "tests/datamodules/test_documentation.py",
    ("docs/data.md", "register("): "tests/datamodules/test_modalities.py",
    ("docs/design.md", WHOLE_PAGE): "tests/test_own_policy.py",
    ("docs/finetuning.md", "frozen_tower.yaml"): "tests/cli/test_finetuning.py",
    ("docs/finetuning.md", "rates.yaml"): "tests/cli/test_finetuning.py",
    ("docs/finetuning.md", "bigmac fit --config configs/qwen3_vl.yaml --config "): "tests/cli/test_finetuning.py",
    ("docs/finetuning.md", "projector_first.ProjectorFirst"): "tests/cli/test_finetuning.py",
    ("docs/finetuning.md", "projector_first.py"): "tests/cli/test_finetuning.py",
    ("docs/finetuning.md", "add_generator.py"): "tests/cli/test_finetuning.py",
    ("docs/models.md", "from_pretrained(DIR)"): "tests/test_blocks.py",
    ("docs/models.md", "codec=LatentCodec"): "tests/test_blocks.py",
    ("docs/models.md", "merge_and_unload"): "tests/models/test_phi4.py",
    ("docs/own_parts.md", WHOLE_PAGE): "tests/test_own_parts.py",
    ("docs/tutorial.md", WHOLE_PAGE): "tests/cli/test_tutorial.py",
    ("docs/using.md", "bigmac_lightning.load"): "tests/cli/test_chat.py",
    ("README.md", "bigmac_lightning.load"): "tests/cli/test_chat.py",
    ("docs/using.md", "bigmac draw"): "tests/cli/test_chat.py",
}
"""Blocks by their page, and by words or the title that only they have; and the test that reads and runs them."""

KINDS = ("python", "bash", "yaml", "json", "text", "jinja")
PARSED = ("fit", "validate", "test", "predict", "export")
FEWER = {"profile": ["--steps", "6"], "tune": ["--seconds", "2"]}
"""What commands get beside their options, so that they end in seconds."""

COMMANDS = {**cli.TRAINING, **cli.OTHERS}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def known(block: Block) -> list[tuple[str, str]]:
    """The entries of `RUN_BY` for a block."""
    return [(page, words) for page, words in RUN_BY if page == block.page and has(block, words)]


def test_every_block_is_known() -> None:
    assert {block.kind for block in BLOCKS} == set(KINDS), [b.name for b in BLOCKS if b.kind not in KINDS]
    unknown = [block.name for block in BLOCKS if block.kind == "python" and not known(block)]
    assert not unknown, f"no test runs {unknown}: name one in RUN_BY"
    hidden = [
        b.name for b in BLOCKS if b.kind == "text" and re.search(r"^(bigmac|python|pip|torchrun|make) ", b.text, re.M)
    ]
    assert not hidden, f"{hidden} have commands: write ```bash"


@pytest.mark.parametrize(("page", "words"), RUN_BY)
def test_the_named_test_reads_the_block(page: str, words: str) -> None:
    source = (ROOT / RUN_BY[page, words]).read_text()
    source = re.sub(r"^RUN_BY = \{.*?^\}", "", source, flags=re.MULTILINE | re.DOTALL)  # if it is this file
    assert Path(page).name in source
    assert words in source
    found = [block for block in blocks_of(page) if has(block, words)]
    assert found if words == WHOLE_PAGE else len(found) == 1, "the page has no such block, or several"


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the repository's configs, and RUN.yaml, which is that of the tutorial with its data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # as the CLI will set it
    monkeypatch.setattr(sys, "argv", ["bigmac"])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    exec(block_with("docs/tutorial.md", "draw.py"), {})
    (tmp_path / "shapes.py").write_text(block_with("docs/tutorial.md", "shapes.py"))
    (tmp_path / "RUN.yaml").write_text(block_with("docs/tutorial.md", "shapes.yaml"))
    yield tmp_path
    sys.modules.pop("shapes", None)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.kind == "bash" and not known(b) for b in blocks_of(page))]
)
def test_commands(page: str, folder: Path) -> None:
    """Each command line of a page, in its order."""
    for block in blocks_of(page):
        if block.kind == "bash" and not known(block):
            for command in block.commands:
                check(shlex.split(command), page, folder)
    for name in ("x.png", "memory.png"):
        assert not (folder / name).exists() or (folder / name).read_bytes().startswith(b"\x89PNG")


def test_wrong_commands_are_found(folder: Path) -> None:
    for command in (
        "bigmac plan --pipeline_parallel_size 4 --microbatchs 16",
        "bigmac fit --config RUN.yaml --trainer.devics 2",
        "bigmac export --checkpoint RUN.ckpt --outptu OUT",
        "bigmac train --config RUN.yaml",
        "torchrun --nproc-per-nodes 2 -m bigmac_lightning.cli fit --config RUN.yaml",
        "torchrun --nproc-per-node 2 -m bigmac_lightning.cli fit --config NONE.yaml",
        "python -m benchmarks.gpus",
        "python -m benchmarks.gpu --small",
        "python other.py",
        "pip install -e .[everything]",
        "make qickstart",
        "pytest -m gpus",
        "curl x",
    ):
        with pytest.raises((AssertionError, SystemExit, ModuleNotFoundError, ArgumentError)):
            check(shlex.split(command), "README.md", folder)


def check(words: list[str], page: str, folder: Path) -> None:
    """Run a command, or parse it.

    Raises:
        AssertionError, SystemExit, ModuleNotFoundError, ArgumentError: it is wrong.
    """
    match words:
        case ["bigmac", name, *options]:
            _check_bigmac(name, options, folder)
        case ["torchrun", *options]:
            given = get_args_parser().parse_args(options)
            assert given.module
            assert given.training_script == "bigmac_lightning.cli"
            _check_bigmac(given.training_script_args[0], given.training_script_args[1:], folder)
        case ["python", "-m", module, *options]:
            _check_module(module, options)
        case ["python", file]:
            assert any(block.title == file for block in blocks_of(page)), f"{page} has no file {file}"
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {target}"
        case ["pip", "install", "-e", what]:
            extras = Requirement(f"bigmac-lightning{what.removeprefix('.')}").extras
            assert extras <= PROJECT["project"]["optional-dependencies"].keys(), extras
        case ["pytest", "-m", marker, *paths]:
            markers = [text.split(":")[0] for text in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
            assert marker in markers, marker
            assert all((ROOT / path).exists() for path in paths), paths
        case [".venv/bin/pre-commit", "install"]:
            assert (ROOT / ".pre-commit-config.yaml").is_file()
        case _:
            raise AssertionError(f"no test knows this command: {words}")


def _check_bigmac(name: str, options: list[str], folder: Path) -> None:
    if name == "export":
        parser_of("export", "", export_checkpoint).parse_args(options)
    elif name == "chat":
        parser_of("chat", "", chat, positional=True).parse_args(options)
    elif name in PARSED:
        _Parsed(args=[name, *options])
    elif name == "profile":
        assert "costs" in bigmac(2, folder, name, *options, *FEWER[name])
    else:
        assert name in cli.OTHERS, name
        assert cli.module_of(name, options).main([*options, *FEWER.get(name, [])]) == 0


def _check_module(module: str, options: list[str]) -> None:
    found = importlib.util.find_spec(module)
    assert found is not None, module
    assert found.origin is not None
    package = Path(found.origin).parent if found.submodule_search_locations else Path(found.origin)
    files = package.rglob("*.py") if package.is_dir() else [package]
    text = "".join(file.read_text() for file in files)
    for option in options:
        assert not option.startswith("--") or f'"{option}"' in text, f"{module} has no option {option}"


def test_commands_in_sentences_exist() -> None:
    """Their names, modules, targets and files."""
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        for command in re.findall(r"`([^`]+)`", text):
            words = command.split()
            match words:
                case ["bigmac", name, *_]:
                    assert name in COMMANDS or name == "COMMAND", (page, command)
                case ["python", "-m", module, *options]:
                    if module != "pip":
                        _check_module(module, options)
                case ["make", target, *_]:
                    assert re.search(rf"^([\w-]+ )*{target}( [\w-]+)*:", makefile, re.MULTILINE), (page, command)
            for path in re.findall(
                r"\b(?:bigmac_lightning|models|datamodules|configs|tests|benchmarks)/[\w./-]*", command
            ):
                assert (ROOT / path).exists() or "://" in command, (page, path)


# -- configs ---------------------------------------------------------------------------------------------------------

WHOLE = ("seed_everything", "trainer", "model", "data")
PLACES: dict[str, Callable[[Any], Any]] = {
    "strategy": lambda part: {"trainer": part},
    "sharding": lambda part: {
        "trainer": {"strategy": {"class_path": "bigmac_lightning.BigMacStrategy", "init_args": part}}
    },
    "media": lambda part: {"data": _data(part)},
    "class_path": lambda part: {"data": _data({"train": [part]})},
}
"""Where a part stands in a config, by its first key."""


def _data(arguments: Any) -> Any:
    return {"class_path": "bigmac_lightning.datamodules.MultimodalDataModule", "init_args": arguments}


YAML = [block for block in BLOCKS if block.kind == "yaml" and not known(block)]


def _check_arguments(part: Any) -> None:
    """That classes have the arguments that are given: jsonargparse does not look into lists of sources."""
    if isinstance(part, dict) and "class_path" in part:
        inspect.signature(import_object(part["class_path"])).bind_partial(**part.get("init_args", {}))
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else []:
        _check_arguments(inner)


def _parse(text: str, folder: Path) -> RunReader:
    """A config of this text, with the model, and where it has none also the data, of RUN.yaml."""
    part = yaml.safe_load(textwrap.dedent(text))
    _check_arguments(part)
    first = next(iter(part))
    config = part if first in WHOLE else PLACES[first](part)
    if "data" in config:  # without arguments that are required, jsonargparse does not look at the others
        config["data"]["init_args"] = {"token_budget": 512, "microbatches": 4, **config["data"]["init_args"]}
    base = yaml.safe_load((folder / "RUN.yaml").read_text())
    whole = {"model": base["model"], "data": base["data"], **config}
    whole.setdefault("trainer", {}).setdefault("strategy", "bigmac")
    (folder / "part.yaml").write_text(yaml.safe_dump(whole))
    return RunReader("plan", ["--config", "part.yaml"])


@pytest.mark.parametrize("block", YAML, ids=[block.name for block in YAML])
def test_configs(block: Block, folder: Path) -> None:
    """They are parsed as by `bigmac fit`, and the strategy is made, which checks its arguments."""
    _parse(block.text, folder)


def test_wrong_configs_are_found(folder: Path) -> None:
    for text in (
        "trainer: {devics: 4}",
        "sharding: {encoders: fspd}",
        "media: {audio: {class_path: bigmac_lightning.datamodules.AudioProcessor, init_args: {merg: 5}}}",
        "data: {class_path: bigmac_lightning.datamodules.MultimodalDataModule, init_args: {mixtures: {}}}",
        "class_path: bigmac_lightning.datamodules.MessagesJSONL\ninit_args: {path: x, file: x}",
    ):
        with pytest.raises(Exception, match=r"not accepted|fspd|devics|merg|mixtures|file"):
            _parse(text, folder)


def test_records(tmp_path: Path) -> None:
    """The JSON of a page is a record that a source reads."""
    records = [block for block in BLOCKS if block.kind == "json"]
    assert [block.page for block in records] == ["docs/data.md"]
    (tmp_path / "beach.png").write_bytes(pictures(1)[0].read_bytes())
    for block in records:
        (tmp_path / "x.jsonl").write_text(json.dumps(json.loads(block.text)) + "\n")
        example = MessagesJSONL(tmp_path / "x.jsonl")[0]
        assert [message.role for message in example.messages] == ["user", "assistant", "tool", "assistant"]


# -- python ----------------------------------------------------------------------------------------------------------


def _readme_file(rank: int) -> list[float]:
    names: dict[str, Any] = {"__name__": "__main__"}
    text = block_with("README.md", "digits.py").replace("max_epochs=2", "max_epochs=1")
    exec(compile(text, "digits.py", "exec"), names)
    return [float(names["trainer"].callback_metrics[f"{stage}/text"]) for stage in ("train", "val")]


def test_readme_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it, in which it learns something: to guess among the 39 tokens costs 3.7."""
    monkeypatch.chdir(tmp_path)
    for losses in on_ranks(2, _readme_file):
        assert max(losses) < 3, losses


@pytest.mark.wide  # most of the time is that of imports
def test_readme_file_as_a_process(tmp_path: Path) -> None:
    """It starts its second process itself."""
    (tmp_path / "digits.py").write_text(block_with("README.md", "digits.py"))
    assert run([sys.executable, "digits.py"], tmp_path).returncode == 0
    [events] = tmp_path.rglob("events.out.tfevents.*")
    assert "train/text" in EventAccumulator(str(events)).Reload().Tags()["scalars"]


def _models_page(rank: int) -> None:
    given = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_checkpointing": False}
    made = L.Trainer(**given, strategy="bigmac", devices=1)  # pyright: ignore
    datamodule = MultimodalDataModule(train=[MessagesJSONL("x.jsonl")], token_budget=128, microbatches=2)
    names = {"MultimodalLM": MultimodalLM, "DIR": "qwen3", "N": 1, "datamodule": datamodule}
    exec(block_with("docs/models.md", "from_pretrained(DIR)"), names | {"Trainer": lambda **_: made})
    made.save_checkpoint("RUN.ckpt")


def test_models_page(folder: Path) -> None:
    """The first block trains a step with a tiny model, and its checkpoint is exported by the page's command."""
    zoo.save("qwen3", folder, zoo.text(transformers.Qwen3Config, vocab_size=VOCABULARY)())
    records = [{"messages": said("What?", "x" * (1 + i % 3))} for i in range(20)]
    write_jsonl(folder / "x.jsonl", records)
    on_ranks(1, _models_page)
    [command] = [
        line for block in blocks_of("docs/models.md") for line in block.commands if line.startswith("bigmac export")
    ]
    assert cli.module_of("export", []).main(shlex.split(command)[2:]) == 0
    assert (folder / "OUT" / "model.safetensors").is_file()


def test_own_combinations(folder: Path) -> None:
    """The components are made, without weights, from folders that have only configs."""
    widths = {"hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name, config in {
        "Qwen3": {"model_type": "qwen3", **widths, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64},
        "siglip2": {"model_type": "siglip_vision_model", **tower, "image_size": 32, "patch_size": 8},
        "dc-ae": codec_config("AutoencoderDC"),
    }.items():
        (folder / "path" / "of" / name).mkdir(parents=True)
        (folder / "path" / "of" / name / "config.json").write_text(json.dumps(config))
    classes = (FlowGenerator, HFDecoder, LatentCodec, MultimodalLM, VisionEncoder)
    made = SimpleNamespace()
    exec(
        f"made.model = {block_with('docs/models.md', 'codec=LatentCodec')}",
        {**{c.__name__: c for c in classes}, "made": made},
    )
    assert isinstance(made.model, MultimodalLM)
