// What the kernels use of AVX-512, from AVX2 and FMA, for processors without it: two halves of 256 bits in the place of each
// register. In this namespace the names hide the compiler's own. Included by common.h alone.
//
// As in AVX-512, but for: rounding and sums of bf16 pairs (see dpbf16, cvtneps), and arguments that no kernel has (each says so).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace erollout {

#define EROLLOUT_INLINE inline __attribute__((always_inline))

struct __m512 {
  __m256 low, high;
};
struct __m512i {
  __m256i low, high;
};
struct __m512d {
  __m256d low, high;
};
using __m512bh = __m512i;

// ---- masks ----

EROLLOUT_INLINE __m256i lanes32(unsigned mask) {  // all bits of the 32-bit lanes whose bit is set
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits), bits);
}
EROLLOUT_INLINE __m256i lanes64(unsigned mask) {
  const __m256i bits = _mm256_setr_epi64x(1, 2, 4, 8);
  return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(static_cast<int>(mask)), bits), bits);
}
EROLLOUT_INLINE __m256 select(__m256 otherwise, unsigned mask, __m256 chosen) {
  return _mm256_blendv_ps(otherwise, chosen, _mm256_castsi256_ps(lanes32(mask)));
}

// ---- float ----

#define EROLLOUT_UNARY(type, name, half) \
  EROLLOUT_INLINE type name(type a) { return {half(a.low), half(a.high)}; }
#define EROLLOUT_BINARY(type, name, half) \
  EROLLOUT_INLINE type name(type a, type b) { return {half(a.low, b.low), half(a.high, b.high)}; }
#define EROLLOUT_TERNARY(type, name, half) \
  EROLLOUT_INLINE type name(type a, type b, type c) { return {half(a.low, b.low, c.low), half(a.high, b.high, c.high)}; }
#define EROLLOUT_SET1(type, name, half, element) \
  EROLLOUT_INLINE type name(element value) { return {half(value), half(value)}; }

EROLLOUT_SET1(__m512, _mm512_set1_ps, _mm256_set1_ps, float)
EROLLOUT_INLINE __m512 _mm512_setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
EROLLOUT_INLINE __m512 _mm512_setr_ps(float a, float b, float c, float d, float e, float f, float g, float h, float i, float j,
                                      float k, float l, float m, float n, float o, float p) {
  return {_mm256_setr_ps(a, b, c, d, e, f, g, h), _mm256_setr_ps(i, j, k, l, m, n, o, p)};
}
EROLLOUT_BINARY(__m512, _mm512_add_ps, _mm256_add_ps)
EROLLOUT_BINARY(__m512, _mm512_sub_ps, _mm256_sub_ps)
EROLLOUT_BINARY(__m512, _mm512_mul_ps, _mm256_mul_ps)
EROLLOUT_BINARY(__m512, _mm512_div_ps, _mm256_div_ps)
EROLLOUT_BINARY(__m512, _mm512_max_ps, _mm256_max_ps)
EROLLOUT_BINARY(__m512, _mm512_min_ps, _mm256_min_ps)
EROLLOUT_TERNARY(__m512, _mm512_fmadd_ps, _mm256_fmadd_ps)
EROLLOUT_TERNARY(__m512, _mm512_fnmadd_ps, _mm256_fnmadd_ps)

