"""`erollout report` and `erollout plot`: what they show of runs, and what they say of directories that are none."""

import base64
import math
import re
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import invoke
from written_runs import HOSTILE, metrics_of, rollout_trace, write_run

from erollout.plots.run_figures import FIGURES, OF_A_ROLLOUT, OVER_STEPS
from erollout.tracking.journal import journal_path
from erollout.tracking.recorded_run import read_run


class Page(HTMLParser):
    """A page as a browser reads it: its text by section, its elements, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.elements: list[str] = []
        self.sources: list[str] = []
        self.handlers: list[str] = []
        self._heading, self._in_heading = "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.handle_data(" ")  # between cells
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "data")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag == "h2":
            self._heading, self._in_heading = "", True

    def handle_endtag(self, tag: str) -> None:
        self._in_heading = self._in_heading and tag != "h2"

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self._heading += data
        else:
            self.sections[self._heading] = self.sections.get(self._heading, "") + data

    def pictures(self) -> list[str]:
        found = [source.partition("base64,")[2] for source in self.sources if source.startswith("data:image/svg+xml")]
        return [base64.b64decode(data).decode() for data in found]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run that was interrupted once, and one without speculation and with another learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first", restart_at=30)
    return [first, write_run(folder / "second", 45, 1, speculation={"mode": "off"}, optimizer={"lr": 3e-4})]


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "new" / "report.html"
    outcome = invoke("report", *map(str, runs), "--out", str(out))
    assert outcome.status == 0, outcome.stderr
    return Page(out.read_text())


def test_a_report_has_every_section_and_needs_nothing_else(page: Page) -> None:
    assert list(page.sections)[1:] == [
        "At a glance",
        "Configuration",
        "Reward and held-out prompts",
        "Training curves",
        "Response lengths",
        "Time",
        "Occupancy and speculation",
        "Acceptance of drafts",
        "The toggle's boundary",
        "Decisions",
        "Memory",
        "Samples",
        "Attempts and restarts",
    ]
    assert all(source.startswith(("data:", "#section-")) for source in page.sources), page.sources
    assert len(page.pictures()) == 9 and all("</svg>" in picture for picture in page.pictures())


def test_a_report_compares(page: Page) -> None:
    glance = " ".join(page.sections["At a glance"].split())
    assert "steps 60 of 60 45 of 45" in glance and "attempts 2 1" in glance and "held-out prompts solved" in glance
    assert "llama (1.23M parameters)" in glance
    differs, _, every = page.sections["Configuration"].partition("All ")
    differs = " ".join(differs.split())
    assert "optimizer.lr" in differs and "0.0003" in differs and "speculation.mode adaptive off" in differs
    assert "rollout.group_size" not in differs and "rollout.group_size" in every and "train.output_dir" not in differs


def test_a_report_says_what_is_missing_and_why(page: Page, runs: list[Path]) -> None:
    for section in ("Occupancy and speculation", "The toggle's boundary", "Decisions"):
        assert f"{runs[1]}: no t" in page.sections[section] and "speculation.mode is off" in page.sections[section]
        assert str(runs[0]) not in page.sections[section]


def test_a_report_tells_of_restarts(page: Page) -> None:
    text = " ".join(page.sections["Attempts and restarts"].split())
    assert "to 35, saved at 30 killed" in text
    assert "from 30 to 60 finished 5" in text  # five steps were repeated


def test_what_a_model_writes_is_shown_and_not_obeyed(page: Page) -> None:
    assert page.sections["Samples"].count(HOSTILE) == 2  # of each run's newest evaluation
    assert not {"script", "iframe", "object", "b"} & set(page.elements) and not page.handlers
    assert page.elements.count("img") == 9
    assert "2+60=" in page.sections["Samples"] and "2+40=" in page.sections["Samples"]


def test_a_report_of_one_run_with_hostile_names_and_texts(tmp_path: Path) -> None:
    name, text = '<b onclick="x">$a_b$ & {{ 7*7 }}', f"half of a character \ud800, a bell \x07, {HOSTILE}"
    options = {"run_name": name, "enabled": False}
    run, out = write_run(tmp_path / "run", 20, text=text, kind="sft", tracking=options), tmp_path / "a.html"
    assert invoke("report", str(run), "--out", str(out)).status == 0
    made = Page(out.read_text())
    assert name in made.sections[""] and "b" not in made.elements and not made.handlers
    assert "half of a character ?, a bell \u2407, <script>" in made.sections["Samples"]
    configuration = " ".join(made.sections["Configuration"].split())
    assert "What is not the default" in configuration and "speculation.mode adaptive" in configuration


def test_saved_rollouts_are_the_samples_of_a_run_without_evaluation(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", 3, kind="sft"), tmp_path / "a.html"
    without = "no responses were kept; set evaluation.interval"
    assert invoke("report", str(run), "--out", str(out)).status == 0 and without in Page(out.read_text()).sections["Samples"]
    (run / "rollouts").mkdir()
    (run / "rollouts" / "step_00000003.jsonl").write_text('{"prompt": "2+2=", "response": "<i>5", "reward": 0.5}\n' * 9)
    assert invoke("report", str(run), "--out", str(out)).status == 0
    samples = Page(out.read_text()).sections["Samples"]
    assert "Training prompts of step 3" in samples and samples.count("<i>5") == 8 and without not in samples


def test_an_occupancy_that_the_run_drew_is_shown_where_no_trace_is_left(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", 3, kind="sft"), tmp_path / "a.html"
    (figures := run / "tracking" / "figures").mkdir()
    for step, content in ((1, b"older"), (2, b"newest")):
        (figures / f"occupancy_step_{step:08d}.png").write_bytes(content)
    assert invoke("report", str(run), "--out", str(out)).status == 0
    made = Page(out.read_text())
    assert f"data:image/png;base64,{base64.b64encode(b'newest').decode()}" in made.sources
    assert "no traces" not in made.sections["Occupancy and speculation"] and "no traces" in made.sections["Decisions"]
    assert "3 of 100" in made.sections["At a glance"]  # supervised.steps


def test_runs_of_one_name_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / parent / "run", 2, kind="sft") for parent in "ab"]
    out = tmp_path / "a.html"
    assert invoke("report", *map(str, runs), "--out", str(out)).status == 0
    made = Page(out.read_text())
    assert all(str(run) in made.sections["At a glance"] for run in runs)
    assert "no rewards: no step of reinforcement learning" in made.sections["Reward and held-out prompts"]


@pytest.mark.parametrize("figure", [pytest.param(name, marks=[pytest.mark.full] * (name != "occupancy")) for name in FIGURES])
def test_every_figure_of_a_run_names_run_model_and_step(figure: str, runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "made" / f"{figure}.svg"
    assert invoke("plot", "--run", str(runs[0]), "--figure", figure, "--out", str(out)).status == 0
    comments = " ".join(re.findall(r"<!-- (.*?) -->", out.read_text()))  # matplotlib's, of each text
    assert "first, llama (1.23M parameters), step" in comments
    assert ("steps 1 to 60" if figure in OVER_STEPS else "step 60") in comments


@pytest.mark.full
@pytest.mark.parametrize("figure", OVER_STEPS)
def test_figures_of_several_runs_name_each(figure: str, runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / f"{figure}.svg"
    assert invoke("plot", "--run", *map(str, runs), "--figure", figure, "--out", str(out)).status == 0
    labels = re.findall(r"<!-- (.*?) -->", out.read_text())
    assert figure == "acceptance" or {"first", "second"} <= set(labels)  # the second drafts nothing


def test_what_can_not_be_plotted_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    out = str(tmp_path / "a.png")

    def error(*arguments: str) -> str:
        return invoke("plot", "--out", out, *arguments).error()

    first, second = map(str, runs)
    assert "speculation.mode is off" in error("--run", second, "--figure", "occupancy")
    assert "no drafts: speculation.mode is off" in error("--run", second, "--figure", "acceptance")
    for figure in OF_A_ROLLOUT:
        assert "2 are named; name one" in error("--run", first, second, "--figure", figure)
        assert "--step = 7" in (line := error("--run", first, "--figure", figure, "--step", "7")) and "60" in line
    assert "--replica = 2" in (line := error("--run", first, "--figure", "decisions", "--replica", "2")) and "0, 1" in line
    assert "reward shows all steps" in error("--run", first, "--step", "7")
    (runs[1] / "decisions").mkdir()
    (damaged := runs[1] / "decisions" / "step_00000000.replica_00000.csv.gz").write_bytes(b"no trace")
    assert str(damaged) in error("--run", second, "--figure", "occupancy")
    damaged.unlink()
    assert not Path(out).exists()


def test_what_makes_no_report_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    out = str(tmp_path / "a.html")
    assert "name the train.output_dir of a run" in invoke("report", str(tmp_path), "--out", out).error()
    assert "must end in .html" in invoke("report", str(runs[0]), "--out", str(tmp_path / "a.pdf")).error()
    other = write_run(tmp_path / "other", 3, kind="other")
    line = invoke("report", str(runs[0]), str(other), "--out", out).error()
    assert "no metric in common" in line and str(other) in line
    begun = write_run(tmp_path / "begun", 1, kind="sft")
    lines = (journal := journal_path(begun)).read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"metrics"' not in line))
    assert "no metrics yet" in invoke("report", str(begun), "--out", out).error()
    (tmp_path / "file").write_text("")
    assert "can't be written" in invoke("report", str(runs[0]), "--out", str(tmp_path / "file" / "a.html")).error()
    assert not Path(out).exists()


@pytest.mark.parametrize("command", ["plot", "report"])
def test_without_matplotlib_one_line_says_what_to_install(
    command: str, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    named = ["--run", str(runs[0])] if command == "plot" else [str(runs[0])]
    line = invoke(command, *named, "--out", str(tmp_path / "a.html")).error()
    assert "the Python package matplotlib, which" in line and "is missing; install it (erollout's requirements: pip" in line


def test_an_attempt_ends_where_its_records_end(runs: list[Path]) -> None:
    first, second = read_run(runs[0]).attempts
    assert (first.reached, first.saved, first.resumed_from) == (35, [30], None)
    assert (second.reached, second.resumed_from, second.status) == (60, 30, "finished") and second.began >= first.last
    assert [row["step"] for row in read_run(runs[0]).history] == list(range(1, 61))


@pytest.mark.full
def test_a_report_of_numbers_that_are_none_and_of_a_name_that_is_too_long(tmp_path: Path) -> None:
    odd = {name: (math.nan, math.inf)[index % 2] for index, name in enumerate(metrics_of(1))}
    run, out = write_run(tmp_path / ("_$x^{2" + 90 * "n"), 3, tracked=odd), tmp_path / "a.html"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert invoke("report", str(run), str(write_run(tmp_path / "one", 1)), "--out", str(out)).status == 0
    assert run.name in Page(out.read_text()).sections["At a glance"]


def test_a_trace_of_no_steps_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2)
    for path in (run / "decisions").iterdir():
        type(rollout_trace(0))().write(path)
    for figure in ("occupancy", "decisions"):
        assert invoke("plot", "--run", str(run), "--figure", figure, "--out", str(tmp_path / "a.svg")).status == 0
    assert "no toggle" in invoke("plot", "--run", str(run), "--figure", "boundary", "--out", str(tmp_path / "b.svg")).error()
