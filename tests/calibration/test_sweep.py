"""Sweeps: which steps are measured, in which order and how often, what the rows say, and that nothing else changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import RankPool
from test_engine import by_sample, make_requests
from tiny_speculation import DRAFTER, NOISE, make_speculative_engine

from erollout.calibration import sweep as module
from erollout.calibration.grid import SweepGrid, SweepPoint, coarse_to_fine, repetitions
from erollout.calibration.sweep import bootstrap, identify, sweep
from erollout.calibration.sweep_file import SweepRow, read_sweep
from erollout.calibration.sweep_log import append_row, resume_rows
from erollout.engine.engine import Engine
from erollout.errors import UserError
from erollout.speculation.step import OFF, Arm
from erollout.types import SamplingParams

GRID = SweepGrid(batches=(1, 3), contexts=(20, 60), num_speculative_tokens=(1, 4))
LONG, NO_TIME = 1e9, 1e-9
MODES = {"target_decode": 1, "drafter_decode": 2, "target_verify": 2, "target_decode_sd": 1}
"""Rows of one place of GRID."""


def make_engine(drafter: str = "good", **rollout: Any) -> Engine:
    return make_speculative_engine(drafter, "coupled", 3, max_num_seqs=4, **rollout)


def points(rows: list[SweepRow]) -> list[tuple[int, int]]:
    """Batches and contexts in the order of measurement."""
    return list(dict.fromkeys((row.batch, row.seq) for row in rows))


@pytest.fixture(autouse=True)
def few_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erollout.calibration.grid.MOST_REPETITIONS", 5)


@pytest.mark.parametrize("drafter", [*NOISE, "ngram"])
def test_every_place_gets_all_of_its_rows(drafter: str, tmp_path: Path) -> None:
    engine = make_engine(drafter)
    path = tmp_path / "sweep.csv"
    assert resume_rows(path) == []
    rows = sweep(engine, [DRAFTER], GRID, LONG, on_row=lambda row: append_row(path, row), model="tiny")
    assert read_sweep(path) == rows  # which finds impossible times, duplicates and missing modes
    for batch in GRID.batches:
        for context in GRID.contexts:
            place = [row for row in rows if (row.batch, row.seq) == (batch, context)]
            assert {mode: sum(row.mode == mode for row in place) for mode in MODES} == MODES
            assert {row.gamma for row in place if row.mode == "target_verify"} == {1, 4}
    assert {row.n_samples for row in rows} == {5}
    assert {row.format for row in rows if row.mode != "target_decode"} == {DRAFTER}
    assert {(row.model, row.dtype, row.kernels) for row in rows} == {("tiny", "float32", engine.kernel)}
    assert {row.architecture for row in rows} == {identify(engine, [DRAFTER]).model}


def test_rows_are_of_the_samples_of_their_arm() -> None:
    """Two repetitions of two arms and of two steps without drafts."""
    short, long = Arm(DRAFTER, 1), Arm(DRAFTER, 4)
    measurement = module._Sweep(make_engine(), [short, long], 100, "")
    seconds = [(short, 10.0, 4.0), (long, 20.0, 8.0), (OFF, 1.0, 0.0), (OFF, 2.0, 0.0)]
    again = [(short, 14.0, 4.0), (long, 24.0, 8.0), (OFF, 3.0, 0.0), (OFF, 4.0, 0.0)]
    rows = measurement._rows(SweepPoint(2, 20), [module._Sample(*sample) for sample in (*seconds, *again)])
    assert [(row.mode, row.gamma, row.median_ms, row.min_ms, row.max_ms, row.std_ms) for row in rows] == [
        ("target_decode", 0, 3000, 2000, 4000, 1000),
        ("drafter_decode", 1, 4000, 4000, 4000, 0),
        ("target_verify", 1, 8000, 6000, 10000, 2000),
        ("drafter_decode", 4, 2000, 2000, 2000, 0),
        ("target_verify", 4, 14000, 12000, 16000, 2000),
        ("target_decode_sd", 4, 2000, 1000, 3000, 1000),
    ]


def test_drafting_and_the_whole_step_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks once a reading, drafting takes one tick, however long the draft."""
    engine = make_engine("same")
    ticks = iter(range(10**9))
    monkeypatch.setattr("erollout.engine.engine.time.perf_counter", lambda: float(next(ticks)))
    rows = sweep(engine, [DRAFTER], SweepGrid((2,), (20,), (1, 4)), LONG)
    ms = {(row.mode, row.gamma): row.median_ms for row in rows}
    assert ms["target_decode", 0] == ms["target_decode_sd", 4]
    assert ms["drafter_decode", 1] == 1000 and ms["drafter_decode", 4] == 250
    assert ms["target_verify", 1] == ms["target_verify", 4] >= ms["target_decode", 0]


