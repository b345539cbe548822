"""What the doctor says of packages and filesystems, its reports, and the whole command on this machine."""

import json
import os
import re
import threading
from pathlib import Path

import pytest
from commands import invoke
from packaging.requirements import Requirement
from tiny_runs import write_config

from erollout.doctor import cpu, storage, versions
from erollout.doctor.report import Finding, could_start, node_lines, page

PINS = [
    Requirement(text)
    for text in (
        "torch==2.13.0",
        "numpy>=2.0",
        "mlflow==3.17.2; extra == 'mlflow'",
        "ray==2.60.0; extra == 'ray'",
        "ruff; extra == 'dev'",
    )
]
GOOD = {"torch": "2.13.0+cpu", "numpy": "2.1", "mlflow": "3.17.2"}


def _by_topic(installed: dict[str, str]) -> dict[str, Finding]:
    return {finding.topic: finding for finding in versions.check_packages(PINS, installed.get)}


def test_packages_as_pinned() -> None:
    found = _by_topic(GOOD)
    assert "torch 2.13.0+cpu" in found["packages"].text and "mlflow 3.17.2" in found["packages"].text
    assert found.keys() == {"packages", "ray"}, "an optional package that is missing is said, no other"
    assert found["ray"].level == "ok" and "pip install -e .[ray]" in found["ray"].text


@pytest.mark.parametrize(
    ("installed", "topic", "level", "fix"),
    [
        (GOOD | {"torch": "2.12.0"}, "torch", "warning", "pip install -e ."),
        (GOOD | {"mlflow": "3.18.0"}, "mlflow", "warning", "pip install -e .[mlflow]"),
        ({"torch": "2.13.0"}, "numpy", "error", "pip install -e ."),
        (GOOD | {"transformer-engine": "2.11.0"}, "transformer-engine", "error", "pip uninstall transformer-engine"),
    ],
)
def test_packages_that_are_not(installed: dict[str, str], topic: str, level: str, fix: str) -> None:
    finding = _by_topic(installed)[topic]
    assert finding.level == level and finding.fix.startswith(fix)
    assert could_start([finding]) == (level == "warning")


def test_a_python_out_of_range() -> None:
    assert versions.check_python(">=3.11,<3.13", "3.12.1").level == "ok"
    assert versions.check_python(">=3.11,<3.13", "3.13.0").level == "error"


def test_fingerprints_differ_with_code_versions_and_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = versions.code_digest([tmp_path])
    (tmp_path / "notes.txt").write_text("no code")
    assert versions.code_digest([tmp_path]) == before
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert versions.code_digest([tmp_path]) != before
    texts = {
        versions.check_fingerprint(PINS, config, installed.get).text
        for installed in (GOOD, GOOD | {"torch": "2.12.0"})
        for config in ("one", "two")
    }
    assert len(texts) == 4
    assert {"doctor", "kernels"} <= {path.name for path in versions.source_folders()[0].iterdir()}


def test_a_canary_leaves_nothing(tmp_path: Path) -> None:
    assert storage.check_canary(tmp_path).level == "ok"
    assert list(tmp_path.iterdir()) == []
    assert storage.existing(tmp_path / "not" / "yet") == tmp_path


def test_a_filesystem_that_takes_nothing() -> None:
    finding = storage.check_canary(Path("/proc"))
    assert finding.level == "error" and "/proc" in finding.text


def test_a_filesystem_that_does_not_answer(tmp_path: Path) -> None:
    answer = threading.Event()

    def check() -> Finding:
        answer.wait(60)
        return Finding("disk", "late")

    assert "no answer in 0.05 s" in storage.within(0.05, "disk", check).text
    answer.set()


def test_too_little_space(tmp_path: Path) -> None:
    assert storage.check_space("disk", tmp_path, 1e9).level == "error"
    assert storage.check_space("disk", tmp_path, 0).level == "ok"


def test_reports() -> None:
    good, warned = Finding("a", "well"), Finding("b", "so so", "warning", "rest")
    bad, mark = Finding("long topic", "ill\nvery", "error", "medicine"), Finding("fingerprint", "code=1")
    lines = node_lines("n1", [mark, good, warned]).splitlines()
    assert lines == ["fingerprint code=1", "ok: a: well", "warning: b: so so; rest", "node n1 ok"]
    assert node_lines("n1", [bad]).splitlines()[-1] == "node n1 bad: long topic: ill very"
    assert page([good]) == "a  well\n\ntraining could start"
    assert page([warned, Finding("e", "one\ntwo"), bad]).splitlines() == [
        "e  one",
        "   two",
        "",
        "error: long topic: ill very",
        "    medicine",
        "warning: b: so so",
        "    rest",
        "",
        "training could not start: 1 error",
    ]


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run on busy machines; and GPUs of this one are none of their business."""
    monkeypatch.setattr(cpu, "SLOW_BANDWIDTH", 0.0)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_the_page_of_a_run_that_could_start(tmp_path: Path, quiet: None) -> None:
    outcome = invoke("doctor", "--config", str(write_config(tmp_path)), "--json")
    document = json.loads(outcome.stdout)
    assert outcome.status == 0 and document["could_start"], document
    topics = {finding["topic"] for finding in document["findings"]}
    assert {
        "Python",
        "packages",
        "CPU",
        "memory bandwidth",
        "interfaces",
        "free ports",
        "disk",
        "kernels",
        "configuration",
    } <= topics
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stesp=1", "train.stesp"),
        ("model.tokenizer=/nowhere", "/nowhere"),
        ("rollout.dtype=float32 rollout.kernels=native", "rollout.kernels = native"),
    ],
)
def test_a_run_that_could_not_start(override: str, words: str, tmp_path: Path, quiet: None) -> None:
    outcome = invoke("doctor", "--config", str(write_config(tmp_path)), *override.split())
    assert outcome.status == 1
    assert any(line.startswith("error: ") and words in line for line in outcome.stdout.splitlines()), outcome.stdout
    assert outcome.stdout.splitlines()[-1].startswith("training could not start")


def test_a_node(tmp_path: Path, quiet: None) -> None:
    config = str(write_config(tmp_path))
    outcome = invoke("doctor", "--node", "--config", config)
    lines = outcome.stdout.splitlines()
    assert outcome.status == 0 and lines[-1].startswith("node ") and lines[-1].endswith(" ok")
    assert re.fullmatch(r"fingerprint code=\w{12} versions=\w{12} config=\w{12}", lines[0])
    assert invoke("doctor", "--node", "--config", config).stdout.splitlines()[0] == lines[0]
    assert invoke("doctor", "--node", "--config", config, "train.steps=9").stdout.splitlines()[0] != lines[0]
    outcome = invoke("doctor", "--node", "--gpus", "8", "--config", config)
    assert outcome.status == 1
    assert "bad: GPUs: 0 visible, 8 wanted" in outcome.stdout.splitlines()[-1]
    refused = invoke("doctor", "--node", "--config", config, "train.stesp=1").stdout.splitlines()
    assert refused[0].startswith("fingerprint code=") and " bad: configuration: " in refused[-1]
