#include "model_rows.h"

#include <algorithm>
#include <cmath>

#include "vector_math.h"

namespace erollout {

void rms_norm(const bf16* x, const bf16* weight, int64_t size, float epsilon, bf16* y) {
  __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < size; i += 16) {
    const __m512 value = load_bf16(x + i, first_lanes16(size - i));
    __m512& sum = squares[i / 16 % 2];
    sum = _mm512_fmadd_ps(value, value, sum);
  }
  const float mean = sum_lanes(_mm512_add_ps(squares[0], squares[1])) / float(size);
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean + epsilon));
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 lanes = first_lanes16(size - i);
    const __m512 normalised = round_to_bf16(_mm512_mul_ps(load_bf16(x + i, lanes), scale));
    store_bf16(y + i, _mm512_mul_ps(normalised, load_bf16(weight + i, lanes)), lanes);
  }
}

void rotate(const bf16* x, const bf16* cosine, const bf16* sine, int64_t size, bf16* y) {
  const int64_t half = size / 2;
  const auto turned = [](__m512 own, __m512 other, __m512 cosine_, __m512 sine_) {
    return _mm512_add_ps(round_to_bf16(_mm512_mul_ps(own, cosine_)), round_to_bf16(_mm512_mul_ps(other, sine_)));
  };
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 lanes = first_lanes16(half - i);
    const __m512 low = load_bf16(x + i, lanes), high = load_bf16(x + half + i, lanes);
    store_bf16(y + i, turned(low, high, load_bf16(cosine + i, lanes), load_bf16(sine + i, lanes)), lanes);
    store_bf16(y + half + i, turned(high, low, load_bf16(cosine + half + i, lanes), load_bf16(sine + half + i, lanes)), lanes);
  }
}

void silu_times(bf16* gate, const bf16* up, int64_t size) {
  const __m512 one = _mm512_set1_ps(1.0f), minus_log2_e = _mm512_set1_ps(-1.4426950408889634f);
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 lanes = first_lanes16(size - i);
    const __m512 x = load_bf16(gate + i, lanes);
    const __m512 silu = _mm512_div_ps(x, _mm512_add_ps(one, exp2(_mm512_mul_ps(x, minus_log2_e))));
    store_bf16(gate + i, _mm512_mul_ps(round_to_bf16(silu), load_bf16(up + i, lanes)), lanes);
  }
}

void add(bf16* x, const bf16* y, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 lanes = first_lanes16(size - i);
    store_bf16(x + i, _mm512_add_ps(load_bf16(x + i, lanes), load_bf16(y + i, lanes)), lanes);
  }
}

}  // namespace erollout
