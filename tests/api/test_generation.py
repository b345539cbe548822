"""The engine for programs: texts and token ids in, completions out, equal with and without speculation and on any layout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import invoke, save_random_model
from ranks import RankPool

import erollout
from erollout import Engine, SamplingParams, UserError

DRAFTED = {"drafter": "w8a8", "num_speculative_tokens": 2, "kv_cache_gib": 0.01}
PROMPTS = ["1+2=", "4-1-7=", "12+3-4="]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"))


def _generated(folder: str, **options) -> list[tuple[str, tuple[int, ...], tuple[float, ...]]]:
    with Engine.from_pretrained(folder, seed=5, **DRAFTED, **options) as engine:
        first = engine.generate(PROMPTS, SamplingParams(max_tokens=12), n=2)
        second = engine.generate(PROMPTS[0], SamplingParams(max_tokens=12))
    rows = [(each.text, each.token_ids, each.logprobs) for found in (first, second) for p in found for each in p.completions]
    assert rows[0] != rows[-1], "each call has samples of its own"
    return rows


def test_speculation_changes_no_token(model: Path) -> None:
    without = _generated(str(model))
    assert len(without) == 7 and all(len(tokens) == len(logprobs) for _, tokens, logprobs in without)
    assert _generated(str(model), speculation="always") == without


def test_the_result_tells_what_speculation_did_and_takes_token_ids(model: Path) -> None:
    with Engine.from_pretrained(model, "always", **DRAFTED) as engine:
        ids = engine.tokenizer.encode("7-2=")
        by_text = engine.generate("7-2=", SamplingParams(max_tokens=12, temperature=0))
        by_ids = engine.generate([ids, ids], SamplingParams(max_tokens=12, temperature=0))
        assert by_ids[0].completions == by_ids[1].completions == by_text[0].completions
        assert by_text[0].prompt == "7-2=" and by_ids[0].prompt is None and by_ids[0].prompt_token_ids == tuple(ids)
        assert by_text.speculation.num_drafts > 0 and by_text.tokens_per_second > 0 and by_text.why
        assert by_text[0].text == engine.tokenizer.decode(by_text[0].completions[0].token_ids, skip_special_tokens=True)


def _generated_here(folder: str, tensor: int) -> list[tuple[str, tuple[int, ...]]]:
    rows = _generated(folder, speculation="always", tensor_parallel_size=tensor, dtype="float32")
    return [(text, tokens) for text, tokens, _ in rows]


@pytest.mark.distributed
@pytest.mark.parametrize("tensor", [1, 2], ids=["two replicas", "one replica of two"])
def test_every_rank_gets_all_completions(model: Path, rank_pool: RankPool, tensor: int) -> None:
    one, other = rank_pool.run(2, _generated_here, str(model), tensor)
    assert one == other
    if tensor == 1:
        assert one == [(text, tokens) for text, tokens, _ in _generated(str(model), dtype="float32")]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [([], "no prompts"), ([[]], "prompt 0 = []"), (["1+1=", ""], "prompt 1 = ''"), ([[1, 10**6]], "vocabulary")],
)
def test_impossible_prompts_are_refused(model: Path, prompts, words: str) -> None:
    with Engine.from_pretrained(model, **DRAFTED) as engine:
        with pytest.raises(UserError) as error:
            engine.generate(prompts, SamplingParams(max_tokens=8))
        assert words in str(error.value)
        with pytest.raises(UserError, match="no chat template"):
            engine.chat("1+1=")
        assert engine.generate("1+1=", SamplingParams(max_tokens=2))[0].completions  # it can still be used


def test_what_can_not_be_loaded_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    for folder, overrides, word in ((tmp_path, (), "config.json"), (model, ("rollout.kernelz=torch",), "rollout.kernels")):
        with pytest.raises(UserError, match=word):
            Engine.from_pretrained(folder, overrides=overrides)


def test_importing_the_package_loads_nothing_and_says_nothing() -> None:
    code = "import erollout, sys; assert 'torch' not in sys.modules; erollout.load_config; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert all(hasattr(erollout, name) for name in erollout.__all__)
    with pytest.raises(AttributeError):
        _ = erollout.nothing


def test_the_command_completes_prompts(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("1+1=\n\n2+2=\n")
    options = ("--max-tokens", "4", "--temperature", "0", "rollout.kv_cache_gib=0.01")
    done = invoke("generate", "--model", str(model), "--prompts", str(tmp_path / "prompts.txt"), "--json", *options)
    assert done.status == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["1+1=", "2+2="] and len(rows[0]["completions"][0]["token_ids"]) <= 4
    assert "tokens/s" in done.stderr
    shown = invoke("generate", "--model", str(model), "--prompt", "1+1=", *options)
    assert shown.stdout == f"1+1={rows[0]['completions'][0]['text']}\n"
    assert "no prompt is given" in invoke("generate", "--model", str(model)).error()
    assert "can't be read" in invoke("generate", "--model", str(model), "--prompts", str(tmp_path)).error()


def test_no_exported_name_is_a_module() -> None:
    """Importing the module would replace the function."""
    package = Path(erollout.__file__).parent
    modules = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert not modules & set(erollout.__all__)