def test_steps_are_those_that_were_ordered() -> None:
    """Whole batches, full drafts, and contexts that stay near the nominal one however much is accepted."""
    engine, seen = make_engine("same"), []
    turns = module._Turns

    class Spy(turns):  # type: ignore[misc, valid-type]
        def observe(self, outcome: Any) -> None:
            super().observe(outcome)
            seen.append(outcome)

    module._Turns = Spy  # type: ignore[misc]
    try:
        sweep(engine, [DRAFTER], SweepGrid((3,), (200,), (1, 4)), LONG)
    finally:
        module._Turns = turns  # type: ignore[misc]
    decoding = [outcome for outcome in seen if not outcome.load.prefill_tokens]
    assert {outcome.load.decoding for outcome in decoding} == {3}
    assert {sum(outcome.drafted_at) for outcome in decoding} == {0, 3, 12}
    assert all(0.9 * 200 <= outcome.load.context <= 1.25 * 200 for outcome in decoding)
    assert sum(sum(outcome.accepted_at) for outcome in decoding) > 0


def test_what_is_done_is_left_out(tmp_path: Path) -> None:
    engine, path = make_engine(), tmp_path / "sweep.csv"
    resume_rows(path)
    rows = sweep(engine, [DRAFTER], GRID, NO_TIME)
    partial = rows[:-2]  # killed between the rows of its last place
    for row in partial:
        append_row(path, row)
    with path.open("a") as file:
        file.write("tiny,3,60,4,target_ver")
    done = resume_rows(path)
    assert done == partial
    more = sweep(engine, [DRAFTER], GRID, LONG, done, lambda row: append_row(path, row))
    assert [row.mode for row in more[:2]] == [row.mode for row in rows[-2:]]
    assert len(read_sweep(path)) == 6 * len(GRID.places())
    last = engine.stats
    assert sweep(engine, [DRAFTER], GRID, LONG, resume_rows(path)) == [] and engine.stats is last  # nothing has run


def test_rows_of_something_else_are_not_mixed_in() -> None:
    engine = make_engine()
    rows = sweep(engine, [DRAFTER], GRID, NO_TIME)
    with pytest.raises(UserError, match="hardware 'abacus'"):
        sweep(engine, [DRAFTER], GRID, LONG, [replace(rows[0], hardware="abacus")])


