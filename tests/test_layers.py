"""What import-linter cannot say: no torch.distributed in single-device code (it sees "torch" as a whole)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "models").rglob("*.py"), *(ROOT / "datamodules").rglob("*.py")])
COLLECTIVES = (
    "llm/exchange.py",
    "llm/expert_parallel.py",
    "llm/tensor_parallel.py",
    "llm/tensor_styles.py",
    "llm/tensor_sums.py",
    "llm/vocabulary_parallel.py",
    "models/lora.py",
    "models/loading.py",
    "models/rows.py",
)
"""What works on meshes that it is given: it computes a stage together with other ranks, or makes a rank's part of
weights."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_single_device_code_knows_no_ranks(path: Path) -> None:
    if f"{path.parent.name}/{path.name}" in COLLECTIVES:
        return
    tree = ast.parse(path.read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.startswith("torch.distributed")]
