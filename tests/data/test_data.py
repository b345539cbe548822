import gzip
import json
import subprocess
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from erollout.config import DataConfig, build_config
from erollout.configuration.keys import TaskConfig
from erollout.data import PromptDataset, PromptLimits, build_datasets
from erollout.data.tasks import BLOCK_SIZE
from erollout.data.tokenizer import CHARACTERS, load_tokenizer, save_character_tokenizer
from erollout.errors import UserError

LIMITS = PromptLimits(max_prompt_tokens=4000, context_tokens=5000)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def reloaded(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_character_tokenizer(path)
    return path


@pytest.fixture
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(directory, vocab_size=64)


@pytest.fixture
def byte_tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    """One token for each byte of any text, no bos."""
    from tokenizers import decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({"<eos>": 0, **{letter: index for index, letter in enumerate(alphabet, start=1)}}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def write_jsonl(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def file_data(path: str, **keys: Any) -> DataConfig:
    return DataConfig(kind="file", train_files=(path,), **keys)


# -- tokenizers --


def test_character_tokenizer_has_64_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 64 == len(set(CHARACTERS)) + 3
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


@given(text=st.text(alphabet=CHARACTERS, max_size=60))
def test_character_tokenizer_round_trip_is_exact(reloaded: PreTrainedTokenizerBase, text: str) -> None:
    ids = reloaded.encode(text, add_special_tokens=False)
    assert len(ids) == len(text)
    assert reloaded.decode(ids) == text


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_one_row_whose_prompt_is_messages(suffix: str, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    byte_tokenizer.chat_template = TEMPLATE
    path = write_jsonl(tmp_path / f"x{suffix}", {"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": 4})
    train, _ = build_datasets(file_data(path), LIMITS, byte_tokenizer)
    assert len(train) == 1 and "2 + 2?" in train.prompt(0).text


def test_a_vocabulary_larger_than_the_models_is_refused(directory: Path) -> None:
    with pytest.raises(UserError, match=r"has 64 tokens but the model's vocab_size is 63"):
        load_tokenizer(directory, vocab_size=63)


def test_directories_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a directory"):
        load_tokenizer(tmp_path / "missing", vocab_size=64)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path, vocab_size=64)


def test_a_damaged_tokenizer_is_refused(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="can't load the tokenizer"):
        load_tokenizer(tmp_path, vocab_size=64)


# -- prompts --


def test_a_prompt_without_template_is_bos_and_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    data = DataConfig(kind="chain_sum_cot", instruction="what is {prompt}")
    prompt = build_datasets(data, LIMITS, tokenizer)[0].prompt(3)
    assert prompt.index == 3
    assert prompt.prompt_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt.prompt_ids) == prompt.text
    assert prompt.text.startswith("<bos>what is ")
    assert prompt.text.endswith("=\n")


def test_chat_template_system_prompt_and_instruction(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    byte_tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "{c}"}]
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "2 + 2?", "answer": 4}, {"prompt": chat, "answer": "d"})
    data = file_data(path, system_prompt="be brief", instruction="Q: {prompt}!", test_files=(path,))
    with pytest.raises(UserError, match=r"data\.train_files and in data\.test_files"):
        build_datasets(data, LIMITS, byte_tokenizer)
    other = write_jsonl(tmp_path / "y.jsonl", Path(path).read_text())
    test = build_datasets(
        file_data(path, system_prompt="be brief", instruction="Q: {prompt}!", test_files=(other,)), LIMITS, byte_tokenizer
    )[1]
    assert test is not None
    texts = [test.prompt(index).text for index in range(2)]
    assert texts == [
        "<system>be brief\n<user>Q: 2 + 2?!\n<assistant>",
        "<system>be brief\n<user>a\n<assistant>b\n<user>Q: {c}!\n<assistant>",
    ]
    assert byte_tokenizer.decode(test.prompt(1).prompt_ids) == texts[1]


