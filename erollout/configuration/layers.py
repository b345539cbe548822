"""Configurations that build on others: `extends` names a file whose keys this one overrides. Pure.

Layers apply in order: the files that a file extends, the file itself, the overrides of the command line. Sections merge key by
key; any other value, lists and mappings such as data.args included, replaces the one below.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from erollout.configuration.renamed import use_present_names
from erollout.configuration.yaml_tree import apply_override, bare_value, joined, part_type, read_file, set_key
from erollout.errors import UserError

EXTENDS = "extends"
OVERRIDE = "command line"
"""Origin of a key that an override sets."""


@dataclass(slots=True)
class LayeredTree:
    """Merged sections of a configuration."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """File (or OVERRIDE) that set a key, by dotted key; keys that nothing set are missing."""

    def add(self, tree: Mapping[str, Any], origin: str, schema: type) -> None:
        """Put a layer on top."""
        for key in _keys(tree, schema):
            self.origins = {old: source for old, source in self.origins.items() if not old.startswith(f"{key}.")}
            self.origins[key] = origin
        for name, value in tree.items():
            set_key(self.tree, name, value, part_type(schema, name))


def read_layers(path: str | Path, overrides: Sequence[str], schema: type) -> LayeredTree:
    """A YAML file with what it extends below and overrides on top. Raises UserError."""
    found = LayeredTree()
    for file, tree in _files(Path(path), ()):
        found.add(tree, str(file), schema)
    for override in joined(overrides):
        apply_override(found.tree, override, schema)
        alone: dict[str, Any] = {}
        apply_override(alone, override, schema)
        found.origins |= dict.fromkeys(_keys(alone, schema), OVERRIDE)
    use_present_names(found.tree)
    return found


def _files(path: Path, above: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """A file after those that it extends, each with its own keys. `above`: files that extend this one."""
    if path.resolve() in above:
        chain = " -> ".join(str(file) for file in (*above, path.resolve()))
        raise UserError(f"config {path} extends itself: {chain}; remove one {EXTENDS}")
    tree = read_file(path)
    use_present_names(tree)
    base = bare_value(tree.pop(EXTENDS, None))
    if base is None:
        return [(path, tree)]
    if not isinstance(base, str):
        raise UserError(f"config {path}: {EXTENDS} = {base!r} must be the path of one file, relative to this one")
    below = path.parent / Path(base).expanduser()
    if not below.is_file():
        raise UserError(f"config {path}: {EXTENDS} = {base!r} is no file; its path is relative to {path.parent}")
    return [*_files(below, (*above, path.resolve())), (path, tree)]


def _keys(tree: Mapping[str, Any], schema: Any, prefix: str = "") -> list[str]:
    """Dotted keys that a tree sets."""
    keys = []
    for name, value in tree.items():
        wanted, inner = part_type(schema, name), bare_value(value)
        if is_dataclass(wanted) and isinstance(inner, Mapping):
            keys += _keys(inner, wanted, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys
