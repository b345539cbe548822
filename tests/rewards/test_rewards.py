import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from math_forms import RIGHT, WRONG

from erollout.config import DataConfig, RewardsConfig, build_config
from erollout.configuration.keys import TaskConfig
from erollout.data.tasks import ReasoningGymSource
from erollout.errors import UserError
from erollout.rewards import RewardPool, Scorer, ScoringCounts, build_scorer
from erollout.rewards.answers import exact_match, final_answer
from erollout.rewards.probe import ScorerProbe
from erollout.types import Prompt, Rollout

TASKS = [
    *("basic_arithmetic", "calendar_arithmetic", "chain_sum", "gsm_symbolic", "leg_counting", "letter_counting"),
    *("number_sorting", "simple_equations", "spell_backward", "syllogism", "acre", "caesar_cipher"),
]


@pytest.fixture
def pool() -> Iterator[RewardPool]:
    with RewardPool(Scorer("scripted_scorer:scripted"), num_workers=2, timeout_seconds=60.0, error_value=-1.0) as pool:
        yield pool


@pytest.fixture
def hasty_pool() -> Iterator[RewardPool]:
    """With a limit that scorers are meant to exceed."""
    with RewardPool(Scorer("scripted_scorer:scripted"), num_workers=2, timeout_seconds=4.0, error_value=-1.0) as pool:
        yield pool


def score(pool: RewardPool, *responses: object, prompt: Prompt | None = None) -> list[float]:
    for index, response in enumerate(responses):
        rollout = Rollout(7, index, (), (), (), (), "stop", 0)
        pool.submit(prompt or Prompt(7, (), "", "t"), rollout, response)  # type: ignore[arg-type]
    rewards = pool.collect()
    assert sorted(rewards) == [(7, index) for index in range(len(responses))]
    return [rewards[7, index].value for index in range(len(responses))]


def test_pool_returns_each_score_under_its_key(pool: RewardPool) -> None:
    values = [index / 10 for index in range(30)]
    assert score(pool, *(f"value {value}" for value in values)) == values
    assert pool.counts == ScoringCounts(scored=30)
    assert pool.collect() == {}
    assert score(pool, "value 3") == [3.0], "the same key may come again after a collect"


def test_code_that_forks_answers_once(pool: RewardPool) -> None:
    """Else every later response of that process would get the reward of the one before."""
    values = [float(index) for index in range(20)]
    assert score(pool, "fork 0.25", "fork 0.25", *(f"value {value}" for value in values)) == [0.25, 0.25, *values]
    assert pool.counts == ScoringCounts(scored=22)


def test_processes_that_die_between_rollouts_cost_nothing() -> None:
    """More of them than starts may fail in a row."""
    with RewardPool(Scorer("scripted_scorer:scripted"), num_workers=4, timeout_seconds=60.0, error_value=-1.0) as pool:
        score(pool, *["sleep 0.2"] * 16)
        assert len(pool.worker_pids) == 4
        for pid in pool.worker_pids:
            os.kill(pid, signal.SIGKILL)
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
        assert score(pool, *["value 2"] * 12) == [2.0] * 12
        assert pool.counts == ScoringCounts(scored=12)


def test_pool_uses_every_worker_and_keeps_them(pool: RewardPool) -> None:
    assert pool.worker_pids == []
    score(pool, *["sleep 0.1"] * 8)
    workers = set(pool.worker_pids)
    assert len(workers) == 2
    assert set(score(pool, *["pid"] * 20)) <= {float(pid) for pid in workers}
    assert set(pool.worker_pids) == workers


def test_responses_are_scored_while_others_are_still_sampled(pool: RewardPool, tmp_path: Path) -> None:
    pool.submit(Prompt(1, (), "", "t"), Rollout(1, 0, (), (), (), (), "stop", 0), f"touch {tmp_path / 'scored'}")
    while not (tmp_path / "scored").exists():
        time.sleep(0.01)
    assert list(pool.collect()) == [(1, 0)]


@pytest.mark.parametrize("stuck", ["sleep 600", "ignore_sigterm_and_sleep"])
def test_a_stuck_scorer_is_killed_and_replaced(hasty_pool: RewardPool, stuck: str) -> None:
    score(hasty_pool, *["sleep 0.1"] * 8)
    before = set(hasty_pool.worker_pids)
    assert score(hasty_pool, "value 1", stuck, "value 2", "value 3") == [1.0, -1.0, 2.0, 3.0]
    assert hasty_pool.counts == ScoringCounts(scored=3, timeouts=1, first_error="scorer took more than 4 s")
    score(hasty_pool, *["sleep 0.1"] * 8)
    lost = before - set(hasty_pool.worker_pids)
    assert len(lost) == 1
    assert not any(psutil.pid_exists(pid) for pid in lost)


