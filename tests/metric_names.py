"""Names of metrics that docs/reference/metrics.md has."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "metrics.md"


def undocumented(names: Iterable[str]) -> list[str]:
    """Tracked names that the page lacks. A `*` on the page stands for any part of a name."""
    known = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE)
    return sorted(name for name in set(names) if not any(fnmatchcase(name, pattern) for pattern in known))