def test_chat_requests_that_cannot_be_honoured(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    user, system, tool = ({"role": role, "content": "x"} for role in ("user", "system", "tool"))
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": [system, user], "answer": "1"})
    with pytest.raises(UserError, match=r"data\.system_prompt is set but the tokenizer has no chat template"):
        build_datasets(file_data(path, system_prompt="s"), LIMITS, byte_tokenizer)
    with pytest.raises(UserError, match=r"x\.jsonl:1: chat messages need a tokenizer with a chat template"):
        build_datasets(file_data(path), LIMITS, byte_tokenizer)
    byte_tokenizer.chat_template = TEMPLATE
    with pytest.raises(UserError, match=r"x\.jsonl:1 has a system message of its own"):
        build_datasets(file_data(path, system_prompt="s"), LIMITS, byte_tokenizer)
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": [tool, user], "answer": "1"})
    with pytest.raises(UserError, match=r"x\.jsonl:1: the tokenizer's chat template refuses .* tool, user: no tools"):
        build_datasets(file_data(path), LIMITS, byte_tokenizer)
    with pytest.raises(UserError, match=r"data\.system_prompt is set but data\.chat_template = false"):
        build_datasets(file_data(path, system_prompt="s", chat_template=False), LIMITS, byte_tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 // 0 }}", r"data\.chat_template: .*ZeroDivisionError"),
        ("{{ messages + 1 }}", r"data\.chat_template: .*TypeError"),
        ("{% for %}", r"data\.chat_template: the tokenizer's chat template refuses"),
        ({"rag": TEMPLATE, "tool_use": TEMPLATE}, r"chat templates named rag, tool_use but none named default"),
    ],
)
def test_templates_that_raise_anything_are_refused_in_one_line(
    template: Any, message: str, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    byte_tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as error:
        build_datasets(DataConfig(kind="chain_sum_cot"), LIMITS, byte_tokenizer)
    assert "\n" not in str(error.value)


def test_one_of_several_templates_is_the_default(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    byte_tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ 1 // 0 }}"}
    assert build_datasets(DataConfig(kind="chain_sum_cot"), LIMITS, byte_tokenizer)[0].prompt(0).text.startswith("<user>")


def test_the_clock_of_a_template_stands_still(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    byte_tokenizer.chat_template = "{{ strftime_now('%d %b %Y %H:%M') }} " + TEMPLATE
    train, test = build_datasets(DataConfig(kind="chain_sum_cot", date="2024-07-26"), LIMITS, byte_tokenizer)
    assert test is not None and train.renderer is test.renderer and train.renderer.tells_date
    assert train.prompt(0).text.startswith("26 Jul 2024 00:00 <user>")
    train.renderer.date = date(2025, 1, 2)
    assert test.prompt(0).text.startswith("02 Jan 2025 00:00 <user>")
    assert DataConfig(date=date(2025, 1, 2)).date == "2025-01-02", "as YAML reads it"
    with pytest.raises(UserError, match=r"data\.date = 'monday': Input should be a day"):
        build_config({"data": {"date": "monday"}})


def test_seeds_that_tasks_with_numpy_cannot_take_are_refused(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    data = DataConfig(tasks=(TaskConfig("chain_sum"),), train_seed=2**32 - 3, train_size=4)
    with pytest.raises(UserError, match=r"seeds below 2\^32, not 4294967296; lower data\.train_seed"):
        build_datasets(data, LIMITS, byte_tokenizer)


def test_text_that_the_tokenizer_does_not_know_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "Ä", "answer": "1"})
    with pytest.raises(UserError, match=r"x\.jsonl:1: the tokenizer can't encode"):
        build_datasets(file_data(path), LIMITS, tokenizer)[0].prompt(0)


def test_prompts_that_are_too_long_are_refused_before_the_run(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "x" * 30, "answer": "1"}, {"prompt": "x" * 31, "answer": "1"})
    with pytest.raises(UserError, match=r"x\.jsonl:2: prompt has 31 tokens, more than rollout\.max_prompt_tokens = 30"):
        build_datasets(file_data(path), PromptLimits(30, 100), byte_tokenizer)
    with pytest.raises(UserError, match=r"x\.jsonl:2: prompt has 31 tokens, which leaves no room .* context of 31"):
        build_datasets(file_data(path), PromptLimits(100, 31), byte_tokenizer)
    train = build_datasets(file_data(path), PromptLimits(31, 32), byte_tokenizer)[0]
    assert {len(train.prompt(index).prompt_ids) for index in range(2)} == {30, 31}


@pytest.mark.parametrize("kind", ["chain_sum_cot", "reasoning_gym"])
def test_generated_prompts_that_are_too_long_are_refused(kind: Any, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    data = DataConfig(kind=kind, tasks=(TaskConfig("chain_sum"),), train_seed=300)
    train = build_datasets(data, PromptLimits(3, 100), byte_tokenizer)[0]
    with pytest.raises(
        UserError, match=r"chain_sum.* item 307: prompt has \d+ tokens, more than rollout\.max_prompt_tokens = 3"
    ):
        train.prompt(7)


# -- supervised examples --


def test_supervised_examples_solve_the_prompt_and_come_from_the_far_end(tokenizer: PreTrainedTokenizerBase) -> None:
    train = build_datasets(DataConfig(kind="chain_sum_cot", train_size=50), LIMITS, tokenizer)[0]
    for index in (0, 1, 49, 50):
        prompt_ids, response_ids = train.supervised_example(index)
        prompt = train.prompt(49 - index % 50)
        assert prompt_ids == prompt.prompt_ids
        assert response_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(response_ids[:-1]).rpartition("#")[2] == str(prompt.item["answer"])


def test_supervised_examples_of_files(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", *({"q": f"question {n}", "a": n} for n in range(5)))
    train = build_datasets(file_data(path, prompt_column="q", answer_column="a"), LIMITS, byte_tokenizer)[0]
    examples = {tuple(map(byte_tokenizer.decode, train.supervised_example(index))) for index in range(5)}
    assert examples == {(f"question {n}", f"{n}<eos>") for n in range(5)}


def test_supervised_examples_that_do_not_exist_or_fit(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "q", "answer": "x" * 50})
    with pytest.raises(UserError, match=r"x\.jsonl:1: prompt and solution have 52 tokens, more than .* 51"):
        build_datasets(file_data(path), PromptLimits(10, 51), byte_tokenizer)[0].supervised_example(0)
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "q", "answer": {"tests": []}})
    with pytest.raises(UserError, match=r"x\.jsonl:1 has no written solution"):
        build_datasets(file_data(path), LIMITS, byte_tokenizer)[0].supervised_example(0)


