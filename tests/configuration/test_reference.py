"""The reference pages follow from the code, and leave nothing out."""

import sys
from pathlib import Path

from commands import invoke
from metric_names import undocumented

from erollout.config import Config
from erollout.configuration import bounds
from erollout.configuration.reference import key_references, type_name

sys.path.append(str(Path(__file__).parents[2] / "docs"))
import generate

ROOT = Path(__file__).parents[2]


def test_every_key_is_documented() -> None:
    assert [key.name for key in key_references(Config) if not key.text] == []


def test_the_page_of_keys_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    assert page == generate.configuration_page(), "run python docs/generate.py"
    assert "| `speculation.toggle.ladder.rungs` |" in page and "| `data.tasks[].weight` |" in page


def test_types_are_told_with_their_ranges() -> None:
    assert type_name(bounds.DraftLength) == "integer 1 to 64"
    assert type_name(bounds.Decay | None) == "number 0 to below 1, or null"
    assert type_name(tuple[bounds.Location, ...]) == "list of text"


def test_keys_are_explained_on_the_command_line() -> None:
    shown = invoke("config", "keys", "rollout.top_p")
    assert shown.status == 0 and shown.stdout.startswith("rollout.top_p: number 1e-06 to 1, default 1.0\n    Sample from")
    refused = invoke("config", "keys", "rolout.top_p")
    assert refused.status == 2 and "did you mean rollout.top_p?" in refused.error()


def test_a_metric_that_the_page_lacks_is_noticed() -> None:
    names = {"reward/mean", "speculation/acceptance_at_7", "evaluation/gsm/pass_at_4", "reward/scoring_errors/KeyError"}
    assert undocumented(names) == [] and undocumented({"reward/mean", "rollout/new"}) == ["rollout/new"]
