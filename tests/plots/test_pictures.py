"""Pictures: they can be drawn and saved for whatever there is to show, and show what they are given."""

import warnings
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from erollout.plots.accepted_drafts import Accepted, acceptance, interval
from erollout.plots.decision_timeline import decisions
from erollout.plots.replica_timeline import MOST_LANES, Lane, Transfer, occupancy
from erollout.plots.simulated_rollouts import Bar, rollout_times, utilisation
from erollout.plots.speculation_map import Measurement, Prediction, boundary
from erollout.plots.style import OFF_COLOR, arm_colors, data_address, figure, label, run_colors, save
from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.speculation.trace import Bin, DecisionTrace, Reason, StepDecision

W4, W8 = Arm("w4a8", 3), Arm("w8a8", 2)
IDLE = Bin(0.0, 0.0, 0.0, 0.0, 0.0)


def drawn(figure: Figure, folder: Path) -> str:
    """All text of a figure that was saved."""
    path = folder / "figure.png"
    save(figure, path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    return "\n".join(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))


def lane(index: int, spans: int = 20) -> Lane:
    """Decodes 8 sequences off, then 2 with three drafts, then nothing; later replicas end earlier."""
    off, drafting = Bin(1.0, 8.0, 0.0, 0.0, 0.0), Bin(1.0, 2.0, 0.0, 1.0, 3.0)
    work = max(2, spans - index % 7)
    return Lane(f"replica {index}", 10.0, [*[off] * (work // 2), *[drafting] * (work - work // 2), *[IDLE] * (spans - work)])


@pytest.mark.parametrize("count", [1, 8, 64, 500])
def test_occupancy_of_any_number_of_replicas(count: int, tmp_path: Path) -> None:
    transfers = [Transfer(4.0 + i / 100, i % count, (i + 1) % count, 2) for i in range(min(count, 90))] if count > 1 else []
    figure = occupancy([lane(index) for index in range(count)], transfers)
    text = drawn(figure, tmp_path)
    together, each = figure.axes[:2]
    assert "num_speculative_tokens (grey: off)" in text and "seconds since the rollout began" in text
    assert (f"red: {2 * len(transfers)} sequences move" in text) == bool(transfers)
    assert len([a for a in each.texts if getattr(a, "arrow_patch", None)]) == (len(transfers) if len(transfers) <= 60 else 0)
    if count <= MOST_LANES:
        assert each.get_ylim()[0] > count - 1 and each.get_yticklabels()[0].get_text() == "replica 0"
        assert len(each.collections[0].get_paths()) == sum(span.decoding > 0 for i in range(count) for span in lane(i).bins)
    else:
        assert f"{count} replicas" in text and each.images[0].get_array().shape[:2] == (count, 20)  # type: ignore[union-attr]
    assert together.get_ylim()[1] == pytest.approx(8 * count * 1.05)


def test_occupancy_colours_tell_off_from_drafts_and_rows_are_sorted_by_end(tmp_path: Path) -> None:
    lanes = [lane(index) for index in range(MOST_LANES + 1)]
    image = occupancy(lanes).axes[1].images[0].get_array()
    assert image is not None
    assert to_hex(image[0, 0]) == OFF_COLOR != to_hex(image[0, 19])
    ends = [sum(any(channel < 1 for channel in pixel) for pixel in row) for row in image.tolist()]
    assert ends == sorted(ends, reverse=True) and ends[0] == 20 and ends[-1] == 14
    colors = {to_hex(c) for c in occupancy(lanes[:2]).axes[1].collections[0].get_facecolor()}  # type: ignore[arg-type]
    assert OFF_COLOR in colors and len(colors) == 2


def test_occupancy_says_how_much_is_idle(tmp_path: Path) -> None:
    busy = Bin(1.0, 4.0, 0.0, 0.0, 0.0)
    text = drawn(occupancy([Lane("a", 4.0, [busy] * 4), Lane("b", 4.0, [busy, IDLE, IDLE, IDLE])]), tmp_path)
    assert "up to 4" in text and "idle, 38%" in text


@pytest.mark.parametrize("lanes", [[], [Lane("a", 0.0, [])], [Lane("a", 1.0, [])], [Lane("a", 0.0, [IDLE])]])
def test_occupancy_of_nothing(lanes: list[Lane], tmp_path: Path) -> None:
    assert "no steps" in drawn(occupancy(lanes), tmp_path)


def test_occupancy_of_idle_and_unlike_replicas(tmp_path: Path) -> None:
    lanes = [Lane("idle", 5.0, [IDLE] * 7), lane(0), Lane("no bins", 3.0, []), Lane("half", 2.0, lane(1).bins)]
    assert "half" in drawn(occupancy(lanes), tmp_path)
    drawn(occupancy(lanes * 20), tmp_path)
    drawn(occupancy([Lane("idle", 5.0, [IDLE] * 7)]), tmp_path)


BATCHES, CONTEXTS = (1, 2, 4, 8, 16), (128, 512)
PREDICTION = Prediction(
    BATCHES, CONTEXTS, [[W4, W4, W8, OFF, OFF]] * 2, [[1.6, 1.3, 1.05, 0.9, 0.7], [1.7, 1.4, 1.1, 0.95, 0.8]]
)


def test_boundary_counts_disagreements(tmp_path: Path) -> None:
    measured = [
        Measurement(1, 128, W4, W4),
        Measurement(2, 128, W8, W4),
        Measurement(8, 128, W4, OFF),
        Measurement(4, 512, OFF, W8),
        Measurement(24, 600, OFF, OFF),
    ]
    figure = boundary(PREDICTION, measured)
    text = drawn(figure, tmp_path)
    assert "5 measured" in text and "1 best with another arm" in text and "2 on the wrong side" in text
    for words in ("off", "w4a8 n=3", "w8a8 n=2", "drafting breaks even", "1.25×"):
        assert words in text.splitlines()
    assert figure.axes[0].get_xscale() == "log" and [t.get_text() for t in figure.axes[0].get_xticklabels()][:2] == ["1", "2"]


@pytest.mark.parametrize(
    ("batches", "contexts"), [((4,), (100,)), ((1, 2), (100,)), ((3,), (64, 128)), ((1, 64), (64, 8192))], ids=str
)
def test_boundary_of_few_cells(batches: tuple[int, ...], contexts: tuple[int, ...], tmp_path: Path) -> None:
    best, speed_up = [[OFF] * len(batches)] * len(contexts), [[0.5] * len(batches)] * len(contexts)
    text = drawn(boundary(Prediction(batches, contexts, best, speed_up)), tmp_path)
    assert "measured" not in text


def test_acceptance_shows_what_was_counted_and_what_was_expected(tmp_path: Path) -> None:
    series = [Accepted("w4a8", [100, 100, 50, 0], [90, 80, 30, 0], [0.9, 0.5]), Accepted("w8a8", [10], [10])]
    figure = acceptance(series)
    text = drawn(figure, tmp_path)
    assert "w4a8, 250 drafted:\n3.30 tokens at 3" in text and "w8a8, 10 drafted:\n2.00 tokens at 1" in text
    shares = [line.get_ydata() for line in figure.axes[0].lines]
    assert list(shares[0]) == [0.9, 0.8, 0.6] and list(shares[1]) == [0.9, 0.45]  # type: ignore[arg-type]
    drawn(acceptance([Accepted("w4a8", [0, 0], [0, 0], [0.8, 0.7])]), tmp_path)


def test_acceptance_of_nothing(tmp_path: Path) -> None:
    assert "nothing was drafted" in drawn(acceptance([]), tmp_path)
    assert "nothing was drafted" in drawn(acceptance([Accepted("w4a8", [0], [0])]), tmp_path)


def test_wilsons_interval() -> None:
    """Figures of Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 0 of 20."""
    assert interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert interval(20, 20) == pytest.approx((0.8389, 1.0), abs=5e-5)


def trace_of(steps: int, probes: bool = True) -> DecisionTrace:
    """Half of the steps off over 8 sequences, half with three drafts over 2, all accepted."""
    trace = DecisionTrace()
    for step in range(steps):
        drafting = step >= steps // 2
        arm, batch = (W4, 2) if drafting else (OFF, 8)
        drafts = (batch,) * arm.num_speculative_tokens
        outcome = StepOutcome(arm, Load(batch, 100.0), 0.02, 0.01, batch * (1 + len(drafts)), drafts, drafts)
        reason = Reason.PROBE if probes and step % 10 == 9 else Reason.KEPT
        trace.append(0.02 * step, StepDecision(arm, reason, 0.021 / (1 + len(drafts)), OFF if drafting else W4, 0.03), outcome)
    return trace


def test_decisions_show_arms_probes_and_what_was_saved(tmp_path: Path) -> None:
    figure = decisions(trace_of(100), lambda arm, load: 0.01)
    text = drawn(figure, tmp_path)
    for words in (
        "off",
        "w4a8 n=3",
        "decoding",
        "probe (10)",
        "predicted for the chosen arm",
        "measured (median)",
        "decode step",
    ):
        assert words in text.splitlines()
    assert "1.00 s of 3.00 s\n(33.3%)" in text  # 50 steps of 20 ms did what 200 of 10 ms would have done
    assert len(figure.axes) == 3
    batch, times, saved = figure.axes
    assert list(saved.lines[-1].get_ydata())[49:52] == pytest.approx([0.0, 0.02, 0.04])  # type: ignore[arg-type]
    measured = times.lines[0].get_ydata()
    assert measured[0] == pytest.approx(20.0) and measured[-1] == pytest.approx(5.0)  # type: ignore[index]
    assert batch.get_xlim() == (0, 100)


def test_decisions_without_costs_probes_or_steps(tmp_path: Path) -> None:
    figure = decisions(trace_of(3, probes=False))
    assert "probe" not in drawn(figure, tmp_path) and len(figure.axes) == 2
    assert "no steps" in drawn(decisions(DecisionTrace(), lambda arm, load: 0.01), tmp_path)
    prefill = DecisionTrace()
    prefill.append(0.0, StepDecision(OFF, Reason.IDLE), StepOutcome(OFF, Load(0, 0.0, 64, 3), 0.1, emitted=2))
    assert "waiting" in drawn(decisions(prefill), tmp_path)


def test_simulated_times(tmp_path: Path) -> None:
    bars = [Bar("off", "replica", 100.0, 2.0), Bar("always", "replica", 107.0, 2.0), Bar("adaptive", "makespan", 80.0)]
    text = drawn(rollout_times(bars), tmp_path).splitlines()
    for words in ("off", "always", "adaptive", "replica", "makespan", "100 s", "+7%", "80 s", "rollout seconds"):
        assert words in text


def test_simulated_utilisation(tmp_path: Path) -> None:
    text = drawn(utilisation({"off": ([0.0, 5.0, 9.0], [1.0, 0.5, 0.0]), "adaptive": ([], [])}), tmp_path)
    assert "busy replicas, %" in text and "adaptive" in text


def test_simulations_of_nothing(tmp_path: Path) -> None:
    assert "nothing" in drawn(rollout_times([]), tmp_path)
    assert "no steps" in drawn(utilisation({}), tmp_path)


def test_an_address_holds_letters_as_shapes_and_many_points_as_pixels() -> None:
    small, large = figure(2, 2, "名 $x^{2"), figure(2, 2, "many")  # neither a formula, nor a warning for each letter
    large.subplots().scatter(range(20_000), range(20_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data_address(small).startswith("data:image/svg+xml;base64,")
    assert data_address(large).startswith("data:image/png;base64,")


@pytest.mark.parametrize("count", [1, 7, 8, 40])
def test_runs_have_colours_of_their_own(count: int) -> None:
    assert len({*run_colors(count)}) == count


def test_a_name_as_a_label() -> None:
    assert label("_$a$") == "\u200b_\\$a\\$" and label("runs/a") == "runs/a"
    assert label("first/" + 90 * "x" + "/last").startswith("first/xx...x") and len(label(99 * "x")) == 44


def test_more_drafts_are_darker_and_drafters_have_their_own_hues() -> None:
    arms = [Arm("w4a8", n) for n in (1, 3, 8)]
    colors = arm_colors([W8, *reversed(arms), OFF, OFF])
    assert list(colors) == [OFF, *arms, W8] and colors[OFF] == OFF_COLOR
    brightness = [sum(int(colors[arm][i : i + 2], 16) for i in (1, 3, 5)) for arm in arms]
    assert all(light > dark for light, dark in pairwise(brightness))
    assert len(set(colors.values())) == 5
