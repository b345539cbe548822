#include "kernels.h"

namespace erollout {
namespace {

struct Kernel {
  const Linear& layer;
  const Rows& x;
  const Outputs& y;

  template <int R, bool First>
  void block(int64_t panel, int64_t row) const {
    const uint8_t* line = panel_of(layer, panel);
    const bf16* source = x.row(row);
    __m512 sum[R][2];
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < layer.in_features; k += 2, line += kLine) {
      if (First) prefetch_line(line);
      const __m512bh low = (__m512bh)_mm512_load_si512(line), high = (__m512bh)_mm512_load_si512(line + 64);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512bh pair = (__m512bh)broadcast32(source + r * x.stride + k);
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], low, pair);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], high, pair);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int half = 0; half < 2; ++half) y.store(row + r, panel * kPanel + half * kHalf, sum[r][half]);
  }
};

// x times pre_scale, and padded to an even number of inputs.
Rows prepare(const Linear& layer, const Rows& x, Threads& threads) {
  if (!layer.pre_scale && layer.in_features % 2 == 0) return x;
  static thread_local Scratch scratch;
  const int64_t stride = round_up(layer.in_features, 32);
  bf16* out = static_cast<bf16*>(scratch.at_least(x.rows * stride * sizeof(bf16)));
  threads.parallel_for(x.rows, [&](int64_t row) {
    for (int64_t k = 0; k < stride; k += 16) {
      const __mmask16 lanes = first_lanes16(layer.in_features - k);
      __m256i values = _mm256_maskz_loadu_epi16(lanes, x.row(row) + k);
      if (layer.pre_scale) values = to_bf16(_mm512_mul_ps(to_float(values), load_bf16(layer.pre_scale + k, lanes)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + row * stride + k), values);
    }
  });
  return {out, stride, x.rows};
}

}  // namespace

void linear_bf16(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads) {
  const Rows prepared = prepare(layer, x, threads);
  run_panels<kMaxBlock>(Kernel{layer, prepared, y}, layer, x.rows, threads);
}

}  // namespace erollout