EROLLOUT_INLINE __m512 _mm512_load_ps(const void* from) {
  const float* at = static_cast<const float*>(from);
  return {_mm256_load_ps(at), _mm256_load_ps(at + 8)};
}
EROLLOUT_INLINE __m512 _mm512_loadu_ps(const void* from) {
  const float* at = static_cast<const float*>(from);
  return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)};
}
EROLLOUT_INLINE void _mm512_store_ps(void* to, __m512 a) {
  float* at = static_cast<float*>(to);
  _mm256_store_ps(at, a.low);
  _mm256_store_ps(at + 8, a.high);
}
EROLLOUT_INLINE void _mm512_storeu_ps(void* to, __m512 a) {
  float* at = static_cast<float*>(to);
  _mm256_storeu_ps(at, a.low);
  _mm256_storeu_ps(at + 8, a.high);
}
EROLLOUT_INLINE __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
  const float* at = static_cast<const float*>(from);
  return {_mm256_maskload_ps(at, lanes32(mask)), _mm256_maskload_ps(at + 8, lanes32(mask >> 8))};
}
EROLLOUT_INLINE void _mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 a) {
  float* at = static_cast<float*>(to);
  _mm256_maskstore_ps(at, lanes32(mask), a.low);
  _mm256_maskstore_ps(at + 8, lanes32(mask >> 8), a.high);
}
EROLLOUT_INLINE __m512 _mm512_mask_mov_ps(__m512 otherwise, __mmask16 mask, __m512 chosen) {
  return {select(otherwise.low, mask, chosen.low), select(otherwise.high, mask >> 8, chosen.high)};
}
EROLLOUT_INLINE __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 a) { return _mm512_mask_mov_ps(_mm512_setzero_ps(), mask, a); }
EROLLOUT_INLINE __m512 _mm512_mask_loadu_ps(__m512 otherwise, __mmask16 mask, const void* from) {
  return _mm512_mask_mov_ps(otherwise, mask, _mm512_maskz_loadu_ps(mask, from));
}
EROLLOUT_INLINE __m512 _mm512_mask_add_ps(__m512 otherwise, __mmask16 mask, __m512 a, __m512 b) {
  return _mm512_mask_mov_ps(otherwise, mask, _mm512_add_ps(a, b));
}
EROLLOUT_INLINE __m512 _mm512_mask_sub_ps(__m512 otherwise, __mmask16 mask, __m512 a, __m512 b) {
  return _mm512_mask_mov_ps(otherwise, mask, _mm512_sub_ps(a, b));
}
EROLLOUT_INLINE __m512 _mm512_maskz_div_ps(__mmask16 mask, __m512 a, __m512 b) {
  return _mm512_maskz_mov_ps(mask, _mm512_div_ps(a, b));
}
EROLLOUT_INLINE __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, const int predicate) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, predicate));
  return static_cast<__mmask16>(low | _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, predicate)) << 8);
}
EROLLOUT_INLINE __mmask16 _mm512_mask_cmp_ps_mask(__mmask16 mask, __m512 a, __m512 b, const int predicate) {
  return mask & _mm512_cmp_ps_mask(a, b, predicate);
}
EROLLOUT_INLINE __m512 _mm512_maskz_compress_ps(__mmask16 mask, __m512 a) {
  alignas(64) float from[16], to[16] = {};
  _mm512_store_ps(from, a);
  for (int count = 0; mask; mask &= mask - 1) to[count++] = from[__builtin_ctz(mask)];
  return _mm512_load_ps(to);
}
EROLLOUT_INLINE __m512 _mm512_permutexvar_ps(__m512i index, __m512 table) {
  const auto pick = [&](__m256i i) {
    const __m256 low = _mm256_permutevar8x32_ps(table.low, i), high = _mm256_permutevar8x32_ps(table.high, i);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
  };
  return {pick(index.low), pick(index.high)};
}
EROLLOUT_INLINE __m512 _mm512_abs_ps(__m512 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
EROLLOUT_INLINE __m512 _mm512_roundscale_ps(__m512 a, const int rounding) {  // to whole numbers
  return {_mm256_round_ps(a.low, rounding), _mm256_round_ps(a.high, rounding)};
}
EROLLOUT_INLINE __m256 power_of_two(__m256i exponent) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
}
EROLLOUT_INLINE __m256 scaled(__m256 a, __m256 exponent) {  // whole exponents; in two steps, of which one can round
  const __m256i limit = _mm256_set1_epi32(252);
  __m256i whole = _mm256_cvtps_epi32(exponent);
  whole = _mm256_max_epi32(_mm256_min_epi32(whole, limit), _mm256_sub_epi32(_mm256_setzero_si256(), limit));
  const __m256i first = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(first)), power_of_two(_mm256_sub_epi32(whole, first)));
}
EROLLOUT_BINARY(__m512, _mm512_scalef_ps, scaled)
EROLLOUT_INLINE __m256 exponent_of(__m256 a) {  // of 0 and normal numbers
  const __m256i biased = _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(a), 23), _mm256_set1_epi32(255));
  const __m256 exponent = _mm256_cvtepi32_ps(_mm256_sub_epi32(biased, _mm256_set1_epi32(127)));
  const __m256 is_zero = _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_EQ_OQ);
  return _mm256_blendv_ps(exponent, _mm256_set1_ps(-__builtin_inff()), is_zero);
}
EROLLOUT_UNARY(__m512, _mm512_getexp_ps, exponent_of)
EROLLOUT_INLINE __m256 mantissa_of(__m256 a) {  // in [0.75, 1.5), of 0 and normal numbers, without the sign
  const __m256i fraction = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffff));
  const __m256i halved = _mm256_srli_epi32(fraction, 22);  // 1 from 1.5 on
  const __m256i exponent = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_set1_epi32(127), halved), 23);
  return _mm256_castsi256_ps(_mm256_or_si256(fraction, exponent));
}
EROLLOUT_INLINE __m512 _mm512_getmant_ps(__m512 a, _MM_MANTISSA_NORM_ENUM, _MM_MANTISSA_SIGN_ENUM) {
  return {mantissa_of(a.low), mantissa_of(a.high)};
}

EROLLOUT_INLINE float _mm512_cvtss_f32(__m512 a) { return _mm256_cvtss_f32(a.low); }
template <class Fold>
EROLLOUT_INLINE float fold(__m256 a, Fold with) {
  __m128 four = with(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  four = with(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(with(four, _mm_movehdup_ps(four)));
}
EROLLOUT_INLINE float _mm512_reduce_max_ps(__m512 a) {
  return fold(_mm256_max_ps(a.low, a.high), [](__m128 x, __m128 y) { return _mm_max_ps(x, y); });
}
EROLLOUT_INLINE float _mm512_reduce_min_ps(__m512 a) {
  return fold(_mm256_min_ps(a.low, a.high), [](__m128 x, __m128 y) { return _mm_min_ps(x, y); });
}
EROLLOUT_INLINE float _mm512_reduce_add_ps(__m512 a) {
  return fold(_mm256_add_ps(a.low, a.high), [](__m128 x, __m128 y) { return _mm_add_ps(x, y); });
}

EROLLOUT_INLINE __m256 _mm512_castps512_ps256(__m512 a) { return a.low; }
EROLLOUT_INLINE __m512 _mm512_castps256_ps512(__m256 a) { return {a, _mm256_setzero_ps()}; }
EROLLOUT_INLINE __m256 _mm512_extractf32x8_ps(__m512 a, const int half) { return half ? a.high : a.low; }
EROLLOUT_INLINE __m512 _mm512_insertf32x8(__m512 a, __m256 b, const int half) {
  return half ? __m512{a.low, b} : __m512{b, a.high};
}
EROLLOUT_INLINE __m512 _mm512_castsi512_ps(__m512i a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
EROLLOUT_INLINE __m512i _mm512_castps_si512(__m512 a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
EROLLOUT_INLINE __m512i _mm512_cvtps_epi32(__m512 a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
EROLLOUT_INLINE __m512 _mm512_cvtepi32_ps(__m512i a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }

// ---- double ----

EROLLOUT_INLINE __m512d _mm512_setzero_pd() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
EROLLOUT_BINARY(__m512d, _mm512_add_pd, _mm256_add_pd)
EROLLOUT_BINARY(__m512d, _mm512_mul_pd, _mm256_mul_pd)
EROLLOUT_TERNARY(__m512d, _mm512_fmadd_pd, _mm256_fmadd_pd)
EROLLOUT_INLINE __m512d _mm512_loadu_pd(const void* from) {
  const double* at = static_cast<const double*>(from);
  return {_mm256_loadu_pd(at), _mm256_loadu_pd(at + 4)};
}
EROLLOUT_INLINE __m512d _mm512_cvtps_pd(__m256 a) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))};
}
EROLLOUT_INLINE double _mm512_reduce_add_pd(__m512d a) {
  const __m256d four = _mm256_add_pd(a.low, a.high);
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// ---- integers ----

EROLLOUT_INLINE __m512i _mm512_setzero_si512() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
EROLLOUT_SET1(__m512i, _mm512_set1_epi8, _mm256_set1_epi8, char)
EROLLOUT_SET1(__m512i, _mm512_set1_epi16, _mm256_set1_epi16, short)
EROLLOUT_SET1(__m512i, _mm512_set1_epi32, _mm256_set1_epi32, int)
EROLLOUT_SET1(__m512i, _mm512_set1_epi64, _mm256_set1_epi64x, long long)
EROLLOUT_INLINE __m512i _mm512_setr_epi64(long long a, long long b, long long c, long long d, long long e, long long f,
                                          long long g, long long h) {
  return {_mm256_setr_epi64x(a, b, c, d), _mm256_setr_epi64x(e, f, g, h)};
}
EROLLOUT_BINARY(__m512i, _mm512_and_si512, _mm256_and_si256)
EROLLOUT_BINARY(__m512i, _mm512_or_si512, _mm256_or_si256)
EROLLOUT_BINARY(__m512i, _mm512_xor_si512, _mm256_xor_si256)
EROLLOUT_BINARY(__m512i, _mm512_add_epi8, _mm256_add_epi8)
EROLLOUT_BINARY(__m512i, _mm512_add_epi16, _mm256_add_epi16)
EROLLOUT_BINARY(__m512i, _mm512_add_epi32, _mm256_add_epi32)
EROLLOUT_BINARY(__m512i, _mm512_add_epi64, _mm256_add_epi64)
EROLLOUT_BINARY(__m512i, _mm512_sub_epi64, _mm256_sub_epi64)
EROLLOUT_BINARY(__m512i, _mm512_max_epi32, _mm256_max_epi32)
EROLLOUT_BINARY(__m512i, _mm512_min_epi32, _mm256_min_epi32)
EROLLOUT_BINARY(__m512i, _mm512_max_epu16, _mm256_max_epu16)
EROLLOUT_BINARY(__m512i, _mm512_unpacklo_epi32, _mm256_unpacklo_epi32)
EROLLOUT_BINARY(__m512i, _mm512_unpackhi_epi32, _mm256_unpackhi_epi32)
EROLLOUT_BINARY(__m512i, _mm512_unpacklo_epi64, _mm256_unpacklo_epi64)
EROLLOUT_BINARY(__m512i, _mm512_unpackhi_epi64, _mm256_unpackhi_epi64)
EROLLOUT_INLINE __m256i low_product(__m256i a, __m256i b) {  // of 64 bits
  const __m256i crossed = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(a, 32), b),
                                           _mm256_mul_epu32(a, _mm256_srli_epi64(b, 32)));
  return _mm256_add_epi64(_mm256_mul_epu32(a, b), _mm256_slli_epi64(crossed, 32));
}
EROLLOUT_BINARY(__m512i, _mm512_mullo_epi64, low_product)
EROLLOUT_INLINE __m512i _mm512_srli_epi16(__m512i a, int n) { return {_mm256_srli_epi16(a.low, n), _mm256_srli_epi16(a.high, n)}; }
EROLLOUT_INLINE __m512i _mm512_srli_epi64(__m512i a, int n) { return {_mm256_srli_epi64(a.low, n), _mm256_srli_epi64(a.high, n)}; }
EROLLOUT_INLINE __m512i _mm512_slli_epi32(__m512i a, int n) { return {_mm256_slli_epi32(a.low, n), _mm256_slli_epi32(a.high, n)}; }