@pytest.mark.parametrize("content", ["{}", '{\n"kind": "erollout calibration"\n}\n', "model,batch,seq,gamma\nx,1,2,3\n", "\n"])
def test_a_file_that_is_no_sweep_stays_as_it_is(content: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(content)
    with pytest.raises(UserError, match="not a sweep that can be resumed"):
        resume_rows(path)
    assert path.read_text() == content


@pytest.mark.parametrize("torn", ["", "model,bat"])
def test_a_torn_header_is_written_again(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    path.write_text(torn)
    assert resume_rows(path) == [] and path.read_text().startswith("model,batch,seq,gamma,mode,") and resume_rows(path) == []


def test_without_time_one_place_is_measured_once() -> None:
    rows = sweep(make_engine(), [DRAFTER], GRID, NO_TIME)
    assert points(rows) == [(1, 20)] and {row.n_samples for row in rows} == {1}


@pytest.mark.parametrize(
    ("share", "left", "once", "expected"),
    [(4, 100, 1, 4), (1, 100, 1, 3), (1, 2.5, 1, 2), (1, 0.5, 1, 1), (1, -3, 1, 1), (1e9, 1e9, 1, 5), (0.1, 100, 50, 2)],
)
def test_repetitions(share: float, left: float, once: float, expected: int) -> None:
    assert repetitions(share, left, once, 3) == expected


def test_places_go_from_coarse_to_fine() -> None:
    places = SweepGrid((1, 2, 4, 8, 16), (64, 128, 256), (3,)).places()
    corners = [SweepPoint(1, 64), SweepPoint(1, 256), SweepPoint(16, 64), SweepPoint(16, 256)]
    assert places[:4] == corners
    assert {(p.batch, p.context) for p in places[:9]} == {(b, c) for b in (1, 4, 16) for c in (64, 128, 256)}
    assert len(places) == 15 == len(set(places))
    assert SweepGrid((2,), (64,), (1,)).places() == [SweepPoint(2, 64)]
    assert SweepGrid((4, 4, 2), (9, 7), (1,)).places() == [
        SweepPoint(2, 7),
        SweepPoint(2, 9),
        SweepPoint(4, 7),
        SweepPoint(4, 9),
    ]


def test_values_go_from_the_ends_to_the_middle() -> None:
    assert coarse_to_fine((1, 2, 4, 8, 16)) == [1, 16, 4, 2, 8]
    assert coarse_to_fine([3, 3]) == [3]


def test_what_the_engine_can_not_hold_is_left_out() -> None:
    grid = SweepGrid(
        (2, 4, 8), (30, 600), (2,)
    )  # 8 sequences are more than run at once, 600 tokens more than the model's positions
    assert points(sweep(make_engine(), [DRAFTER], grid, LONG)) == [(2, 30), (4, 30)]
    assert points(sweep(make_engine(num_kv_blocks=6), [DRAFTER], grid, LONG)) == [(2, 30)]
    rows = sweep(make_engine(max_num_batched_tokens=8), [DRAFTER], SweepGrid((2, 4), (30,), (1, 3)), LONG)
    assert {(row.batch, row.gamma) for row in rows if row.gamma} == {(2, 1), (2, 3), (4, 1)}  # 4 x 4 tokens fit no pass


def test_bootstrap_covers_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erollout.calibration.grid.MOST_REPETITIONS", 1)
    engine = make_engine()
    rows = bootstrap(engine, [DRAFTER], 3, range(1, 9), LONG)
    assert points(rows) == [(1, 256), (3, 256), (2, 256), (1, 64), (3, 64), (2, 64)]
    assert {row.gamma for row in rows} == {0, 1, 3, 8}
    assert {row.n_samples for row in rows} == {3}  # visits of each place
    assert points(bootstrap(engine, [DRAFTER], 3, [2], NO_TIME)) == [(1, 256)]


def test_bootstrap_of_short_responses() -> None:
    """Drafts may be longer than half of them."""
    rows = bootstrap(make_engine(max_prompt_tokens=8, max_tokens=16), [DRAFTER], 2, range(1, 9), NO_TIME)
    assert points(rows) == [(1, 5)] and {row.gamma for row in rows} == {0, 1, 3, 8}


def test_runs_end_before_sequences_outgrow_the_engine() -> None:
    rows = sweep(make_engine(), [DRAFTER], SweepGrid((4,), (520,), (4,)), LONG)
    assert {row.n_samples for row in rows} == {5}


def test_afterwards_the_engine_is_as_before() -> None:
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)
    engine, requests = make_engine(), make_requests(sampling)
    expected = by_sample(engine.generate(requests))
    before = (engine.runner, engine.proposers, engine.rollout, engine.arm, engine.verifier)
    sweep(engine, [DRAFTER], GRID, LONG)
    assert (engine.runner, engine.proposers, engine.rollout, engine.arm, engine.verifier) == before
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert by_sample(engine.generate(requests)) == expected


def test_after_an_error_too() -> None:
    engine = make_engine()
    before = (engine.runner, engine.proposers, engine.rollout)
    with pytest.raises(AssertionError, match="no drafter"):
        sweep(engine, ["missing"], GRID, LONG)
    assert (engine.runner, engine.proposers, engine.rollout) == before


@pytest.mark.distributed
@pytest.mark.parametrize("seconds", [NO_TIME, 0.5])
def test_two_ranks_measure_the_same(rank_pool: RankPool, seconds: float) -> None:
    """Whatever their clocks say: one of them has a hundred times the budget."""
    first, second = rank_pool.run(2, _sweep_on_a_rank, seconds)
    assert first == second
    assert {size for *_, size in first} == {2}
    assert seconds != NO_TIME or {point[:2] for point in first} == {(1, 20)}


def _sweep_on_a_rank(seconds: float) -> list[tuple[object, ...]]:
    group = dist.group.WORLD
    assert group is not None
    engine = make_speculative_engine("good", "coupled", 3, group, max_num_seqs=4)
    rows = sweep(engine, [DRAFTER], SweepGrid((1, 3), (20,), (2,)), seconds * (100 if group.rank() else 1))
    assert engine.blocks.num_free == engine.blocks.num_blocks
    return [(r.batch, r.seq, r.gamma, r.mode, r.n_samples, r.tensor_model_parallel_size) for r in rows]
