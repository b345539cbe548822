"""How a configuration is read: values as people write them in files and on the command line, and numbers of any size."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import example, given, settings
from hypothesis import strategies as st

from erollout.config import Config, build_config, load_config
from erollout.configuration.yaml_tree import apply_override, joined, known_keys, shown
from erollout.errors import UserError

BASE = "model: {path: m}\ndata: {kind: chain_sum_cot}\n"


def _load(tmp_path: Path, *overrides: str, text: str | bytes = BASE) -> Config:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, list(overrides))


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def _refusal(tmp_path: Path, *overrides: str, text: str | bytes = BASE) -> str:
    with pytest.raises(UserError) as raised:
        _load(tmp_path, *overrides, text=text)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.output_dir=run #1", "run #1"),
        ("train.output_dir=a: b", "a: b"),
        ("train.output_dir=[1] first", "[1] first"),
        ("train.output_dir=&x", "&x"),
        ("train.output_dir=!x", "!x"),
        ("train.output_dir=x=y", "x=y"),
        ("train.output_dir='run #1'", "run #1"),
        ("train.output_dir='it''s'", "it's"),
        ("train.output_dir='a' or 'b'", "'a' or 'b'"),
        ("train.output_dir=Zürich", "Zürich"),
        (" train.output_dir = runs/a ", "runs/a"),
        ("tracking.run_name=4711", "4711"),
        ("tracking.run_name=007", "007"),
        ("tracking.run_name=1e-4", "1e-4"),
        ("tracking.run_name=1_000", "1_000"),
        ("tracking.run_name=12:30", "12:30"),
        ("tracking.run_name=2026-11-30", "2026-11-30"),
        ("tracking.run_name=on", "on"),
        ("tracking.run_name=No", "No"),
        ("tracking.run_name=null", None),
        ("tracking.run_name=~", None),
        ("tracking.run_name=", None),
        ("tracking.run_name='null'", "null"),
        ("tracking.run_name={x}", "{x}"),
        ("data.instruction={prompt}", "{prompt}"),
        ("data.instruction={prompt} # think", "{prompt} # think"),
        ('data.instruction="{prompt}\\n"', "{prompt}\n"),
        ("data.train_files=a b.jsonl", ("a b.jsonl",)),
        ("data.train_files=7", ("7",)),
        ("data.train_files=[a.jsonl, 7, on]", ("a.jsonl", "7", "on")),
        ("data.train_files=[]", ()),
        ("rollout.stop=#", ("#",)),
        ("rollout.stop=[", ("[",)),
        ("rollout.stop=['\\n', \"\\n\"]", ("\\n", "\n")),
        ("rollout.stop_token_ids=7", (7,)),
        ("rollout.stop_token_ids=[7, 08]", (7, 8)),
        ("speculation.toggle.ladder.rungs=[1, 2]", (1, 2)),
        ("speculation.mode=off", "off"),
        ("train.steps=010", 10),
        ("train.steps=0x10", 16),
        ("train.steps=1e3", 1000),
        ("train.steps=20_000", 20000),
        ("train.steps='5'", 5),
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.lr=1", 1.0),
        ("tracking.enabled=off", False),
        ("tracking.enabled=True", True),
        (
            "data.args={min_terms: 3, share: 1e-1, name: '1', flag: yes}",
            {"min_terms": 3, "share": 0.1, "name": "1", "flag": True},
        ),
        ("data.args={}", {}),
        ("data.args.min_terms=3", 3),
        ("data.args.when=2026-11-30", "2026-11-30"),
        ("rollout.num_kv_blocks=null", None),
    ],
)
def test_an_override_is_a_value_as_its_key_wants_it(tmp_path: Path, override: str, value: object) -> None:
    found = _get(_load(tmp_path, override), override.partition("=")[0].strip())
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("tracking: {run_name: 4711, experiment: 1e-4}", "tracking.run_name", "4711"),
        ("tracking: {run_name: 2026-11-30}", "tracking.run_name", "2026-11-30"),
        ("tracking: {run_name: 12:30}", "tracking.run_name", "12:30"),
        ("tracking: {run_name: yes}", "tracking.run_name", "yes"),
        ("tracking: {run_name: 0123}", "tracking.run_name", "0123"),
        ("tracking: {run_name: !!str 5}", "tracking.run_name", "5"),
        ("train: {steps: 010}", "train.steps", 10),
        ("train: {steps: 0o10}", "train.steps", 8),
        ("optimizer: {lr: 1e-4}", "optimizer.lr", 1e-4),
        ("optimizer: {lr: 1E-4}", "optimizer.lr", 1e-4),
        ("rewards: {threshold: -5}", "rewards.threshold", -5.0),
        ("rollout: {stop: [1, on, '#']}", "rollout.stop", ("1", "on", "#")),
        ("rollout: {stop: 1}", "rollout.stop", ("1",)),
        ("rollout:\n  stop:\n  - null\n  - a", None, "rollout.stop.0"),
        ("x: &x {steps: 3}\ntrain: {<<: *x, seed: 7}", None, "unknown key x"),
        ("checkpoint: &c {interval: 3}\nevaluation: {<<: *c}", "evaluation.interval", 3),
        ("checkpoint: &c {interval: 3}\nevaluation: {<<: *c, interval: 4}", "evaluation.interval", 4),
    ],
)
def test_a_file_says_what_is_written(tmp_path: Path, written: str, key: str | None, value: object) -> None:
    if key is None:
        assert str(value) in _refusal(tmp_path, text=f"{BASE}{written}\n")
    else:
        assert _get(_load(tmp_path, text=f"{BASE}{written}\n"), key) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 3}\n" + BASE + "train: {seed: 7}\n", ["duplicate key train", "lines 1 and 4"]),
        (BASE + "train:\n  steps: 3\n  seed: 1\n  steps: 4\n", ["duplicate key steps", "lines 4 and 6"]),
        (BASE + "train: {steps: 3, steps: 3}\n", ["duplicate key steps", "line 3"]),
        ("model: {architecture: {a: {b: 1, b: 2}}}\n", ["duplicate key b"]),
        (BASE + "data:\n  tasks:\n  - name: a\n    name: b\n", ["duplicate key data, at lines 2 and 3"]),
        ("model: {path: Zürich}".encode("latin-1"), ["not UTF-8", "save it as UTF-8"]),
        ("model: {path: m}".encode("utf-16"), ["not UTF-8"]),
        ("[" * 5000, ["nested too deeply"]),
        ("a: &a [*a]\n", ["nested too deeply, or contain themselves"]),
        (
            "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
            ["aliases make it more than"],
        ),
        ("train: {steps: !!int ten}\n", ["not valid YAML", "'ten'"]),
        ("train: {steps: !!timestamp 2026-11-30}\n", ["not valid YAML", "timestamp"]),
        ("train: {steps: !!python/name:os.system x}\n", ["not valid YAML"]),
        ("tracking: {run_name: {a}}\n" + BASE, ["tracking.run_name = {'a': None}", "write it in quotes"]),
        ("--- {}\n--- {}\n", ["not valid YAML"]),
        ("train: {1: 2}\n" + BASE, ["train.1 = 1"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_would_be_misread_is_refused(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    message = _refusal(tmp_path, text=text)
    assert all(word in message for word in words), message


def test_a_file_is_utf8_whatever_the_locale_with_or_without_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "latin-1")
    monkeypatch.setattr("locale.getencoding", lambda: "latin-1")
    for encoding in ("utf-8", "utf-8-sig"):
        config = _load(tmp_path, text=f"{BASE}tracking: {{run_name: Zürich → 東京}}\n".encode(encoding))
        assert config.tracking.run_name == "Zürich → 東京"


def test_a_key_may_have_its_former_name(tmp_path: Path) -> None:
    text = BASE + "coordinator: {hand_out: static}\n"
    assert _load(tmp_path, text=text).coordinator.dispatch == "static"
    for key in ("coordinator.hand_out", "coordinator.dispatch"):
        assert _load(tmp_path, f"{key}=dynamic", text=text).coordinator.dispatch == "dynamic"
        assert _load(tmp_path, f"coordinator={{{key.partition('.')[2]}: dynamic}}", text=text).coordinator.dispatch == "dynamic"
    both = _refusal(tmp_path, text=BASE + "coordinator: {hand_out: static, dispatch: dynamic}\n")
    assert "coordinator.hand_out is the former name of coordinator.dispatch" in both
    in_turns = ("coordinator={hand_out: static, window_seconds: 0.5}", "coordinator.dispatch=dynamic")
    assert _load(tmp_path, *in_turns).coordinator.dispatch == "dynamic"
    assert _load(tmp_path, *in_turns).coordinator.window_seconds == 0.5


def test_an_override_of_a_section_keeps_the_rest_of_it(tmp_path: Path) -> None:
    text = f"{BASE}train: {{steps: 3, seed: 7}}\n"
    config = _load(tmp_path, "train={steps: 5}", "speculation={toggle: {probe_steps: 5}}", text=text)
    assert config.train.steps == 5 and config.train.seed == 7 and config.speculation.toggle.probe_steps == 5
    assert _load(tmp_path, "train.steps=5", "train.steps=6", text=text).train.steps == 6, "the last one counts"


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["a.b=1", "c.d=2"], ["a.b=1", "c.d=2"]),
        (["a.b", "=", "1", "c.d=2"], ["a.b=1", "c.d=2"]),
        (["a.b", "=1"], ["a.b=1"]),
        (["a.b=", "1"], ["a.b=1"]),
        (["a.b=", "c.d=2"], ["a.b=", "c.d=2"]),
        (["a.b=x=", "1"], ["a.b=x=", "1"]),
        (["a.b=x", "=", "1"], ["a.b=x", "=", "1"]),
    ],
)
def test_blanks_round_the_sign_may_part_words(words: list[str], overrides: list[str]) -> None:
    assert joined(words) == overrides


def test_an_override_that_is_no_text_is_refused(tmp_path: Path) -> None:
    assert "not UTF-8" in _refusal(tmp_path, "train.output_dir=\udcff")


def _numbers() -> dict[str, Any]:
    """Every key that is a number, or a list of numbers, and its type."""
    return {key: kind for key, kind in known_keys(Config).items() if _of_numbers(kind)}


def _of_numbers(kind: Any) -> bool:
    return kind in (int, float) or any(_of_numbers(part) for part in get_args(kind) if not isinstance(part, Ge | Le))


def bounds_of(kind: Any) -> list[object]:
    if get_origin(kind) is Annotated:
        return [part for field in kind.__metadata__ for part in getattr(field, "metadata", [])]
    return [bound for part in get_args(kind) for bound in bounds_of(part)]


NUMBERS = _numbers()
SCALARS = [key for key in NUMBERS if not key.startswith("data.tasks")]
EXTREMES = ["1" + "0" * 4999, "-" + "9" * 5000, str(2**70), str(-(2**70)), "1e300", "-1e300", "1e-300", "1e400", ".inf", ".nan"]
EXTREMES += [
    "nan",
    "inf",
    "true",
    "",
    "0",
    "-1",
    "0x" + "f" * 600,
    "1" * 400,
    "[1, 2",
    "{}",
    "[]",
    "[[1]]",
    "1:30",
    "١",
    "1__0",
]


def test_every_number_has_twobounds_of() -> None:
    assert len(NUMBERS) > 60
    for key, kind in NUMBERS.items():
        found = {type(bound) for bound in bounds_of(kind)}
        assert found & {Ge, Gt} and found & {Le, Lt}, f"{key} has bounds {bounds_of(kind)}"


@pytest.mark.parametrize("key", SCALARS)
def test_a_number_of_any_size_is_taken_or_refused_in_one_line(key: str) -> None:
    for value in EXTREMES:
        _require_sense(key, value)


@example(key="data.test_size", value="10000001")  # overlaps the training items
@given(key=st.sampled_from(SCALARS), value=st.one_of(st.integers().map(str), st.floats().map(repr), st.text(max_size=8)))
@settings(max_examples=200, deadline=None)
def test_whatever_is_written_for_a_number_is_taken_or_refused_in_one_line(key: str, value: str) -> None:
    _require_sense(key, value)


def _require_sense(key: str, value: str) -> None:
    tree = {"model": {"path": "m"}, "data": {"kind": "chain_sum_cot"}}
    try:
        apply_override(tree, f"{key}={value}", Config)
        config = build_config(tree)
    except UserError as error:
        message = str(error)
        assert len(message) < 600 and "\n" not in message
        assert re.search(r"override|not UTF-8|" + re.escape(key.rpartition(".")[2]), message), message
    else:
        found = _get(config, key)
        assert all(math.isfinite(number) for number in (found if isinstance(found, tuple) else (found,)) if number is not None)
        json.dumps(config.to_dict(), allow_nan=False)


def test_a_long_value_is_cut_in_a_message() -> None:
    assert len(shown("x" * 10_000)) < 120 and len(shown(10**5000)) < 120 and shown("x") == "'x'"


def test_a_removed_key_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"speculation\.toggle\.margin is no longer a key: .*; remove it$"):
        _load(tmp_path, text=BASE + "speculation: {toggle: {margin: 0.05}}\n")
    for text, overrides in (("speculation: {toggle: {margin: 0.02}}\n", ()), ("", ("speculation.toggle.margin=0.02",))):
        assert _load(tmp_path, *overrides, text=BASE + text).speculation.toggle.probe_interval == 200  # as in every saved one
