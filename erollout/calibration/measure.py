"""A sweep of this device's steps into a file, which grows row by row and can be continued."""

from collections.abc import Mapping, Sequence
from functools import partial

from erollout.calibration.grid import SweepGrid
from erollout.calibration.sweep import sweep
from erollout.calibration.sweep_file import SweepRow
from erollout.calibration.sweep_log import append_row, resume_rows
from erollout.config import RolloutConfig
from erollout.engine.engine import Engine
from erollout.parallel.collectives import on_rank_zero
from erollout.resilience.unattended import ignore


def sweep_grid(chosen: Mapping[str, tuple[int, ...]], engine: Engine, options: RolloutConfig, longest_draft: int) -> SweepGrid:
    """The grid of a sweep.

    Args:
        chosen: `batches`, `contexts` and `drafts` (values of num_speculative_tokens); empty: what suits the configuration.
    """
    longest = min(engine.max_model_len, options.max_prompt_tokens + options.max_tokens)
    return SweepGrid(
        chosen["batches"] or tuple(2**i for i in range(options.max_num_seqs.bit_length())),
        chosen["contexts"] or tuple(sorted({max(2, longest // 8), max(2, longest // 2)})),
        chosen["drafts"] or tuple(n for n in (1, 3, 5, 8) if n <= longest_draft),
    )


def sweep_into(
    out: str, engine: Engine, formats: Sequence[str], grid: SweepGrid, minutes: float, model: str, writes: bool
) -> tuple[int, int]:
    """Time single steps and append each to a CSV file. Collective; the engine has weights and drafters of one version.

    Args:
        formats: names of the drafters.
        model: its name, for people.
        writes: on rank 0.

    Returns: rows that were there, and new ones.
    Raises UserError for a file that is something else than a sweep, or can't be written.
    """
    done = on_rank_zero(lambda: resume_rows(out))
    engine.wake_up()
    on_row = partial(append_row, out) if writes else ignore
    rows: list[SweepRow] = sweep(engine, formats, grid, 60 * minutes, done, on_row, model)
    return len(done), len(rows)
