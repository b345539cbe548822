// AMX tiles, thinly: eight of 16 rows of 64 bytes. With EROLLOUT_EMULATE_TILES they are software, after the definitions of
// TDPBF16PS and TDPBSUD in Intel's manual, so that kernels on tiles are tested on any processor with AVX-512.
// These kernels have been run in that form alone: no AMX hardware was at hand.
#pragma once
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common.h"

namespace erollout::tile {

// LDTILECFG's operand.
struct alignas(64) Shapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};
};
static_assert(sizeof(Shapes) == 64);

#ifdef EROLLOUT_EMULATE_TILES

struct State {
  Shapes shapes;
  uint8_t data[8][16][64];
};
inline State& state() {
  static thread_local State value;
  return value;
}

inline bool available() { return true; }
inline void configure(const Shapes& shapes) { state().shapes = shapes; }
inline void release() { state().shapes = Shapes{}; }

template <int T>
void zero() {
  std::memset(state().data[T], 0, sizeof state().data[T]);
}

template <int T>
void load(const void* base, int64_t stride) {
  zero<T>();
  for (int row = 0; row < state().shapes.rows[T]; ++row)
    std::memcpy(state().data[T][row], static_cast<const uint8_t*>(base) + row * stride, state().shapes.bytes[T]);
}

template <int T>
void store(void* base, int64_t stride) {
  for (int row = 0; row < state().shapes.rows[T]; ++row)
    std::memcpy(static_cast<uint8_t*>(base) + row * stride, state().data[T][row], state().shapes.bytes[T]);
}

template <class Element>
Element& element(int tile, int row, int index) {
  return reinterpret_cast<Element*>(state().data[tile][row])[index];
}

template <int C, int A, int B>
void add_pairs() {
  for (int m = 0; m < state().shapes.rows[C]; ++m)
    for (int n = 0; n < state().shapes.bytes[C] / 4; ++n) {
      float sum[2] = {0, 0};
      for (int k = 0; k < state().shapes.bytes[A] / 4; ++k)
        for (int i = 0; i < 2; ++i)
          sum[i] = __builtin_fmaf(to_float(element<bf16>(A, m, 2 * k + i)), to_float(element<bf16>(B, k, 2 * n + i)), sum[i]);
      element<float>(C, m, n) += sum[0] + sum[1];
    }
}

template <int C, int A, int B>
void add_fours() {
  for (int m = 0; m < state().shapes.rows[C]; ++m)
    for (int n = 0; n < state().shapes.bytes[C] / 4; ++n)
      for (int k = 0; k < state().shapes.bytes[A] / 4; ++k)
        for (int i = 0; i < 4; ++i)
          element<int32_t>(C, m, n) += element<int8_t>(A, m, 4 * k + i) * element<uint8_t>(B, k, 4 * n + i);
}

#else

// The processor has bf16 and int8 tiles, and the kernel lets this process use them; asked once.
inline bool available() {
#ifndef __AVX512F__
  return false;
#endif
  static const bool answer = [] {
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned bits = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & bits) != bits) return false;
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return answer;
}

inline void configure(const Shapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
inline void release() { asm volatile("tilerelease" : : : "memory"); }

template <int T>
void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}

template <int T>
void load(const void* base, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(base), "r"(stride), "i"(T) : "memory");
}

template <int T>
void store(void* base, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(base), "r"(stride), "i"(T) : "memory");
}

// C += A B on pairs of bf16; on fours of signed (A) and unsigned (B) bytes.
template <int C, int A, int B>
void add_pairs() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
void add_fours() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace erollout::tile
