"""The pages of docs/: none is left out of the navigation, and what they quote or list is what the sources have."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = {"bigmac_lightning": "bigmac_lightning", "models": "bigmac_lightning.models"}
PACKAGES |= {"datamodules": "bigmac_lightning.datamodules", "bigmac_lightning/callbacks": "bigmac_lightning.callbacks"}
VARIES = "\0"


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name Python objects."""


def pages_of(entry: object) -> Iterator[str]:
    """The pages in a part of the navigation."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, list):
        for part in entry:
            yield from pages_of(part)
    elif isinstance(entry, dict):
        yield from pages_of([*entry.values()])


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)
    listed = list(pages_of(config["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize(("folder", "name"), PACKAGES.items())
def test_the_reference_has_every_public_name(folder: str, name: str) -> None:
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    [names] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name) and target.id == "__all__"
    ]
    entries = re.findall(
        r"^::: (\S+)$", "".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.MULTILINE
    )
    assert len(set(entries)) == len(entries)
    assert {f"{name}.{public}" for public in names} <= set(entries)


def test_every_config_is_listed() -> None:
    section = (DOCS / "index.md").read_text().split("## Configs")[1].split("## Pages")[0]
    listed = [
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    ]
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_texts_of_other_files_are_found() -> None:
    """A page that stands for a section of another file names one that exists."""
    for page in DOCS.rglob("*.md"):
        for file, heading in re.findall(r"^<!-- ([\w.]+\.md)(?:: (.+))? -->$", page.read_text(), re.MULTILINE):
            assert not heading or f"\n## {heading}\n" in (ROOT / file).read_text(), (page, heading)


def one_line(text: str) -> str:
    """A text with single spaces, in which one mark stands for what varies."""
    return re.sub(f"{VARIES}+", VARIES, " ".join(text.split()))


def text_of(node: ast.expr) -> str | None:
    """A text as the sources have it, with a mark for each value in it; ``None``: it is no text."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"\.\.\.|\{\}", VARIES, text)
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part) or VARIES for part in parts)
        case ast.BinOp(op=ast.Add(), left=left, right=right) if (begin := text_of(left)) is not None:
            return begin + (text_of(right) or VARIES)
    return None


def texts_in(tree: ast.AST) -> Iterator[str]:
    """The texts in a file that are no docstrings and no parts of longer ones, each in one line."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        text = text_of(child) if isinstance(child, ast.expr) else None
        if text is not None:
            yield one_line(text)
        if text is None or isinstance(child, ast.BinOp):
            yield from texts_in(child)


@cache
def messages() -> frozenset[str]:
    """All texts in the sources."""
    files = [file for folder in ("bigmac_lightning", "models", "datamodules") for file in (ROOT / folder).rglob("*.py")]
    return frozenset(text for file in files for text in texts_in(ast.parse(file.read_text())))


def is_printed(quoted: str) -> bool:
    """Whether a message is one of the sources: all of it, or its first words up to a colon or the end of a sentence."""
    wanted = one_line(quoted.replace("...", VARIES))
    begins = wanted.removesuffix(VARIES).rstrip()
    ends = begins.endswith((".", ":", ";", ","))
    return len(begins) > 15 and any(m == wanted or (ends and m.startswith(begins)) for m in messages())


QUOTED = re.findall(r"```text\n(.*?)```", (DOCS / "troubleshooting.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_messages_are_printed(quoted: str) -> None:
    assert is_printed(quoted), f"no text in the sources is: {quoted}"


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_messages_are_expected_by_a_test(quoted: str) -> None:
    """Some words of each, one after another, stand in a test."""
    pieces = (piece.split() for piece in plain(quoted).split("..."))
    runs = (" ".join(words[n : n + 3]) for words in pieces for n in range(max(1, len(words) - 2)) if words)
    assert any(len(run) > 12 and run in texts_of_tests() for run in runs), f"no test expects: {quoted}"


@cache
def texts_of_tests() -> str:
    files = (file for file in (ROOT / "tests").rglob("*.py") if file != Path(__file__))
    return plain(" ".join(file.read_text() for file in files))


def plain(text: str) -> str:
    """Without quotes and escapes."""
    return re.sub(r"[\\'\"\s]+", " ", text)


def test_a_changed_message_is_found() -> None:
    assert len(QUOTED) >= 15
    assert is_printed("policy is ...; expected one of ...")
    for wrong in ("policy is ...; expected some of ...", "policy is ...", "...", "... expected one of ..."):
        assert not is_printed(wrong), wrong
