"""Process groups of torch.distributed and Megatron, and a rank's place in them."""

import logging
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from erollout.config import Config, ParallelConfig
from erollout.environment import STORE, LauncherEnvironment, launcher_environment, stay_on_loopback, variable
from erollout.errors import UserError
from erollout.megatron_patches import apply_all
from erollout.parallel.layout import DecodeLayout, TrainLayout, layouts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """A rank's place in both layouts, its device and the decode group."""

    rank: int
    world_size: int
    device: torch.device
    train: TrainLayout
    decode: DecodeLayout
    decode_group: dist.ProcessGroup | None
    """Ranks of this decode replica; None: it has only this rank."""
    control_group: dist.ProcessGroup | None
    """The same ranks over gloo, for decisions; None: only this rank."""
    coordination_group: dist.ProcessGroup | None
    """Leaders of all decode replicas in order, over gloo; None on other ranks and with a single replica."""
    owns_world: bool
    """Whether the default group was created here."""

    @property
    def device_name(self) -> str:
        return device_name(self.device)

    @property
    def data_parallel_rank(self) -> int:
        return self.train.coordinates(self.rank)[1]

    @property
    def is_decode_leader(self) -> bool:
        """The one rank of its decode replica that reports the replica's rollouts."""
        return self.decode.tensor_rank(self.rank) == 0

    @property
    def is_replica_leader(self) -> bool:
        """The one rank of its training model replica that holds the loss: tensor rank 0 of the last pipeline stage."""
        tensor, _, pipeline = self.train.coordinates(self.rank)
        return tensor == 0 and pipeline == self.train.pipeline - 1


def device_name(device: torch.device) -> str:
    """Name of a GPU, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def resolve_layouts(config: Config, world_size: int) -> tuple[TrainLayout, DecodeLayout]:
    """Both layouts on `world_size` ranks. Raises UserError if they don't divide it."""
    train, decode = layouts(config.parallel, config.rollout, world_size)
    batch = config.train.global_batch_size or config.samples_per_step
    if batch < train.data:
        raise UserError(f"train.global_batch_size = {batch} is less than the {train.data} data-parallel ranks; raise it")
    return train, decode


def expected_world_size(parallel: ParallelConfig) -> int:
    """Number of ranks that the launcher started or `erollout train` would start. Raises UserError if they disagree."""
    wanted, started = parallel.world_size, _started_ranks()
    if started is None:
        return wanted or parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if wanted not in (None, started):
        raise UserError(f"parallel.world_size = {wanted} but the launcher started {started} ranks; unset it or start {wanted}")
    return started


def initialize(config: Config) -> ParallelContext:
    """Join the world and create the training and decode groups.

    The world is the caller's default group if there is one, else torchrun's rendezvous, else this process alone.
    """
    patches = apply_all()
    from megatron.core import parallel_state

    launcher = launcher_environment()
    world_size = expected_world_size(config.parallel)
    train, decode = resolve_layouts(config, world_size)
    device = _device(launcher.local_rank if launcher else 0)
    timeout = timedelta(seconds=config.parallel.timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    owns_world = not dist.is_initialized()
    if owns_world and launcher:
        _join(backend, launcher, timeout)
    elif owns_world:
        stay_on_loopback()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    parallel_state.initialize_model_parallel(train.tensor, train.pipeline, distributed_timeout_minutes=_minutes(timeout))
    decode_group = _decode_group(decode, timeout)
    control_group = _decode_group(decode, timeout, "gloo")
    coordination_group = _coordination_group(decode, 2 * timeout)  # longer than the wait for a replica in it
    logger.debug("%s", patches.describe())
    logger.info(
        "%s on %s: training tensor %d x data %d x pipeline %d, decoding %d replicas of %d",
        backend,
        device,
        train.tensor,
        train.data,
        train.pipeline,
        decode.replicas,
        decode.tensor,
    )
    return ParallelContext(
        dist.get_rank(), world_size, device, train, decode, decode_group, control_group, coordination_group, owns_world
    )


def shut_down(context: ParallelContext) -> None:
    """Leave the groups, and the world if `initialize` joined it."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if context.owns_world:
        dist.destroy_process_group()


def current_rank() -> int:
    """This process's rank, before or after joining the world."""
    if dist.is_initialized():
        return dist.get_rank()
    launcher = launcher_environment()
    return launcher.rank if launcher else 0


def _started_ranks() -> int | None:
    """Size of the existing world, or of the one that a launcher has started; None: neither."""
    if dist.is_initialized():
        return dist.get_world_size()
    launcher = launcher_environment()
    return launcher.world_size if launcher else None


def _join(backend: str, launcher: LauncherEnvironment, timeout: timedelta) -> None:
    """Join the launcher's world. Raises UserError if the rendezvous fails: port taken, host unknown, address missing."""
    rank, size = launcher.rank, launcher.world_size
    try:
        if (path := variable(STORE)) is not None:
            dist.init_process_group(backend, timeout=timeout, rank=rank, world_size=size, store=dist.FileStore(path, size))
        else:
            dist.init_process_group(backend, timeout=timeout)
    except (dist.DistError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the ranks can't meet at MASTER_ADDR, MASTER_PORT: {reason}; set a reachable host and a free port"
        ) from error


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # two ranks with several threads each on few cores are ten times slower
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _decode_group(decode: DecodeLayout, timeout: timedelta, backend: str | None = None) -> dist.ProcessGroup | None:
    """Group of this rank's replica. `backend`: None: that of the world."""
    if decode.tensor == 1:
        return None
    mine = None
    for replica in range(decode.replicas):  # every rank creates every group, in the same order
        group = dist.new_group(list(decode.ranks(replica)), timeout=timeout, backend=backend)
        if replica == decode.replica(dist.get_rank()):
            mine = group
    return mine


def _coordination_group(decode: DecodeLayout, timeout: timedelta) -> dist.ProcessGroup | None:
    if decode.replicas == 1:
        return None
    leaders = [decode.ranks(replica)[0] for replica in range(decode.replicas)]
    group = dist.new_group(leaders, timeout=timeout, backend="gloo")
    return group if dist.get_rank() in leaders else None


def _minutes(timeout: timedelta) -> int:
    return max(1, round(timeout.total_seconds() / 60))
