"""The fenced blocks of README.md and docs/: what the pages say that one can run."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r'^```(\w*)(?: title="([\w.]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its page, relative to the repository.
        line: the line of its fence.
        kind: the language after the fence.
        title: the name of its file; "": it has none.
        text: what is in it.
    """

    page: str
    line: int
    kind: str
    title: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The command lines of a bash block, without comments."""
        return [line for row in self.text.splitlines() if (line := re.sub(r"(^|\s)#.*", "", row).strip())]


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in their order.

    Raises:
        AssertionError: a fence is written in another way.
    """
    text = (ROOT / page).read_text()
    found = [Block(page, text[: m.start()].count("\n") + 1, m[1], m[2] or "", m[3]) for m in FENCE.finditer(text)]
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(found), (
        f"{page} has fences of another form"
    )
    return found


def has(block: Block, words: str) -> bool:
    """Whether a block has this title, or else these words."""
    return words == block.title if words.endswith((".py", ".yaml")) else words in block.text


def block_with(page: str, words: str) -> str:
    """The text of the only block of a page that has this title, or else these words."""
    [block] = [block for block in blocks_of(page) if has(block, words)]
    return block.text
