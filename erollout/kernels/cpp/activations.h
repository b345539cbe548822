// Activations as the kernels read them: copies in the scratch of the calling thread, valid until its next linear.
#pragma once
#include "kernels.h"

namespace erollout {

// bf16: x times pre_scale, padded with zeros to the packed inputs; x itself where nothing is to be done.
Rows padded(const Linear& layer, const Rows& x, Threads& threads);

// int4: x times pre_scale, each 8 inputs in the order 0 2 4 6 1 3 5 7, in which a packed line unpacks to pairs.
struct Permuted {
  const bf16* values;  // [rows][in_features]
  const float* sums;   // [rows][groups] of the values; null if the weights are symmetric
};
Permuted permuted(const Linear& layer, const Rows& x, Threads& threads);

// int8 codes of x times pre_scale: code = round(value * (127 / max |value|)), to even, over a group (int4_a8) or a row (int8).
// Where a value is infinite or NaN, the scale is NaN; where all are below 1e-36, codes and scale are zero.
struct Codes {
  const int8_t* values;  // [rows][stride], stride a multiple of 64; int8: the padding is zero
  int64_t stride;
  int64_t groups;
  const float* scales;   // [rows][groups]: max |value| / 127
  const int32_t* sums;   // [rows][groups] of the codes
};
Codes quantized(const Linear& layer, int64_t group_size, const Rows& x, Threads& threads);

}  // namespace erollout
