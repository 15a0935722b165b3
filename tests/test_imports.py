"""What the package exports, and what is imported for it."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NAMES = {
    "bigmac_lightning": """
        Batch BigMacStrategy Encoder Generator LanguageModel MediaItem Microbatch PipelineLayout PipelineModule
        PipelineOutput TargetItem assign_owners""",
    "bigmac_lightning.callbacks": "PipelineMonitor SampleImages SampleReplies",
    "bigmac_lightning.datamodules": """
        CaptionFolder ChatOptions Clips Collator Conversation DigitsDataModule EasyVQA EasyVQADataModule EasyVQADrawings
        EpochSampler Example ExampleError File HFDataset HFStream HFVisual Image LlavaJSON LoadingOptions Media Message
        MessagesJSONL MixtureOptions MultimodalDataModule PackingOptions PatchProcessor PipelineDataModule
        PipelineDataset Sample SampleList Size Source SourceError SourceStream Stream Sums Taken Target TargetProcessor
        TextFiles Video VisualProcessor WebDatasetTars byte_tokenizer example_of""",
    "bigmac_lightning.models": """
        FlowGenerator HFAudioEncoder HFDecoder HFVideoEncoder HFVisionEncoder LatentCodec MultimodalLM VisionEncoder""",
}
"""Names that users import, and that stand in their configs: they stay where they are."""


@pytest.mark.parametrize("package", NAMES)
def test_public_names(package: str) -> None:
    module = import_module(package)
    for name in NAMES[package].split():
        assert getattr(module, name).__name__ == name
    assert set(NAMES[package].split()) <= set(dir(module))


def test_all_packages_are_installed() -> None:
    """A package that pyproject.toml does not name would be missing in a wheel."""
    roots = {"bigmac_lightning": "bigmac_lightning", "models": "bigmac_lightning.models"}
    roots["datamodules"] = "bigmac_lightning.datamodules"
    found = {
        ".".join([package, *file.parent.relative_to(ROOT / folder).parts])
        for folder, package in roots.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == found
    others = {
        ".".join([package, *file.parent.relative_to(ROOT / folder).parts, file.name])
        for folder, package in roots.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert {f"{package}.{name}" for package, names in settings["package-data"].items() for name in names} == others


def test_what_is_not_exported_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'BigMcStrategy'"):
        import_module("bigmac_lightning").BigMcStrategy  # noqa: B018


def _run(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ORDERS = [
    "import bigmac_lightning; from lightning.pytorch import Trainer",
    "import bigmac_lightning; from lightning import Trainer",
    "from lightning.pytorch import Trainer; import bigmac_lightning",
    "import bigmac_lightning; import lightning.pytorch.strategies; from lightning import Trainer",
    "from bigmac_lightning import PipelineModule; from lightning import Trainer",
    "import bigmac_lightning.datamodules; from lightning import Trainer",
]
"""Each takes a Python of its own and its imports, so most of them are run on demand."""


@pytest.mark.parametrize(
    "order", [order if i in (1, 2) else pytest.param(order, marks=pytest.mark.wide) for i, order in enumerate(ORDERS)]
)
def test_the_strategy_is_known_in_any_order_of_imports(order: str) -> None:
    _run(
        f"{order}\n"
        'made = Trainer(strategy="bigmac", accelerator="cpu", devices=1, logger=False).strategy\n'
        "from bigmac_lightning import BigMacStrategy\n"
        "assert type(made) is BigMacStrategy"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan", "--pipeline_parallel_size", "4", "--microbatches", "8"],
        ["plan", "--help"],
        ["compare", "--pipeline_parallel_size", "2", "--microbatches", "4"],
    ],
    ids=" ".join,
)
def test_commands_that_need_no_model_import_no_torch(arguments: list[str]) -> None:
    _run(
        "import sys\n"
        "from bigmac_lightning.cli import main\n"
        f"sys.argv = ['bigmac', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'lightning', 'numpy'} & sys.modules.keys()"
    )


def test_a_command_that_is_not_there() -> None:
    done = subprocess.run([sys.executable, "-m", "bigmac_lightning.cli", "fitt"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "bigmac: error: there is no command 'fitt'; did you mean fit?\n"
