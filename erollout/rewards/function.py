"""The reward function: its name, how it is loaded, and what it may return.

`package.module:name`, or `/path/file.py:name`. Scoring processes import this module: it is light.
"""

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from erollout.errors import UserError
from erollout.types import Prompt

ScoreFunction = Callable[[Prompt, str], Any]


def split_name(name: str) -> tuple[str, str]:
    """Split a name into module or file path, and function. Raises UserError for another form."""
    module, colon, function = name.rpartition(":")
    if not (module and colon and function.isidentifier()):
        raise UserError(f"rewards.function = {name!r} must look like package.module:function or path/file.py:function")
    return module, function


def is_file(name: str) -> bool:
    return name.rpartition(":")[0].endswith(".py")


def absolute_name(name: str, directory: Path) -> str:
    """A `path/file.py:name` with an absolute path, looked up in `directory` (the configuration's), then the current one.

    Raises UserError, naming the directories searched, if there is no such file.
    """
    path, function = split_name(name)
    places = [(base / Path(path).expanduser()).absolute() for base in (directory, Path())]
    for place in places:
        if place.is_file():
            return f"{place.resolve()}:{function}"
    looked = " and ".join(dict.fromkeys(str(place.parent) for place in places))
    near = _near(
        Path(path).name, [file.name for place in places if place.parent.is_dir() for file in place.parent.glob("*.py")]
    )
    raise UserError(f"rewards.function = {name!r}: there is no file {Path(path).name} in {looked}{near}")


@lru_cache(maxsize=8)
def load_function(name: str, import_path: str | None = None) -> ScoreFunction:
    """Load the function. Raises UserError if it is missing or not callable, and whatever its module raises.

    Args:
        import_path: directory of importable modules; installed modules of the same name take precedence. For a file, the
            file's own directory takes precedence, as in a script.
    """
    module_name, function_name = split_name(name)
    module = _load_file(Path(module_name)) if is_file(name) else _load_module(name, module_name, import_path)
    function = getattr(module, function_name, None)
    if function is None:
        near = _near(function_name, [key for key, value in vars(module).items() if callable(value)])
        raise UserError(f"rewards.function = {name!r}: {module_name} has no function {function_name}{near}")
    try:
        inspect.signature(function).bind(None, "")
    except TypeError as error:
        raise UserError(f"rewards.function = {name!r} must be callable as function(prompt, response): {error}") from error
    return function  # type: ignore[no-any-return]


class NotANumber(ValueError):
    """Raised if a function returns something that is not a reward."""


def reward_value(name: str, value: object) -> float:
    """The returned value as a number. Raises NotANumber for anything else, and for a number that is not finite."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise NotANumber(f"{name} returned a {type(value).__name__}, {str(value)[:40]!r}; a reward is a number")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (
        TypeError,
        ValueError,
        ArithmeticError,
        RuntimeError,
    ) as error:  # an array of several numbers, or a number that is too large
        raise NotANumber(f"{name} returned a {type(value).__name__} that is no number ({error})") from error
    if not math.isfinite(number):
        raise NotANumber(f"{name} returned {number}")
    return number


def _load_module(name: str, module: str, import_path: str | None) -> ModuleType:
    if import_path is not None and import_path not in sys.path:
        sys.path.append(import_path)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # of something that it imports
        folder = Path(import_path) if import_path else Path()
        near = _near(module, [path.stem for path in folder.glob("*.py")])
        where = f"in {import_path} nor on Python's path (PYTHONPATH)" if import_path else "on Python's path (PYTHONPATH)"
        raise UserError(f"rewards.function = {name!r}: there is no module {error.name} {where}{near}") from error


def _load_file(path: Path) -> ModuleType:
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"rewards.function: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # what it defines can be pickled
    spec.loader.exec_module(module)
    return module


def _near(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
