"""The error for mistakes that a user can fix, and the translation of what foreign code raises."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Invalid input: the message is one line that names the key or file, the value and the fix.

    The command line prints it without a traceback and exits with status 2.
    """


@contextmanager
def foreign_code(translated: Callable[[Exception], Exception], passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raise `translated(error)` for any error of the block, but for the kinds in `passing`, which stay as they are.

    For libraries, drivers, templates and pickles, which document no kinds of errors: hence the broad except. Interrupts
    and exits pass.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        raise translated(error) from error
