"""The engine under a control: orders that change from step to step, and sequences that go from one engine to another."""

from dataclasses import dataclass, field, replace

import pytest
from test_engine import by_sample, make_requests, word_tokenizer
from test_speculative_engine import check_pool
from tiny_decode import make_engine
from tiny_speculation import DRAFTER, make_speculative_engine

from erollout.engine.orders import Arrival, Orders
from erollout.errors import UserError
from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.types import PartialRollout, RolloutRequest, SamplingParams

SAMPLED = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True)


@dataclass
class Script:
    """Orders by step; the last ones are repeated."""

    script: list[Orders]
    loads: list[Load] = field(default_factory=list)
    outcomes: list[StepOutcome] = field(default_factory=list)
    partials: list[PartialRollout] = field(default_factory=list)

    def orders(self, load: Load) -> Orders:
        self.loads.append(load)
        return self.script[min(len(self.loads), len(self.script)) - 1]

    def released(self, partials: list[PartialRollout]) -> None:
        self.partials += partials

    def observe(self, outcome: StepOutcome) -> None:
        self.outcomes.append(outcome)


def repeated(*orders: Orders) -> Script:
    """These orders in turn, for longer than any rollout here, with the end allowed throughout."""
    return Script([orders[step % len(orders)] for step in range(200)])


def test_arms_may_change_at_every_step() -> None:
    requests = make_requests(SAMPLED)
    expected = by_sample(make_engine("llama").generate(requests))
    engine = make_speculative_engine("good", "coupled", 3)
    orders = [Orders(arm, is_last=True) for arm in (OFF, Arm(DRAFTER, 1), Arm(DRAFTER, 7), OFF, Arm(DRAFTER, 2))]
    control = repeated(*orders)
    assert by_sample(engine.run(control, requests=requests)) == expected
    assert {outcome.arm.num_speculative_tokens for outcome in control.outcomes} == {0, 1, 2, 7}
    assert sum(outcome.emitted for outcome in control.outcomes) == engine.stats.decode_tokens == 24 * len(expected)
    assert sum(outcome.finished for outcome in control.outcomes) == len(expected)
    speculation = engine.stats.speculation
    assert [sum(c) for c in zip(*(_padded(o.drafted_at) for o in control.outcomes), strict=True)] == speculation.drafted_at
    assert [sum(c) for c in zip(*(_padded(o.accepted_at) for o in control.outcomes), strict=True)] == speculation.accepted_at
    for load, outcome in zip(control.loads, control.outcomes, strict=False):
        assert outcome.seconds > outcome.seconds_drafting >= 0
        assert (outcome.seconds_drafting > 0) == outcome.arm.speculates
        assert load.decoding <= outcome.load.decoding + outcome.load.prefill_tokens


def _padded(counts: tuple[int, ...]) -> list[int]:
    return [*counts, *[0] * (7 - len(counts))]


def test_loads_say_what_runs_and_what_waits() -> None:
    engine = make_engine("llama", max_num_seqs=3)
    control = repeated(Orders(is_last=True))
    engine.run(control, requests=[RolloutRequest(0, (1, 2, 3, 4, 5), 4, SAMPLED, 7)])
    first, second = control.outcomes[:2]
    assert (first.load.decoding, first.load.prefill_tokens) == (0, 5)
    assert (second.load.decoding, second.load.context, second.load.prefill_tokens, second.load.waiting) == (3, 5.0, 0, 1)
    assert control.loads[0] == Load(0, 0.0, 5, 1) and control.loads[1].decoding == 3 and control.loads[1].context == 5.0


def test_requests_may_come_while_others_run() -> None:
    requests = make_requests(SAMPLED)
    expected = by_sample(make_engine("llama").generate(requests))
    engine, seen = make_engine("llama"), []
    script = [Orders(), *[Orders(requests=(request,)) for request in requests], Orders(), Orders(is_last=True)]
    rollouts = engine.run(Script(script), on_finished=seen.append)
    assert by_sample(rollouts) == expected and [r.prompt_index for r in rollouts] == sorted(r.prompt_index for r in rollouts)
    assert sorted(map(id, seen)) == sorted(map(id, rollouts))


