"""Every interleaving of a few replicas that step, answer late, claim prompts on their own and send each other sequences.

The replicas here are as small as can be: a set of responses to complete, and the real state machine. They take part in the
stream of operations as the exchange does: a window, the moves of its decision, the next window, ...; each posts an operation
when it has carried out the one before, and sees at any later time that all have posted. All states that can be reached are
visited.
"""

import copy
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from erollout.config import CoordinatorConfig
from erollout.coordinator.dispatch import Dispatch
from erollout.coordinator.migration import Migration
from erollout.coordinator.occupancy import CURVE_BATCHES, Occupancy
from erollout.coordinator.state_machine import ClusterDecision, StateMachine

CURVE = tuple(0.001 * batch for batch in CURVE_BATCHES)
"""Seconds: whatever is split is faster."""

Response = tuple[int, int]
"""Prompt and sample."""
Parcels = tuple[tuple[Response, ...], ...]
"""Responses that go to each replica."""


@dataclass(frozen=True, slots=True)
class Replica:
    machine: StateMachine
    mind: object
    """The machine's state, to compare."""
    decision: ClusterDecision
    completed: int = 0
    """Operations of the stream."""
    moves_due: bool = False
    """The next operation is the decision's moves, not a window."""
    owned: tuple[Response, ...] = ()
    finished: tuple[Response, ...] = ()
    kept: tuple[Response, ...] = ()
    """Given away, until a window shows that their target has them."""
    claims: tuple[int, ...] = ()
    """Prompts, in the order of their claims."""
    alone: bool = False
    """It has noticed that somebody died: nothing comes from the stream any more."""


