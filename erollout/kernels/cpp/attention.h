// Grouped-query attention of new tokens over the paged KV cache, read where it lies.
#pragma once
#include <cstdint>
#include <vector>

#include "linear.h"

namespace erollout {

// Sizes of one rank's heads and of the cache, which is [2 x kv_heads][blocks][block_size][head_size]: keys, then values.
struct AttentionShape {
  int64_t heads;
  int64_t kv_heads;
  int64_t head_size;     // even
  int64_t block_size;
  int64_t cache_blocks;  // of one head of the cache
};

// New tokens of one sequence: `tokens` of them, the first at `start` and in `first_row` of the pass.
struct Span {
  int64_t first_row;
  int64_t start;
  int64_t tokens;
  const int32_t* blocks;  // its block table, for all positions below start + tokens
};

// A few query tokens of a span, which read the keys and values together.
struct Tile {
  int64_t first_row;
  int64_t start;
  int64_t tokens;
  const int32_t* blocks;
};

std::vector<Tile> cut_into_tiles(const AttentionShape& shape, const Span* spans, int64_t count);

// output[row] = attention of every tile's tokens. query: rows of `query_stride`, the heads side by side, rotated. output: rows of
// heads x head_size. cache: of this layer; it already holds the keys and values of the pass's own tokens.
//
// Scores and sums are fp32, the weights are rounded to bf16 before they are multiplied with the values and summed up. A token's
// bits depend on its query and its sequence's keys and values up to its position alone: keys come in chunks that begin at
// multiples of a fixed size, in their order; what lies beyond the position is never part of the arithmetic, be it NaN.
void attention(const AttentionShape& shape, const std::vector<Tile>& tiles, const bf16* query, int64_t query_stride,
               const bf16* cache, bf16* output, Threads& threads);

}  // namespace erollout