EROLLOUT_INLINE __m512i _mm512_load_si512(const void* from) {
  const __m256i* at = static_cast<const __m256i*>(from);
  return {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
}
EROLLOUT_INLINE __m512i _mm512_loadu_si512(const void* from) {
  const __m256i* at = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
EROLLOUT_INLINE void _mm512_store_si512(void* to, __m512i a) {
  __m256i* at = static_cast<__m256i*>(to);
  _mm256_store_si256(at, a.low);
  _mm256_store_si256(at + 1, a.high);
}
EROLLOUT_INLINE void _mm512_stream_si512(__m512i* to, __m512i a) {
  __m256i* at = reinterpret_cast<__m256i*>(to);
  _mm256_stream_si256(at, a.low);
  _mm256_stream_si256(at + 1, a.high);
}
template <class Vector, class Element, class Mask>
EROLLOUT_INLINE Vector gathered(Mask mask, const void* from) {  // what the mask leaves out is not read
  alignas(64) Element elements[sizeof(Vector) / sizeof(Element)] = {};
  for (; mask; mask &= mask - 1) {
    const int lane = __builtin_ctzll(mask);
    elements[lane] = static_cast<const Element*>(from)[lane];
  }
  Vector result;
  std::memcpy(&result, elements, sizeof result);
  return result;
}
EROLLOUT_INLINE __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* from) {
  return mask == ~0ull ? _mm512_loadu_si512(from) : gathered<__m512i, uint8_t>(mask, from);
}
EROLLOUT_INLINE __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* from) {
  return mask == ~0u ? _mm512_loadu_si512(from) : gathered<__m512i, uint16_t>(mask, from);
}
EROLLOUT_INLINE __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* from) {
  const int* at = static_cast<const int*>(from);
  return {_mm256_maskload_epi32(at, lanes32(mask)), _mm256_maskload_epi32(at + 8, lanes32(mask >> 8))};
}
EROLLOUT_INLINE __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
  if (mask == 0xffff) return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  return gathered<__m256i, uint16_t>(mask, from);
}
EROLLOUT_INLINE void _mm256_mask_storeu_epi16(void* to, __mmask16 mask, __m256i a) {
  if (mask == 0xffff) return _mm256_storeu_si256(static_cast<__m256i*>(to), a);
  alignas(32) uint16_t elements[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(elements), a);
  for (; mask; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    static_cast<uint16_t*>(to)[lane] = elements[lane];
  }
}
EROLLOUT_INLINE __m512i _mm512_mask_mov_epi32(__m512i otherwise, __mmask16 mask, __m512i chosen) {
  return {_mm256_blendv_epi8(otherwise.low, chosen.low, lanes32(mask)),
          _mm256_blendv_epi8(otherwise.high, chosen.high, lanes32(mask >> 8))};
}
EROLLOUT_INLINE __m512i _mm512_mask_add_epi64(__m512i otherwise, __mmask8 mask, __m512i a, __m512i b) {
  const __m512i sum = _mm512_add_epi64(a, b);
  return {_mm256_blendv_epi8(otherwise.low, sum.low, lanes64(mask)),
          _mm256_blendv_epi8(otherwise.high, sum.high, lanes64(mask >> 4))};
}

