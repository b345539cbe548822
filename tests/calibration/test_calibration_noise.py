"""What `calibrate fit` says of a sweep's noise, what `validate` says of figures in sample, and what a bad sweep is told."""

from dataclasses import replace
from pathlib import Path

import pytest
from sweeps import IDENTITY, SIZE, command, sweep

from erollout.calibration.file import Calibration, load_calibration
from erollout.calibration.fit import fit, measured_passes
from erollout.calibration.noise import Noise, noise
from erollout.calibration.sweep_file import SweepRow, read_sweep, write_sweep
from erollout.calibration.validate import seen
from erollout.errors import UserError


def fitted(rows: list[SweepRow]) -> Calibration:
    return fit(measured_passes(rows), SIZE, IDENTITY)


def noise_of(rows: list[SweepRow]) -> Noise:
    return noise(rows, fitted(rows).passes().tables)


def test_a_sweep_that_no_machine_explains_is_told() -> None:
    quiet, loud = (noise_of(sweep(noise=level)) for level in (0.0, 0.4))
    assert not quiet.outliers and not quiet.warnings() and max(quiet.off.values()) < 0.02
    assert any("the roofline is off by" in warning and "of verify" in warning for warning in loud.warnings())
    assert any("points are outliers" in warning for warning in loud.warnings())


def test_the_spread_of_repeated_steps_makes_a_sweep_uncertain() -> None:
    rows = [replace(row, std_ms=0.2 * row.median_ms, n_samples=16) for row in sweep(noise=0.0)]
    steady, spread = noise_of(rows), noise_of([replace(row, std_ms=2 * row.std_ms) for row in rows])
    assert steady.spread == pytest.approx(0.2) and steady.uncertainty == pytest.approx(0.2 * 1.2533 / 4, rel=1e-3)
    assert [warning.split(",")[0] for warning in spread.warnings()] == ["medians are uncertain by 12.5 %"]
    once = noise_of([replace(row, std_ms=0.0, n_samples=1) for row in rows])
    assert any(f"{len(rows)} of {len(rows)} rows have fewer than 3 steps" in warning for warning in once.warnings())


def test_outliers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sweep()
    index = next(i for i, row in enumerate(rows) if (row.mode, row.batch, row.seq, row.gamma) == ("target_verify", 24, 2048, 7))
    odd = rows[index]
    rows[index] = replace(odd, median_ms=0.5 * odd.median_ms, min_ms=0.4 * odd.median_ms)
    write_sweep(tmp_path / "s.csv", rows)
    assert command("fit", "--csv", str(tmp_path / "s.csv"), "--out", str(tmp_path / "c.json")) == 0
    told = capsys.readouterr().out
    assert "noise: repeated steps spread by" in told and "WARNING" not in told
    assert "verify at batch 24, context 2048, n = 7 (-" in told.partition("outliers, of which")[2]
    assert load_calibration(tmp_path / "c.json").diagnostics["noise"]["outliers"][0][0].startswith("verify at batch 24")


def test_what_a_sweep_does_not_vary_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv, out = str(tmp_path / "s.csv"), str(tmp_path / "c.json")
    write_sweep(csv, sweep(batches=(4,), contexts=(512,)))
    assert command("fit", "--csv", csv, "--out", out) == 0
    told = capsys.readouterr().out
    assert "WARNING: the sweep has a single batch size, 4" in told and "a single context, 512" in told
    assert "one draft length" not in told
    with pytest.raises(UserError, match="can't hold out batch sizes: the sweep has 1 batch size"):
        command("validate", "--config", out, "--csv", csv, "--held-out")


def test_figures_of_the_points_that_were_fitted_are_in_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv, copy, out = (str(tmp_path / name) for name in ("s.csv", "copy.csv", "c.json"))
    rows = sweep(contexts=(512,))
    write_sweep(csv, rows)
    write_sweep(copy, rows[: len(rows) // 5 * 3])  # under another name, and not all of it
    assert command("fit", "--csv", csv, "--out", out) == 0
    capsys.readouterr()
    command("validate", "--config", out, "--csv", copy)
    assert "was fitted to 27 of the 27 points of" in (told := capsys.readouterr().out) and "give --held-out" in told
    command("validate", "--config", out, "--csv", csv, "--held-out")
    assert "was fitted to 45 of the 45 points of" in (told := capsys.readouterr().out) and "held out by batch" in told
    assert seen(load_calibration(out), measured_passes(sweep(noise=0.01, contexts=(512,)))) == 0
    write_sweep(copy, [replace(row, hardware="H100", median_ms=1.01 * row.median_ms) for row in rows])
    command("validate", "--config", out, "--csv", copy)
    told = capsys.readouterr().out
    assert "IN SAMPLE" not in told and f"NOTE: hardware of calibration {out}: A100; of sweep {copy}: H100" in told


def test_a_sweep_is_utf8_whoever_wrote_it(tmp_path: Path) -> None:
    rows = [replace(row, model="模型") for row in sweep(contexts=(512,))]
    write_sweep(tmp_path / "s.csv", rows)
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "s.csv").read_bytes())
    assert read_sweep(tmp_path / "bom.csv") == rows


HEADER = "model,batch,seq,gamma,mode,mean_ms,median_ms,std_ms,min_ms,max_ms,n_samples"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("m,1,256,0,target_decode,9,5,9,5,0,9,10,5", "row 2: more fields than the header names"),
        ("m,1,256,0,target_decode,9,9,nan,9,9,5", "row 2: std_ms = nan is no standard deviation"),
        ("m,1,256,0,target_decode,9,9,-1,9,9,5", "row 2: std_ms = -1.0 is no standard deviation"),
        (f"m,{10**300},256,0,target_decode,9,9,0,9,9,5", "row 2: batch = 10+, .* none can be above"),
        ("m,1,256,0,target_decode,1e300,1e300,0,1e300,1e300,5", r"row 2: mean_ms = 1e\+300 is no time"),
    ],
)
def test_numbers_in_wrong_places_are_refused(row: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(f"{HEADER}\n{row}\n")
    with pytest.raises(UserError, match=message):
        read_sweep(tmp_path / "s.csv")


def test_a_sweep_of_two_architectures_is_refused(tmp_path: Path) -> None:
    rows = sweep(contexts=(512,))
    other = rows[0].architecture.replace("layers=28", "layers=32")
    mixed = [replace(row, architecture=other) if row.batch > 8 else row for row in rows]
    write_sweep(tmp_path / "s.csv", mixed)
    with pytest.raises(UserError, match=r"mixes .*layers=28.* and .*layers=32"):
        command("fit", "--csv", str(tmp_path / "s.csv"), "--out", str(tmp_path / "c.json"))


def test_a_calibration_that_nests_too_deep_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="is damaged"):
        load_calibration(tmp_path / "c.json")
