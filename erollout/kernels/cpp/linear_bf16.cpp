#include "activations.h"

namespace erollout {
namespace {

struct Kernel {
  const Linear& layer;
  const Rows& x;
  const Outputs& y;

  template <int R, class Ahead>
  void block(int64_t panel, int64_t row, Ahead prefetch) const {
    const uint8_t* line = panel_of(layer, panel);
    const bf16* source = x.row(row);
    __m512 sum[R][2];
    UNROLLED for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < layer.in_features; k += 2, line += kLine) {
      prefetch.line();
      const __m512i low = _mm512_load_si512(line), high = _mm512_load_si512(line + 64);
      UNROLLED for (int r = 0; r < R; ++r) {
        const __m512i pair = broadcast32(source + r * x.stride + k);
        add_pairs(sum[r][0], low, pair);
        add_pairs(sum[r][1], high, pair);
      }
    }
    UNROLLED for (int r = 0; r < R; ++r)
      UNROLLED for (int half = 0; half < 2; ++half) y.store(row + r, panel * kPanel + half * kHalf, sum[r][half]);
  }
};

}  // namespace

void linear_bf16(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads) {
  const Rows activations = padded(layer, x, threads);
  run_panels<kMaxBlock>(Kernel{layer, activations, y}, layer, x.rows, threads);
}

}  // namespace erollout