def test_a_request_that_can_not_be_served_ends_the_run_with_a_full_pool() -> None:
    engine = make_engine("llama")
    too_long = RolloutRequest(9, tuple([1] * 2000), 1, SAMPLED, 0)
    with pytest.raises(UserError, match="2000 tokens"):
        engine.run(Script([Orders(requests=tuple(make_requests(SAMPLED)))] * 4 + [Orders(requests=(too_long,))]))
    check_pool(engine)


@pytest.mark.parametrize("after", [1, 3, 5])
@pytest.mark.parametrize(
    "sampling", [SAMPLED, SamplingParams(repetition_penalty=1.3, top_k=20, max_tokens=24)], ids=["plain", "penalty"]
)
@pytest.mark.parametrize("arm", [OFF, Arm(DRAFTER, 3)], ids=str)
def test_a_moved_sequence_goes_on_as_if_it_had_stayed(after: int, sampling: SamplingParams, arm: Arm) -> None:
    requests = make_requests(sampling)
    expected = by_sample(make_engine("llama").generate(requests))
    source, target = make_speculative_engine("good", "coupled", 3), make_speculative_engine("good", "coupled", 3)
    stay = Orders(arm, is_last=True)
    giving = Script([*[stay] * after, Orders(arm, release=4, is_last=True), stay])
    kept = source.run(giving, requests=requests)
    assert 0 < len(giving.partials) <= 4
    check_pool(source)
    by_index = {request.prompt_index: request for request in requests}
    arrivals = tuple(Arrival(by_index[p.prompt_index], p) for p in giving.partials)
    moved = target.run(Script([Orders(arm), Orders(arm, arrivals=arrivals), stay]))
    check_pool(target)
    assert len(moved) == len(arrivals)
    assert by_sample([*kept, *moved]) == expected
    assert {(r.prompt_index, r.sample_index): r.rollout_logprobs for r in [*kept, *moved]} == {
        (r.prompt_index, r.sample_index): r.rollout_logprobs for r in make_engine("llama").generate(requests)
    }


def test_stop_strings_are_found_across_a_move() -> None:
    """What came before the move may be the beginning of the string."""
    engine = make_engine("llama")
    requests = [RolloutRequest(0, (5, 6, 7), 2, SAMPLED, 3)]
    free = by_sample(engine.generate(requests))
    engine.tokenizer = word_tokenizer()
    third, last = free[0, 0][0][2:4]
    sampling = replace(SAMPLED, stop=(f"w{third} w{last}",))
    requests = [replace(requests[0], sampling=sampling)]
    expected = by_sample(engine.generate(requests))
    assert expected[0, 0][0] == free[0, 0][0][:4]
    giving = Script([*[Orders(is_last=True)] * 3, Orders(release=2, is_last=True), Orders(is_last=True)])
    kept = engine.run(giving, requests=requests)
    assert [len(partial.response_ids) for partial in giving.partials] == [3, 3]
    arrivals = tuple(Arrival(requests[0], partial) for partial in giving.partials)
    moved = engine.run(Script([Orders(arrivals=arrivals), Orders(is_last=True)]))
    assert by_sample([*kept, *moved]) == expected


def test_leaders_of_groups_that_wait_for_their_prompt_stay() -> None:
    engine = make_engine("llama", max_num_batched_tokens=4)
    control = Script([Orders(release=5, is_last=True), Orders(is_last=True)])
    rollouts = engine.run(control, requests=[RolloutRequest(0, tuple(range(1, 12)), 3, SAMPLED, 1)])
    assert control.partials == [] and len(rollouts) == 3
