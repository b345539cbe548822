"""Write the reference pages that follow from the code: python docs/generate.py

docs/reference/configuration.md: every key of the configuration, from the dataclasses of erollout/configuration.
"""

from dataclasses import fields
from itertools import groupby
from pathlib import Path

from erollout.config import Config
from erollout.configuration.reference import KeyReference, key_references

_HEAD = """# Configuration

Generated from the sources by `python docs/generate.py`. `erollout config keys PART` prints the same for keys with PART in their
names.

A configuration is a YAML file of sections. `section.key=value` on the command line wins over the file.
`extends: base.yaml` takes from another file, whose path is relative to this one, what this one does not set: sections merge key
by key, any other value (lists and mappings such as `data.args` too) is replaced.

| command | prints |
|---|---|
| `erollout config show --config FILE` | every key with its value and the file that set it; `--set` leaves out defaults |
| `erollout config diff A B` | the keys in which two files, or two runs, differ |
| `erollout config keys PART` | what keys mean |

"""


def configuration_page() -> str:
    """Markdown tables of all keys, one per section."""
    sections = [field.name for field in fields(Config)]  # type: ignore[arg-type]  # mypy does not see through section
    keys = {name: list(found) for name, found in groupby(key_references(Config), lambda key: key.name.partition(".")[0])}
    return _HEAD + "\n".join(_section(name, keys[name]) for name in sections)


def _section(name: str, keys: list[KeyReference]) -> str:
    rows = [f"| `{key.name}` | {key.type} | {_code(key.default)} | {key.text.replace('|', chr(92) + '|')} |\n" for key in keys]
    return f"## {name}\n\n| key | type | default | |\n|---|---|---|---|\n{''.join(rows)}"


def _code(text: str) -> str:
    return f"`{text}`" if text else "required"


if __name__ == "__main__":
    Path(__file__).with_name("reference").joinpath("configuration.md").write_text(configuration_page(), encoding="utf-8")
