"""The `erollout` command. Light: handles Ctrl-C from the start, and loads the commands on demand."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from erollout.environment import is_rank
from erollout.resilience.signals import starting


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status."""
    try:
        with starting(speaks=not is_rank()):
            from erollout.command_line.commands import run_command
        return run_command(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("erollout: interrupted", file=sys.stderr)
        return 130


def _leave(status: int) -> NoReturn:
    """Exit. A failed rank exits at once, so that the launcher ends the others: Python's own shutdown takes seconds."""
    if status and is_rank():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run() -> NoReturn:
    """Entry point of `python -m erollout`, by which ranks are started."""
    try:
        status = main()
    except Exception:  # whatever it is: the traceback of a rank may hold a secret, and the rank ends at once
        if not is_rank():
            raise
        from erollout.security.redaction import redact

        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        status = 1
    _leave(status)


if __name__ == "__main__":
    run()
