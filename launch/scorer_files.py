"""The files of a reward function that is not installed: its module and what it imports from beside it."""

import ast
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from erollout.errors import UserError
from erollout.rewards.function import absolute_name, is_file, split_name

_FOLDER = "scorer"
"""Directory in a copy of the code for a `path/file.py:name` and its imports."""


def scorer_files(function: str | None, import_path: str | None) -> dict[str, Path]:
    """Files by their path in a copy of the code; none for a module of an installed package, which the environment provides.

    Raises UserError if there is no such module or file.
    """
    if function is None:
        return {}
    if is_file(function):
        path = Path(split_name(absolute_name(function, Path(import_path or ".")))[0])
        return {f"{_FOLDER}/{place}": file for place, file in _with_imports(path, path.parent).items()}
    name = split_name(function)[0].split(".")[0]
    if name == "erollout" or name in sys.stdlib_module_names:
        return {}
    spec = PathFinder.find_spec(name, [*sys.path, *([import_path] if import_path else [])])
    if spec is None:
        beside = f" and not in {import_path}" if import_path else ""
        raise UserError(
            f"rewards.function = {function}: there is no module {name} on PYTHONPATH{beside}; add its directory there, or name "
            "it by rewards.import_path"
        )
    path = Path(next(iter(spec.submodule_search_locations or [str(spec.origin)])))
    if {"site-packages", "dist-packages"} & set(path.parts):
        return {}
    return _with_imports(path, path.parent)


def function_in_copy(function: str | None, copy: Path) -> str | None:
    """Value of rewards.function in a configuration that runs with the copy."""
    if function is None or not is_file(function):
        return function
    path, name = split_name(function)
    return f"{copy / _FOLDER / Path(path).name}:{name}"


def _with_imports(first: Path, folder: Path) -> dict[str, Path]:
    """A module or package in a folder, and all that it imports from there, by path in the folder."""
    files: dict[str, Path] = {}
    waiting = [first]
    while waiting:
        path = waiting.pop()
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            place = str(file.relative_to(folder))
            if place in files or "__pycache__" in file.parts:
                continue
            files[place] = file
            for name in _imported(file):
                waiting += [beside for beside in (folder / f"{name}.py", folder / name) if _is_module(beside)]
    return files


def _is_module(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.glob("*.py")))


def _imported(file: Path) -> set[str]:
    """Top-level names that a file imports; none for invalid Python, which its import will report."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names - {"erollout"}
