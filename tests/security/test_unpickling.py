"""Pickles of strangers: from a socket, and in a checkpoint. What they name is not called."""

import io
import os
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from erollout.checkpoint.checkpointer import _require_plain
from erollout.errors import UserError
from erollout.megatron_patches import apply_all
from erollout.rewards.scorers import Scorer
from erollout.rewards.worker import Worker
from erollout.security.unpickling import ForbiddenClass, load_message, load_metadata
from erollout.types import PartialRollout, Prompt, Reward


class Hostile:
    """Unpickled, it makes a directory."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def hostile(path: Path) -> dict[str, Hostile]:
    return {
        "posix.mkdir": Hostile(os.mkdir, str(path)),
        "builtins.exec": Hostile(exec, f"import os; os.mkdir({str(path)!r})"),
        "builtins.getattr": Hostile(getattr, "a", "upper"),
        "builtins.eval": Hostile(eval, "1"),
        "torch.storage._load_from_bytes": Hostile(torch.storage._load_from_bytes, b""),
    }


def dotted(path: Path) -> bytes:
    """`torch.serialization.os.mkdir` as a name of the module `torch`."""
    body = pickle.PROTO + b"\x04"
    for text in ("torch", "serialization.os.mkdir"):
        body += pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()
    argument = str(path).encode()
    body += pickle.STACK_GLOBAL + pickle.BINUNICODE + len(argument).to_bytes(4, "little") + argument
    return body + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP


@pytest.mark.parametrize("name", hostile(Path()))
def test_what_is_not_needed_is_not_called(name: str, tmp_path: Path) -> None:
    data = pickle.dumps([hostile(tmp_path / "made")[name]])
    for load in (load_message, lambda data: load_metadata(io.BytesIO(data))):
        with pytest.raises(ForbiddenClass, match=r"it names [\w.]+, which is not allowed there"):
            load(data)
    assert not (tmp_path / "made").exists()


def test_what_a_pickle_has_made_is_not_called(tmp_path: Path) -> None:
    scorer = Scorer("os:mkdir")  # of our own records, and one that calls any function
    with pytest.raises(ForbiddenClass, match="Scorer"):
        load_message(pickle.dumps(Hostile(scorer, str(tmp_path / "made"), 0o777)))
    assert not (tmp_path / "made").exists()


def test_a_name_with_dots_leads_nowhere(tmp_path: Path) -> None:
    data = dotted(tmp_path / "made")
    pickletools.dis(data, io.StringIO())
    for load in (load_message, lambda data: load_metadata(io.BytesIO(data))):
        with pytest.raises(ForbiddenClass):
            load(data)
    pickle.loads(data)
    assert (tmp_path / "made").exists(), "the test's own pickle is as hostile as it claims"


@pytest.mark.parametrize("data", [b"", b"?" * 100, pickle.dumps(list(range(100)))[:-5], b"\x80\x04}\x94s."])
def test_a_damaged_pickle_is_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"it can't be read|pickl|invalid load key"):
        load_message(data)


def test_what_ranks_tell_each_other_arrives() -> None:
    plan = SavePlan([WriteItem(("a",), WriteItemType.TENSOR)], planner_data={"x": torch.Size((1, 2))})  # type: ignore[arg-type]
    values = [
        (1, 2.5, "text", None, True, b"bytes", {3}, frozenset({4}), Path("a/b"), slice(1, 2)),
        [Reward(0, 1, 0.5, "late"), PartialRollout(1, 2, (3,), (0.1,), (0.2,), "stop")],
        plan,
        torch.bfloat16,
    ]
    assert load_message(pickle.dumps(values)) == values
    error = load_message(pickle.dumps(FileNotFoundError(2, "No such file", "x")))
    assert isinstance(error, FileNotFoundError) and error.filename == "x"
    assert isinstance(load_message(pickle.dumps(UserError("said"))), UserError)


def changing(owner: Any) -> bytes:
    """A pickle that sets the attribute `xyz` of a class, or of a member of an enumeration."""
    state = b"N" + b"}X\x03\x00\x00\x00xyzK\x01s" + pickle.TUPLE2  # (None, {"xyz": 1}): the second is set, one by one
    return pickle.dumps(owner, protocol=2)[:-1] + state + pickle.BUILD + pickle.STOP


@pytest.mark.parametrize("owner", [Metadata, WriteItem, WriteItemType, WriteItemType.TENSOR], ids=str)
def test_what_a_pickle_names_stays_as_it_is(owner: Any) -> None:
    data = changing(owner)
    for load in (load_message, lambda data: load_metadata(io.BytesIO(data))):
        with pytest.raises(ForbiddenClass, match="it sets attributes of"):
            load(data)
        assert not hasattr(owner, "xyz")
    pickle.loads(data)
    assert owner.xyz == 1, "the test's own pickle is as hostile as it claims"
    del owner.xyz


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "pipe", "missing"])
def test_a_checkpoint_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_1"
    checkpoint.mkdir()
    (tmp_path / "outside").write_text("x")
    os.mkfifo(checkpoint / "pipe")
    metadata = Metadata({}, storage_data={"a": _StorageInfo(name, 0, 1)})
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({}, checkpoint / "common.pt")
    with pytest.raises(UserError, match=rf"\.metadata: {name} is no file of the checkpoint"):
        _require_plain(checkpoint)


@pytest.mark.parametrize(
    "metadata", [Metadata({}, storage_data=3), Metadata({}, storage_data={1: 2}), Hostile(bytearray, 2**62)]
)
def test_a_checkpoint_of_wrong_types_is_refused(metadata: Any, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({}, tmp_path / "common.pt")
    with pytest.raises(UserError, match=r"is refused: \.metadata: "):
        _require_plain(tmp_path)


def test_a_common_file_of_damaged_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))
    torch.save({"name of it": 1}, tmp_path / "common.pt")
    (tmp_path / "common.pt").write_bytes((tmp_path / "common.pt").read_bytes().replace(b"name of it", b"name \xffof i"))
    with pytest.raises(UserError, match=r"is refused: common\.pt: "):
        _require_plain(tmp_path)


def test_a_pipe_in_a_checkpoint_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".metadata")
    with pytest.raises(UserError, match=r"\.metadata is no file of the checkpoint"):
        _require_plain(tmp_path)


def test_the_metadata_of_a_checkpoint_arrives() -> None:
    metadata = Metadata({"a": [1]}, planner_data={"p": TensorProperties(torch.float32)})  # type: ignore[dict-item]
    assert load_metadata(io.BytesIO(pickle.dumps(metadata))) == metadata
    with pytest.raises(ForbiddenClass, match=r"erollout\.types\.Reward"):
        load_metadata(io.BytesIO(pickle.dumps(Reward(0, 0, 0.0))))


def _send_hostile(path: str) -> str:
    """For RankPool.run: rank 0 sends, by each collective of objects; what the other says."""
    apply_all()
    said = []
    bad = Hostile(os.mkdir, path) if dist.get_rank() == 0 else None
    for send in (lambda: dist.broadcast_object_list([bad], 0), lambda: dist.all_gather_object([None, None], bad)):
        try:
            send()
        except pickle.UnpicklingError as error:
            said.append(str(error))
    return "; ".join(said)


@pytest.mark.distributed
def test_an_object_of_another_rank_is_not_executed(rank_pool: RankPool, tmp_path: Path) -> None:
    _, said = rank_pool.run(2, _send_hostile, str(tmp_path / "made"))
    assert said.count("posix.mkdir") == 2 and not (tmp_path / "made").exists()


def test_what_scores_is_not_obeyed(tmp_path: Path) -> None:
    worker = Worker(Scorer("toy_scorer:attacking"))
    try:
        worker.wait_until_ready()
        outcome = worker.score(Prompt(0, (), "", "task"), str(tmp_path / "made"), timeout_seconds=60.0)
    finally:
        worker.close()
    assert outcome.worker_lost and "posix.mkdir" in str(outcome.error) and not (tmp_path / "made").exists()