EROLLOUT_INLINE __m256i _mm512_castsi512_si256(__m512i a) { return a.low; }
EROLLOUT_INLINE __m512i _mm512_castsi256_si512(__m256i a) { return {a, _mm256_setzero_si256()}; }
EROLLOUT_INLINE __m256i _mm512_extracti64x4_epi64(__m512i a, const int half) { return half ? a.high : a.low; }
EROLLOUT_INLINE __m512i _mm512_inserti64x4(__m512i a, __m256i b, const int half) {
  return half ? __m512i{a.low, b} : __m512i{b, a.high};
}
EROLLOUT_INLINE __m128i quarter(__m512i a, int index) {
  const __m256i half = index < 2 ? a.low : a.high;
  return index % 2 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half);
}
EROLLOUT_INLINE __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, const int order) {
  return {_mm256_set_m128i(quarter(a, order >> 2 & 3), quarter(a, order & 3)),
          _mm256_set_m128i(quarter(b, order >> 6 & 3), quarter(b, order >> 4 & 3))};
}
EROLLOUT_INLINE __m512i _mm512_permutexvar_epi16(__m512i index, __m512i table) {
  alignas(64) uint16_t at[32], from[32], to[32];
  _mm512_store_si512(at, index);
  _mm512_store_si512(from, table);
  for (int i = 0; i < 32; ++i) to[i] = from[at[i] & 31];
  return _mm512_load_si512(to);
}
EROLLOUT_INLINE __m512i _mm512_permutex2var_epi16(__m512i first, __m512i index, __m512i second) {
  alignas(64) uint16_t at[32], from[64], to[32];
  _mm512_store_si512(at, index);
  _mm512_store_si512(from, first);
  _mm512_store_si512(from + 32, second);
  for (int i = 0; i < 32; ++i) to[i] = from[at[i] & 63];
  return _mm512_load_si512(to);
}

EROLLOUT_INLINE __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))};
}
EROLLOUT_INLINE __m128i _mm512_cvtepi32_epi8(__m512i a) {
  const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i low = _mm256_shuffle_epi8(a.low, order), high = _mm256_shuffle_epi8(a.high, order);
  return _mm_unpacklo_epi64(_mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)),
                            _mm_unpacklo_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
