"""Assignment of formats to layers: the default, and overrides by pattern."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from erollout.drafter.formats import Format, find_format
from erollout.errors import UserError

LM_HEAD = "lm_head"


def assign_formats(
    layers: Iterable[str], default: str, overrides: Sequence[tuple[str, str]], lm_head: str
) -> dict[str, Format | None]:
    """Format of every linear layer of the decode model; None: the target's own layer.

    Args:
        layers: local names ("layers.3.qkv_proj"), the LM head's among them.
        default: format of all layers but the LM head.
        overrides: (glob over layer names, format), in order: the last match counts. Only the pattern "lm_head" matches the
            LM head.
        lm_head: "target" | a format's name.

    Raises UserError for an unknown format and for a pattern that matches no layer.
    """
    names = list(layers)
    body = [name for name in names if name != LM_HEAD]
    formats: dict[str, Format | None] = dict.fromkeys(body, find_format(default))
    formats[LM_HEAD] = None if lm_head == "target" else find_format(lm_head, "speculation.drafter.lm_head")
    for index, (pattern, name) in enumerate(overrides):
        key = f"speculation.drafter.overrides[{index}]"
        format = find_format(name, f"{key}.format")
        matching = [LM_HEAD] if pattern == LM_HEAD else [layer for layer in body if fnmatchcase(layer, pattern)]
        if not matching:
            raise UserError(
                f"{key}.pattern = {pattern} matches none of the drafter's {len(names)} linear layers; "
                f"they are named like {', '.join(body[:4])}"
            )
        formats |= dict.fromkeys(matching, format)
    return {name: formats[name] for name in names}


def summary(formats: Mapping[str, Format | None]) -> str:
    """Number of layers by format: "120 x w4a16_clip, 1 x target"."""
    names = [format.name if format is not None else "target" for format in formats.values()]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
