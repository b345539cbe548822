// int4 weights in groups: exact (bf16 activations) and on int8 codes of the activations.
#include "activations.h"
#include "int4.h"

namespace erollout {
namespace {

template <bool Asymmetric>
struct Exact {
  const Linear& layer;
  const Permuted& x;
  const Outputs& y;
  __m512i integers;  // nibble, twice -> value less 8 as bf16

  template <int R, class Ahead>
  void block(int64_t panel, int64_t row, Ahead prefetch) const {
    const int64_t inputs = layer.in_features, group_size = layer.group_size, groups = inputs / group_size;
    const uint8_t* line = panel_of(layer, panel);
    const bf16* source = x.values + row * inputs;
    __m512 sum[R][2];
    UNROLLED for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; ++group) {
      const GroupHeader<Asymmetric> header(line);
      prefetch.header(int4_header(Asymmetric));
      line += int4_header(Asymmetric);
      __m512 part[R][2];
      UNROLLED for (int r = 0; r < R; ++r) part[r][0] = part[r][1] = _mm512_setzero_ps();
      for (int64_t k = 0; k < group_size; k += 8, line += kLine, source += 8) {
        prefetch.line();
        const __m512i low = _mm512_load_si512(line), high = _mm512_load_si512(line + 64);
        UNROLLED for (int pair = 0; pair < 4; ++pair) {
          const __m512i weight_low = to_integers(_mm512_srli_epi16(low, 4 * pair), integers);
          const __m512i weight_high = to_integers(_mm512_srli_epi16(high, 4 * pair), integers);
          UNROLLED for (int r = 0; r < R; ++r) {
            const __m512i values = broadcast32(source + r * inputs + 2 * pair);
            add_pairs(part[r][0], weight_low, values);
            add_pairs(part[r][1], weight_high, values);
          }
        }
      }
      UNROLLED for (int r = 0; r < R; ++r) {
        const float activations = Asymmetric ? x.sums[(row + r) * groups + group] : 0;
        UNROLLED for (int half = 0; half < 2; ++half)
          sum[r][half] = header.add(half, sum[r][half], part[r][half], activations);
      }
    }
    UNROLLED for (int r = 0; r < R; ++r)
      UNROLLED for (int half = 0; half < 2; ++half) y.store(row + r, panel * kPanel + half * kHalf, sum[r][half]);
  }
};

template <bool Asymmetric>
struct OnCodes {
  const Linear& layer;
  const Codes& x;
  const Outputs& y;

  template <int R, class Ahead>
  void block(int64_t panel, int64_t row, Ahead prefetch) const {
    const int64_t group_size = layer.group_size, groups = x.groups;
    const uint8_t* line = panel_of(layer, panel);
    const int8_t* source = x.values + row * x.stride;
    __m512 sum[R][2];
    UNROLLED for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; ++group) {
      const GroupHeader<Asymmetric> header(line);
      prefetch.header(int4_header(Asymmetric));
      line += int4_header(Asymmetric);
      __m512i part[R][2];
      UNROLLED for (int r = 0; r < R; ++r) part[r][0] = part[r][1] = _mm512_set1_epi32(-8 * x.sums[(row + r) * groups + group]);
      for (int64_t k = 0; k < group_size; k += 8, line += kLine, source += 8) {
        prefetch.line();
        const __m512i low = _mm512_load_si512(line), high = _mm512_load_si512(line + 64);
        const __m512i low0 = low_nibbles(low), high0 = low_nibbles(high), low4 = high_nibbles(low), high4 = high_nibbles(high);
        UNROLLED for (int r = 0; r < R; ++r) {
          const __m512i first = broadcast32(source + r * x.stride), second = broadcast32(source + r * x.stride + 4);
          add_fours(part[r][0], low0, first);
          add_fours(part[r][1], high0, first);
          add_fours(part[r][0], low4, second);
          add_fours(part[r][1], high4, second);
        }
      }
      UNROLLED for (int r = 0; r < R; ++r) {
        const int64_t index = (row + r) * groups + group;
        const float codes = static_cast<float>(x.sums[index]);
        UNROLLED for (int half = 0; half < 2; ++half)
          sum[r][half] = header.add(half, sum[r][half], part[r][half], codes, x.scales[index]);
      }
    }
    UNROLLED for (int r = 0; r < R; ++r)
      UNROLLED for (int half = 0; half < 2; ++half) y.store(row + r, panel * kPanel + half * kHalf, sum[r][half]);
  }
};

}  // namespace

void linear_int4(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads) {
  const Permuted activations = permuted(layer, x, threads);
  if (layer.asymmetric)
    run_panels<kMaxBlock>(Exact<true>{layer, activations, y, signed_integers()}, layer, x.rows, threads);
  else
    run_panels<kMaxBlock>(Exact<false>{layer, activations, y, signed_integers()}, layer, x.rows, threads);
}

void linear_int4_a8(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads) {
  const Codes codes = quantized(layer, layer.group_size, x, threads);
  if (layer.asymmetric)
    run_panels<kMaxBlock>(OnCodes<true>{layer, codes, y}, layer, x.rows, threads);
  else
    run_panels<kMaxBlock>(OnCodes<false>{layer, codes, y}, layer, x.rows, threads);
}

}  // namespace erollout