# -- reasoning-gym --


def gym(byte_tokenizer: PreTrainedTokenizerBase, *tasks: TaskConfig, **keys: Any) -> tuple[PromptDataset, PromptDataset]:
    train, test = build_datasets(DataConfig(tasks=tasks, **keys), LIMITS, byte_tokenizer)
    assert test is not None
    return train, test


@pytest.mark.parametrize("name", ["chain_sum", "acre", "gsm_symbolic", "simple_equations"])
def test_items_depend_on_the_index_alone(name: str, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    indices = [0, 3, BLOCK_SIZE - 1, BLOCK_SIZE, 3 * BLOCK_SIZE + 1, 900_000]
    train, again = (gym(byte_tokenizer, TaskConfig(name))[0] for _ in range(2))
    prompts = [train.prompt(index) for index in indices]
    assert [again.prompt(index) for index in reversed(indices)] == prompts[::-1]
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert train.prompt(1_000_000 + 3).prompt_ids == prompts[1].prompt_ids


@pytest.mark.parametrize("name", ["basic_arithmetic", "acre", "gsm_symbolic", "calendar_arithmetic"])
def test_train_and_test_items_are_disjoint(name: str, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    args = {"min_terms": 5, "max_terms": 6, "min_digits": 3} if name == "basic_arithmetic" else {}
    train, test = gym(byte_tokenizer, TaskConfig(name, args=args))
    texts = [{dataset.prompt(index).text for index in range(200)} for dataset in (train, test)]
    assert len(texts[0] & texts[1]) <= (4 if name == "calendar_arithmetic" else 0)


def test_a_mixture_follows_its_weights(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    tasks = (TaskConfig("chain_sum", weight=3.0), TaskConfig("leg_counting", weight=1.0))
    train, _ = gym(byte_tokenizer, *tasks)
    counts = Counter(train.prompt(index).task for index in range(1000))
    assert counts.keys() == {"chain_sum", "leg_counting"}
    assert abs(counts["chain_sum"] / 1000 - 0.75) < 0.05


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TaskConfig("chain_sums"), r"data\.tasks\.0\.name = 'chain_sums' .* did you mean chain_sum\?"),
        (TaskConfig("codeio"), r"data\.tasks\.0\.name = 'codeio': its items differ between ranks and runs"),
        (TaskConfig("composite"), r"'composite' .* data\.tasks with weights"),
        (TaskConfig("chain_sum", args={"max_term": 3}), r"data\.tasks\.0\.args\.max_term .* did you mean max_terms\?"),
        (TaskConfig("chain_sum", args={"seed": 3}), r"data\.tasks\.0\.args\.seed .* data\.train_seed"),
        (TaskConfig("chain_sum", args={"max_terms": 0}), r"data\.tasks\.0\.args = .* chain_sum refuses them: max_terms must"),
        (TaskConfig("chain_sum", args={"max_terms": "x"}), r"data\.tasks\.0\.args = .* chain_sum refuses them"),
    ],
)
def test_tasks_that_cannot_be_had_are_refused(task: TaskConfig, message: str, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=message):
        gym(byte_tokenizer, task)


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_tasks_that_depend_on_string_hashes_need_them_fixed(hash_seed: str) -> None:
    code = (
        "from erollout.configuration.keys import TaskConfig; from erollout.data.tasks import ReasoningGymSource;"
        "print(ReasoningGymSource((TaskConfig('word_ladder'),), 0, 1_000_000).item(30_000).origin)"
    )
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True)
    if hash_seed == "0":
        assert run.stdout == "word_ladder item 30000\n"
    else:
        assert "UserError: data.tasks.0.name = 'word_ladder'" in run.stderr
        assert "PYTHONHASHSEED=0" in run.stderr


