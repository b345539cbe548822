// int8 weights per output, int8 activations per row.
#include "activations.h"

namespace erollout {
namespace {

struct Kernel {
  const Linear& layer;
  const Codes& x;
  const Outputs& y;

  template <int R, class Ahead>
  void block(int64_t panel, int64_t row, Ahead prefetch) const {
    const uint8_t* line = panel_of(layer, panel);
    const int8_t* source = x.values + row * x.stride;
    __m512i dot[R][2];  // started at -128 times the sum of codes: the bytes are value + 128
    UNROLLED for (int r = 0; r < R; ++r) dot[r][0] = dot[r][1] = _mm512_set1_epi32(-128 * x.sums[row + r]);
    for (int64_t k = 0; k < layer.in_features; k += 4, line += kLine) {
      prefetch.line();
      const __m512i low = _mm512_load_si512(line), high = _mm512_load_si512(line + 64);
      UNROLLED for (int r = 0; r < R; ++r) {
        const __m512i codes = broadcast32(source + r * x.stride + k);
        add_fours(dot[r][0], low, codes);
        add_fours(dot[r][1], high, codes);
      }
    }
    UNROLLED for (int half = 0; half < 2; ++half) {
      const int64_t output = panel * kPanel + half * kHalf;
      const __m512 scale = _mm512_maskz_loadu_ps(first_lanes16(layer.out_features - output), layer.scale + output);
      UNROLLED for (int r = 0; r < R; ++r) {
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[r][half]), _mm512_set1_ps(x.scales[row + r]));
        y.store(row + r, output, _mm512_mul_ps(scaled, scale));
      }
    }
  }
};

}  // namespace

void linear_int8(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads) {
  const Codes codes = quantized(layer, layer.in_features, x, threads);
  run_panels<kMaxBlock>(Kernel{layer, codes, y}, layer, x.rows, threads);
}

}  // namespace erollout
