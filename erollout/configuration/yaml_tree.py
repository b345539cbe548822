"""YAML configurations and overrides as a tree of plain values that fit the types of a schema. Pure.

Numbers are those of YAML 1.2: `1e-4` is one, `010` is ten, `1:30` and `2026-11-30` are text. An unquoted value is kept as
written until its key determines the type: for a text key, `4711`, `007`, `on` and `1e-4` are text.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ValidationError

from erollout.configuration.renamed import REMOVED, RENAMED, present_name, use_present_names
from erollout.errors import UserError

_SHOWN = 80
"""Longest value shown in a message, in characters."""
_MOST_VALUES = 100_000
"""Largest number of values in a file, with aliases expanded."""
_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
_FLOW = {"[": "]", "{": "}", '"': '"', "'": "'"}
"""First and last characters of overrides that are parsed as YAML."""
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_BOOLEANS = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Written:
    """An unquoted value."""

    text: str
    value: Any
    """Its value in YAML."""
    problem: str | None = None
    """Reason why YAML can't parse it; text that begins with a bracket may be meant as text."""


def fit(value: Any, wanted: Any, key: str = "") -> Any:
    """Plain values of a tree in the types of the schema: text as written, a single value as a list of one.

    Values that do not fit are passed on, to be rejected by the schema. Raises UserError for invalid YAML.
    """
    wanted = _bare(wanted)
    content = bare_value(value)
    if content is None:
        return None
    if is_dataclass(wanted) and isinstance(content, Mapping):
        types = get_type_hints(wanted, include_extras=True)
        return {name: fit(part, types.get(name, Any), f"{key}.{name}".lstrip(".")) for name, part in content.items()}
    if isinstance(value, Written):
        if wanted is str or (get_origin(wanted) is Literal and value.text in get_args(wanted)):
            return value.text
        if value.problem:
            raise UserError(f"{key} = {shown(value.text)}: {value.problem}")
    if get_origin(wanted) is tuple and (not isinstance(content, Mapping) or is_dataclass(get_args(wanted)[0])):
        parts = content if isinstance(content, list | tuple) else [value]
        return [fit(part, get_args(wanted)[0], f"{key}.{index}") for index, part in enumerate(parts)]
    return plain(value)


def plain(value: Any) -> Any:
    """The value in YAML."""
    content = bare_value(value)
    if isinstance(content, Mapping):
        return {name: plain(part) for name, part in content.items()}
    return [plain(part) for part in content] if isinstance(content, list) else content


def bare_value(value: Any) -> Any:
    """The value in YAML of an unquoted value; other values are themselves."""
    return value.value if isinstance(value, Written) else value


def joined(words: Sequence[str]) -> list[str]:
    """Overrides on a command line; `key = value` in three words is one override."""
    found: list[str] = []
    for word in words:
        previous = found[-1].rstrip() if found else ""
        is_begun = previous.endswith("=") and _KEY.fullmatch(previous[:-1].rstrip()) is not None
        continues = word.startswith("=") and _KEY.fullmatch(previous) is not None
        if continues or (is_begun and not _KEY.fullmatch(word.partition("=")[0].rstrip() if "=" in word else "")):
            found[-1] += word
        else:
            found.append(word)
    return found


def describe(error: ValidationError, schema: type) -> tuple[str, str]:
    """The key of the first problem, and one line with the key, the value and the fix."""
    problems = error.errors()
    unknown = [p for p in problems if p["type"] == "unexpected_keyword_argument"]  # a misspelt key may also cause a missing one
    first = (unknown or problems)[0]
    key = ".".join(str(part) for part in first["loc"])
    if unknown:
        if key in RENAMED:
            return key, f"{key} is the former name of {RENAMED[key]}, which is given too; remove it"
        if key in REMOVED:
            return key, f"{key} is no longer a key: {REMOVED[key].reason}; remove it"
        near = _nearest(first["loc"], schema)
        return key, f"unknown key {key}" + (f"; did you mean {near}?" if near else "; `erollout config keys` lists them")
    value = "" if first["type"] == "missing" else f" = {shown(first['input'])}"
    fix = "; write it in quotes" if first["type"] == "string_type" and first["input"] is not None else ""
    return key, f"{key}{value}: {first['msg'].removeprefix('Value error, ')}{fix}"


