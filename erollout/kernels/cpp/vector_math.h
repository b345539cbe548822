// Arithmetic on sixteen floats whose bits are ours: sums in a fixed order, 2^x.
#pragma once
#include <immintrin.h>

#include "common.h"

namespace erollout {

inline __m512 round_to_bf16(__m512 x) {
  return to_float(to_bf16(x));
}

// Sum of all lanes in one fixed order.
inline float sum_lanes(__m512 x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// 2^x within a relative 1.7e-7 where the result is normal; exactly 1 for 0, 0 below -150, inf above 128, NaN for NaN.
// 2^f for the fraction f in [-1/2, 1/2] is a polynomial, minimax in relative error under the constraint that it is 1 at 0.
inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // in this order NaN stays; -inf - -inf would become one
  x = _mm512_min_ps(_mm512_set1_ps(200.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(0.001326472731307149f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.009671512991189957f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05550733581185341f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24022242426872253f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931470036506653f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

inline void exp2(const float* x, float* y) { _mm512_storeu_ps(y, exp2(_mm512_loadu_ps(x))); }

}  // namespace erollout