@dataclass(frozen=True, slots=True)
class World:
    replicas: tuple[Replica, ...]
    posted: dict[int, tuple[Occupancy | Parcels | None, ...]] = field(default_factory=dict)
    """By number of the operation: what each replica contributed."""
    moves: int = 0
    """Since a response was completed."""
    dead: int | None = None

    def key(self) -> object:
        """Equal for worlds that go on alike: operations are counted from the first that is not complete everywhere."""
        first = min(r.completed for r in self.replicas)
        replicas = tuple(
            (r.mind, r.decision.moves, r.decision.finished, r.completed - first, *_parts(r)) for r in self.replicas
        )
        return replicas, tuple((n - first, state_of(p)) for n, p in sorted(self.posted.items())), self.moves, self.dead

    def responses(self) -> Counter[Response]:
        """Those that are somewhere, how often: with a replica, or on their way."""
        copies = Counter(response for r in self.replicas for response in (*r.owned, *r.finished))
        for index, replica in enumerate(self.replicas):
            for operation, posted in self.posted.items():
                if operation >= replica.completed:  # what it holds has not arrived yet
                    copies.update(r for parcels in posted if isinstance(parcels, tuple) for r in parcels[index])
        return copies

    @property
    def has_ended(self) -> bool:
        """Nobody who lives has anything left to do."""
        living = [replica for index, replica in enumerate(self.replicas) if index != self.dead]
        return all(replica.decision.finished or (replica.alone and not replica.owned) for replica in living)

    def changed(self, index: int, mine: Replica, **values: object) -> "World":
        replicas = (*self.replicas[:index], mine, *self.replicas[index + 1 :])
        return replace(self, replicas=replicas, **values)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules of one exploration."""

    options: CoordinatorConfig
    replicas: int
    prompts: int
    group_size: int
    slots: int
    stalls: bool = True
    """Replicas claim prompts at any time at which they wait for the others."""
    deaths: bool = False
    """The last replica may die at any time; the others notice it at any time after that."""
    decided: dict = field(default_factory=dict, compare=False, repr=False)
    """The machine's answers."""

    @property
    def everything(self) -> set[Response]:
        return {(prompt, sample) for prompt in range(self.prompts) for sample in range(self.group_size)}

    def begin(self) -> World:
        replicas = []
        for index in range(self.replicas):
            machine = StateMachine(
                self.options, self.replicas, self.prompts, self.group_size, self.slots, (1000, 2000, 3000), 4096
            )
            decision = machine.start()
            replica = Replica(machine, state_of(machine), decision)
            replicas.append(self.taken(replica, machine.mine(decision, index)))
        return World(tuple(replicas))

    def taken(self, replica: Replica, prompts: tuple[int, ...]) -> Replica:
        new = [(prompt, sample) for prompt in prompts for sample in range(self.group_size)]
        return replace(replica, owned=tuple(sorted([*replica.owned, *new])))

    def steps(self, world: World) -> Iterator[World]:
        """All worlds that one action of one replica leads to."""
        for index, replica in enumerate(world.replicas):
            if replica.decision.finished or index == world.dead:
                continue
            if replica.owned:
                yield self.finish(world, index)
            posted = world.posted.get(replica.completed, (None,) * self.replicas)
            waits = posted[index] is not None
            if not replica.alone and not waits:
                yield self.post(world, index, posted)
            elif not replica.alone and None not in posted:
                yield self.complete(world, index, posted)
            if (replica.alone or (waits and self.stalls)) and len(replica.owned) < self.slots:
                yield from self.claim(world, index)
            if world.dead is not None and not replica.alone:
                mine = tuple(sorted([*replica.owned, *replica.kept]))
                yield world.changed(index, replace(replica, alone=True, owned=mine, kept=()))
        if self.deaths and world.dead is None and not any(replica.decision.finished for replica in world.replicas):
            yield replace(world, dead=self.replicas - 1)

    def finish(self, world: World, index: int) -> World:
        replica = world.replicas[index]
        done, *rest = replica.owned
        return world.changed(
            index, replace(replica, owned=tuple(rest), finished=tuple(sorted([*replica.finished, done]))), moves=0
        )

    def claim(self, world: World, index: int) -> Iterator[World]:
        replica = world.replicas[index]
        machine = clone(replica.machine)
        if (prompt := machine.claim(index)) is not None:
            claims = (*replica.claims, prompt)
            replica = replace(replica, machine=machine, mind=state_of(machine), claims=claims)
            yield world.changed(index, self.taken(replica, (prompt,)))

    def post(self, world: World, index: int, posted: tuple) -> World:
        replica = world.replicas[index]
        contribution: Occupancy | Parcels
        if replica.moves_due:
            replica, contribution = self.give(replica, index)
        else:
            contribution = self.occupancy(replica, index)
        entries = (*posted[:index], contribution, *posted[index + 1 :])
        return world.changed(index, replica, posted={**world.posted, replica.completed: entries})

    def give(self, replica: Replica, index: int) -> tuple[Replica, Parcels]:
        """As many as there still are, the last ones."""
        parcels = [()] * self.replicas
        owned = replica.owned
        for move in replica.decision.moves:
            if move.source == index:
                count = min(move.num_sequences, len(owned))
                parcels[move.target] = owned[len(owned) - count :]
                owned = owned[: len(owned) - count]
        return replace(replica, owned=owned, kept=sum(parcels, ())), tuple(parcels)

    def occupancy(self, replica: Replica, index: int) -> Occupancy:
        """The last replica is asked before its first pass: all its responses wait."""
        running = min(len(replica.owned), self.slots) if index < self.replicas - 1 else 0
        return Occupancy(
            running=running,
            waiting=len(replica.owned) - running,
            finished=len(replica.finished),
            claimed=replica.machine.claimed,
            curve=CURVE,
        )

    def complete(self, world: World, index: int, posted: tuple) -> World:
        replica = world.replicas[index]
        moves = world.moves
        if replica.moves_due:
            arrived = [response for parcels in posted for response in parcels[index]]
            replica = replace(replica, owned=tuple(sorted([*replica.owned, *arrived])), moves_due=False)
            moves += bool(arrived)
        else:
            machine, mind, decision = self.decide(replica, posted)
            self.agrees(world, replica.completed, decision)
            moves_due = bool(decision.moves)
            replica = replace(replica, machine=machine, mind=mind, decision=decision, kept=(), moves_due=moves_due)
            mine = machine.mine(decision, index)
            assert not set(mine) & set(replica.claims), "a replica samples twice what it had claimed"
            replica = self.taken(replica, mine)
            handed = {prompt for prompts in decision.dispatched for prompt in prompts}
            for other, occupancy in zip(world.replicas, posted, strict=True):
                assert not handed & set(other.claims[: occupancy.claimed]), "what is known to be claimed is handed out"
        replica = replace(replica, completed=replica.completed + 1)
        world = world.changed(index, replica, moves=moves)
        behind = min(r.completed for r in world.replicas)
        return replace(world, posted={n: p for n, p in world.posted.items() if n >= behind})

    def decide(self, replica: Replica, window: tuple) -> tuple[StateMachine, object, ClusterDecision]:
        """The machine after a window, its state, and the decision. Calculated once for equal states and windows."""
        key = replica.mind, state_of(window)
        if key not in self.decided:
            machine = clone(replica.machine)
            decision = replace(machine.advance(window), epoch=0)
            self.decided[key] = machine, state_of(machine), decision
        return self.decided[key]

    def agrees(self, world: World, operation: int, decision: ClusterDecision) -> None:
        """Whoever has completed the same window has decided the same."""
        for other in world.replicas:
            if other.completed == operation + 1:
                assert other.decision == decision, "replicas decide differently"

    def check(self, world: World) -> None:
        """What holds in every state."""
        copies = world.responses()
        if world.dead is None:
            handed = {prompt for prompt, _ in copies}
            for prompt in handed:
                counts = {copies[prompt, sample] for sample in range(self.group_size)}
                assert counts <= ({1, 2} if self.stalls else {1}), f"prompt {prompt} is sampled {counts} times"
        if any(replica.decision.finished for replica in world.replicas):
            assert {response for r in world.replicas for response in r.finished} == self.everything, "ended too early"
            working = [replica for replica in world.replicas if replica.owned and not replica.alone]
            assert world.dead is not None or not working, "ended while someone works"
        if world.has_ended:
            held = {response for r in world.replicas for response in (*r.owned, *r.finished, *r.kept)}
            assert held == set(copies), "ended with responses on their way"
        assert world.moves <= self.replicas, "sequences go back and forth"