def shown(value: object) -> str:
    """A value as Python writes it, shortened if it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = f"an integer of {value.bit_length() * 0.30103:.0f} digits" if isinstance(value, int) else "..."
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}... ({len(text)} characters)"


def read_file(path: str | Path) -> dict[str, Any]:
    """The sections of a YAML file. Raises UserError."""
    try:
        tree = _parse(Path(path).read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise UserError(f"can't read config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is not valid YAML: {_one_line(error)}") from error
    except RecursionError:
        raise UserError(f"config {path} is nested too deeply, or contains itself") from None
    content = bare_value(tree)
    if not isinstance(content, dict | None):
        raise UserError(f"config {path} must be a mapping of sections, not {type(content).__name__}")
    return content or {}


def apply_override(tree: dict[str, Any], override: str, schema: type) -> None:
    """Set one key of a tree. Raises UserError for an invalid override."""
    key, separator, text = (part.strip() for part in override.partition("="))
    if not separator or not _KEY.fullmatch(key):
        raise UserError(f"override {shown(override)} must look like section.key=value")
    *parents, last = present_name(key).split(".")
    node, wanted = tree, schema
    for parent in parents:
        part = bare_value(node.get(parent))
        if part is None or isinstance(part, dict):
            node[parent] = part or {}  # an earlier override may have given the section as a whole
        node, wanted = node[parent], part_type(wanted, parent)
        if not isinstance(node, dict):
            raise UserError(f"override {shown(override)}: {parent} is a value, not a section")
    value = _value(text)
    if not parents:
        use_present_names({last: value})  # a section as a whole
    set_key(node, last, value, part_type(wanted, last))


def set_key(node: dict[str, Any], key: str, value: Any, wanted: Any) -> None:
    """Set a key. Keys that a new section does not name keep their values, as in a file."""
    given, there = bare_value(value), bare_value(node.get(key))
    if is_dataclass(wanted) and isinstance(given, dict) and isinstance(there, dict):
        node[key] = there
        for name, part in given.items():
            set_key(there, name, part, part_type(wanted, name))
    else:
        node[key] = value


def _value(text: str) -> Any:
    """Value of an override: lists, mappings and quoted text are parsed as YAML, all else is taken literally."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"override {text!r} is not UTF-8 text") from None
    if len(text) < 2 or _FLOW.get(text[0]) != text[-1]:
        return Written(text, _scalar(text))
    try:
        value = _parse(text, text)
    except (yaml.YAMLError, RecursionError) as error:
        return Written(text, text, _one_line(error))
    return value if isinstance(value, str) else Written(text, value)


def _bare(wanted: Any) -> Any:
    """A type without its bounds, and without None."""
    if get_origin(wanted) is Annotated:
        return _bare(get_args(wanted)[0])
    if get_origin(wanted) in (Union, UnionType):
        (kind, *others) = [part for part in get_args(wanted) if part is not type(None)]
        return Any if others else _bare(kind)
    return wanted


def part_type(wanted: Any, name: str) -> Any:
    """Type of a key in a section; any type if the schema does not say."""
    return _bare(get_type_hints(wanted, include_extras=True).get(name, Any)) if is_dataclass(wanted) else Any


def _nearest(location: tuple[int | str, ...], schema: type) -> str | None:
    """The known key closest to an unknown one: in its own section first, then in any section."""
    *parents, name = [part for part in location if isinstance(part, str)]
    keys = known_keys(schema)
    own = [key for key in keys if key.split(".")[:-1] == parents]
    for candidates in ({key.split(".")[-1]: key for key in own}, {key.split(".")[-1]: key for key in keys}):
        if close := difflib.get_close_matches(name, candidates, n=1, cutoff=0.6):
            return candidates[close[0]]
    return None


def known_keys(schema: Any, prefix: str = "") -> dict[str, Any]:
    """All keys of a schema, including sections, with their types; keys in a list of sections have no index."""
    found: dict[str, Any] = {}
    types = get_type_hints(schema, include_extras=True)
    for field in fields(schema):
        found[prefix + field.name] = types[field.name]
        inner = _bare(types[field.name])
        inner = _bare(get_args(inner)[0]) if get_origin(inner) is tuple else inner
        if is_dataclass(inner):
            found |= known_keys(inner, f"{prefix}{field.name}.")
    return found


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys, and has no dates, sets or bytes, which no key takes."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # as yaml declares it
    yaml_constructors = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("null", "str", "seq", "map")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    where = f"lines {lines[key.value]} and {line}" if line != lines[key.value] else f"line {line}"
                    raise UserError(f"{self.name}: duplicate key {key.value}, at {where}; merge the two")
                lines[key.value] = line
        found = super().construct_mapping(node, deep)
        return {_key(key): value for key, value in found.items()}


def _key(key: Any) -> Any:
    if not isinstance(key, Written):
        return key
    return key.value if type(key.value) is int else key.text


def _construct(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Written:
    text = str(loader.construct_scalar(node))
    value = _scalar(text)
    if isinstance(value, str) and not _INTEGER.fullmatch(text):  # an explicit tag, as in `!!int ten`
        raise yaml.constructor.ConstructorError(None, None, f"{text!r} does not fit its tag", node.start_mark)
    return Written(text, value)


def _scalar(text: str) -> Any:
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text.lower() in _BOOLEANS and text in (text.lower(), text.upper(), text.capitalize()):
        return _BOOLEANS[text.lower()]
    try:
        if _INTEGER.fullmatch(text):
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        plain_number = text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan")
        return float(plain_number) if _FLOAT.fullmatch(text) else text
    except ValueError:  # more digits than Python reads, or `1__0`
        return text


for _kind, _pattern, _first in (
    ("int", _INTEGER, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("bool", re.compile("|".join(f"{w}|{w.upper()}|{w.capitalize()}" for w in _BOOLEANS)), "yYnNtTfFoO"),
    ("null", re.compile("~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("merge", re.compile("<<"), "<"),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"(?:{_pattern.pattern})$"), list(_first))
    if _kind != "merge":
        _Loader.add_constructor(f"{_TAG}{_kind}", _construct)


def _parse(text: str, name: str) -> Any:
    loader = _Loader(text)
    loader.name = name
    try:
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > _MOST_VALUES:
            raise UserError(f"{name}: aliases make it more than {_MOST_VALUES} values; write out what is meant")
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values with aliases expanded. A value that contains itself counts once."""
    if id(node) in known or isinstance(node, yaml.ScalarNode):
        return known.get(id(node), 1)
    known[id(node)] = 1
    children = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
