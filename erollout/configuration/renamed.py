"""Keys that have been renamed or removed: configurations and checkpoints with former names and defaults still load."""

import logging
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Removed:
    """A key that is gone."""

    default: Any
    """Its default, which every saved configuration has: it is left out. Another value is refused."""
    reason: str


RENAMED = {"coordinator.hand_out": "coordinator.dispatch"}
"""Present name of each key, by its former one; in the same section."""

REMOVED = {"speculation.toggle.margin": Removed(0.02, "the toggle takes the best arm without a margin")}


def present_name(key: str) -> str:
    return RENAMED.get(key, key)


def use_present_names(tree: dict[str, Any]) -> None:
    """Rename keys of a configuration in place, and leave out removed ones at their defaults.

    If it has both names, the former stays, to be refused as unknown.
    """
    for former, present in RENAMED.items():
        section, (old, new) = _section(tree, former), (key.rpartition(".")[2] for key in (former, present))
        if old in section and new not in section:
            section[new] = section.pop(old)
    for key, removed in REMOVED.items():
        section, name = _section(tree, key), key.rpartition(".")[2]
        if name in section and _plain(section[name]) == removed.default:
            del section[name]
            logger.info("%s is no longer a key (%s): left out", key, removed.reason)


def _section(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """The section of a dotted key; an empty one if it is not there."""
    node: Any = tree
    for name in key.split(".")[:-1]:
        node = _plain(node.get(name)) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _plain(value: Any) -> Any:
    """The value of a node of a YAML tree (yaml_tree.Written)."""
    return getattr(value, "value", value)
