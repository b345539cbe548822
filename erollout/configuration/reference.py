"""Every key of a configuration with its type, default and documentation, read from the dataclasses and their sources."""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class KeyReference:
    """One key, for a table."""

    name: str
    """Dotted name; keys in a list of sections have `[]` after the list's name."""
    type: str
    default: str
    """As YAML; empty for a key that must be given."""
    text: str
    """Its documentation in one paragraph; empty: it has none."""


def key_references(schema: type, prefix: str = "") -> Iterator[KeyReference]:
    """The keys of a section and of those in it, in their order."""
    types, texts = get_type_hints(schema, include_extras=True), key_texts(schema)
    for field in fields(schema):
        name, wanted = f"{prefix}{field.name}", types[field.name]
        if is_dataclass(wanted):
            yield from key_references(wanted, f"{name}.")  # type: ignore[arg-type]
            continue
        yield KeyReference(name, type_name(wanted), _default(field), texts.get(field.name, ""))
        if get_origin(wanted) is tuple and is_dataclass(inner := get_args(wanted)[0]):
            yield from key_references(inner, f"{name}[].")  # type: ignore[arg-type]


def key_texts(schema: type) -> dict[str, str]:
    """The strings below the fields of a dataclass, by field."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def type_name(wanted: Any) -> str:
    """A type with its range, in words."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is Annotated:
        return " ".join(filter(None, (type_name(parts[0]), _range(wanted.__metadata__))))
    if origin in (Union, UnionType):
        return " or ".join(type_name(part) for part in parts if part is not type(None)) + ", or null"
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return "list of sections" if is_dataclass(parts[0]) else f"list of {type_name(parts[0])}"
    return "mapping" if origin is dict else _NAMES.get(wanted, getattr(wanted, "__name__", str(wanted)))


def _range(metadata: tuple[Any, ...]) -> str:
    limits = [limit for part in metadata for limit in (getattr(part, "metadata", None) or [part])]
    low = next((_number(limit.ge) for limit in limits if isinstance(limit, Ge)), None)
    low = low or next((f"above {_number(limit.gt)}" for limit in limits if isinstance(limit, Gt)), None)
    high = next((_number(limit.le) for limit in limits if isinstance(limit, Le)), None)
    high = high or next((f"below {_number(limit.lt)}" for limit in limits if isinstance(limit, Lt)), None)
    return f"{low} to {high}" if low and high else low or high or ""


def _number(value: Any) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{value:g}"


def _default(field: "Field[Any]") -> str:
    if field.default_factory is not MISSING:
        return json.dumps(field.default_factory())
    return "" if field.default is MISSING else json.dumps(field.default, ensure_ascii=False)