# -- files --


def test_each_epoch_of_a_file_has_every_row_in_its_own_order(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", *({"prompt": f"q{n}", "answer": n} for n in range(20)))
    train, again, other = (
        build_datasets(file_data(path, train_seed=seed), LIMITS, byte_tokenizer)[0]
        for seed in (50_000_000, 50_000_000, 60_000_000)
    )
    epochs = [[train.prompt(epoch * 20 + n).text for n in range(20)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert again.prompt(47).text == epochs[2][7], "a position alone is enough to go on from"
    assert [other.prompt(n).text for n in range(20)] != epochs[0]


def test_test_files_keep_their_order_and_all_columns_reach_the_scorer(
    byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"prompt": f"q{n}", "answer": f"a{n}", "level": n} for n in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "held.parquet")
    data = file_data(write_jsonl(tmp_path / "x.jsonl", "", rows[0]), test_files=(str(tmp_path / "held.parquet"),))
    train, test = build_datasets(data, LIMITS, byte_tokenizer)
    assert test is not None
    assert (len(train), len(test)) == (1, 5)
    assert [test.prompt(n).item for n in range(5)] == [
        {"answer": row["answer"], "row": row, "origin": f"{tmp_path / 'held.parquet'} row {n}"} for n, row in enumerate(rows, 1)
    ]
    assert (train.prompt(0).task, test.prompt(0).task) == ("x", "held")


def test_shared_questions_are_reported(
    byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [
        write_jsonl(tmp_path / f"{n}.jsonl", {"prompt": "q", "answer": "a"}, {"prompt": f"q{n}", "answer": "a"}) for n in "12"
    ]
    build_datasets(file_data(paths[0], test_files=(paths[1],)), LIMITS, byte_tokenizer)
    assert "1 of 2 test questions are also in data.train_files" in caplog.text


GOOD = {"prompt": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, "", {"prompt": "q"}], r"x\.jsonl:3: no column 'answer' \(columns: prompt\); .* data\.answer_column"),
        ([GOOD, {"prompt": None, "answer": "a"}], r"x\.jsonl:2: no column 'prompt' \(columns: answer\)"),
        ([GOOD, '{"prompt": "q", '], r"x\.jsonl:2: not valid JSON"),
        ([GOOD, "[1]"], r"x\.jsonl:2: a row must be an object with columns, not list"),
        ([{"prompt": 3, "answer": "a"}], r"x\.jsonl:1: column 'prompt' must be text or a list of messages"),
        ([{"prompt": [{"role": "user"}], "answer": "a"}], r"x\.jsonl:1: column 'prompt' must be text or a list of messages"),
        (
            [{"prompt": [{"role": "assistant", "content": "x"}], "answer": "a"}],
            r"x\.jsonl:1: .* must end with one of role user",
        ),
        ([], r"x\.jsonl: no rows"),
        (
            ['{"prompt": "q \\ud83d", "answer": "a"}'],
            r"x\.jsonl:1: column 'prompt' holds half a character, \\ud83d at position 2",
        ),
        (['{"prompt": "q", "answer": "\\udc00"}'], r"x\.jsonl:1: column 'answer' holds half a character"),
        (['{"prompt": ' + "[" * 100_000], r"x\.jsonl:1: not valid JSON"),
        (['{"prompt": "q", "answer": NaN}'], r"x\.jsonl:1: column 'answer' is NaN"),
        (
            [{"prompt": '[{"role": "user", ', "answer": "a"}],
            r"x\.jsonl:1: column .prompt. looks like messages but",
        ),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "answer": "a"}],
            r"x\.jsonl:1: column 'prompt' has a content part of type 'image'",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_refused(
    rows: list[Any], message: str, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        build_datasets(file_data(write_jsonl(tmp_path / "x.jsonl", *rows)), LIMITS, byte_tokenizer)


def test_columns_inside_columns_and_messages_in_other_forms(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    byte_tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "q"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "q"}, {"text": "!"}]}]
    rows = [
        {"prompt": messages, "reward_model": {"ground_truth": "7"}},
        {"prompt": json.dumps(messages), "reward_model": json.dumps({"ground_truth": 7})},
        {"prompt": parts, "reward_model": {"ground_truth": 7.0}},
        {"prompt": "q", "reward_model": {}, "reward_model.ground_truth": "8"},
    ]
    path = write_jsonl(tmp_path / "x.jsonl", *rows)
    data = file_data(write_jsonl(tmp_path / "y.jsonl", rows[0]), test_files=(path,), answer_column="reward_model.ground_truth")
    test = build_datasets(data, LIMITS, byte_tokenizer)[1]
    assert test is not None
    texts = [test.prompt(n).text for n in range(4)]
    assert texts == [f"<user>{text}\n<assistant>" for text in ("q", "q", "q!", "q")]
    assert [test.prompt(n).item["answer"] for n in range(4)] == ["7", "7", "7.0", "8"]
    with pytest.raises(UserError, match=r"x\.jsonl:1: no column 'reward_model\.answer' \(columns: reward_model\.ground_truth"):
        build_datasets(file_data(path, answer_column="reward_model.answer"), LIMITS, byte_tokenizer)


