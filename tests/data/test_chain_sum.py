import itertools
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erollout.data.chain_sum import ChainSumArgs, ChainSumSource, is_held_out, parse_args, question, solution
from erollout.errors import UserError
from erollout.rewards.answers import integer_match
from erollout.types import Prompt

ARGS = ChainSumArgs(min_terms=2, continue_probability=0.7, max_terms=12)


def source(
    split: Literal["train", "test"] = "train", args: ChainSumArgs = ARGS, seed: int = 5, size: int = 2000
) -> ChainSumSource:
    return ChainSumSource(args, seed=seed, size=size, split=split)


def test_format_of_an_item() -> None:
    assert question([4, -1, -7]) == "4-1-7=\n"
    assert solution([4, -1, -7]) == "4-1=3\n3-7=-4\n#-4"


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=20).map(lambda terms: [abs(terms[0]), *terms[1:]]))
def test_every_line_of_a_solution_is_true_and_scores_one(terms: list[int]) -> None:
    *lines, last = solution(terms).split("\n")
    for line in lines:
        left, right = line.split("=")
        assert eval(left) == int(right)
    assert eval(question(terms).removesuffix("=\n")) == int(last.removeprefix("#"))
    prompt = Prompt(0, (), "", "chain_sum_cot", {"answer": sum(terms)})
    assert integer_match(prompt, solution(terms)) == 1.0


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("#-4", 1.0),
        ("9#9\n# -4 ", 1.0),
        ("#-04", 1.0),
        ("-4", 0.0),
        ("#4", 0.0),
        ("#-4\n#5", 0.0),
        ("#-4.0", 0.0),
        ("#-4 or so", 0.0),
        ("#", 0.0),
        ("", 0.0),
        ("#-٤", 0.0),
    ],
)
def test_only_the_exact_integer_after_the_last_mark_scores(response: str, score: float) -> None:
    assert integer_match(Prompt(0, (), "", "chain_sum_cot", {"answer": -4}), response) == score


def test_items_depend_on_the_index_alone() -> None:
    forward, backward = source(), source()
    items = [forward.item(index) for index in range(50)]
    assert [backward.item(index) for index in reversed(range(50))] == items[::-1]
    assert forward.item(2000 + 7) == items[7], "a second epoch goes round again"


def test_train_and_test_share_no_question() -> None:
    train, test = source(), source("test", seed=100_000)
    train_questions = {train.item(index).question for index in range(2000)}
    test_questions = {test.item(index).question for index in range(2000)}
    assert not train_questions & test_questions
    assert all(is_held_out(str(text)) for text in test_questions)


def test_both_splits_hold_two_term_sums() -> None:
    texts = {question([first, second]) for first, second in itertools.product(range(10), range(-9, 10))}
    assert len(texts) == 190
    assert 10 < sum(map(is_held_out, texts)) < 40


@pytest.mark.parametrize("split", ["train", "test"])
def test_lengths_are_geometric(split: Literal["train", "test"]) -> None:
    items = [source(split).item(index) for index in range(2000)]
    counts = [len(str(item.solution).split("\n")) for item in items]
    assert min(counts) == 2
    assert max(counts) == 12
    for terms in (2, 3, 4):
        longer = sum(count > terms for count in counts) / sum(count >= terms for count in counts)
        assert abs(longer - 0.7) < 0.05


def test_arguments_are_checked() -> None:
    assert parse_args({"max_terms": 3}) == replace(ChainSumArgs(), max_terms=3)
    for args, message in [
        ({"max_term": 3}, r"data\.args\.max_term = 3.*max_terms"),
        ({"min_terms": 1}, r"data\.args\.min_terms = 1"),
        ({"continue_probability": 1.0}, r"data\.args\.continue_probability = 1\.0"),
        ({"min_terms": 9, "max_terms": 4}, r"data\.args\.max_terms = 4.*min_terms = 9"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_args(args)
