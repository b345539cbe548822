"""The report in a browser: Chromium shows every section and picture, runs nothing that a response holds, and logs no error."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from written_runs import HOSTILE, write_run

from erollout.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTH = 1240
OPTIONS = (
    "--headless",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    f"--window-size={WIDTH},1000",
    "--virtual-time-budget=5000",
)
LOOK = """
<script>
const box = (it) => { const {right, width, height} = it.getBoundingClientRect(); return {right, width, height} }
const seen = {
  title: document.title,
  scroll: document.documentElement.scrollWidth,
  sections: [...document.querySelectorAll("section")].map((it) => ({
    heading: it.querySelector("h2").innerText, text: it.innerText, box: box(it),
    pictures: [...it.querySelectorAll("img")].map((img) => ({alt: img.alt, loaded: img.naturalWidth > 0, box: box(img)})),
  })),
}
const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out)
</script>
"""
"""What is visible: innerText has no hidden text. The page itself allows no script, so this looks at a copy that does."""

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]


@dataclass(frozen=True, slots=True)
class Visit:
    dom: str
    console: list[str]
    """Messages of the page's console."""


def visit(page: Path, folder: Path) -> Visit:
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0 and "</html>" in done.stdout, done.stderr
    return Visit(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def look(page: Path, folder: Path) -> dict[str, Any]:
    """What a reader sees of a page."""
    copy = folder / "copy.html"
    text = re.sub(r"<meta http-equiv=.*?>", "", page.read_text())
    copy.write_text(text.replace("</body>", f"{LOOK}</body>"))
    found = re.search(r'<pre id="seen">(.*?)</pre>', visit(copy, folder).dom, re.DOTALL)
    assert found is not None
    return json.loads(unescape(found[1]))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    off = write_run(folder / "off", 45, 1, speculation={"mode": "off"})
    write_report([write_run(folder / "adaptive", restart_at=30), off], folder / "report.html")
    return folder / "report.html"


def test_every_section_and_picture_is_visible(page: Path, tmp_path: Path) -> None:
    seen = look(page, tmp_path)
    assert seen["title"] == "adaptive and off: erollout"  # HOSTILE would have changed it
    assert seen["scroll"] <= WIDTH and len(seen["sections"]) == 13
    for section in seen["sections"]:
        assert section["box"]["height"] > 60, section["heading"]
        for picture in section["pictures"]:
            assert picture["loaded"] and picture["box"]["width"] > 500 and picture["box"]["right"] <= WIDTH, picture
    text = {section["heading"]: section["text"] for section in seen["sections"]}
    assert sum(len(section["pictures"]) for section in seen["sections"]) == 9
    assert HOSTILE in text["Samples"] and "speculation.mode" in text["Configuration"]
    assert "rollout.group_size" not in text["Configuration"]  # folded, because it does not differ
    assert "no traces of rollouts: speculation.mode is off" in text["Occupancy and speculation"]


def test_the_console_stays_empty(page: Path, tmp_path: Path) -> None:
    assert visit(page, tmp_path).console == []


def test_what_the_console_says_is_heard(tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<html><body><script>missing()</script></body></html>")
    assert "missing is not defined" in " ".join(visit(broken, tmp_path).console)