@pytest.mark.parametrize("name", ["x.json", "wrapped.json", "lines.json", "x.jsonl.gz", "x.json.gz", "bom.jsonl", "x.parquet"])
def test_every_file_type_gives_the_same_rows(name: str, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "answer": f"a{n}"} for n in range(3)]
    text = {"x": json.dumps(rows, indent=1), "wrapped": json.dumps({"version": 1, "data": rows})}
    lines = "\ufeff" * (name == "bom.jsonl") + "\r\n".join(json.dumps(row) for row in rows)
    data = (lines if ".jsonl" in name or name == "lines.json" else text[name.partition(".")[0]]).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    train = build_datasets(file_data(str(tmp_path / name)), LIMITS, byte_tokenizer)[0]
    assert sorted(train.prompt(n).text for n in range(3)) == ["q0", "q1", "q2"]


def test_files_that_cannot_be_read_are_refused(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("not parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD, {"prompt": "q"}]), tmp_path / "y.parquet")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "q", "answer": 1}')[:-12])
    (tmp_path / "plain.jsonl.gz").write_text('{"prompt": "q", "answer": 1}')
    (tmp_path / "broken.json").write_text('[{"prompt": "q", ')
    (tmp_path / "mixed.json").write_text('[{"prompt": "q", "answer": 1}, 3]')
    (tmp_path / "z.jsonl").write_bytes(b'{"prompt": "\xff", "answer": 1}')
    for name, message in [
        ("missing.jsonl", r"can't read dataset .*missing\.jsonl: No such file"),
        ("missing.parquet", r"can't read dataset .*missing\.parquet"),
        ("x.csv", r"x\.csv: unknown file type '\.csv'"),
        ("x.parquet", r"can't read dataset .*x\.parquet"),
        ("y.parquet", r"y\.parquet row 2: no column 'answer'"),
        ("z.jsonl", r"z\.jsonl:1: not valid JSON"),
        ("cut.jsonl.gz", r"can't read dataset .*cut\.jsonl\.gz"),
        ("plain.jsonl.gz", r"can't read dataset .*plain\.jsonl\.gz"),
        ("broken.json", r"broken\.json: not valid JSON"),
        ("mixed.json", r"mixed\.json row 2: a row must be an object with columns, not int"),
    ]:
        with pytest.raises(UserError, match=message):
            build_datasets(file_data(str(tmp_path / name)), LIMITS, byte_tokenizer)
