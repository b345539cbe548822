"""What a replica tells the others, built the same way in a run and in the simulator."""

import ast
from pathlib import Path

import pytest

from erollout.coordinator.occupancy import CURVE_BATCHES, PREFILL_TOKENS, OccupancyBuilder
from erollout.speculation.step import Load

ROOT = Path(__file__).parents[2]
COUNTS = {"steps": 3, "arm": 1, "finished": 2, "num_drafts": 4, "drafted": 8, "accepted": 5, "seconds": 1.5}


class Predictions:
    """Two arms, the second twice as fast; a pass costs a millisecond for each sequence and a microsecond for a prompt token."""

    def __init__(self) -> None:
        self.asked: list[Load] = []

    def seconds_per_token(self, load: Load) -> tuple[float, ...]:
        self.asked.append(load)
        return (1e-3 * load.decoding, 5e-4 * load.decoding)

    def autoregressive_seconds(self, load: Load) -> float:
        return 1e-3 * load.decoding + 1e-6 * load.prefill_tokens

    def builder(self) -> OccupancyBuilder:
        return OccupancyBuilder(4, self.seconds_per_token, self.autoregressive_seconds)


def test_responses_run_as_far_as_there_are_slots_and_are_as_old_as_their_context_without_prompts() -> None:
    builder = Predictions().builder()
    builder.given(100, 4)
    builder.given(40, 2)
    told = builder.build(Load(3, 110.0, 0, 1), 6, **COUNTS)
    assert (told.running, told.waiting, told.outstanding) == (4, 2, 6)
    assert told.age == pytest.approx(110 - (4 * 100 + 2 * 40) / 6)
    assert (told.steps, told.finished, told.claimed, told.stop_requested) == (3, 2, 0, 0)
    assert told.seconds_per_token == (3e-3, 1.5e-3)
    assert told.curve == tuple(5e-4 * batch for batch in CURVE_BATCHES)
    assert told.prefill_seconds == pytest.approx(1e-6)
    assert PREFILL_TOKENS > 1000


def test_an_idle_replica_is_asked_for_one_sequence() -> None:
    told = Predictions().builder().build(Load(0, 0.0), 0, **COUNTS, claimed=2, stop_requested=True)
    assert (told.running, told.waiting, told.age, told.claimed, told.stop_requested) == (0, 0, 0.0, 2, 1)
    assert told.seconds_per_token == (1e-3, 5e-4)


def test_other_batches_are_predicted_again_once_the_context_has_changed() -> None:
    predictions = Predictions()
    builder = predictions.builder()
    calls = []
    for context in (100.0, 124.0, 81.0, 126.0, 126.0):
        builder.build(Load(2, context), 2, **COUNTS)
        calls.append(len(predictions.asked))
    per_curve = len(CURVE_BATCHES)
    assert calls == [per_curve + 1, per_curve + 2, per_curve + 3, 2 * per_curve + 4, 2 * per_curve + 5]


def test_run_and_simulator_build_no_occupancy_by_hand() -> None:
    made = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "erollout").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Occupancy"
    }
    assert made == {"erollout/coordinator/occupancy.py"}
