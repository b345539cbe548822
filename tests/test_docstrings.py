"""Docstrings have a subject, read from the source: none begins with "Of ", also those under a field or constant."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("erollout", "launch", "megatron_patches", "slurm", "benchmarks", "tests")


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that is a statement of its own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def test_attribute_docstrings_are_found() -> None:
    source = '"""Module."""\nLIMIT = 3\n"""Of a run."""\nclass A:\n    """Class."""\n    x: int\n    """Of one."""\n'
    assert [text for _, text in docstrings(source)] == ["Module.", "Of a run.", "Class.", "Of one."]


def test_no_docstring_lacks_its_subject() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in docstrings(path.read_text())
        if text.startswith("Of ")
    ]
    assert not found, "\n".join(['say what it is ("Seconds of ...", not "Of ..."):', *found])
