"""Resharding against megatron.core.resharding.swap_model_weights: seconds, GB/s, peak extra memory, in one run.

    python benchmarks/reshard.py [--cases tp2:tp1 pp2:tp2 ...] [--repetitions 15] [--layers 8] [--hidden 1024]

Each case starts its own ranks (CPU, gloo). Every rank holds a megatron-core GPTModel in the training layout, one in the decode
layout (Megatron's destination) and the decode engine's fused tensors (ours); the arms take turns, each between barriers,
and a repetition counts as long as its slowest rank. The destinations are compared bit for bit afterwards.

Peak extra memory is the resident set's high-water mark of a call over the resident set before it (Linux: clear_refs, VmHWM),
of the rank that needs most, for both arms alike; staging buffers are given back before that call.
"""

import argparse
import ctypes
import gc
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from erollout.doctor.cpu import processor
from erollout.engine.model.decode_layout import decode_placement
from erollout.environment import set_default, stay_on_loopback
from erollout.megatron_patches import apply_all
from erollout.parallel.layout import DecodeLayout, TrainLayout
from erollout.parallel.placement import Placement
from erollout.policy.architecture import Architecture
from erollout.policy.training_layout import padded_vocab_size, training_placement
from erollout.resharding.executor import Resharder
from erollout.resharding.planner import DEFAULT_BUCKET_BYTES, build_plan, plan_for_rank
from erollout.resharding.transport import ProcessGroupTransport

DTYPE = torch.bfloat16
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Case:
    train: TrainLayout
    decode: DecodeLayout

    def __str__(self) -> str:
        train, decode = self.train, self.decode
        return f"TP{train.tensor} PP{train.pipeline} DP{train.data} -> TP{decode.tensor} x {decode.replicas}"


CASES = {
    "tp2:tp1": Case(TrainLayout(2, 2, 1), DecodeLayout(2, 1)),
    "pp2:tp1": Case(TrainLayout(2, 1, 2), DecodeLayout(2, 1)),
    "pp2:tp2": Case(TrainLayout(2, 1, 2), DecodeLayout(2, 2)),
    "tp2pp2:tp2": Case(TrainLayout(4, 2, 2), DecodeLayout(4, 2)),
}


@dataclass(slots=True)
class Arm:
    """One way to reshard, and what was measured of it on this rank."""

    name: str
    run: Callable[[], object]
    release: Callable[[], None]
    """Give back memory that is kept between calls."""
    first_seconds: float = 0.0
    """Seconds of the first call, planning included."""
    seconds: list[float] | None = None
    extra_bytes: int = 0


def main() -> None:
    arguments = _arguments()
    set_default("PYTHONWARNINGS", "ignore")  # of the ranks: megatron-core names each optional package that is not installed
    print(
        f"{processor()[1]}, {mp.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}"
    )
    print(f"torch {torch.__version__}, megatron-core {version('megatron-core')}, gloo, 1 thread per rank, {DTYPE}")
    architecture = _architecture(arguments.hidden, arguments.layers)
    size = architecture.num_parameters()
    print(
        f"{size / 1e6:.0f} M parameters ({size * 2 / 1e6:.0f} MB), medians of {arguments.repetitions} repetitions (min, max)\n"
    )
    print(f"{'layouts':28s}{'arm':20s}{'first ms':>10s}{'ms':>8s}{'min':>8s}{'max':>8s}{'GB/s':>8s}{'extra MB':>10s}")
    for name in arguments.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(
                _rank_main,
                (case, architecture, arguments.repetitions, arguments.bucket_mib * 2**20, folder),
                nprocs=case.train.world_size,
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 256")
    parser.add_argument("--bucket-mib", type=int, default=DEFAULT_BUCKET_BYTES >> 20)
    return parser.parse_args()


def _architecture(hidden: int, layers: int) -> Architecture:
    return Architecture(
        "qwen2",
        vocab_size=32000,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=hidden * 11 // 4,
        num_attention_heads=hidden // 64,
        num_query_groups=hidden // 128,
        kv_channels=64,
        max_position_embeddings=2048,
        add_qkv_bias=True,
    )


def _rank_main(rank: int, case: Case, architecture: Architecture, repetitions: int, bucket_bytes: int, folder: str) -> None:
    torch.set_num_threads(1)
    world = case.train.world_size
    stay_on_loopback()
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder) / "store"), world), rank=rank, world_size=world)
    apply_all()
    arms, compare = _build(rank, case, architecture, bucket_bytes)
    for arm in arms:
        arm.first_seconds, arm.seconds = _slowest(_timed(arm.run)), []
    for repetition in range(repetitions):
        for arm in arms if repetition % 2 else reversed(arms):
            arm.seconds.append(_slowest(_timed(arm.run)))
    for arm in arms:
        arm.extra_bytes = int(_slowest(_extra_bytes(arm)))
    compare()
    if rank == 0:
        _report(case, architecture, arms)
    dist.destroy_process_group()


