"""What tracking is told about datasets, and the rows that show samples."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from erollout.config import DataConfig
from erollout.data.datasets import build_datasets
from erollout.data.description import describe_datasets
from erollout.data.prompts import PromptLimits
from erollout.data.tokenizer import save_character_tokenizer
from erollout.errors import UserError
from erollout.rollout.sample_rows import sample_rows, write_rollouts
from erollout.types import Rollout, ScoredRollout

LIMITS = PromptLimits(max_prompt_tokens=100, context_tokens=200)


def _file(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _files(folder: Path, answer: object = 2) -> DataConfig:
    row = {"prompt": "1+1=", "answer": answer, "ok": True, "weight": 0.5, "tags": ["a"], "meta": {"b": 1}}
    train = _file(folder / "sums.jsonl", row, row | {"prompt": "1+2="})
    return DataConfig(kind="file", train_files=(train,), test_files=(_file(folder / "held.jsonl", row | {"prompt": "3+3="}),))


def _build(folder: Path, data: DataConfig):
    save_character_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return build_datasets(data, LIMITS, tokenizer)


def test_files_are_described_by_rows_columns_and_content(tmp_path: Path) -> None:
    data = _files(tmp_path)
    found = describe_datasets(data, *_build(tmp_path, data))
    training = found["training"]
    assert (training.name, training.source, training.rows) == ("sums", data.train_files[0], 2)
    assert list(training.columns.values()) == ["string", "long", "boolean", "double", "array", "object"]
    assert found["evaluation"].rows == 1 and found["evaluation"].digest != training.digest
    copied = tmp_path / "copy"
    copied.mkdir()
    again = _files(copied)
    assert describe_datasets(again, *_build(tmp_path, again))["training"].digest == training.digest
    changed = _files(copied, answer=3)
    assert describe_datasets(changed, *_build(tmp_path, changed))["training"].digest != training.digest


def test_a_file_that_has_gone_is_one_line(tmp_path: Path) -> None:
    data = _files(tmp_path)
    built = _build(tmp_path, data)
    Path(data.test_files[0]).unlink()
    with pytest.raises(UserError, match=r"held\.jsonl can't be read any more"):
        describe_datasets(data, *built)


def test_generated_items_are_described_by_what_determines_them(tmp_path: Path) -> None:
    def digest(**keys: object) -> str:
        data = DataConfig(kind="chain_sum_cot", **keys)
        described = describe_datasets(data, *_build(tmp_path, data))["training"]
        assert described.columns == {"question": "string", "answer": "long"} and described.name == "chain_sum_cot"
        return described.digest

    assert digest() == digest() != digest(train_seed=30_000_000) != digest(args={"max_terms": 3})


def test_rows_show_the_question_without_template_and_the_reference(tmp_path: Path) -> None:
    data = _files(tmp_path)
    train, _ = _build(tmp_path, data)
    index = next(i for i in range(2) if train.item(i).question == "1+2=")
    prompt = train.prompt(index)
    rollout = Rollout(index, 3, prompt.prompt_ids, (5, 6), (-0.5, -0.25), (-0.5, -0.25), "stop", 7)
    scored = [ScoredRollout(rollout, 0.5, "sums")]
    (row,) = sample_rows(scored, train, lambda rollout: f"{len(rollout.response_ids)} tokens")
    assert row == {
        "task": "sums",
        "prompt_index": index,
        "sample_index": 3,
        "prompt": "1+2=",
        "response": "2 tokens",
        "reference": "2",
        "reward": 0.5,
        "finish_reason": "stop",
        "tokens": 2,
    }
    write_rollouts(tmp_path / "rollouts" / "a.jsonl", scored, train, lambda _: "a\u2028\ud800b")
    read = json.loads((tmp_path / "rollouts" / "a.jsonl").read_bytes().decode(errors="surrogatepass"))
    assert read["response_ids"] == [5, 6] and read["rollout_logprobs"] == [-0.5, -0.25] and read["policy_version"] == 7
    assert read["response"] == "a\u2028\ud800b"
