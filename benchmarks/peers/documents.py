"""Writes generated texts into documents, between ``<!-- NAME -->`` and ``<!-- end of NAME -->``."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/benchmarks.md")


def marked(text: str) -> Iterator[tuple[str, str]]:
    """The name and the content of each marked part of a document."""
    for found in re.finditer(r"<!-- ([\w-]+) -->\n(.*?)\n?<!-- end of \1 -->", text, re.DOTALL):
        yield found[1], found[2].strip("\n")


def replaced(text: str, blocks: Mapping[str, str]) -> str:
    """A document with the parts that have one of these names replaced."""
    for name, content in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        text = re.sub(pattern, lambda found, new=content: f"{found[1]}\n{new}\n\n{found[2]}", text, flags=re.DOTALL)
    return text


def write_marked(blocks: Mapping[str, str]) -> None:
    """Write texts into the project's documents."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(replaced(path.read_text(), blocks))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)
