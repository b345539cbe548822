// Packing weights (packed.h). Every byte of the packed buffer is written, so packing again in place leaves nothing behind.
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
}
