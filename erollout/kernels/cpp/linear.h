// Packed linear layers: y = x W^T + bias. Every pointer is borrowed from a tensor that Python keeps alive.
#pragma once
#include <cstdint>

#include "threads.h"

namespace erollout {

using bf16 = uint16_t;

enum class Format : int32_t {
  bf16 = 0,     // bf16 weights, bf16 activations, fp32 sums
  int4 = 1,     // int4 weights, bf16 activations: exact weight-only
  int4_a8 = 2,  // int4 weights, activations int8 per token and group
  int8 = 3,     // int8 weights per output row, activations int8 per token
};

// Mirrored by a ctypes.Structure in erollout/kernels/native.py; a test compares the sizes.
struct Linear {
  int32_t format;
  int32_t out_features;
  int32_t in_features;
  int32_t group_size;      // of int4: 32, 64 or 128, and divides in_features
  int32_t asymmetric;      // int4: the stream holds zero points
  int32_t reserved;
  const void* weight;      // packed (packed.h), 64-byte aligned
  const float* scale;      // int8: [out_features]; else null
  const bf16* bias;        // [out_features] or null
  const bf16* pre_scale;   // [in_features] or null: x is multiplied by it first, rounded to bf16
};

// y[r] = x[r] W^T + bias for r in [0, rows). A row's bits depend on that row of x alone: not on rows, its place or the threads.
// Strides in elements. x and y need no alignment and must not overlap. Not callable from inside a parallel_for.
void linear(const Linear& layer, const bf16* x, int64_t x_stride, int64_t rows, bf16* y, int64_t y_stride, Threads& threads);

}  // namespace erollout
