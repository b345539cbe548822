// Drawing tokens from rows of logits: Gumbel-max with the noise of erollout/engine/sampling/random.py, normalizers, filters.
#pragma once
#include <cstdint>

namespace erollout {

constexpr int64_t kLanes = 16;    // tokens of a block of noise; they lie kColumns ids apart
constexpr int64_t kColumns = 64;  // blocks of a tile
constexpr int64_t kTile = kLanes * kColumns;

// A filter's parameter in the rows that have one; rows ascend.
template <class Value>
struct RowFilter {
  const int64_t* rows;
  const Value* values;
  int64_t count;
};

// Mirrored by a ctypes.Structure in erollout/kernels/native_sampling.py; a test compares the sizes.
struct SamplingJob {
  const void* logits;      // [rows, size] of ids first_id + margin on; bf16 or float
  int64_t logits_stride;
  int64_t rows;
  int64_t size;
  int64_t margin;          // columns of the grid before the first token
  int64_t width;           // columns of the grid, a multiple of kTile
  int64_t first_id;        // of the grid, a multiple of kTile
  int32_t is_bf16;
  int32_t wants_facts;     // all six; else the best value alone
  const int64_t* seeds;    // [rows]
  const int64_t* positions;
  const int64_t* noisy;    // 0: greedy
  const float* temperature;   // [rows] or null: all 1
  const float* penalty;       // [rows] or null: all 1
  const int64_t* context_ids; // [rows, context_length], -1 where there is none
  int64_t context_length;
  RowFilter<int64_t> top_k;
  RowFilter<double> top_p;
  RowFilter<double> min_p;
  float* processed;        // [rows, width] or null: where the processed logits go, or are
  int32_t is_processed;    // they are there already
  int32_t reserved;
  int64_t* token_ids;      // [rows] or null: always valid ids, 0 where no logit is above -inf
  double* facts;           // [rows, 6] or null: best value and id, the id's raw logit, log of the sum of exponentials, both processed
};

class Threads;

// A row's results depend on that row alone, bit for bit: not on the other rows or the threads.
void sample(const SamplingJob& job, Threads& threads);

// The smallest logit of values[0, count) that top-k keeps: the k-th largest, -inf if there are fewer. Reorders values.
float top_k_floor(float* values, int64_t count, int64_t k);

// The largest value from which upwards there is at least the share p of the mass exp(value - largest) of all. Destroys both arrays,
// which have room for 16 more than count. Masses are integers in units of 2^-40, as in erollout/engine/sampling/logits.py.
float top_p_floor(float* values, float* masses, int64_t count, float largest, double p);

}  // namespace erollout