@pytest.mark.parametrize("what", ["child", "child_of_its_own"])
def test_killing_a_scorer_takes_along_what_it_started(hasty_pool: RewardPool, what: str, tmp_path: Path) -> None:
    """Also what leads a session of its own, as sandboxes do."""
    assert score(hasty_pool, f"{what} {tmp_path / 'pid'}") == [-1.0]
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(child)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("raise no such thing", "RuntimeError: no such thing"),
        ("exit", "scorer ended its process"),
        ("sys_exit", "scorer ended its process"),
        ("value nan", "ValueError: scripted_scorer:scripted returned nan"),
        ("value two", "ValueError: could not convert"),
    ],
)
def test_a_failing_scorer_costs_only_its_own_sample(pool: RewardPool, response: str, message: str) -> None:
    values = score(pool, *["value 1"] * 5, response, *["value 2"] * 5, response)
    assert values == [1.0] * 5 + [-1.0] + [2.0] * 5 + [-1.0]
    assert (pool.counts.scored, pool.counts.errors, pool.counts.timeouts) == (10, 2, 0)
    assert pool.counts.first_error is not None
    assert message in pool.counts.first_error
    assert score(pool, "value 3") == [3.0]


def test_a_worker_killed_while_idle_costs_nothing(pool: RewardPool) -> None:
    score(pool, *["sleep 0.1"] * 4)
    for pid in pool.worker_pids:
        os.kill(pid, signal.SIGKILL)
    assert score(pool, *["value 1"] * 6) == [1.0] * 6, "whether they are dead by now or not"
    assert pool.counts == ScoringCounts(scored=6)


def test_a_worker_that_dies_before_it_takes_a_response_costs_nothing(pool: RewardPool) -> None:
    score(pool, *["sleep 0.1"] * 4)
    stopped = pool.worker_pids
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(1.0, lambda: [os.kill(pid, signal.SIGKILL) for pid in stopped])
    timer.start()
    assert score(pool, *["value 1"] * 6) == [1.0] * 6
    timer.join()
    assert pool.counts == ScoringCounts(scored=6)


def test_signals_for_ranks_cost_no_score(pool: RewardPool) -> None:
    """A scheduler sends them to all processes of a job, from the first moment on."""
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            for pid in pool.worker_pids:
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGUSR1)
            time.sleep(0.001)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert score(pool, *["sleep 0.2"] * 4) == [0.2] * 4
    finally:
        done.set()
        thread.join()
    assert len(pool.worker_pids) == 2 and pool.counts == ScoringCounts(scored=4)
    assert score(pool, "terminate_children") == [-signal.SIGTERM]


def test_an_item_that_cannot_be_pickled_costs_only_its_own_sample(pool: RewardPool) -> None:
    prompt = Prompt(7, (), "", "t", {"generator": (number for number in range(3))})
    assert score(pool, "value 1", prompt=prompt) == [-1.0]
    assert "can't be sent" in str(pool.counts.first_error)
    assert score(pool, "value 1") == [1.0]


def test_a_scorer_that_does_not_load_in_the_worker_is_counted() -> None:
    with RewardPool(Scorer("scripted_scorer:missing"), num_workers=1, timeout_seconds=60.0, error_value=0.0) as pool:
        assert score(pool, "a", "b") == [0.0, 0.0]
        assert pool.counts.errors == 2
        assert "missing" in str(pool.counts.first_error)


def test_workers_are_light_and_keep_off_standard_output(pool: RewardPool, capfd: pytest.CaptureFixture[str]) -> None:
    scorer = Scorer("erollout.rewards.answers:exact_match")
    code = (
        "import sys; from erollout.rewards.worker import main; print(sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    with RewardPool(scorer, num_workers=1, timeout_seconds=60.0, error_value=0.0) as exact:
        assert score(exact, "42", prompt=Prompt(7, (), "", "t", {"answer": "42"})) == [1.0]
    assert score(pool, "print 1") == [1.0]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "a scorer's own output" in captured.err


def test_processes_end_with_the_pool_even_in_an_exception() -> None:
    with pytest.raises(KeyError), RewardPool(Scorer("scripted_scorer:scripted"), 2, 30.0, 0.0) as pool:
        score(pool, *["sleep 0.1"] * 4)
        pids = pool.worker_pids
        pool.submit(Prompt(1, (), "", "t"), Rollout(1, 0, (), (), (), (), "stop", 0), "sleep 600")
        raise KeyError
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_stuck_scorer_does_not_outlive_a_killed_rank(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    code = f"""
import sys; sys.path[:0] = {[str(path) for path in Path(__file__).parents[:2]]!r}
from test_rewards import *
pool = RewardPool(Scorer("scripted_scorer:scripted"), 1, 600.0, 0.0)
score(pool, "value 1")
pool.submit(Prompt(1, (), "", "t"), Rollout(1, 0, (), (), (), (), "stop", 0), "ignore_sigterm_and_sleep")
Path({str(started)!r}).write_text(str(pool.worker_pids[0]))
time.sleep(600)
"""
    rank = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    worker = int(started.read_text())
    assert is_running(worker)
    rank.kill()
    rank.wait()
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(worker)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("scripted_scorer", "package.module:function"),
        (":scripted", "package.module:function"),
        ("scripted_scorer:two words", "package.module:function"),
        ("no_such_module:score", "there is no module no_such_module"),
        ("scripted_scorer:no_such_function", "no_such_function"),
        ("scripted_scorer:wrong_signature", "callable as function"),
        ("scripted_scorer:__name__", "callable"),
    ],
)
def test_a_reward_function_that_cannot_be_used_is_refused_at_start(function: str, message: str) -> None:
    with pytest.raises(UserError, match=r"rewards\.function") as error:
        probe(build_scorer(RewardsConfig(function=function), DataConfig()))
    assert message in str(error.value)


def probe(scorer: Scorer, solution: str | None = "7", timeout_seconds: float = 60.0) -> None:
    with ScorerProbe(scorer, timeout_seconds) as trial:
        trial.require_scores(Prompt(0, (), "", "sums", {"answer": "7"}), solution)


USER_FILE = """
import sys
from helpers_of_a_user import seven
def good(prompt, response): return 1.0 if seven() in response else 0.0
def choosy(prompt, response): return float(response[response.index("####"):] != "")
def raises(prompt, response): return {}["no key"]
def gives_dict(prompt, response): return {"score": 1.0}
def gives_nothing(prompt, response): pass
def thinks(prompt, response): return float(response.split("</think>")[1] == "7")
def mixes(prompt, response): return {}["no key"] if "#" not in response else {"score": 1.0}
def gives_several(prompt, response):
    import numpy
    return numpy.zeros(2)
def gives_text(prompt, response): return "1.0"
def gives_nan(prompt, response): return float("nan")
async def waits(prompt, response): return 1.0
def hangs(prompt, response):
    while True: pass
def leaves(prompt, response): sys.exit(3)
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "helpers_of_a_user.py").write_text("def seven(): return '7'")
    (tmp_path / "my_scores.py").write_text(USER_FILE)
    return tmp_path


def in_file(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp: str = "elsewhere") -> Scorer:
    """As a configuration in `folder` names it, with the command given in another place."""
    (folder / tmp).mkdir()
    monkeypatch.chdir(folder / tmp)
    return build_scorer(RewardsConfig(function=name, import_path=str(folder)), DataConfig())


@pytest.mark.parametrize("name", ["my_scores:good", "my_scores.py:good", "my_scores.py:choosy"])
def test_a_function_beside_the_configuration(name: str, user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = in_file(name, user_file, monkeypatch)
    probe(scorer)
    with RewardPool(scorer, 1, 60.0, 0.0) as pool:
        assert score(pool, "#### 7") == [1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_scores.py:gives_dict", r"returned a dict, .*; a reward is a number"),
        ("my_scores.py:gives_nothing", r"returned a NoneType"),
        ("my_scores.py:gives_text", r"returned a str, '1.0'; a reward is a number"),
        ("my_scores.py:gives_several", r"returned a ndarray that is no number"),
        ("my_scores.py:mixes", r"returned a dict"),
        ("my_scores.py:gives_nan", r"returned nan"),
        ("my_scores.py:waits", r"returned a coroutine"),
        ("my_scores.py:leaves", r"scorer ended its process"),
        ("my_scores.py:god", r"has no function god; did you mean good\?"),
        ("my_scores:god", r"has no function god; did you mean good\?"),
        ("my_score:good", r"there is no module my_score in .* nor on Python's path .*; did you mean my_scores\?"),
        ("my_score.py:good", r"there is no file my_score\.py in .*; did you mean my_scores\.py\?"),
        ("exits.py:good", r"exits when it is imported \(SystemExit: 2\)"),
        ("dies.py:good", r"died while it started and loaded .*dies\.py:good"),
        ("broken.py:good", r"can't be imported \(SyntaxError: "),
        ("lacks.py:good", r"can't be imported \(ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    ],
)
def test_a_function_that_cannot_score_is_refused_in_one_line(
    name: str, message: str, user_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (user_file / "exits.py").write_text("import sys; sys.exit(2)")
    (user_file / "dies.py").write_text("import os; os._exit(0)")
    (user_file / "broken.py").write_text("def good(:")
    (user_file / "lacks.py").write_text("import nowhere_to_be_found")
    with pytest.raises(UserError, match=message) as error:
        probe(in_file(name, user_file, monkeypatch))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [("raises", "score the first item (sums)"), ("raises", "KeyError: 'no key' ("), ("thinks", "IndexError")],
)
def test_a_function_that_raises_is_warned_of(
    name: str, said: str, user_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may insist on a form that is none of those tried."""
    probe(in_file(f"my_scores.py:{name}", user_file, monkeypatch))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said in warning and "rewards.error_value" in warning


