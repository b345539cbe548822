// What the kernels of all formats share: rows in, rows out, and the loop over panels and blocks of rows.
#pragma once
#include <algorithm>
#include <utility>

#include "common.h"
#include "linear.h"
#include "packed.h"

namespace erollout {

struct Rows {
  const bf16* x;
  int64_t stride;
  int64_t rows;
  const bf16* row(int64_t index) const { return x + index * stride; }
};

struct Outputs {
  const Linear& layer;
  bf16* y;
  int64_t stride;

  // y[row, 16 outputs from `output` on] = sums + bias; outputs behind the last are dropped.
  void store(int64_t row, int64_t output, __m512 sums) const {
    const __mmask16 lanes = first_lanes16(layer.out_features - output);
    if (!lanes) return;
    if (layer.bias) sums = _mm512_add_ps(sums, load_bf16(layer.bias + output, lanes));
    store_bf16(y + row * stride + output, sums, lanes);
  }
};

// Four bytes of any alignment in every 32-bit lane.
inline __m512i broadcast32(const void* source) {
  int32_t value;
  std::memcpy(&value, source, sizeof value);
  return _mm512_set1_epi32(value);
}

constexpr int64_t kPrefetch = 3072;  // bytes ahead in the weight stream
constexpr int kMaxBlock = 12;        // rows of one pass over a panel: 2 x 12 sums fill the registers

inline void prefetch_line(const uint8_t* line) {
  _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetch), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetch + 64), _MM_HINT_T0);
}

// Kernel::block<R, first>(panel, row) for all panels and blocks of 1..kMaxBlock rows; `first` is the pass that reads a panel from
// memory. Blocks differ by at most one row; how rows are blocked changes no bits.
template <class Kernel, int... R>
void run_blocks(const Kernel& kernel, int64_t panel, int64_t rows, std::integer_sequence<int, R...>) {
  using Block = void (*)(const Kernel&, int64_t, int64_t);
  static constexpr Block first[] = {[](const Kernel& k, int64_t p, int64_t row) { k.template block<R + 1, true>(p, row); }...};
  static constexpr Block again[] = {[](const Kernel& k, int64_t p, int64_t row) { k.template block<R + 1, false>(p, row); }...};
  const int64_t blocks = ceil_div(rows, static_cast<int64_t>(sizeof...(R)));
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int64_t size = (rows - row) / (blocks - block);
    (block ? again : first)[size - 1](kernel, panel, row);
    row += size;
  }
}

template <int MaxBlock, class Kernel>
void run_panels(const Kernel& kernel, const Linear& layer, int64_t rows, Threads& threads) {
  const int64_t count = panels(layer.out_features);
  const int64_t tasks = threads.count() == 1 ? 1 : std::min<int64_t>(count, 4 * threads.count());
  threads.parallel_for(tasks, [&](int64_t task) {
    for (int64_t panel = task * count / tasks; panel < (task + 1) * count / tasks; ++panel)
      run_blocks(kernel, panel, rows, std::make_integer_sequence<int, MaxBlock>{});
  });
}

void linear_bf16(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads);
void linear_int4(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads);
void linear_int4_a8(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads);
void linear_int8(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads);

}  // namespace erollout
