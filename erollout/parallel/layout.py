"""Pure rank arithmetic: which rank holds which shard, in training and in decoding. No torch, no process groups."""

from dataclasses import dataclass

from erollout.config import ParallelConfig, RolloutConfig
from erollout.errors import UserError


def _require_divides(world_size: int, parts: int, what: str) -> None:
    if parts < 1 or world_size % parts:
        raise UserError(f"{what} = {parts} does not divide the world of {world_size} ranks; change it or the number of ranks")


@dataclass(frozen=True, slots=True)
class TrainLayout:
    """Ranks of a tensor x data x pipeline grid in Megatron's order: tensor fastest, pipeline slowest."""

    world_size: int
    tensor: int
    pipeline: int

    def __post_init__(self) -> None:
        _require_divides(
            self.world_size,
            self.tensor * self.pipeline,
            "parallel.tensor_model_parallel_size x parallel.pipeline_model_parallel_size",
        )

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline)

    def rank(self, tensor: int, data: int, pipeline: int) -> int:
        return (pipeline * self.data + data) * self.tensor + tensor

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tensor, data, pipeline) of a global rank."""
        return rank % self.tensor, rank // self.tensor % self.data, rank // (self.tensor * self.data)

    def model_replica(self, data: int) -> tuple[int, ...]:
        """The ranks that together hold one copy of the model, ordered by (pipeline, tensor)."""
        return tuple(self.rank(t, data, p) for p in range(self.pipeline) for t in range(self.tensor))


@dataclass(frozen=True, slots=True)
class DecodeLayout:
    """Consecutive ranks form a decode replica of `tensor` ranks; there is no pipeline."""

    world_size: int
    tensor: int

    def __post_init__(self) -> None:
        _require_divides(self.world_size, self.tensor, "rollout.tensor_model_parallel_size")

    @property
    def replicas(self) -> int:
        return self.world_size // self.tensor

    def replica(self, rank: int) -> int:
        return rank // self.tensor

    def tensor_rank(self, rank: int) -> int:
        return rank % self.tensor

    def ranks(self, replica: int) -> tuple[int, ...]:
        return tuple(range(replica * self.tensor, (replica + 1) * self.tensor))


def layouts(parallel: ParallelConfig, rollout: RolloutConfig, world_size: int) -> tuple[TrainLayout, DecodeLayout]:
    """The configured layouts. Raises UserError if they don't divide the world size."""
    train = TrainLayout(world_size, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    return train, DecodeLayout(world_size, rollout.tensor_model_parallel_size)


def even_slice(size: int, parts: int, index: int, what: str) -> tuple[int, int]:
    """[start, end) of part `index` of `parts` equal parts of `size`. Raises UserError if `parts` does not divide it."""
    if size % parts:
        raise UserError(f"{what} = {size} can't be split over {parts} tensor-parallel ranks; choose a size that divides it")
    step = size // parts
    return index * step, (index + 1) * step
