// Exponentials, logarithms and random bits of the sampler, sixteen or eight at a time.
#pragma once
#include <cmath>
#include <limits>

#include "common.h"

namespace erollout {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// e^x for x <= 0 within a relative 1.5e-7 where the result is normal: 1 + r + r^2 P(r), P minimax. 0 for -inf, NaN for NaN.
inline __m512 exp_nonpositive(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-130.0f), x);  // in this order NaN stays; -inf - -inf would become one
  const __m512 whole =
      _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(0.001381459878757596f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.008368716575205326f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.04166838899254799f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.1666652113199234f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.4999999403953552f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
  return _mm512_scalef_ps(_mm512_add_ps(p, _mm512_set1_ps(1.0f)), whole);
}

// log(1 + r) for r in [-1/4, 1/2] within a relative 1e-6: r P(r), P minimax.
inline __m512 log1p_near(__m512 r) {
  __m512 p = _mm512_set1_ps(-0.066460520029068f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.14131858944892883f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(-0.17372222244739532f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.2010803371667862f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(-0.24976791441440582f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.33329764008522034f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(-0.5000021457672119f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0000001192092896f));
  return _mm512_mul_ps(p, r);
}

// x = (1 + r) 2^e with r in [-1/4, 1/2), for positive normal x.
struct Split {
  __m512 r, e;
  explicit Split(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
    e = _mm512_getexp_ps(x);
    e = _mm512_mask_add_ps(e, _mm512_cmp_ps_mask(mantissa, one, _CMP_LT_OQ), e, one);
    r = _mm512_sub_ps(mantissa, one);
  }
};

constexpr float kLn2 = 0.69314718f;

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15ull, kFirst = 0xBF58476D1CE4E5B9ull, kSecond = 0x94D049BB133111EBull;
constexpr uint64_t kBlocks = 1ull << 32;

inline uint64_t finalize(uint64_t z) {
  z = (z ^ (z >> 30)) * kFirst;
  z = (z ^ (z >> 27)) * kSecond;
  return z ^ (z >> 31);
}

inline uint64_t stream_key(int64_t seed, int64_t position) {
  return finalize(finalize(static_cast<uint64_t>(seed) + kGamma) + (static_cast<uint64_t>(position) + 1) * kGamma);
}

inline uint64_t random_bits(uint64_t key, uint64_t counter) { return finalize(key + (counter + 1) * kGamma); }

inline double uniform(uint64_t bits) { return (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52; }

inline __m512i finalize(__m512i z) {
  z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), _mm512_set1_epi64(static_cast<int64_t>(kFirst)));
  z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), _mm512_set1_epi64(static_cast<int64_t>(kSecond)));
  return _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
}

inline __m512 join(__m256 low, __m256 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }

// Errors of block_noise against the exact noise, bounded from its parts: 2e-7 of u and 1e-6 of log1p make 2e-6 of the
// exponential (relative), hence 2e-6 of its logarithm; that log adds 4e-6 of its own (|log| <= 40).
constexpr float kNoiseMargin = 1e-4f;

// The largest noise of each of 16 blocks, the first of which is `block`: log 16 - log(-log u), within kNoiseMargin.
inline __m512 block_noise(uint64_t key, uint64_t block) {
  const __m512i steps = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(static_cast<int64_t>(kGamma)));
  const uint64_t first = key + (block + kBlocks + 1) * kGamma;
  const __m512i low = _mm512_srli_epi64(finalize(_mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)), steps)), 12);
  const __m512i high =
      _mm512_srli_epi64(finalize(_mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first + 8 * kGamma)), steps)), 12);
  const __m512i top = _mm512_set1_epi64((1ll << 52) - 1);
  const __m512 half = _mm512_set1_ps(0.5f), unit = _mm512_set1_ps(0x1p-52f);
  const __m512 u = _mm512_mul_ps(_mm512_add_ps(join(_mm512_cvtepu64_ps(low), _mm512_cvtepu64_ps(high)), half), unit);
  const __m512 v = _mm512_mul_ps(  // 1 - u, precise where u is almost 1
      _mm512_add_ps(join(_mm512_cvtepu64_ps(_mm512_sub_epi64(top, low)), _mm512_cvtepu64_ps(_mm512_sub_epi64(top, high))), half), unit);
  const __mmask16 near = _mm512_cmp_ps_mask(v, _mm512_set1_ps(0.25f), _CMP_LE_OQ);
  Split split(u);
  split.r = _mm512_mask_sub_ps(split.r, near, _mm512_setzero_ps(), v);
  split.e = _mm512_mask_mov_ps(split.e, near, _mm512_setzero_ps());
  const __m512 log_u = _mm512_fmadd_ps(split.e, _mm512_set1_ps(kLn2), log1p_near(split.r));
  const Split exponential(_mm512_sub_ps(_mm512_setzero_ps(), log_u));
  const __m512 log_exponential = _mm512_fmadd_ps(exponential.e, _mm512_set1_ps(kLn2), log1p_near(exponential.r));
  return _mm512_sub_ps(_mm512_set1_ps(2.77258872f), log_exponential);
}

}  // namespace erollout
