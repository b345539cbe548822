"""Patches to megatron-core, and the mechanism that most use: replacing a line inside an installed function.

Megatron's functions are imported by value all over the place, so rebinding a name would miss copies. `FunctionEdit` keeps the
function object and exchanges its code: the text is read from the installed source, the expected line replaced, and the result
compiled under the original file name and line numbers, so tracebacks still point into the wheel.
"""

import ast
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, Protocol

from packaging.specifiers import SpecifierSet

from erollout.errors import UserError

TESTED_VERSIONS = SpecifierSet("==0.16.1")
"""Releases of megatron-core for which every patch here was written and tested."""


@dataclass(frozen=True, slots=True)
class Host:
    """Facts that determine which patches a process needs."""

    cuda_available: bool
    fused_adam_available: bool
    """Whether Transformer Engine's or Apex's FusedAdam is installed; otherwise Megatron uses torch.optim.AdamW."""


class Patch(Protocol):
    """A patch is stateless: `check` may be called any number of times, and applying it twice equals applying it once."""

    @property
    def name(self) -> str: ...

    @property
    def why(self) -> str: ...

    @property
    def locations(self) -> tuple[str, ...]:
        """Patched upstream places, as `package.module: function`."""
        ...

    @property
    def versions(self) -> SpecifierSet: ...

    def needs(self, host: Host) -> bool: ...

    def check(self, version: str) -> None:
        """Raise UserError unless the installed source, of release `version`, is what the patch was written for."""
        ...

    def apply(self) -> None: ...


def without_cuda(host: Host) -> bool:
    """Condition of patches that adapt an assumption that the device is a GPU."""
    return not host.cuda_available


def on_every_host(host: Host) -> bool:
    """Condition of patches that fix something independent of the device."""
    return True


def source_changed(patch: str, location: str, version: str, problem: str) -> UserError:
    """The error of a patch whose target differs from what it was written for."""
    package = "torch beside it" if location.startswith("torch.") else f"megatron-core {version}"
    return UserError(
        f"megatron patch {patch}: {location} of the installed {package} {problem}; "
        f"install a tested release (pip install 'megatron-core{TESTED_VERSIONS}')"
    )


@dataclass(frozen=True, slots=True)
class FunctionEdit:
    """Replacements inside one function or method."""

    module: str
    function: str
    """`name` or `Class.name`."""
    replacements: tuple[tuple[str, str], ...]
    """(expected, new) pairs; each expected text must occur exactly once. A new text keeps the number of lines."""

    @property
    def location(self) -> str:
        return f"{self.module}: {self.function}"

    def problem(self) -> str | None:
        """Reason why the edit can't be made to the installed source; None: it can."""
        try:
            text = inspect.getsource(self._target())
        except (ImportError, AttributeError) as error:
            return f"does not exist ({error})"
        for expected, _ in self.replacements:
            if (count := text.count(expected)) != 1:
                return f"was expected to contain `{expected.strip()}` once and contains it {count} times"
        return None

    def apply(self) -> None:
        function = self._target()
        code = self._edited_code(function)
        assert code.co_freevars == function.__code__.co_freevars, f"{self.location}: an edit may not change the closure"
        function.__code__ = code

    def _target(self) -> FunctionType:
        """The function as written upstream: beneath classmethod, contextmanager, no_grad and the like."""
        target: Any = importlib.import_module(self.module)
        for part in self.function.split("."):
            target = getattr(target, part)
        return inspect.unwrap(getattr(target, "__func__", target))

    def _edited_code(self, function: FunctionType) -> CodeType:
        lines, first_line = inspect.getsourcelines(function)
        text = "".join(lines)
        for expected, new in self.replacements:
            assert new.count("\n") == expected.count("\n"), f"{self.location}: an edit may not move lines"
            text = text.replace(expected, new)
        *classes, name = self.function.split(".")
        if classes:  # the class gives super() its cell and private names their mangling; it is compiled, never executed
            text = f"class {classes[-1]}:\n{text}"
        tree = ast.parse(text)
        ast.increment_lineno(tree, first_line - 1 - len(classes))
        code = compile(tree, function.__code__.co_filename, "exec", dont_inherit=True)
        for enclosed in (*classes, name):
            code = _nested_code(code, enclosed)
        return code


def _nested_code(code: CodeType, name: str) -> CodeType:
    return next(constant for constant in code.co_consts if isinstance(constant, CodeType) and constant.co_name == name)


@dataclass(frozen=True, slots=True)
class SourcePatch:
    """A patch that consists of edits to functions."""

    name: str
    why: str
    edits: tuple[FunctionEdit, ...]
    needed_on: Callable[[Host], bool] = without_cuda
    versions: SpecifierSet = TESTED_VERSIONS

    @property
    def locations(self) -> tuple[str, ...]:
        return tuple(edit.location for edit in self.edits)

    def needs(self, host: Host) -> bool:
        return self.needed_on(host)

    def check(self, version: str) -> None:
        for edit in self.edits:
            if (problem := edit.problem()) is not None:
                raise source_changed(self.name, edit.location, version, problem)

    def apply(self) -> None:
        for edit in self.edits:
            edit.apply()
