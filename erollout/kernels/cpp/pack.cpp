// Packing weights (packed.h). Every byte of the packed buffer is written, so packing again in place leaves nothing behind.
#include <algorithm>

#include "packed.h"

namespace erollout {
namespace {

// row[i] lane j <-> row[j] lane i, for 16 rows of 16 32-bit lanes.
inline void transpose(__m512i (&row)[16]) {
  __m512i pair[16], quad[16];
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      quad[i + 2 * j] = _mm512_unpacklo_epi64(pair[i + j], pair[i + 2 + j]);
      quad[i + 2 * j + 1] = _mm512_unpackhi_epi64(pair[i + j], pair[i + 2 + j]);
    }
  // quad[4 a + c] holds in its 128-bit lane l: rows 4 a .. 4 a + 3 of column 4 l + c
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(quad[c], quad[4 + c], 0x88);    // lanes 0 2 of a = 0 and of a = 1
    const __m512i low23 = _mm512_shuffle_i32x4(quad[8 + c], quad[12 + c], 0x88);
    const __m512i high01 = _mm512_shuffle_i32x4(quad[c], quad[4 + c], 0xdd);   // lanes 1 3
    const __m512i high23 = _mm512_shuffle_i32x4(quad[8 + c], quad[12 + c], 0xdd);
    row[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    row[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    row[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    row[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

// 16 lines of a half from 16 weight rows: lane (row, line) = load(row, line's inputs), stored at line_at(line) if that exists.
template <class Load, class LineAt>
inline void pack_lines(int64_t rows, const Load& load, const LineAt& line_at) {
  __m512i row[16];
  for (int i = 0; i < 16; ++i) row[i] = i < rows ? load(i) : _mm512_setzero_si512();
  transpose(row);
  for (int line = 0; line < 16; ++line)
    if (uint8_t* target = line_at(line)) _mm512_stream_si512(reinterpret_cast<__m512i*>(target), row[line]);
}

void pack_bf16(const Linear& layer, const bf16* weight, int64_t stride, uint8_t* out, Threads& threads) {
  const int64_t in_features = layer.in_features, bytes = panel_bytes(layer), lines = bytes / kLine;
  threads.parallel_for(panels(layer.out_features), [&](int64_t panel) {
    for (int64_t first = 0; first < lines; first += 16)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t output = panel * kPanel + half * kHalf, k = first * 2;
        const __mmask32 lanes = first_lanes32(in_features - k);
        pack_lines(
            layer.out_features - output,
            [&](int64_t i) { return _mm512_maskz_loadu_epi16(lanes, weight + (output + i) * stride + k); },
            [&](int64_t line) { return out + panel * bytes + (first + line) * kLine + half * 64; });
      }
    _mm_sfence();
  });
}

void pack_int8(const Linear& layer, const int8_t* values, uint8_t* out, Threads& threads) {
  const int64_t in_features = layer.in_features, bytes = panel_bytes(layer), lines = bytes / kLine;
  threads.parallel_for(panels(layer.out_features), [&](int64_t panel) {
    for (int64_t first = 0; first < lines; first += 16)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t output = panel * kPanel + half * kHalf, k = first * 4;
        const __mmask64 lanes = in_features - k >= 64 ? ~0ull : (1ull << (in_features - k)) - 1;
        pack_lines(
            layer.out_features - output,
            [&](int64_t i) {
              const __m512i loaded = _mm512_maskz_loadu_epi8(lanes, values + (output + i) * in_features + k);
              return _mm512_xor_si512(loaded, _mm512_set1_epi8(-128));
            },
            [&](int64_t line) { return out + panel * bytes + (first + line) * kLine + half * 64; });
      }
    _mm_sfence();
  });
}

// Eight bytes of [-8, 7] in each 64-bit lane -> its line's four bytes of nibbles.
inline __m256i nibbles(__m512i values) {
  const __m512i unsigned_values = _mm512_add_epi8(values, _mm512_set1_epi8(8));
  const __m512i both = _mm512_or_si512(unsigned_values, _mm512_srli_epi64(unsigned_values, 28));
  return _mm512_cvtepi64_epi32(both);
}

void pack_int4_headers(const Linear& layer, const bf16* scales, const int8_t* zero_points, int64_t panel, uint8_t* out) {
  const int64_t groups = layer.in_features / layer.group_size, block = int4_block(layer.group_size, layer.asymmetric);
  const int64_t first = panel * kPanel, outputs = std::min<int64_t>(kPanel, layer.out_features - first);
  for (int64_t group = 0; group < groups; ++group, out += block) {
    bf16* header = reinterpret_cast<bf16*>(out);
    std::memset(header, 0, int4_header(layer.asymmetric));
    for (int64_t i = 0; i < outputs; ++i) header[i] = scales[(first + i) * groups + group];
    if (!layer.asymmetric) continue;
    for (int64_t i = 0; i < outputs; ++i)
      header[kPanel + i] = to_bf16(static_cast<float>(zero_points[(first + i) * groups + group]));
  }
}

void pack_int4(const Linear& layer, const int8_t* values, const bf16* scales, const int8_t* zero_points, uint8_t* packed,
               Threads& threads) {
  const int64_t in_features = layer.in_features, group_size = layer.group_size, bytes = panel_bytes(layer);
  const int64_t block = int4_block(group_size, layer.asymmetric), header = int4_header(layer.asymmetric);
  threads.parallel_for(panels(layer.out_features), [&](int64_t panel) {
    uint8_t* out = packed + panel * bytes;
    pack_int4_headers(layer, scales, zero_points, panel, out);
    for (int64_t first = 0; first < in_features; first += 128)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t output = panel * kPanel + half * kHalf, left = in_features - first;  // a multiple of 32
        const __mmask64 low = left >= 64 ? ~0ull : (1ull << left) - 1;
        const __mmask64 high = left >= 128 ? ~0ull : left <= 64 ? 0 : (1ull << (left - 64)) - 1;
        pack_lines(
            layer.out_features - output,
            [&](int64_t i) {
              const int8_t* source = values + (output + i) * in_features + first;
              const __m256i near = nibbles(_mm512_maskz_loadu_epi8(low, source));
              const __m256i far = nibbles(_mm512_maskz_loadu_epi8(high, source + 64));
              return _mm512_inserti64x4(_mm512_castsi256_si512(near), far, 1);
            },
            [&](int64_t line) -> uint8_t* {
              const int64_t k = first + 8 * line;
              if (k >= in_features) return nullptr;
              return out + k / group_size * block + header + k % group_size / 8 * kLine + half * 64;
            });
      }
    _mm_sfence();
  });
}

}  // namespace
}  // namespace erollout

using erollout::Linear;
using erollout::Threads;

extern "C" {

int64_t erollout_linear_packed_bytes(const Linear* layer) { return erollout::packed_bytes(*layer); }

// weight: bf16 [out_features, in_features] with a stride in elements between rows.
void erollout_linear_pack_bf16(const Linear* layer, const void* weight, int64_t stride, void* packed, void* threads) {
  erollout::pack_bf16(*layer, static_cast<const erollout::bf16*>(weight), stride, static_cast<uint8_t*>(packed),
                      *static_cast<Threads*>(threads));
}

// values: int8 [out_features, in_features] in [-8, 7]; scales: bf16 [out_features, groups]; zero_points: int8 like scales, or
// null.
void erollout_linear_pack_int4(const Linear* layer, const void* values, const void* scales, const void* zero_points,
                               void* packed, void* threads) {
  erollout::pack_int4(*layer, static_cast<const int8_t*>(values), static_cast<const erollout::bf16*>(scales),
                      static_cast<const int8_t*>(zero_points), static_cast<uint8_t*>(packed), *static_cast<Threads*>(threads));
}

// values: int8 [out_features, in_features].
void erollout_linear_pack_int8(const Linear* layer, const void* values, void* packed, void* threads) {
  erollout::pack_int8(*layer, static_cast<const int8_t*>(values), static_cast<uint8_t*>(packed),
                      *static_cast<Threads*>(threads));
}
}
