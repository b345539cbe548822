"""Explanation of a decision: the cost of each arm at a load, what limits it, and where speculation stops to pay. Pure."""

from collections.abc import Callable, Sequence

from erollout.speculation.cost.cost_model import PassTimes
from erollout.speculation.cost.roofline import Pass
from erollout.speculation.step import OFF, Arm

LARGEST_BATCH = 256
"""Largest batch size considered for the boundary."""
LIMITS = {
    "bandwidth": "reading weights and cache",
    "compute": "arithmetic",
    "overhead": "overheads per pass and sequence",
    "communication": "all-reduces between ranks",
}


def explanation(passes: PassTimes, batch: int, context: float, lengths: Callable[[int], float], drafts: Sequence[int]) -> str:
    """The explanation, as lines of text.

    Args:
        lengths: acceptance length by num_speculative_tokens.
        drafts: draft lengths to consider.
    """
    arms = [Arm(format, n) for format in passes.formats for n in drafts]
    target = passes.target_seconds(batch, context)
    best = min(arms, key=lambda arm: passes.step_seconds(arm, batch, context) / lengths(arm.num_speculative_tokens))
    length = lengths(best.num_speculative_tokens)
    speed_up = passes.speed_up(best, batch, context, length)
    why = _why(passes, "target", OFF, batch, context)
    lines = [
        f"{batch} sequences of {context:.0f} tokens.",
        f"Off: a step of the target takes {_ms(target)} and gives each sequence one token; {why}.",
        f"Best draft: {best}. {_cycle(passes, best, batch, context, length)}",
        _verdict(best, speed_up),
        *(_boundary(passes, arm, context, lengths(arm.num_speculative_tokens)) for arm in arms),
    ]
    return "\n".join(lines)


def _cycle(passes: PassTimes, arm: Arm, batch: int, context: float, length: float) -> str:
    n = arm.num_speculative_tokens
    draft = passes.draft_seconds(arm.format, batch, context, n)
    verify = passes.verify_seconds(batch, context, n)
    target, step = passes.target_seconds(batch, context), passes.step_seconds(arm, batch, context)
    drafting, verifying = _why(passes, "draft", arm, batch, context), _why(passes, "verify", arm, batch, context)
    return (
        f"{n} drafter steps of {_ms(draft)} (r = {draft / target:.2f}; {drafting}) and a verify pass of {_ms(verify)} "
        f"(v = {verify / target:.2f}; {verifying}) take {_ms(step)} and give each sequence {length:.2f} tokens: "
        f"{_ms(step / length)} per token, L / (n r + v) = {length * target / step:.3f}."
    )


def _why(passes: PassTimes, kind: Pass, arm: Arm, batch: int, context: float) -> str:
    format = arm.format if kind == "draft" else ""
    parts = passes.parts(kind, format, batch, context, arm.num_speculative_tokens)
    share = {
        "bandwidth": parts.memory,
        "compute": parts.compute,
        "overhead": parts.overhead,
        "communication": parts.communication,
    }[parts.limit] / parts.seconds
    return f"{100 * share:.0f} % of it {LIMITS[parts.limit]}"


def _verdict(arm: Arm, speed_up: float) -> str:
    if speed_up > 1:
        return f"Speculation pays: {arm} is {100 * (speed_up - 1):.1f} % faster than off."
    return f"Speculation does not pay: {arm} is {100 * (1 / speed_up - 1):.1f} % slower than off."


def _boundary(passes: PassTimes, arm: Arm, context: float, length: float) -> str:
    """Batch sizes at which an arm beats off: several ranges where times grow in steps."""
    pays = [batch for batch in range(1, LARGEST_BATCH + 1) if passes.speed_up(arm, batch, context, length) > 1]
    if not pays:
        return f"{arm}: pays at no batch size."
    spans: list[tuple[int, int]] = []
    for batch in pays:
        spans = [*spans[:-1], (spans[-1][0], batch)] if spans and spans[-1][1] == batch - 1 else [*spans, (batch, batch)]
    words = ", ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in spans)
    return f"{arm}: pays at {words} sequences."


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
