"""The callbacks that do nothing, for callers without a stop, a watchdog or a console."""


def never(*_: object) -> bool:
    """No, as when no stop can be requested."""
    return False


def ignore(*_: object) -> None:
    """Do nothing, as with a heartbeat that no watchdog reads, or progress that no console shows."""
