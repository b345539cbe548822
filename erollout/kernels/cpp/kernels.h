// What the kernels of all formats share: rows in, rows out, and the loop over panels and blocks of rows.
#pragma once
#include <algorithm>
#include <type_traits>
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

constexpr int64_t kAhead = 3072;  // bytes ahead in the weight stream
#ifdef __AVX512F__
constexpr int kMaxBlock = 12;  // rows of one pass over a panel: 2 x 12 sums fill the registers
#else
constexpr int kMaxBlock = 3;  // of half the size and half as many
#endif

// Fetches weights while others are computed with. A single pass over a panel fetches its own stream, kAhead bytes ahead; of
// several passes, each fetches its share of the next panel: the first would wait for memory, and the others leave it idle.
template <bool Single>
class Prefetch {
 public:
  Prefetch(const uint8_t* panel, int64_t bytes, int64_t pass, int64_t passes)
      : at_(panel + (Single ? kAhead : bytes + bytes * pass / passes)), line_(Single ? kLine : ceil_div(kLine, passes)) {}

  void line() {
    if (Single) {
      fetch(at_, std::integral_constant<int, _MM_HINT_T0>{});
      fetch(at_ + 64, std::integral_constant<int, _MM_HINT_T0>{});
    } else {
      fetch(at_, std::integral_constant<int, _MM_HINT_T1>{});
    }
    at_ += line_;
  }

  void header(int64_t bytes) {
    if (Single) fetch(at_, std::integral_constant<int, _MM_HINT_T0>{});
    at_ += Single ? bytes : line_;
  }

 private:
  template <int Hint>
  static void fetch(const uint8_t* address, std::integral_constant<int, Hint>) {
    _mm_prefetch(reinterpret_cast<const char*>(address), static_cast<_mm_hint>(Hint));
  }
  const uint8_t* at_;
  int64_t line_;
};

// Kernel::block<R>(panel, row, prefetch) for all blocks of 1..MaxBlock rows of one panel. Blocks differ by at most one row; how
// rows are blocked changes no bits.
template <class Kernel, int... R>
void run_blocks(const Kernel& kernel, int64_t panel, int64_t rows, std::integer_sequence<int, R...>) {
  const uint8_t* weights = panel_of(kernel.layer, panel);
  const int64_t bytes = panel_bytes(kernel.layer), blocks = ceil_div(rows, static_cast<int64_t>(sizeof...(R)));
  if (blocks == 1) {
    using Block = void (*)(const Kernel&, int64_t, int64_t, Prefetch<true>);
    static constexpr Block run[] = {
        [](const Kernel& k, int64_t p, int64_t row, Prefetch<true> ahead) { k.template block<R + 1>(p, row, ahead); }...};
    return run[rows - 1](kernel, panel, 0, {weights, bytes, 0, 1});
  }
  using Block = void (*)(const Kernel&, int64_t, int64_t, Prefetch<false>);
  static constexpr Block run[] = {
      [](const Kernel& k, int64_t p, int64_t row, Prefetch<false> ahead) { k.template block<R + 1>(p, row, ahead); }...};
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int64_t size = (rows - row) / (blocks - block);
    run[size - 1](kernel, panel, row, {weights, bytes, block, blocks});
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

// Either kind of kernels, for rows > 0: AVX-512 on any processor that the extension runs on, AMX where tile::available().
void linear_avx512(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads);
void linear_amx(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads);

void linear_bf16(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads);
void linear_int4(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads);
void linear_int4_a8(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads);
void linear_int8(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads);

}  // namespace erollout
