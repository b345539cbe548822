"""Resharding: every pair of layouts up to four ranks, bit for bit, planned, simulated in one process and on real ranks."""

import re
from collections import deque
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from erollout.engine.model.decode_layout import decode_placement
from erollout.errors import UserError
from erollout.parallel.layout import DecodeLayout, TrainLayout
from erollout.parallel.placement import Placement, box_slices, whole
from erollout.policy.architecture import Architecture
from erollout.policy.families.qwen3 import QWEN3
from erollout.policy.training_layout import training_placement
from erollout.resharding.executor import Resharder, wire_dtype
from erollout.resharding.planner import ReshardPlan, build_plan, plan_for_rank
from erollout.resharding.transport import Message, ProcessGroupTransport

CPU = torch.device("cpu")
UNTIED = Architecture(
    "qwen2",
    vocab_size=101,  # divisible by no tensor-parallel size
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=6,
    max_position_embeddings=64,
    add_qkv_bias=True,
)
TIED = replace(UNTIED, tie_word_embeddings=True, add_qkv_bias=False)
SPARSE = replace(TIED, vocab_size=5)  # on four ranks two rows each: the last rank holds nothing but padding
THIRDS = replace(UNTIED, num_layers=3, num_attention_heads=6, num_query_groups=3, ffn_hidden_size=36)
HEAD_NORMS = replace(TIED, family="qwen3", layer=QWEN3.layer)
Case = tuple[TrainLayout, DecodeLayout]
PADDING = 777.0


def _layouts(world: int) -> list[Case]:
    """Every training layout with every decode layout."""
    train = [TrainLayout(world, t, p) for t in range(1, world + 1) for p in range(1, world + 1) if world % (t * p) == 0]
    return [(source, DecodeLayout(world, t)) for source in train for t in range(1, world + 1) if world % t == 0]


EVERY_PAIR = [case for world in (1, 2, 4) for case in _layouts(world)]


@cache
def _logical(architecture: Architecture, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in architecture.logical_tensors().items()}


