// What the model does to one token's row between its linear layers.
#pragma once
#include <cstdint>

#include "common.h"

namespace erollout {

// y = x / rms(x) * weight. y may be x.
void rms_norm(const bf16* x, const bf16* weight, int64_t size, float epsilon, bf16* y);

// Rotate one head: x cosine + (its halves swapped) sine, all [size]. y may be x.
void rotate(const bf16* x, const bf16* cosine, const bf16* sine, int64_t size, bf16* y);

// gate = silu(gate) * up.
void silu_times(bf16* gate, const bf16* up, int64_t size);

// x += y.
void add(bf16* x, const bf16* y, int64_t size);

}  // namespace erollout
