#include "activations.h"

#include <limits>

namespace erollout {
namespace {

// Work that is small beside its linear is shared only where there are rows for all threads.
template <class Function>
void for_rows(int64_t rows, Threads& threads, const Function& function) {
  const int64_t tasks = rows < 8 * threads.count() ? 1 : threads.count();
  threads.parallel_for(tasks, [&](int64_t task) {
    for (int64_t row = task * rows / tasks; row < (task + 1) * rows / tasks; ++row) function(row);
  });
}

// 32 activations from input k on, times pre_scale and rounded to bf16; zeros behind the last.
inline __m512i load32(const Linear& layer, const bf16* x, int64_t k) {
  const __mmask32 lanes = first_lanes32(layer.in_features - k);
  const __m512i values = _mm512_maskz_loadu_epi16(lanes, x + k);
  if (!layer.pre_scale) return values;
  const __m512i scale = _mm512_maskz_loadu_epi16(lanes, layer.pre_scale + k);
  const auto product = [&](int half) {
    return _mm512_mul_ps(to_float(half ? _mm512_extracti64x4_epi64(values, 1) : _mm512_castsi512_si256(values)),
                         to_float(half ? _mm512_extracti64x4_epi64(scale, 1) : _mm512_castsi512_si256(scale)));
  };
  return (__m512i)_mm512_cvtne2ps_pbh(product(1), product(0));
}

inline __m512 low_half(__m512i values) { return to_float(_mm512_castsi512_si256(values)); }
inline __m512 high_half(__m512i values) { return to_float(_mm512_extracti64x4_epi64(values, 1)); }

inline __m512i maximum_magnitude(__m512i maximum, __m512i values) {
  return _mm512_max_epu16(maximum, _mm512_and_si512(values, _mm512_set1_epi16(0x7fff)));
}

inline uint16_t largest(__m512i values) {
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(values), _mm512_extracti64x4_epi64(values, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));  // of the complement
  return static_cast<uint16_t>(~_mm_extract_epi16(least, 0));
}

// One group of `size` inputs (a multiple of 32, as padded) from input k on.
inline void quantize_group(const Linear& layer, const bf16* x, int64_t k, int64_t size, int8_t* codes, float& scale,
                           int32_t& sum) {
  __m512i maximum = _mm512_setzero_si512();
  for (int64_t i = 0; i < size; i += 32) maximum = maximum_magnitude(maximum, load32(layer, x, k + i));
  const uint16_t bits = largest(maximum);
  const float magnitude = to_float(bits);
  const bool finite = bits < 0x7f80, zero = magnitude < 1e-36f;
  const __m512 inverse = _mm512_set1_ps(!finite || zero ? 0.f : 127.f / magnitude);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < size; i += 32) {
    const __m512i values = load32(layer, x, k + i);
    const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(low_half(values), inverse));
    const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(high_half(values), inverse));
    total = _mm512_add_epi32(total, _mm512_add_epi32(low, high));
    _mm_store_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(low));
    _mm_store_si128(reinterpret_cast<__m128i*>(codes + i + 16), _mm512_cvtepi32_epi8(high));
  }
  scale = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.f : magnitude / 127.f;
  sum = _mm512_reduce_add_epi32(total);
}

}  // namespace

Rows padded(const Linear& layer, const Rows& x, Threads& threads) {
  const int64_t stride = padded_inputs(Format::bf16, layer.in_features);
  if (!layer.pre_scale && stride == layer.in_features) return x;
  static thread_local Scratch scratch;
  bf16* out = static_cast<bf16*>(scratch.at_least(x.rows * stride * sizeof(bf16)));
  for_rows(x.rows, threads, [&, out](int64_t row) {
    for (int64_t k = 0; k < stride; k += 32) _mm512_store_si512(out + row * stride + k, load32(layer, x.row(row), k));
  });
  return {out, stride, x.rows};
}

Permuted permuted(const Linear& layer, const Rows& x, Threads& threads) {
  static thread_local Scratch value_scratch, sum_scratch;
  const int64_t inputs = layer.in_features, groups = inputs / layer.group_size;
  bf16* values = static_cast<bf16*>(value_scratch.at_least(x.rows * inputs * sizeof(bf16)));
  float* sums = layer.asymmetric ? static_cast<float*>(sum_scratch.at_least(x.rows * groups * sizeof(float))) : nullptr;
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>((i & ~7) + (i & 3) * 2 + (i >> 2 & 1));
  const __m512i lanes = _mm512_load_si512(order);
  for_rows(x.rows, threads, [&](int64_t row) {
    for (int64_t group = 0; group < groups; ++group) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t k = group * layer.group_size; k < (group + 1) * layer.group_size; k += 32) {
        const __m512i loaded = load32(layer, x.row(row), k);
        if (sums) sum = _mm512_add_ps(sum, _mm512_add_ps(low_half(loaded), high_half(loaded)));
        _mm512_store_si512(values + row * inputs + k, _mm512_permutexvar_epi16(lanes, loaded));
      }
      if (sums) sums[row * groups + group] = _mm512_reduce_add_ps(sum);
    }
  });
  return {values, sums};
}

Codes quantized(const Linear& layer, int64_t group_size, const Rows& x, Threads& threads) {
  static thread_local Scratch code_scratch, scale_scratch, sum_scratch;
  const int64_t stride = round_up(layer.in_features, 64), groups = ceil_div(layer.in_features, group_size);
  int8_t* codes = static_cast<int8_t*>(code_scratch.at_least(x.rows * stride));
  float* scales = static_cast<float*>(scale_scratch.at_least(x.rows * groups * sizeof(float)));
  int32_t* sums = static_cast<int32_t*>(sum_scratch.at_least(x.rows * groups * sizeof(int32_t)));
  const int64_t size = groups == 1 ? stride : group_size;
  for_rows(x.rows, threads, [&](int64_t row) {
    for (int64_t group = 0; group < groups; ++group)
      quantize_group(layer, x.row(row), group * size, size, codes + row * stride + group * size, scales[row * groups + group],
                     sums[row * groups + group]);
  });
  return {codes, stride, groups, scales, sums};
}

}  // namespace erollout
