"""The command-line parser: shows defaults in the help, and suggests corrections. Pure."""

import argparse
import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from erollout.errors import UserError

Commands = argparse._SubParsersAction


class Parser(argparse.ArgumentParser):
    """Parser that shows defaults in its help, takes overrides anywhere, and reports errors with the command's usage."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": _Formatter, **options})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        found, unknown = super().parse_known_args(args, namespace)
        if hasattr(found, "overrides") and not any(word.startswith("-") for word in unknown):
            found.overrides = [*found.overrides, *unknown]  # overrides after an option
            return found, []
        if unknown:
            self._refuse([word for word in unknown if word.startswith("-")] or unknown)
        return found, []

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, Commands) and value not in action.choices:
            known = ", ".join(action.choices)
            raise argparse.ArgumentError(
                None, f"unknown command {value!r}{_meant(value, action.choices)}; commands are {known}"
            )
        super()._check_value(action, value)

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        name, separator, _ = unknown[0].partition("=")
        meant = _meant(name, self._option_string_actions)
        if separator and "." in name:
            meant = f"; configuration keys have no dashes before them: {unknown[0].lstrip('-')}"
        self.error(f"unknown {'option' if unknown[0].startswith('-') else 'argument'} {' '.join(unknown)}{meant}")


class _Formatter(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Help text with the default, unless the text states it."""
        text, default = action.help or "", action.default
        if default in (None, argparse.SUPPRESS, "") or default is False or default == [] or "default" in text:
            return text
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        return f"{text} (default {shown.replace('%', '%%')})"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of all commands on a run: configuration, run directory and overrides."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; `erollout config keys` explains its keys")
    parser.add_argument("--run-dir", metavar="DIR", help="output directory of the run; short for train.output_dir=DIR")
    add_overrides(parser)


def add_step(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a run's checkpoint."""
    parser.add_argument("--step", type=int, metavar="N", help="step of the run's checkpoint (default: the newest)")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add overrides of configuration values."""
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="configuration values that override those of the file"
    )


def overrides(options: argparse.Namespace) -> list[str]:
    """Overrides of a command line with `add_run_arguments`. Raises UserError if the run directory is given twice."""
    if options.run_dir is None:
        return list(options.overrides)
    for override in options.overrides:
        key, _, value = override.partition("=")
        if key.strip() == "train.output_dir" and value.strip() != options.run_dir:
            raise UserError(f"--run-dir = {options.run_dir}, but {override} is given too; give one of them")
    quoted = json.dumps(options.run_dir, ensure_ascii=False)  # in double quotes: YAML would fold a newline in single quotes
    return [*options.overrides, f"train.output_dir={quoted}"]


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
