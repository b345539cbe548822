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

// For VPERMW: the low four bits of a word -> its value less 8, as bf16.
inline __m512i signed_integers() {
  alignas(64) bf16 table[32];
  for (int i = 0; i < 32; ++i) table[i] = to_bf16(static_cast<float>((i & 15) - 8));
  return _mm512_load_si512(table);
}

// The low and the high nibble of every byte.
inline __m512i low_nibbles(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline __m512i high_nibbles(__m512i bytes) {
  return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(0x1020408000000000), 0);  // an 8 x 8 matrix of bits
}

}  // namespace erollout
