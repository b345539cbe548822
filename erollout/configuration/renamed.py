"""Keys that have been renamed (configurations and checkpoints with the former name still load) or removed. Pure."""

from typing import Any

RENAMED = {"coordinator.hand_out": "coordinator.dispatch"}
"""Present name of each key, by its former one; in the same section."""

REMOVED = {"speculation.toggle.margin": "the toggle takes the best arm without a margin"}
"""Keys that are refused, with the reason."""


def present_name(key: str) -> str:
    return RENAMED.get(key, key)


def use_present_names(tree: dict[str, Any]) -> None:
    """Rename keys of a configuration in place. If it has both names, the former stays, to be refused as unknown."""
    for former, present in RENAMED.items():
        section, _, last = present.rpartition(".")
        node = tree.get(section)
        if isinstance(node, dict) and last not in node and (key := former.rpartition(".")[2]) in node:
            node[last] = node.pop(key)
