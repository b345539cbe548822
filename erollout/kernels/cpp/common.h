// What every kernel needs: bf16 <-> fp32, in scalars and in AVX-512 registers, or in their likeness where there are none.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#ifndef __AVX512F__
#include "avx2.h"
#endif

namespace erollout {

using bf16 = uint16_t;

inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Round to nearest even; a NaN stays one.
inline bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40);
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline __m512 to_float(__m256i values) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)); }

inline __m512 load_bf16(const bf16* source) { return to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))); }

inline __m512 load_bf16(const bf16* source, __mmask16 lanes) { return to_float(_mm256_maskz_loadu_epi16(lanes, source)); }

// Round to nearest even; denormals become zero.
inline __m256i to_bf16(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

inline void store_bf16(bf16* target, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), to_bf16(values));
}

inline void store_bf16(bf16* target, __m512 values, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(target, lanes, to_bf16(values));
}

// The first `count` of 16 (of 32) lanes; any count, also below 0 and above the lanes.
inline __mmask16 first_lanes16(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}
inline __mmask32 first_lanes32(int64_t count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : static_cast<__mmask32>((1ull << count) - 1);
}

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Before a loop over what registers hold: as a loop, it would keep them in memory.
#define UNROLLED _Pragma("GCC unroll 12")

// sum += products of pairs of bf16.
inline void add_pairs(__m512& sum, __m512i weights, __m512i values) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)values);
}

// sum += products of fours of unsigned and signed bytes. Not the intrinsic: GCC 12 copies every sum to another register and back
// around it, which halves the speed.
inline void add_fours(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
#ifdef __AVX512F__
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
#else
  sum = {add_fours(sum.low, unsigned_bytes.low, signed_bytes.low), add_fours(sum.high, unsigned_bytes.high, signed_bytes.high)};
#endif
}

// A 64-byte aligned buffer that only grows; its contents don't outlive the next call of `at_least`. Keep one per thread.
class Scratch {
 public:
  void* at_least(size_t bytes) {
    if (bytes > capacity_) {
      data_.reset();
      capacity_ = 0;
      const size_t rounded = (bytes + 4095) & ~static_cast<size_t>(4095);
      data_.reset(std::aligned_alloc(64, rounded));
      if (!data_) std::abort();  // no C++ exception may cross the C interface
      capacity_ = rounded;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<void, Free> data_;
  size_t capacity_ = 0;
};

}  // namespace erollout
