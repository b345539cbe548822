"""Counter-based random numbers: pure functions of (sequence seed, position, token id), without generator state.

A sequence's noise does not depend on its neighbours, on the batch, on how the vocabulary is sharded or on how often a token
was recomputed. The bits come from SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014; its finalizer is variant 13 of David Stafford's "Better bit mixing"), read at a counter instead of in sequence:
bits(key, counter) = finalizer(key + (counter + 1) * 0x9E3779B97F4A7C15) modulo 2^64. A uniform has 52 of the 64 bits.

The exponentials of a vocabulary are drawn in blocks of 16 tokens. The smallest of 16 independent Exp(1) variables is
Exp(1) / 16, each of the 16 is equally likely to have it, and by memorylessness the others exceed it by fresh independent
Exp(1) variables. Drawn in this order, one hash bounds the noise of 16 tokens, so that a sampler can skip whole blocks that
cannot win, and still use exactly the noise that drawing everything would give it.

Integers are the same on every device; -log(-log u) is float64, so that the last bit of a device's log cannot matter.
"""

from torch import Tensor

LANES = 16
"""Number of tokens of a block, which are COLUMNS ids apart, so that a maximum over a block is vertical, which vectorises."""
COLUMNS = 64
TILE = LANES * COLUMNS
"""Number of ids in COLUMNS blocks: id = tile * TILE + lane * COLUMNS + column is in block tile * COLUMNS + column."""

_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_BLOCKS = 1 << 32
"""First counter of blocks; those of tokens are below."""


def request_seed(run_seed: int, step: int, prompt_index: int) -> int:
    """Seed of a group's request, in [0, 2^63): different for every prompt of every step."""
    return _absorb(_absorb(_absorb(1, run_seed), step), prompt_index) >> 1


def sequence_seed(request_seed: int, sample_index: int) -> int:
    """Seed of one sample of a group, in [0, 2^63)."""
    return _absorb(_absorb(2, request_seed), sample_index) >> 1


def draft_seed(sequence_seed: int) -> int:
    """Seed of a sequence's drafts if they must not depend on the target's own noise, in [0, 2^63)."""
    return _absorb(3, sequence_seed) >> 1


def acceptance_seed(sequence_seed: int) -> int:
    """Seed of the decisions whether a sequence's drafts are accepted, in [0, 2^63)."""
    return _absorb(4, sequence_seed) >> 1


def stream_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """Keys for (sequence seed, position); int64 tensors of equal shape."""
    return _finalize_(_finalize_(seeds + _signed(_GAMMA)).add_((positions + 1).mul_(_signed(_GAMMA))))


def uniforms(keys: Tensor, counters: Tensor) -> Tensor:
    """Uniforms, float64 in (0, 1), multiples of 2^-52 plus 2^-53; the int64 arguments broadcast. Counters are at least 0."""
    return _uniforms(_bits(keys, counters))


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, of tokens under `stream_keys`; the two int64 arguments broadcast."""
    blocks = token_ids.div(TILE, rounding_mode="floor") * COLUMNS + token_ids % COLUMNS
    smallest, lane = block_exponentials(keys, blocks)
    is_smallest = token_ids.div(COLUMNS, rounding_mode="floor") % LANES == lane
    return token_exponentials(keys, token_ids, smallest, is_smallest).log_().neg_()


def block_exponentials(keys: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest exponential of each block (float64) and the lane that has it (int64); the arguments broadcast."""
    bits = _bits(keys, blocks + _BLOCKS)
    lane = bits & (LANES - 1)  # the low 4 bits: the uniform takes none of the low 12
    return _uniforms(bits).log_().mul_(-1.0 / LANES), lane


def token_exponentials(keys: Tensor, token_ids: Tensor, smallest: Tensor, is_smallest: Tensor) -> Tensor:
    """Exp(1) variables of tokens (float64), given their blocks' smallest and whether the token is the one that has it."""
    excess = uniforms(keys, token_ids).log_().neg_()
    return excess.masked_fill_(is_smallest, 0.0).add_(smallest)


def _bits(keys: Tensor, counters: Tensor) -> Tensor:
    return _finalize_(keys + (counters + 1) * _signed(_GAMMA))


def _uniforms(bits: Tensor) -> Tensor:
    return _shift_right(bits, 12).double().add_(0.5).mul_(2.0**-52)


def _finalize_(z: Tensor) -> Tensor:
    z.bitwise_xor_(_shift_right(z, 30)).mul_(_signed(_FIRST))
    z.bitwise_xor_(_shift_right(z, 27)).mul_(_signed(_SECOND))
    return z.bitwise_xor_(_shift_right(z, 31))


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own copies the sign of an int64."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _absorb(state: int, value: int) -> int:
    """A new 64-bit state that depends on every bit of the old one and of the integer `value` (modulo 2^64)."""
    z = (state + (value + 1) * _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)
