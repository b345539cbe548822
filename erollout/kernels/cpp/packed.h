// The layout of packed weights: one sequential stream, the same for AVX-512 and AMX.
//
// Outputs stand in panels of 32, in two halves of 16; the last panel is padded. Within a panel, inputs follow one another:
//   bf16   per 2 inputs  [2 halves][16 outputs][2 inputs] bf16; inputs padded to 32 with zeros
//   int8   per 4 inputs  [2 halves][16 outputs][4 inputs] value + 128; inputs padded to 64 with zeros (128)
//   int4   per group     [32 outputs] bf16 scales, [32 outputs] bf16 zero points if asymmetric, then
//          per 8 inputs  [2 halves][16 outputs][4 bytes]; byte b holds input b in its low and input 4 + b in its high
//                        nibble, each value + 8
// Each line is 128 bytes for a panel: a half is one AVX-512 register, or one row of an AMX tile with a stride of 128 bytes.
#pragma once
#include "common.h"
#include "linear.h"

namespace erollout {

constexpr int64_t kPanel = 32;   // outputs
constexpr int64_t kHalf = 16;
constexpr int64_t kLine = 128;   // bytes

inline int64_t panels(int64_t out_features) { return ceil_div(out_features, kPanel); }

inline int64_t int4_header(bool asymmetric) { return asymmetric ? 128 : 64; }

inline int64_t int4_block(int64_t group_size, bool asymmetric) { return int4_header(asymmetric) + group_size / 8 * kLine; }

// Inputs per line of a panel.
inline int64_t line_inputs(Format format) { return format == Format::bf16 ? 2 : format == Format::int8 ? 4 : 8; }

// in_features as stored.
inline int64_t padded_inputs(Format format, int64_t in_features) {
  return format == Format::bf16 ? round_up(in_features, 32) : format == Format::int8 ? round_up(in_features, 64) : in_features;
}

inline int64_t panel_bytes(const Linear& layer) {
  const auto format = static_cast<Format>(layer.format);
  if (format == Format::bf16 || format == Format::int8)
    return padded_inputs(format, layer.in_features) / line_inputs(format) * kLine;
  return layer.in_features / layer.group_size * int4_block(layer.group_size, layer.asymmetric);
}

inline int64_t packed_bytes(const Linear& layer) { return panels(layer.out_features) * panel_bytes(layer); }

inline const uint8_t* panel_of(const Linear& layer, int64_t panel) {
  return static_cast<const uint8_t*>(layer.weight) + panel * panel_bytes(layer);
}

}  // namespace erollout
