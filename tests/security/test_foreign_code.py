"""Errors of foreign code become ours, with their cause."""

import pytest

from erollout.errors import UserError, foreign_code
from erollout.rewards.worker import NotCarried, pack, unpack


class Refuses:
    """Neither pickled nor a known kind of error."""

    def __reduce__(self) -> str:
        raise RuntimeError("not this one")


class Explodes:
    def __reduce__(self) -> tuple[object, ...]:
        return (int, ("no number",))


def test_any_error_is_translated_and_keeps_its_cause() -> None:
    cause = Exception("bare")
    with pytest.raises(UserError, match="file x: bare") as found, foreign_code(lambda error: UserError(f"file x: {error}")):
        raise cause
    assert found.value.__cause__ is cause


def test_known_kinds_interrupts_and_exits_pass() -> None:
    for error in (OSError(5, "disk"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as found, foreign_code(lambda _: UserError("translated"), passing=(OSError,)):
            raise error
        assert found.value is error


def test_an_item_that_cannot_be_carried_says_so() -> None:
    assert unpack(pack("prompt", "response")) == ("prompt", "response")
    with pytest.raises(NotCarried, match="can't be sent to a scoring process: RuntimeError: not this one"):
        pack(Refuses(), "response")
    with pytest.raises(NotCarried, match="can't be read by a scoring process: ValueError: invalid literal"):
        unpack(pack(Explodes(), "response"))
