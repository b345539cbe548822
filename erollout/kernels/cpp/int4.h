// How the groups of an int4 panel add up, for all kernels alike.
#pragma once
#include "packed.h"

namespace erollout {

// The scales and zero points at the start of a block.
template <bool Asymmetric>
struct GroupHeader {
  __m512 scale[2], zero[2];

  explicit GroupHeader(const uint8_t* block) {
    UNROLLED for (int half = 0; half < 2; ++half) {
      scale[half] = load_bf16(reinterpret_cast<const bf16*>(block + 32 * half));
      zero[half] = Asymmetric ? load_bf16(reinterpret_cast<const bf16*>(block + 64 + 32 * half)) : _mm512_setzero_ps();
    }
  }

  // sum + (dot - zero point * sum of the group's activations) * scale.
  __m512 add(int half, __m512 sum, __m512 dot, float activations) const {
    if (Asymmetric) dot = _mm512_fnmadd_ps(zero[half], _mm512_set1_ps(activations), dot);
    return _mm512_fmadd_ps(dot, scale[half], sum);
  }

  // The same on codes, whose dot products and sums are integers below 2^24: exact up to the activations' scale.
  __m512 add(int half, __m512 sum, __m512i dot, float codes, float activation_scale) const {
    __m512 exact = _mm512_cvtepi32_ps(dot);
    if (Asymmetric) exact = _mm512_fnmadd_ps(zero[half], _mm512_set1_ps(codes), exact);
    return _mm512_fmadd_ps(_mm512_mul_ps(exact, _mm512_set1_ps(activation_scale)), scale[half], sum);
  }
};

// The table that `to_integers` reads: the low four bits of a word -> its value less 8, as bf16.
inline __m512i signed_integers() {
  alignas(64) bf16 table[32];
  for (int i = 0; i < 32; ++i) table[i] = to_bf16(static_cast<float>((i & 15) - 8));
#ifdef __AVX512F__
  return _mm512_load_si512(table);
#else
  alignas(64) uint8_t bytes[4][16];  // the words' low bytes and their high bytes, each twice
  for (int i = 0; i < 64; ++i) bytes[i / 16][i % 16] = static_cast<uint8_t>(table[i % 16] >> (i < 32 ? 0 : 8));
  return _mm512_load_si512(bytes);
#endif
}

inline __m512i to_integers(__m512i words, __m512i table) {
#ifdef __AVX512F__
  return _mm512_permutexvar_epi16(words, table);
#else
  const auto half = [&](__m256i x) {
    const __m256i index = _mm256_and_si256(x, _mm256_set1_epi16(15));  // the zero in each upper byte finds a byte too
    const __m256i low = _mm256_and_si256(_mm256_shuffle_epi8(table.low, index), _mm256_set1_epi16(255));
    return _mm256_or_si256(low, _mm256_slli_epi16(_mm256_shuffle_epi8(table.high, index), 8));
  };
  return {half(words.low), half(words.high)};
#endif
}

// The low and the high nibble of every byte.
inline __m512i low_nibbles(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline __m512i high_nibbles(__m512i bytes) {
#ifdef __AVX512F__
  return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(0x1020408000000000), 0);  // an 8 x 8 matrix of bits
#else
  return low_nibbles(_mm512_srli_epi16(bytes, 4));
#endif
}

}  // namespace erollout
