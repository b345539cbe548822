"""`erollout config`: what a configuration resolves to and where each value comes from, how two differ, what keys mean."""

import argparse
import difflib
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from erollout.checkpoint.saved_policy import config_file
from erollout.config import Config, load_config, load_layers
from erollout.configuration.arguments import Commands, add_run_arguments, overrides
from erollout.configuration.reference import key_references
from erollout.configuration.yaml_tree import part_type
from erollout.errors import UserError

_DEFAULT = "default"
_WIDTH = 72
"""Column, in characters, at which origins begin if values are short enough."""


def add_command(commands: Commands) -> None:
    """Add `config` with its two commands."""
    config = commands.add_parser("config", help="show what a configuration resolves to, how two differ, what keys mean")
    actions = config.add_subparsers(dest="action", required=True, metavar="action")
    text = "print every key with its value, and the file that set it, as YAML that can be used as a configuration"
    show = actions.add_parser("show", help=text, description=text)
    add_run_arguments(show)
    show.add_argument("--set", action="store_true", dest="only_set", help="leave out keys that have their defaults")
    show.set_defaults(run=_show)
    text = "print the keys in which two configurations differ"
    diff = actions.add_parser("diff", help=text, description=text)
    for name in ("first", "second"):
        diff.add_argument(name, metavar="CONFIG", help="YAML file, or output directory of a run")
    diff.set_defaults(run=_diff)
    text = "print what keys mean, with types and defaults"
    keys = actions.add_parser("keys", help=text, description=text)
    keys.add_argument(
        "part", nargs="?", default="", metavar="PART", help="only keys with this in their names, as rollout.top_p"
    )
    keys.set_defaults(run=_keys)


def _show(options: argparse.Namespace, arguments: list[str]) -> int:
    config, origins = load_layers(options.config, overrides(options))
    lines = _lines(config.to_dict(), Config, origins, options.only_set)
    width = min(_WIDTH, max((len(text) for text, origin in lines if origin), default=0))
    for text, origin in lines:
        print(f"{text:<{width}}  # {origin}" if origin else text)
    return 0


def _lines(
    tree: Mapping[str, Any], schema: Any, origins: Mapping[str, str], only_set: bool, prefix: str = ""
) -> list[tuple[str, str]]:
    """Lines of YAML, each with the origin of its value; headings of sections have none."""
    lines: list[tuple[str, str]] = []
    indent = "  " * prefix.count(".")
    for name, value in tree.items():
        wanted, origin = part_type(schema, name), origins.get(f"{prefix}{name}", _DEFAULT)
        if is_dataclass(wanted) and isinstance(value, Mapping):
            inner = _lines(value, wanted, origins, only_set, f"{prefix}{name}.")
            lines += [(f"{indent}{name}:", ""), *inner] if inner else []
        elif not only_set or origin != _DEFAULT:
            lines.append((f"{indent}{name}: {_value(value)}", origin))
    return lines


def _value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)  # JSON is YAML


def _diff(options: argparse.Namespace, arguments: list[str]) -> int:
    first, second = (dict(_leaves(load_config(_file(name)).to_dict(), Config)) for name in (options.first, options.second))
    differing = [(key, _value(value), _value(second[key])) for key, value in first.items() if value != second[key]]
    if not differing:
        print("no difference")
    for key, one, other in differing:
        print(f"{key}\n  - {one}\n  + {other}")
    return 0


def _keys(options: argparse.Namespace, arguments: list[str]) -> int:
    found = [key for key in key_references(Config) if options.part in key.name]
    if not found:
        close = difflib.get_close_matches(options.part, [key.name for key in key_references(Config)], n=1)
        meant = f"; did you mean {close[0]}?" if close else "; without PART all are printed"
        raise UserError(f"no key has {options.part!r} in its name{meant}")
    for key in found:
        default = f", default {key.default}" if key.default else ", required"
        print(f"{key.name}: {key.type}{default}")
        print(textwrap.indent(textwrap.fill(key.text, _WIDTH + 20), "    "))
    return 0


def _leaves(tree: Mapping[str, Any], schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        wanted = part_type(schema, name)
        if is_dataclass(wanted) and isinstance(value, Mapping):
            yield from _leaves(value, wanted, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _file(name: str) -> Path:
    """The configuration that a word of the command line means. Raises UserError."""
    path = Path(name)
    if not path.is_dir():
        return path
    file = config_file(path)
    if file is None:
        raise UserError(f"{name} is a directory without config.yaml: name the output directory of a run, or a YAML file")
    return file