def _local(placement: Placement, logical: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a rank with this placement must hold; PADDING where no logical tensor is."""
    tensors = {}
    for local in placement:
        tensors[local.name] = torch.full(local.shape, PADDING, dtype=dtype)
        for piece in local.pieces:
            values = logical[piece.tensor][box_slices(piece.start, piece.shape)]
            tensors[local.name][box_slices(piece.local_start, piece.shape)] = values.to(dtype)
    return tensors


def _plan(architecture: Architecture, case: Case, rank: int, itemsize: int = 4, bucket_bytes: int = 2000) -> ReshardPlan:
    return plan_for_rank(architecture, *case, rank, decode_placement, itemsize, bucket_bytes)


@dataclass
class _Mailbox:
    """A transport between plans that one process carries out one after the other: sends never block."""

    rank: int
    mail: dict[tuple[int, int], deque[Tensor]]

    def send(self, message: Message) -> None:
        self.mail.setdefault((self.rank, message.peer), deque()).append(message.tensor.clone())

    def receive(self, message: Message) -> None:
        message.tensor.view(-1).copy_(self.mail[message.peer, self.rank].popleft().view(-1))


class _Done:
    def wait(self) -> None: ...


@dataclass
class _Outgoing(_Mailbox):
    def start(self, send: Message | None, receive: Message | None) -> _Done:
        if send is not None:
            self.send(send)
        return _Done()


@dataclass
class _Incoming(_Mailbox):
    def start(self, send: Message | None, receive: Message | None) -> _Done:
        if receive is not None:
            self.receive(receive)
        return _Done()


def _reshard_in_one_process(
    architecture: Architecture, case: Case, source_dtype: torch.dtype, dtype: torch.dtype, bucket_bytes: int
) -> None:
    """Run all ranks' plans, first their sends, then their receives, and compare with what each must hold."""
    train, decode = case
    logical = _logical(architecture, source_dtype)
    wire = wire_dtype(source_dtype, dtype)
    mail: dict[tuple[int, int], deque[Tensor]] = {}
    ranks = range(train.world_size)
    sources = [_local(training_placement(architecture, train, r), logical, source_dtype) for r in ranks]
    targets = [decode_placement(architecture, decode.tensor, decode.tensor_rank(r)) for r in ranks]
    plans = [_plan(architecture, case, r, wire.itemsize, bucket_bytes) for r in ranks]
    for kind in (_Outgoing, _Incoming):
        for r in ranks:
            expected = _local(targets[r], logical, dtype)
            got = {name: torch.full_like(tensor, PADDING) for name, tensor in expected.items()}
            complete: list[str] = []
            Resharder(plans[r], kind(r, mail), wire, CPU, complete.append).run(sources[r], got)
            assert sorted(complete) == sorted(expected)
            if kind is _Incoming:
                for name, tensor in expected.items():
                    assert torch.equal(got[name], tensor), f"{case}, rank {r}, {name}"
    assert not any(mail.values()), "messages that nobody received"


@pytest.mark.parametrize(
    "architecture", [UNTIED, TIED, SPARSE, THIRDS, HEAD_NORMS], ids=["untied", "tied", "sparse", "thirds", "head-norms"]
)
def test_every_pair_of_layouts_is_bit_exact(architecture: Architecture) -> None:
    for case in _layouts(3) if architecture is THIRDS else EVERY_PAIR:
        _reshard_in_one_process(architecture, case, torch.float32, torch.float32, bucket_bytes=2000)


@settings(max_examples=25)
@given(
    st.sampled_from(EVERY_PAIR),
    st.sampled_from([UNTIED, TIED]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(min_value=1, max_value=100_000),
)
def test_any_dtypes_and_bucket_size(
    case: Case, architecture: Architecture, source: torch.dtype, target: torch.dtype, size: int
) -> None:
    _reshard_in_one_process(architecture, case, source, target, max(size, 40))


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("case", EVERY_PAIR)
def test_peers_agree_on_every_message(case: Case) -> None:
    plans = [_plan(TIED, case, rank) for rank in range(case[0].world_size)]
    for sender in plans:
        for receiver in plans:
            sent = [[box.shape for box in b.boxes] for b in sender.sends if b.peer == receiver.rank]
            received = [[box.shape for box in b.boxes] for b in receiver.receives if b.peer == sender.rank]
            assert sent == received
    assert all(4 * bucket.numel <= 2000 for plan in plans for bucket in plan.sends)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("case", EVERY_PAIR)
def test_no_deadlock_with_one_step_at_a_time(case: Case) -> None:
    """Ranks that leave a step only when its messages have met their other ends all come to the end."""
    queues = [deque(_plan(TIED, case, rank, bucket_bytes=400).steps) for rank in range(case[0].world_size)]
    sent: list[set[bool]] = [set() for _ in queues]  # which halves of the head step are through: True send, False receive
    while any(queues):
        heads = [queue[0] if queue else None for queue in queues]
        for rank, head in enumerate(heads):
            peer = heads[head.send.peer] if head and head.send else None
            if peer and peer.receive and peer.receive.peer == rank and True not in sent[rank]:
                assert False not in sent[head.send.peer], "a receive met two sends"
                sent[rank].add(True)
                sent[head.send.peer].add(False)
        before = sum(map(len, queues))
        for rank, head in enumerate(heads):
            if head and sent[rank] == {x for x, half in ((True, head.send), (False, head.receive)) if half}:
                queues[rank].popleft()
                sent[rank] = set()
        assert sum(map(len, queues)) < before, "all ranks wait"


def test_tied_embedding_is_sent_by_each_of_its_holders_in_turn() -> None:
    """First and last stage both hold the shards: of four decode replicas, each holder serves one that lacks its shard."""
    case = (TrainLayout(4, 2, 2), DecodeLayout(4, 1))
    plans = [_plan(TIED, case, rank) for rank in range(4)]
    sent = [
        sum(
            box.numel
            for b in plan.sends
            for box in b.boxes
            if box.tensor in ("embedding.word_embeddings.weight", "output_layer.weight")
        )
        for plan in plans
    ]
    rows = [51, 50, 51, 50]
    assert sent == [n * TIED.hidden_size for n in rows]


def test_data_parallel_replicas_exchange_nothing() -> None:
    case = (TrainLayout(4, 1, 1), DecodeLayout(4, 1))
    for rank in range(4):
        assert not _plan(UNTIED, case, rank).steps
    train = TrainLayout(4, 2, 1)
    for rank in range(4):
        plan = _plan(UNTIED, (train, DecodeLayout(4, 1)), rank)
        assert {b.peer for b in (*plan.sends, *plan.receives)} == {rank ^ 1}


def test_a_world_of_1024_ranks_plans_one_replica() -> None:
    llama_70b = Architecture("llama", 128256, 80, 8192, 28672, 64, 8, 128, 8192)
    plan = plan_for_rank(llama_70b, TrainLayout(1024, 8, 8), DecodeLayout(1024, 4), 517, decode_placement)
    local = sum(copy.destination.numel for copy in plan.local)
    received = sum(bucket.numel for bucket in plan.receives)
    held = sum(piece.numel for tensor in decode_placement(llama_70b, 4, 517 % 4) for piece in tensor.pieces)
    assert local + received == held
    replica = TrainLayout(1024, 8, 8).model_replica(TrainLayout(1024, 8, 8).coordinates(517)[1])
    assert {bucket.peer for bucket in plan.receives} <= set(replica)


def test_uncovered_and_twice_covered_elements_are_named() -> None:
    full, half = (whole("a", "model.a", (4, 2)),), (whole("a", "model.b", (4, 2)),)
    with pytest.raises(ValueError, match=r"model\.a"):
        build_plan({0: half}, {0: full}, 0)
    overlapping = decode_placement(UNTIED, 2, 0)
    with pytest.raises(ValueError, match=r"model\.embed_tokens"):
        build_plan({0: overlapping, 1: decode_placement(UNTIED, 1, 0)}, {0: decode_placement(UNTIED, 1, 0), 1: ()}, 0)


def test_layouts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="4 ranks"):
        _plan(UNTIED, (TrainLayout(4, 1, 1), DecodeLayout(2, 1)), 0)
    with pytest.raises(UserError, match="key/value heads = 4"):
        _plan(UNTIED, (TrainLayout(8, 1, 1), DecodeLayout(8, 8)), 0)


def _one_rank() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    logical = _logical(UNTIED, torch.float32)
    source = _local(training_placement(UNTIED, TrainLayout(1, 1, 1), 0), logical, torch.float32)
    return source, _local(decode_placement(UNTIED, 1, 0), logical, torch.float32)


def test_tensors_that_differ_from_the_plan_are_refused_before_anything_moves() -> None:
    plan = _plan(UNTIED, (TrainLayout(1, 1, 1), DecodeLayout(1, 1)), 0)
    resharder = Resharder(plan, _Outgoing(0, {}), torch.float32, CPU)
    source, target = _one_rank()
    name = "layers.0.qkv_proj.weight"
    with pytest.raises(UserError, match=re.escape(name)):
        resharder.run(source, {**target, name: target[name][:-1]})
    with pytest.raises(UserError, match=re.escape(name)):
        resharder.run(source, {**target, name: target[name].bfloat16()})
    with pytest.raises(UserError, match="final_layernorm"):
        resharder.run({k: v for k, v in source.items() if k != "decoder.final_layernorm.weight"}, target)


def test_a_wire_that_loses_precision_is_refused() -> None:
    plan = _plan(UNTIED, (TrainLayout(1, 1, 1), DecodeLayout(1, 1)), 0, itemsize=2)
    with pytest.raises(UserError, match="precision"):
        Resharder(plan, _Outgoing(0, {}), torch.bfloat16, CPU).run(*_one_rank())
    assert wire_dtype(torch.float32, torch.bfloat16) == wire_dtype(torch.bfloat16, torch.float32) == torch.bfloat16


def _reshard_on_real_ranks(
    cases: list[tuple[Case, Architecture, torch.dtype, torch.dtype, int]],
) -> list[str]:
    """Each case twice with changed weights; what went wrong on this rank."""
    rank = dist.get_rank()
    problems = []
    for case, architecture, source_dtype, dtype, bucket_bytes in cases:
        train, decode = case
        wire = wire_dtype(source_dtype, dtype)
        plan = _plan(architecture, case, rank, wire.itemsize, bucket_bytes)
        complete: list[str] = []
        resharder = Resharder(plan, ProcessGroupTransport(None, CPU), wire, CPU, complete.append)
        placement = decode_placement(architecture, decode.tensor, decode.tensor_rank(rank))
        got = {local.name: torch.full(local.shape, PADDING, dtype=dtype) for local in placement}
        addresses = {name: tensor.data_ptr() for name, tensor in got.items()}
        for round_ in (1, 2):
            logical = {name: tensor * round_ for name, tensor in _logical(architecture, source_dtype).items()}
            complete.clear()
            stats = resharder.run(_local(training_placement(architecture, train, rank), logical, source_dtype), got)
            wrong = [n for n, t in _local(placement, logical, dtype).items() if not torch.equal(got[n], t)]
            if wrong:
                problems.append(f"{case} round {round_}: {wrong}")
            if sorted(complete) != sorted(got):
                problems.append(f"{case} round {round_}: completed {complete}")
            if (
                stats.peak_extra_bytes > 4 * bucket_bytes
                or stats.bytes_received != sum(b.numel for b in plan.receives) * wire.itemsize
            ):
                problems.append(f"{case} round {round_}: {stats}")
        if addresses != {name: tensor.data_ptr() for name, tensor in got.items()}:
            problems.append(f"{case}: a destination tensor moved")
    return problems


FP32, BF16 = torch.float32, torch.bfloat16
REAL = {
    2: [
        ((TrainLayout(2, 2, 1), DecodeLayout(2, 1)), UNTIED, FP32, FP32, 2000),
        ((TrainLayout(2, 1, 2), DecodeLayout(2, 2)), TIED, FP32, BF16, 4000),
        ((TrainLayout(2, 1, 2), DecodeLayout(2, 1)), TIED, BF16, FP32, 4000),
        ((TrainLayout(2, 1, 1), DecodeLayout(2, 2)), UNTIED, FP32, BF16, 4000),
    ],
    4: [
        ((TrainLayout(4, 2, 2), DecodeLayout(4, 2)), UNTIED, FP32, FP32, 4000),
        ((TrainLayout(4, 2, 2), DecodeLayout(4, 1)), TIED, FP32, BF16, 1 << 20),
        ((TrainLayout(4, 1, 2), DecodeLayout(4, 4)), UNTIED, BF16, BF16, 1 << 20),
        ((TrainLayout(4, 1, 4), DecodeLayout(4, 2)), TIED, FP32, BF16, 8000),
    ],
}
"""World size to cases: layouts, architecture, dtypes of source and destination, bucket size."""


@pytest.mark.distributed
@pytest.mark.parametrize("world", REAL)
def test_real_ranks(rank_pool, world: int) -> None:
    assert rank_pool.run(world, _reshard_on_real_ranks, REAL[world]) == [[]] * world