EROLLOUT_INLINE void _mm512_mask_cvtepi32_storeu_epi8(void* to, __mmask16 mask, __m512i a) {
  alignas(16) uint8_t bytes[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8(a));
  for (; mask; mask &= mask - 1) static_cast<uint8_t*>(to)[__builtin_ctz(mask)] = bytes[__builtin_ctz(mask)];
}
EROLLOUT_INLINE __m256i _mm512_cvtepi64_epi32(__m512i a) {
  const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  return _mm256_blend_epi32(_mm256_permutevar8x32_epi32(a.low, even), _mm256_permutevar8x32_epi32(a.high, even), 0xf0);
}
EROLLOUT_INLINE __m256i nearest(__m256d a) {  // |a| below 2^51
  const __m256d shift = _mm256_set1_pd(0x1.8p52);
  return _mm256_sub_epi64(_mm256_castpd_si256(_mm256_add_pd(a, shift)), _mm256_castpd_si256(shift));
}
EROLLOUT_INLINE __m512i _mm512_cvtps_epi64(__m256 a) {
  const __m512d wide = _mm512_cvtps_pd(a);
  return {nearest(wide.low), nearest(wide.high)};
}
EROLLOUT_INLINE __m128 rounded(__m256i a) {  // of integers below 2^52
  const __m256d shift = _mm256_set1_pd(0x1p52);
  return _mm256_cvtpd_ps(_mm256_sub_pd(_mm256_castsi256_pd(_mm256_or_si256(a, _mm256_castpd_si256(shift))), shift));
}
EROLLOUT_INLINE __m256 _mm512_cvtepu64_ps(__m512i a) { return _mm256_set_m128(rounded(a.high), rounded(a.low)); }

EROLLOUT_INLINE int _mm512_reduce_add_epi32(__m512i a) {
  const __m256i eight = _mm256_add_epi32(a.low, a.high);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
EROLLOUT_INLINE int _mm512_reduce_max_epi32(__m512i a) {
  const __m256i eight = _mm256_max_epi32(a.low, a.high);
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
EROLLOUT_INLINE long long _mm512_reduce_add_epi64(__m512i a) {
  const __m256i four = _mm256_add_epi64(a.low, a.high);
  const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
  return _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
}

// ---- bf16 ----

EROLLOUT_INLINE __m256i rounded_to_bf16(__m256 a) {  // in the low halves of 32 bits; denormals become zero, a NaN stays one
  const __m256i bits = _mm256_castps_si256(a), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i exponent = _mm256_and_si256(bits, _mm256_set1_epi32(0x7f800000));
  const __m256i tiny = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x8000));
  return _mm256_blendv_epi8(_mm256_blendv_epi8(nearest, quiet, is_nan), sign, tiny);
}
EROLLOUT_INLINE __m256i _mm512_cvtneps_pbh(__m512 a) {
  const __m256i packed = _mm256_packus_epi32(rounded_to_bf16(a.low), rounded_to_bf16(a.high));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
EROLLOUT_INLINE __m512i _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  return {_mm512_cvtneps_pbh(low), _mm512_cvtneps_pbh(high)};
}
EROLLOUT_INLINE __m256 add_products(__m256 sum, __m256i a, __m256i b) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  const auto odd = [&](__m256i x) { return _mm256_castsi256_ps(_mm256_and_si256(x, high)); };
  const auto even = [](__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); };
  return _mm256_fmadd_ps(even(a), even(b), _mm256_fmadd_ps(odd(a), odd(b), sum));
}
EROLLOUT_INLINE __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {  // each product added by itself; denormals count
  return {add_products(sum.low, a.low, b.low), add_products(sum.high, a.high, b.high)};
}

// ---- fours of bytes ----

EROLLOUT_INLINE __m256i add_fours(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(unsigned_bytes, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(signed_bytes, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(unsigned_bytes, 8), _mm256_srai_epi16(signed_bytes, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}

#undef EROLLOUT_UNARY
#undef EROLLOUT_BINARY
#undef EROLLOUT_TERNARY
#undef EROLLOUT_SET1

}  // namespace erollout
