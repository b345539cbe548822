"""Stand-ins for callbacks where nobody asks, watches or listens."""


def never(*_: object) -> bool:
    """The answer where nobody asks for anything: not to stop, for one."""
    return False


def ignore(*_: object) -> None:
    """What is told to nobody: a sign of life without a watchdog, a finished step without a console."""
