"""What a resumed run's drafts are made by: activation statistics, the formats that `auto` chose, and what the toggle knew."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPool
from tiny_decode import make_engine, prompts
from tiny_runs import tiny_config, tiny_tree, train_here

from erollout.checkpoint.manifest import STATE
from erollout.drafter.drafter import tensor_name
from erollout.drafter.self_speculation import SelfSpeculation
from erollout.engine.engine import Engine
from erollout.rollout.coordination import Coordination
from erollout.speculation.toggle import Toggle
from erollout.types import RolloutRequest, SamplingParams

TOKENS = 100


def _speculation(format: str, folder: str, **drafter: Any) -> tuple[SelfSpeculation, Engine]:
    options = {"mode": "always", "drafter": {"format": format, "group_size": 16, "statistics_tokens": TOKENS, **drafter}}
    engine = make_engine("llama", dtype="bfloat16")
    speculation = SelfSpeculation(tiny_config(Path(folder), speculation=options).speculation, engine)
    speculation.switch(True)
    return speculation, engine


def _refit(speculation: SelfSpeculation) -> dict[str, torch.Tensor]:
    """The drafter of the engine's weights as they are: what each layer makes of the same input."""
    speculation.all_landed()
    speculation.complete(1)
    inputs, target = torch.Generator().manual_seed(0), speculation.engine.model
    sizes = {name: target.tensors[tensor_name(target, name)].shape[1] for name in speculation.drafter.linears}
    return {
        name: linear(torch.randn(8, sizes[name], generator=inputs).bfloat16())
        for name, linear in speculation.drafter.linears.items()
    }


def _learnt(format: str, folder: str) -> tuple[SelfSpeculation, Any, dict[str, torch.Tensor]]:
    """A speculation that has learnt from a rollout, its state as a checkpoint has it, and its next drafter."""
    speculation, engine = _speculation(format, folder)
    _refit(speculation)
    requests = [RolloutRequest(i, ids, 1, SamplingParams(max_tokens=30), seed=i) for i, ids in enumerate(prompts(40, 40))]
    speculation.learn_from(engine.generate(requests))
    return speculation, json.loads(json.dumps(speculation.state_dict())), _refit(speculation)


def resumed_numbers(format: str, folder: str) -> None:
    _, state, expected = _learnt(format, folder)
    assert sum(map(len, state["tokens"])) == TOKENS
    again, _ = _speculation(format, folder)
    unweighted = _refit(again)
    resumed, _ = _speculation(format, folder)
    resumed.load_state_dict(state)
    assert resumed.has_learned and json.loads(json.dumps(resumed.state_dict())) == state
    found = _refit(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(unweighted[name], expected[name]) for name in expected)


@pytest.mark.distributed
@pytest.mark.parametrize("format", ["w4a16_clip", "w4a16_awq"])
def test_a_resumed_drafter_has_the_numbers_of_an_unbroken_one(format: str, rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(1, resumed_numbers, format, str(tmp_path))


def resumed_choice(folder: str) -> None:
    speculation, state, expected = _learnt("auto", folder)
    chosen = speculation.drafter.formats
    resumed, _ = _speculation("auto", folder)
    resumed.load_state_dict(state)
    assert resumed.has_learned and resumed.drafter.formats == chosen
    found = _refit(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for other, _ in (_speculation("auto", folder, lm_head="w8a8"), _speculation("auto", folder)):
        other.load_state_dict(state | {"of": state["of"] | {"device": "another"}})
        assert other.wants_rollouts and not other.has_learned, "it chooses after its first rollout"


@pytest.mark.distributed
def test_what_auto_chose_is_kept_where_it_holds(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(1, resumed_choice, str(tmp_path))


def first_toggles(tree: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """For RankPool.run: what the toggle of each training rollout knew at its begin, and drafters that were forgotten."""
    begin, forget = Coordination.begin, Toggle.forget
    known: list[dict[str, Any]] = []
    forgotten: list[str] = []

    def recorded_begin(self: Coordination, *arguments: Any) -> Any:
        control = begin(self, *arguments)
        assert self.toggle is not None
        known.append(json.loads(json.dumps(self.toggle.state_dict())))
        return control

    def recorded_forget(self: Toggle, format: str) -> None:
        forgotten.append(format)
        forget(self, format)

    Coordination.begin, Toggle.forget = recorded_begin, recorded_forget  # type: ignore[method-assign]
    try:
        train_here(tree)
    finally:
        Coordination.begin, Toggle.forget = begin, forget  # type: ignore[method-assign]
    return known, forgotten


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["adaptive", "ladder"])
def test_the_first_rollout_after_a_resume_begins_with_what_was_known(mode: str, rank_pool: RankPool, tmp_path: Path) -> None:
    """The next decisions follow from it and the clock (test_toggle.py)."""
    drafter = {"format": "auto", "group_size": 16, "statistics_tokens": 64}
    toggle = {
        "bootstrap_seconds": 0.2,
        "max_speculative_tokens": 3,
        "acceptance_window": 10**6,
    }  # a rollout begins with all of it
    speculation = {"mode": mode, "drafter": drafter, "toggle": toggle}
    tree = tiny_tree(tmp_path, speculation=speculation, checkpoint={"interval": 1})
    ((_, forgotten),) = rank_pool.run(1, first_toggles, tree)
    assert forgotten == ["auto"]
    before = _saved(tmp_path, 2)
    tree["train"]["steps"] = 3
    ((known, forgotten),) = rank_pool.run(1, first_toggles, tree)
    assert known == [before["toggle"]] and forgotten == []
    assert _saved(tmp_path, 3)["drafter"] == before["drafter"] and before["drafter"]["chosen"]


def _saved(folder: Path, step: int) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads((folder / "run" / "checkpoints" / f"step_{step:08d}" / STATE).read_text())["rollout"]
    return saved
