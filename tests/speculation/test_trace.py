"""The record of a rollout's decisions: what is written is read again, what it lost and saved is what can be counted by hand."""

import csv
import gzip
import logging
from math import isnan
from pathlib import Path

import pytest

from erollout.errors import UserError
from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.speculation.trace import COLUMNS, DecisionTrace, Reason, StepDecision, forget_others

N3 = Arm("w4 odd, name", 3)
ARMS = (OFF, N3)


def step_seconds(arm: Arm, load: Load) -> float:
    return (1.0 + 0.1 * load.decoding + 0.01 * load.prefill_tokens) * (2 if arm.speculates else 1)


def outcome(arm: Arm, decoding: int, seconds: float, emitted: int, accepted: int = 0, prefill: int = 0) -> StepOutcome:
    drafted = (decoding,) * arm.num_speculative_tokens
    return StepOutcome(
        arm, Load(decoding, 10.0, prefill, 7), seconds, 0.0, emitted, drafted, (accepted, 0, 0)[: len(drafted)], 1
    )


@pytest.fixture
def trace() -> DecisionTrace:
    trace = DecisionTrace()
    trace.append(0.0, StepDecision(OFF, Reason.IDLE), outcome(OFF, 0, 2.0, 4, prefill=100))
    trace.append(2.0, StepDecision(OFF, Reason.KEPT, 1.4, N3, 1.5), outcome(OFF, 4, 1.4, 4))
    trace.append(4.0, StepDecision(N3, Reason.BETTER, 0.7, OFF, 1.2), outcome(N3, 2, 2.0, 6, 4))
    trace.append(6.0, StepDecision(N3, Reason.PROBE, 0.7, OFF, 1.2), outcome(N3, 2, 99.0, 2, 0))
    trace.append(105.0, StepDecision(N3, Reason.KEPT, 0.7, OFF, 1.2), outcome(N3, 2, 4.0, 8, 4, prefill=50))
    return trace


def test_what_is_written_is_read_again(trace: DecisionTrace, tmp_path: Path) -> None:
    path = tmp_path / "new" / "decisions.csv.gz"
    assert trace.write(path)
    again = DecisionTrace.read(path)
    assert len(again) == 5 and again.arms == trace.arms
    for name, column in trace.columns.items():
        assert [str(x) for x in again.columns[name]] == [str(x) for x in column], name
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    first = path.read_bytes()
    again.write(path)
    assert path.read_bytes() == first
    rows = list(csv.DictReader(gzip.decompress(first).decode().splitlines()))
    assert rows[2]["arm"] == str(N3) and rows[2]["reason"] == "better" and rows[2]["other"] == "off"
    assert tuple(rows[0]) == COLUMNS and isnan(float(rows[0]["predicted"]))


def test_late_steps_keep_their_microseconds(tmp_path: Path) -> None:
    trace = DecisionTrace()
    trace.append(123456.789012, StepDecision(OFF, Reason.KEPT), outcome(OFF, 1, 0.01, 1))
    trace.write(tmp_path / "late")
    assert DecisionTrace.read(tmp_path / "late").columns["start"][0] == 123456.789012


def test_a_disk_that_fails_costs_the_trace_and_not_the_run(
    trace: DecisionTrace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert not trace.write(tmp_path / "file" / "decisions.csv.gz")
    assert "is lost" in caplog.text and "decisions.csv.gz" in caplog.text


def test_a_damaged_file_is_named(trace: DecisionTrace, tmp_path: Path) -> None:
    path = tmp_path / "decisions.csv.gz"
    trace.write(path)
    whole = path.read_bytes()
    text = gzip.decompress(whole).decode()
    damaged = [
        whole[:40],
        b"no gzip",
        gzip.compress(b"a,b\n1,2\n"),
        gzip.compress(text.replace("better", "worse").encode()),
        gzip.compress(text.replace("off", "of").encode()),
        gzip.compress(text.rpartition(",")[0].encode()),
        gzip.compress(text.replace(",100,", f",{10**30},").encode()),
        whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"decisions\.csv\.gz can't be read"):
            DecisionTrace.read(path)
    with pytest.raises(UserError, match="can't be read"):
        DecisionTrace.read(tmp_path / "missing")


def test_regret_counts_tokens_at_the_difference_to_the_best_arm(trace: DecisionTrace) -> None:
    def seconds_per_token(load: Load) -> tuple[float, float]:
        return (1.0, 1.5) if load.decoding == 4 else (1.0, 0.75)

    assert trace.regret(seconds_per_token, ARMS) == 0.0
    assert trace.regret(lambda load: (1.0, 0.75), ARMS) == pytest.approx(0.25)  # one token of each in the second step
    # 3 + 1 + 3 tokens of each sequence in the speculating steps
    assert trace.regret(lambda load: (1.0, 1.5), ARMS) == pytest.approx(0.5 * (3 + 1 + 3))


def test_saved_seconds_compare_with_steps_without_drafts(trace: DecisionTrace) -> None:
    plain = 1.2  # of an autoregressive step at two sequences
    third = 3 * plain - 2.0
    fourth = plain - 3 * 2 * plain  # the outlier counts as three times its prediction
    fifth = (plain + 0.5) + 2 * plain - 4.0  # the prompt is computed once
    assert trace.saved(step_seconds) == {2: pytest.approx(third + fourth + fifth)}
    assert trace.saved(step_seconds, probes=False) == {2: pytest.approx(third + fifth)}


def test_bins_are_means_over_time(trace: DecisionTrace) -> None:
    bins = trace.binned(4, 8.0)
    assert [b.busy for b in bins] == pytest.approx([1.0, 0.7, 1.0, 1.0])
    assert [b.decoding for b in bins] == pytest.approx([0.0, 0.7 * 4, 2.0, 2.0])
    assert [b.speculating for b in bins] == pytest.approx([0.0, 0.0, 1.0, 1.0])
    assert [b.drafts for b in bins] == pytest.approx([0.0, 0.0, 3.0, 3.0])
    assert [b.waiting for b in bins] == pytest.approx([7.0, 4.9, 7.0, 7.0])
    assert sum(b.busy for b in trace.binned(7, 109.0)) * 109 / 7 == pytest.approx(trace.seconds)
    assert DecisionTrace().binned(3, 1.0)[2].busy == 0.0
    early = DecisionTrace()
    early.append(-3.0, StepDecision(OFF, Reason.KEPT), outcome(OFF, 1, 4.0, 1))
    assert [b.busy for b in early.binned(2, 4.0)] == [0.5, 0.0]


def test_predicted_over_measured_leaves_prompts_out(trace: DecisionTrace) -> None:
    assert trace.predicted_over_measured == pytest.approx((1.4 + 3 * 0.7 + 0.7) / (1.4 + 2.0 + 99.0))
    assert DecisionTrace().predicted_over_measured == 1.0


def test_the_newest_of_a_replica_are_kept(tmp_path: Path) -> None:
    """Those of later steps are of an attempt that is forgotten."""
    for step in range(12):
        for replica in (0, 1):
            (tmp_path / f"step_{step:08d}.replica_{replica:05d}.csv.gz").write_text("")
    forget_others(tmp_path / "step_00000009.replica_00001.csv.gz", kept=3)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert [name[:13] for name in left if "replica_00001" in name] == [f"step_0000000{step}" for step in (7, 8, 9)]
    assert len([name for name in left if "replica_00000" in name]) == 12
