"""Commands on pages: each parses, names keys and files that exist, and is run by a test or says what it needs."""

import argparse
import contextlib
import io
import re
from functools import cache
from pathlib import Path

import pytest
from pages import PAGES, ROOT, Block, blocks, commands, files

from erollout.command_line.commands import parser
from erollout.config import Config, load_config
from erollout.configuration.yaml_tree import apply_override

YOURS = {"run.yaml", "site.yaml", "published.csv", "FILE", "X"}
"""Files that only a reader has."""
_READ = ("config", "csv", "site", "prompts")
_INLINE = re.compile(r"`(erollout [^`\n]+)`")
_PYTHON = re.compile(r"\bpython (?:-W ignore )?((?:benchmarks|docs)/\w+\.py)")
_MAKE = re.compile(r"(?:`|^|\()make ([a-z][a-z0-9-]*)", re.MULTILINE)


_parser = cache(parser)


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _shell(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "bash"]


def _parsed(words: list[str]) -> argparse.Namespace | None:
    """The command line's options; None for --help."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return _parser().parse_args(words)
    except SystemExit as left:
        assert left.code == 0, f"erollout {' '.join(words)}\n{printed.getvalue()}"
        return None


def _check_command(words: list[str], page: Path, folder: Path, made: set[str]) -> None:
    """`made`: files that earlier commands of the page write."""
    options = _parsed(words)
    if options is None:
        return
    here = files(page)
    for option in _READ:
        name = getattr(options, option, None)
        for each in name if isinstance(name, list) else [name] if isinstance(name, str) else []:
            assert each in YOURS | made or each in here or (ROOT / each).is_file(), f"{each} of {words} is not there"
    config, overrides = getattr(options, "config", None), getattr(options, "overrides", [])
    if config in here:
        (folder / config).write_text(here[config])
        load_config(folder / config, overrides)
    elif config is not None and config.endswith(".yaml") and (ROOT / config).is_file():
        load_config(ROOT / config, overrides)
    else:
        for override in overrides:
            apply_override({}, override, Config)
    if isinstance(out := getattr(options, "out", None), str):
        made.add(out)


def _commands(page: Path) -> list[list[str]]:
    """Arguments of each `erollout` command in the page's shell blocks and tables."""
    found = [words[1:] for block in _shell(page) for words in commands(block.text) if words[0] == "erollout"]
    return found + [words for text in _INLINE.findall(_text(page)) if (words := _beyond_its_name(text.split()[1:]))]


def _beyond_its_name(words: list[str]) -> list[str]:
    """A command that a sentence quotes with arguments; nothing if it is only named: `erollout calibrate fit`."""
    known: argparse.ArgumentParser = _parser()
    for number, word in enumerate(words):
        actions = [action for action in known._actions if isinstance(action, argparse._SubParsersAction)]
        if not actions:
            return words if number < len(words) else []
        assert word in actions[0].choices, f"erollout {' '.join(words)} is no command"
        known = actions[0].choices[word]
    return []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_what_the_command_line_takes(page: Path, tmp_path: Path) -> None:
    if any(block.kind == "edit" for block in blocks(page)):
        pytest.skip("they are for edited sources: test_recipes.py")
    made: set[str] = set()
    for words in _commands(page):
        _check_command(words, page, tmp_path, made)
    assert re.search(r"^    erollout ", _text(page), re.MULTILINE) is None, "commands are in blocks, where this test finds them"
    for script in _PYTHON.findall(_text(page)):
        assert (ROOT / script).is_file(), f"{page.name} names {script}"
    targets = set(re.findall(r"^([\w-]+):", _text(ROOT / "Makefile"), re.MULTILINE))
    assert set(_MAKE.findall(_text(page))) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_run_by_a_test_or_say_what_they_need(page: Path) -> None:
    for block in _shell(page):
        if any(words[0] == "erollout" for words in commands(block.text)):
            assert block.kind in ("run by", "needs"), f"{page.name}: no `run by` or `needs` before\n{block.text}"
        if block.kind == "run by":
            assert (ROOT / block.note).is_file()


DEMO = ["train", "--config", "configs/demo.yaml"]


@pytest.mark.parametrize(
    "words", [["trian"], ["train"], ["train", "--config", "missing.yaml"], [*DEMO, "train.stepz=3"]], ids=" ".join
)
def test_a_wrong_command_is_noticed(words: list[str], tmp_path: Path) -> None:
    with pytest.raises((AssertionError, ValueError)):
        _check_command(words, ROOT / "README.md", tmp_path, set())
