"""A file is replaced as a whole or not at all, and one module does it."""

import ast
import os
from pathlib import Path

import pytest

from erollout.resilience.atomic_write import write_atomically

ROOT = Path(__file__).parents[2]


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    path.with_name("state.json.partial").write_text("of a process that was killed, and longer than the new one")
    write_atomically(path, "né")
    assert path.read_bytes() == "né".encode() and list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new", durable=True)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_durable_file_is_flushed_before_it_gets_its_name_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "state.json", []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
    )
    write_atomically(path, "new", durable=True)
    assert seen == [(f"{path}.partial", False), (str(tmp_path), True)]


def test_files_are_replaced_in_one_module() -> None:
    allowed = {"erollout/resilience/atomic_write.py", "erollout/tracking/journal.py"}  # the journal appends, and flushes
    found = {
        str(path.relative_to(ROOT))
        for folder in ("erollout", "launch", "megatron_patches")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.replace", "os.rename", "os.fsync")
    }
    assert found == allowed
