"""Configurations that come with this package. Pure."""

from pathlib import Path


def shipped_config(name: str) -> str:
    """Path of a file of configs/, which is beside the package in a checkout and inside it when installed."""
    package = Path(__file__).parents[1]
    installed, checkout = package / "configs", package.parent / "configs"
    return str((installed if installed.is_dir() else checkout) / name)