def test_a_function_that_hangs_is_refused(user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"my_scores\.py:hangs.*scorer took more than 1 s; fix it, or raise rewards\.timeout_seconds"
    ):
        probe(in_file("my_scores.py:hangs", user_file, monkeypatch), timeout_seconds=1.0)


@pytest.mark.parametrize("seconds", [1e10, 0.0])
def test_a_time_limit_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(UserError, match=r"rewards\.timeout_seconds"):
        build_config({"rewards": {"timeout_seconds": seconds}})


def test_reference_answers_that_say_nothing_are_refused_with_the_row() -> None:
    prompts = [
        Prompt(n, (), "", "t", {"answer": a, "origin": f"x.jsonl:{n + 1}"}) for n, a in enumerate(("7", " ", "nan", "B"))
    ]
    with ScorerProbe(build_scorer(RewardsConfig(), DataConfig(kind="file")), 60.0) as trial:
        trial.require_scores(prompts[0], "7")
        with pytest.raises(UserError, match=r"2 reference answers can't be used; the first: .*x\.jsonl:2: .* is empty"):
            trial.require_readable(prompts)


def test_threshold_turns_scores_into_zero_or_one() -> None:
    scorer = build_scorer(RewardsConfig(function="scripted_scorer:scripted", threshold=0.5), DataConfig())
    prompt = Prompt(0, (), "", "t")
    assert [scorer(prompt, f"value {value}") for value in (0.49, 0.5, 2.0)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (" 42 \n", "42"),
        ("so <answer>41</answer> no, <answer> 42\n</answer> #### 7", "42"),
        (r"\boxed{1} then \boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"cut off \boxed{\frac{1}{2", r"cut off \boxed{\frac{1}{2"),
        ("2 + 3 = 5\n#### 5", "5"),
        ("2+3=5\n#5", "5"),
        ("##.\n.#.", "##.\n.#."),
        ("it is C# 7", "it is C# 7"),
        ("", ""),
    ],
)
def test_final_answer(response: str, answer: str) -> None:
    assert final_answer(response) == answer
    assert exact_match(Prompt(0, (), "", "t", {"answer": f"{answer} "}), response) == 1.0


def forms(table: list[tuple[str, list[str]]]) -> list[tuple[str, str]]:
    return [(reference, response) for reference, responses in table for response in responses]


@pytest.mark.parametrize(("reference", "response"), forms(RIGHT))
def test_math_scorer_takes_right_answers_in_every_form(reference: str, response: str) -> None:
    assert math_score(reference, response) == 1.0


@pytest.mark.parametrize(("reference", "response"), forms(WRONG))
def test_math_scorer_takes_no_wrong_answer(reference: str, response: str) -> None:
    assert math_score(reference, response) == 0.0


def math_score(reference: str, response: str) -> float:
    scorer = build_scorer(RewardsConfig(), DataConfig(kind="file", train_files=("x.jsonl",)))
    return scorer(Prompt(0, (), "", "t", {"answer": reference, "origin": "x.jsonl:7"}), response)


@pytest.mark.parametrize("reference", ["", "  ", "####", "nan", "None", r"\boxed{}"])
def test_math_scorer_names_the_row_of_a_reference_that_says_nothing(reference: str) -> None:
    with pytest.raises(ValueError, match=r"x\.jsonl:7: the reference answer .* is empty"):
        math_score(reference, "1")


def test_reasoning_gym_tasks_score_their_own_answers() -> None:
    scorer = build_scorer(RewardsConfig(), DataConfig())
    for name in TASKS:
        source = ReasoningGymSource((TaskConfig(name),), seed=20_000_000, size=1_000_000)
        for index in (0, 1, 777_777):
            item = source.item(index)
            prompt = Prompt(index, (), "", item.task, item.record)
            assert scorer(prompt, str(item.solution)) == 1.0, name
            assert scorer(prompt, f"thinking\n<answer>{item.solution}</answer>") == 1.0, name
            assert scorer(prompt, "no idea") < 1.0, name
            assert json.dumps(item.record["args"])


def test_reasoning_gym_scores_by_the_arguments_of_the_task_in_the_pool() -> None:
    task = TaskConfig("chain_sum", args={"min_terms": 7, "max_terms": 7})
    item = ReasoningGymSource((task,), seed=0, size=10).item(3)
    with RewardPool(build_scorer(RewardsConfig(), DataConfig()), 1, 20.0, 0.0) as pool:
        prompt = Prompt(7, (), "", item.task, item.record)
        assert score(pool, f"#### {item.solution}", "#### 1000000", prompt=prompt) == [1.0, 0.0]
