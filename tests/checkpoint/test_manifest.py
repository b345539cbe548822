"""A checkpoint counts only when it is whole, and damage is found and named."""

import json
import shutil
from pathlib import Path

import pytest

from erollout.checkpoint import manifest as manifest_module
from erollout.checkpoint.manifest import MANIFEST, STATE, complete_checkpoints, damage, total_bytes, write_manifest

FILES = {STATE: b"{}", "metadata.json": b"abc", "shards/__0_0.distcp": bytes(1000), "shards/__1_0.distcp": bytes(500)}


def _write_files(directory: Path) -> Path:
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def _saved(root: Path, name: str = "step_00000010") -> Path:
    """A checkpoint as it is published: files, manifest, then the name."""
    partial = _write_files(root / f"{name}.partial")
    write_manifest(partial)
    return partial.rename(root / name)


def _damage(checkpoint: Path) -> str:
    found = damage(checkpoint)
    assert found is not None and "\n" not in found
    return found


def test_a_whole_checkpoint_passes(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    assert damage(checkpoint) is None
    assert complete_checkpoints(tmp_path) == [checkpoint]


def test_a_moved_checkpoint_passes(tmp_path: Path) -> None:
    assert damage(_saved(tmp_path).rename(tmp_path / "elsewhere")) is None


def test_a_manifest_may_be_written_again(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    (checkpoint / STATE).write_bytes(b'{"longer": 1}')
    write_manifest(checkpoint)
    assert damage(checkpoint) is None


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_named_at_once(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module.time, "sleep", None)  # a wait would be an error
    checkpoint = _saved(tmp_path)
    (checkpoint / name).unlink()
    assert _damage(checkpoint) == f"{name} is missing"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_named(tmp_path: Path, name: str, change: int) -> None:
    checkpoint = _saved(tmp_path)
    size = len(FILES[name])
    (checkpoint / name).write_bytes(bytes(size + change))
    assert f"{name} has {size + change} bytes instead of {size}" in _damage(checkpoint)


def test_a_file_that_can_not_be_read_is_damage_if_it_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "_READ_AGAIN_AFTER", (0.01, 0.01))
    checkpoint = _saved(tmp_path)
    (checkpoint / "metadata.json").unlink()
    (checkpoint / "metadata.json").symlink_to("/proc/self/mem")  # reading at address 0 is an input/output error
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["metadata.json"]["bytes"] = 0
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert damage(checkpoint) == "metadata.json can't be read: Input/output error"


def test_a_file_that_can_be_read_a_moment_later_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _write_files(tmp_path) / "metadata.json"
    file.write_bytes(b"")
    write_manifest(tmp_path)
    file.unlink()
    file.symlink_to("/proc/self/mem")

    def mend(seconds: float) -> None:
        file.unlink()
        file.write_bytes(b"")

    monkeypatch.setattr(manifest_module.time, "sleep", mend)
    assert damage(tmp_path) is None


def test_a_file_that_a_rank_has_written_and_the_first_one_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "_READ_AGAIN_AFTER", (0.01, 0.01))
    with pytest.raises(FileNotFoundError, match="written by a rank"):
        write_manifest(_write_files(tmp_path), {STATE: "0", "__7_0.distcp": "0"})


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_named_and_by_one_reader_of_several(tmp_path: Path, name: str) -> None:
    checkpoint = _saved(tmp_path)
    content = bytearray(FILES[name])
    content[0] ^= 1
    (checkpoint / name).write_bytes(bytes(content))
    assert f"{name} has the checksum" in _damage(checkpoint)
    found = [damage(checkpoint, part, 3) for part in range(3)]
    assert sum(reason is not None for reason in found) == 1


def test_checksums_that_are_known_are_not_computed_again(tmp_path: Path) -> None:
    write_manifest(_write_files(tmp_path), {STATE: "wrong"})
    assert f"{STATE} has the checksum" in str(damage(tmp_path))


def test_a_manifest_knows_how_large_the_checkpoint_is(tmp_path: Path) -> None:
    assert total_bytes(_saved(tmp_path)) == sum(map(len, FILES.values()))


def test_a_file_replaced_by_a_directory_is_missing(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    (checkpoint / STATE).unlink()
    (checkpoint / STATE).mkdir()
    assert f"{STATE} is missing" in _damage(checkpoint)


@pytest.mark.parametrize("content", [b"", b'{"state.json": 2', b"[]", b"{}", b"null", b"\xff\xfe"], ids=repr)
def test_a_damaged_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    checkpoint = _saved(tmp_path)
    (checkpoint / MANIFEST).write_bytes(content)
    assert MANIFEST in _damage(checkpoint)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_manifest_that_leads_out_of_the_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    checkpoint = _write_files(tmp_path / "c")
    (tmp_path / "outside").write_text("x")
    write_manifest(checkpoint)
    entries = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**entries, name: {"bytes": 1, "crc32": "0"}}))
    assert damage(checkpoint) == f"manifest.json lists {name}, which is not in the checkpoint"


def test_a_truncated_manifest_is_never_taken_for_a_shorter_one(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    whole = (checkpoint / MANIFEST).read_bytes()
    for length in range(len(whole)):
        (checkpoint / MANIFEST).write_bytes(whole[:length])
        _damage(checkpoint)


def test_no_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    (checkpoint / MANIFEST).unlink()
    assert complete_checkpoints(tmp_path) == []
    assert MANIFEST in _damage(checkpoint)
    assert MANIFEST in _damage(tmp_path / "step_00000099")


def test_a_crash_at_any_point_of_a_save_leaves_what_was_there(tmp_path: Path) -> None:
    before = _saved(tmp_path, "step_00000010")
    partial = tmp_path / "step_00000020.partial"
    for written in range(len(FILES) + 1):  # the process ends after so many files
        partial.mkdir()
        for name in list(FILES)[:written]:
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(FILES[name])
        assert complete_checkpoints(tmp_path) == [before]
        shutil.rmtree(partial)
    write_manifest(_write_files(partial))
    assert complete_checkpoints(tmp_path) == [before]  # not renamed yet
    after = partial.rename(tmp_path / "step_00000020")
    assert complete_checkpoints(tmp_path) == [before, after]
    assert damage(before) is None
    assert damage(after) is None


def test_checkpoints_are_listed_oldest_first(tmp_path: Path) -> None:
    names = ["step_00000100", "step_00000020", "step_00001000"]
    for name in names:
        _saved(tmp_path, name)
    (tmp_path / "step_notes.txt").write_text("a file")
    for name in ("other", "step_00000100_best", "step_00000100_1", "step_00000100.partial"):
        _saved(tmp_path, name)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000020", "step_00000100", "step_00001000"]


def test_a_directory_that_is_not_there_has_no_checkpoints(tmp_path: Path) -> None:
    assert complete_checkpoints(tmp_path / "none") == []
    (tmp_path / "file").write_text("")
    assert complete_checkpoints(tmp_path / "file") == []