def _parts(replica: Replica) -> tuple:
    return replica.moves_due, replica.owned, replica.finished, replica.kept, replica.alone


def clone(machine: StateMachine) -> StateMachine:
    """What it learns from now on stays unknown to the first one."""
    return _copied(machine)


def _copied(value):
    if isinstance(value, StateMachine | Dispatch | Migration):
        other = copy.copy(value)
        other.__dict__.update({name: _copied(part) for name, part in vars(value).items()})
        return other
    return list(value) if isinstance(value, list) else value


def state_of(value: object) -> object:
    """All that a machine's future depends on but the number of the window, and what never changes."""
    if isinstance(value, StateMachine | Dispatch | Migration):
        return tuple(
            (name, state_of(part)) for name, part in vars(value).items() if name not in ("_epoch", "lengths", "options")
        )
    if isinstance(value, Occupancy):
        return value.running, value.waiting, value.finished, value.claimed
    return tuple(state_of(part) for part in value) if isinstance(value, list | tuple) else value


def explore(rules: Rules, limit: int = 200_000) -> tuple[int, int]:
    """Visit all states; how many there are, and in how many of them sequences are to move.

    No step loses a response. From each state the end can be reached: nothing blocks, whatever happened before.
    """
    first = rules.begin()
    known, responses, before = {first.key(): 0}, [set(first.responses())], [[]]  # type: ignore[var-annotated]
    ends, moves = [], 0
    waiting = deque([(0, first)])
    while waiting:
        number, world = waiting.popleft()
        rules.check(world)
        moves += any(replica.moves_due for replica in world.replicas)
        if world.has_ended:
            ends.append(number)
        for following in rules.steps(world):
            key = following.key()
            if key not in known:
                known[key] = len(before)
                before.append([])
                responses.append(set(following.responses()))
                waiting.append((known[key], following))
            assert responses[number] <= responses[known[key]], f"{responses[number] - responses[known[key]]} are lost"
            before[known[key]].append(number)
        assert len(known) < limit, "more states than expected"
    leading = set(ends)
    while ends:
        new = set(before[ends.pop()]) - leading
        ends += new
        leading |= new
    assert len(leading) == len(before), f"{len(before) - len(leading)} of {len(before)} states never lead to an end"
    return len(before), moves


MAKESPAN, DYNAMIC, STATIC = (
    CoordinatorConfig(policy="makespan", dispatch="static"),
    CoordinatorConfig(policy="replica"),
    CoordinatorConfig(policy="replica", dispatch="static"),
)


@pytest.mark.parametrize(
    ("rules", "moves"),
    [
        (Rules(STATIC, 3, 3, 1, 1), False),
        (Rules(DYNAMIC, 2, 6, 1, 1), False),
        (Rules(DYNAMIC, 2, 6, 1, 1, stalls=False), False),
        (Rules(MAKESPAN, 2, 3, 2, 2), True),
        (Rules(MAKESPAN, 3, 4, 1, 2), True),
        (Rules(CoordinatorConfig(), 2, 5, 1, 1), True),
        (Rules(MAKESPAN, 2, 4, 1, 2, deaths=True), True),
    ],
    ids=["static", "dynamic", "no-stalls", "groups", "three", "all", "deaths"],
)
def test_no_order_of_events_loses_work_or_blocks(rules: Rules, moves: bool) -> None:
    states, moving = explore(rules)
    assert states > 1000
    assert (moving > 0) == moves, "the exploration meets moves where it should"
