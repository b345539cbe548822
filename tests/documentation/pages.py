"""Pages of the documentation: their blocks, files, edits and commands."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOP_LEVEL = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md")
PAGES = sorted([*(ROOT / name for name in TOP_LEVEL), *(ROOT / "docs").rglob("*.md")])
RECIPES = [page for page in PAGES if page.parent.name == "recipes" and page.name != "index.md"]
_BLOCK = re.compile(
    r"(?:^<!-- (?P<kind>[\w ]+): (?P<note>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block, with the comment on the line before it: `<!-- file: scores.py -->`."""

    kind: str
    """`file`, `edit`, `run by` (a test), `needs`; empty: there is no comment."""
    note: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(block["kind"] or "", block["note"] or "", block["language"], block["text"]) for block in found]


def files(page: Path) -> dict[str, str]:
    """Text of each file that a reader of the page makes."""
    return {block.note: block.text for block in blocks(page) if block.kind == "file"}


def edits(page: Path) -> Iterator[tuple[str, str, str]]:
    """(file, text before, text after) of each edit of our sources, from lines that begin with a space, `-` or `+`."""
    for block in blocks(page):
        if block.kind == "edit":
            lines = block.text.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
            yield block.note, old, new


def commands(text: str) -> list[list[str]]:
    """Words of each line of shell, without comments; lines that end with a backslash are joined."""
    return [words for line in text.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]