def _build(rank: int, case: Case, architecture: Architecture, bucket_bytes: int) -> tuple[list[Arm], Callable[[], None]]:
    """The arms, and a check that they give the same weights."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.resharding import swap_model_weights

    from erollout.policy.initialization import initialize_weights

    parallel_state.initialize_model_parallel(case.train.tensor, case.train.pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    source_model = _gpt(architecture, case.train)
    # Megatron's destination: the decode replicas are the data-parallel replicas of a model without a pipeline.
    target_model = _gpt(architecture, TrainLayout(case.train.world_size, case.decode.tensor, 1))
    source = _tensors(source_model)
    initialize_weights(architecture, training_placement(architecture, case.train, rank), source, seed=1)

    placement = decode_placement(architecture, case.decode.tensor, case.decode.tensor_rank(rank))
    ours = {local.name: torch.zeros(local.shape, dtype=DTYPE) for local in placement}
    resharders: list[Resharder] = []

    def run_ours() -> None:
        if not resharders:
            plan = plan_for_rank(
                architecture, case.train, case.decode, rank, decode_placement, DTYPE.itemsize, bucket_bytes=bucket_bytes
            )
            resharders.append(Resharder(plan, ProcessGroupTransport(None, CPU), DTYPE, CPU))
        resharders[0].run(source, ours)

    def compare() -> None:
        theirs = training_placement(architecture, TrainLayout(case.train.world_size, case.decode.tensor, 1), rank)
        expected = _relabel(theirs, _tensors(target_model), placement)
        wrong = [name for name, tensor in ours.items() if not torch.equal(tensor, expected[name])]
        assert not wrong, f"rank {rank}: the two arms differ in {wrong}"

    def megatron(method: str) -> Arm:
        return Arm(f"megatron {method}", lambda: swap_model_weights(source_model, target_model, method), lambda: None)

    return [Arm("erollout", run_ours, lambda: resharders[0].release()), megatron("gloo"), megatron("nccl")], compare


def _gpt(architecture: Architecture, layout: TrainLayout) -> torch.nn.Module:
    """A GPTModel in its own process groups, as swap_model_weights wants it."""
    from megatron.core.models.gpt import GPTModel

    from erollout.config import ModelConfig, ParallelConfig
    from erollout.policy.model import layer_specification, transformer_config

    groups = _groups(layout)
    config = transformer_config(
        architecture,
        ModelConfig(dtype="bfloat16"),
        ParallelConfig(tensor_model_parallel_size=layout.tensor, pipeline_model_parallel_size=layout.pipeline),
    )
    _, _, stage = layout.coordinates(dist.get_rank())
    return GPTModel(
        config,
        layer_specification(config),
        vocab_size=padded_vocab_size(architecture, layout.tensor),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=stage == 0,
        post_process=stage == layout.pipeline - 1,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        pg_collection=groups,
    )


def _groups(layout: TrainLayout) -> object:
    """Megatron's collection of process groups for a layout; collective over the world."""
    from megatron.core import parallel_state
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.process_groups_config import ProcessGroupCollection

    grid = HyperCommGrid([layout.tensor, 1, 1, layout.data, layout.pipeline], ["tp", "cp", "ep", "dp", "pp"])
    dimensions = {
        **{name: [name] for name in ("tp", "cp", "ep", "dp", "pp")},
        "tp_cp": ["tp", "cp"],
        "mp": ["tp", "cp", "ep", "pp"],
        "tp_ep": ["tp", "ep"],
        "tp_ep_pp": ["tp", "ep", "pp"],
        "dp_cp": ["cp", "dp"],
        "tp_dp_cp": ["tp", "cp", "dp"],
    }
    groups = {name: grid.create_pg(parts) for name, parts in dimensions.items()}
    embedding = position = None
    for data in range(layout.data):
        for tensor in range(layout.tensor):
            pipeline = [layout.rank(tensor, data, stage) for stage in range(layout.pipeline)]
            ends = dist.new_group(parallel_state.default_embedding_ranks(pipeline))
            first = dist.new_group(parallel_state.default_position_embedding_ranks(pipeline))
            if dist.get_rank() in pipeline:
                embedding, position = ends, first
    return ProcessGroupCollection(embd=embedding, pos_embd=position, expt_tp=groups["tp"], expt_dp=groups["dp"], **groups)


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _relabel(source: Placement, tensors: dict[str, Tensor], destination: Placement) -> dict[str, Tensor]:
    """Tensors of one placement as those of another that holds the same shard."""
    result = {local.name: torch.zeros(local.shape, dtype=DTYPE) for local in destination}
    plan = build_plan({0: source}, {0: destination}, 0, DTYPE.itemsize)
    assert not plan.steps
    Resharder(plan, ProcessGroupTransport(None, CPU), DTYPE, CPU).run(tensors, result)
    return result


def _timed(function: Callable[[], object]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _slowest(value: float) -> float:
    """The largest of all ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def _extra_bytes(arm: Arm) -> int:
    """How far one call raises the resident set over what it was before."""
    arm.release()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    arm.run()
    extra = _status("VmHWM") - before
    dist.barrier()
    return extra


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _report(case: Case, architecture: Architecture, arms: list[Arm]) -> None:
    filled = sum(
        piece.numel * DTYPE.itemsize
        for rank in range(case.decode.world_size)
        for local in decode_placement(architecture, case.decode.tensor, case.decode.tensor_rank(rank))
        for piece in local.pieces
    )
    for arm in arms:
        assert arm.seconds
        middle = median(arm.seconds)
        times = f"{arm.first_seconds * 1e3:10.0f}{middle * 1e3:8.0f}{min(arm.seconds) * 1e3:8.0f}{max(arm.seconds) * 1e3:8.0f}"
        print(f"{case!s:28s}{arm.name:20s}{times}{filled / middle / 1e9:8.2f}{arm.extra_bytes / 1e6:10.0f}", flush=True)


if __name__ == "__main__":
    main()
