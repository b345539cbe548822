// The linears on AMX tiles (tile.h): up to 32 rows by 32 outputs at a time, on the same packed weights.
// Tiles 0 and 1 sum both halves of a panel for the first 16 rows, 2 and 3 for the others; 4 and 5 hold rows, 6 and 7 weights.
#include "activations.h"
#include "int4.h"
#include "tile.h"

namespace erollout {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kBlockRows = 2 * kTileRows;

// Rows of activations as the tiles load them, `bytes` of a row at a time.
struct TileRows {
  const uint8_t* x;
  int64_t stride;  // in bytes
  int64_t bytes;
};

void configure(int64_t rows, int64_t bytes) {
  const auto first = static_cast<uint8_t>(std::min(rows, kTileRows));
  const auto others = static_cast<uint8_t>(std::max<int64_t>(rows - kTileRows, 1));  // a tile has a row, used or not
  tile::Shapes shapes;
  for (int tile : {0, 1, 4}) shapes.rows[tile] = first;
  for (int tile : {2, 3, 5}) shapes.rows[tile] = others;
  for (int tile : {6, 7}) shapes.rows[tile] = static_cast<uint8_t>(bytes / 4);
  for (int tile = 0; tile < 8; ++tile) shapes.bytes[tile] = tile == 4 || tile == 5 ? static_cast<uint16_t>(bytes) : 64;
  tile::configure(shapes);
}

template <bool Codes, int C, int A, int B>
void add() {
  if constexpr (Codes)
    tile::add_fours<C, A, B>();
  else
    tile::add_pairs<C, A, B>();
}

// Sums [kBlockRows][kPanel] of `steps` tiles of activations times weights, whose lines are 128 bytes apart.
template <bool Codes, class Ahead>
void multiply(const TileRows& x, const uint8_t* activations, int64_t rows, const uint8_t* weights, int64_t steps, void* sums,
              Ahead ahead) {
  tile::zero<0>();
  tile::zero<1>();
  tile::zero<2>();
  tile::zero<3>();
  for (int64_t step = 0; step < steps; ++step, activations += x.bytes, weights += x.bytes / 4 * kLine) {
    ahead(x.bytes / 4);
    tile::load<6>(weights, kLine);
    tile::load<7>(weights + 64, kLine);
    tile::load<4>(activations, x.stride);
    add<Codes, 0, 4, 6>();
    add<Codes, 1, 4, 7>();
    if (rows <= kTileRows) continue;
    tile::load<5>(activations + kTileRows * x.stride, x.stride);
    add<Codes, 2, 5, 6>();
    add<Codes, 3, 5, 7>();
  }
  uint8_t* out = static_cast<uint8_t*>(sums);
  tile::store<0>(out, kPanel * 4);
  tile::store<1>(out + 64, kPanel * 4);
  if (rows <= kTileRows) return;
  tile::store<2>(out + kTileRows * kPanel * 4, kPanel * 4);
  tile::store<3>(out + kTileRows * kPanel * 4 + 64, kPanel * 4);
}

// Kernel::block(panel, row, rows, prefetch) for all panels and blocks of up to 32 rows.
template <class Kernel>
void run_tiles(const Kernel& kernel, const Linear& layer, int64_t rows, Threads& threads) {
  const int64_t count = panels(layer.out_features), bytes = panel_bytes(layer), blocks = ceil_div(rows, kBlockRows);
  const int64_t tasks = threads.count() == 1 ? 1 : std::min<int64_t>(count, 4 * threads.count());
  threads.parallel_for(tasks, [&](int64_t task) {
    int64_t configured = 0;
    for (int64_t panel = task * count / tasks; panel < (task + 1) * count / tasks; ++panel)
      for (int64_t block = 0, row = 0; block < blocks; ++block) {
        const int64_t size = (rows - row) / (blocks - block);
        if (size != configured) configure(size, kernel.x.bytes);
        configured = size;
        if (blocks == 1)
          kernel.block(panel, row, size, Prefetch<true>(panel_of(layer, panel), bytes, 0, 1));
        else
          kernel.block(panel, row, size, Prefetch<false>(panel_of(layer, panel), bytes, block, blocks));
        row += size;
      }
    tile::release();
  });
}

struct Bf16 {
  const Linear& layer;
  const TileRows& x;
  const Outputs& y;

  template <class Ahead>
  void block(int64_t panel, int64_t row, int64_t rows, Ahead prefetch) const {
    alignas(64) float sums[kBlockRows][kPanel];
    const int64_t steps = ceil_div(layer.in_features, 32);
    multiply<false>(x, x.x + row * x.stride, rows, panel_of(layer, panel), steps, sums, [&](int64_t lines) {
      for (int64_t line = 0; line < lines; ++line) prefetch.line();
    });
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t half = 0; half < 2; ++half)
        y.store(row + r, panel * kPanel + half * kHalf, _mm512_load_ps(sums[r] + half * kHalf));
  }
};

struct Int8 {
  const Linear& layer;
  const TileRows& x;
  const Codes& codes;
  const Outputs& y;

  template <class Ahead>
  void block(int64_t panel, int64_t row, int64_t rows, Ahead prefetch) const {
    alignas(64) int32_t sums[kBlockRows][kPanel];
    const int64_t steps = ceil_div(layer.in_features, 64);
    multiply<true>(x, x.x + row * x.stride, rows, panel_of(layer, panel), steps, sums, [&](int64_t lines) {
      for (int64_t line = 0; line < lines; ++line) prefetch.line();
    });
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t output = panel * kPanel + half * kHalf;
      const __m512 scale = _mm512_maskz_loadu_ps(first_lanes16(layer.out_features - output), layer.scale + output);
      for (int64_t r = 0; r < rows; ++r) {
        const __m512i offset = _mm512_set1_epi32(-128 * codes.sums[row + r]);
        const __m512i dot = _mm512_add_epi32(_mm512_load_si512(sums[r] + half * kHalf), offset);
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(codes.scales[row + r]));
        y.store(row + r, output, _mm512_mul_ps(scaled, scale));
      }
    }
  }
};

// A block's nibbles as lines of bf16 pairs (in the order of Permuted), or of unsigned bytes.
template <bool Codes, class Ahead>
void unpack(const uint8_t* line, int64_t lines, __m512i integers, uint8_t* out, Ahead& prefetch) {
  for (int64_t i = 0; i < lines; ++i, line += kLine) {
    prefetch.line();
    for (int64_t half = 0; half < 2; ++half) {
      const __m512i bytes = _mm512_load_si512(line + 64 * half);
      uint8_t* target = out + 64 * half;
      if (Codes) {
        _mm512_store_si512(target + 2 * i * kLine, low_nibbles(bytes));
        _mm512_store_si512(target + (2 * i + 1) * kLine, high_nibbles(bytes));
      } else {
        UNROLLED for (int pair = 0; pair < 4; ++pair) {
          const __m512i unpacked = to_integers(_mm512_srli_epi16(bytes, 4 * pair), integers);
          _mm512_store_si512(target + (4 * i + pair) * kLine, unpacked);
        }
      }
    }
  }
}

// int4 on codes or, exactly, on bf16 activations.
template <bool OnCodes, bool Asymmetric>
struct Int4 {
  const Linear& layer;
  const TileRows& x;
  const Permuted& exact;
  const Codes& codes;
  const Outputs& y;
  __m512i integers;

  template <class Ahead>
  void block(int64_t panel, int64_t row, int64_t rows, Ahead prefetch) const {
    alignas(64) uint8_t weights[128 / 2 * kLine];  // the largest group, as bf16
    alignas(64) int32_t parts[kBlockRows][kPanel];
    alignas(64) float sums[kBlockRows][kPanel] = {};
    const int64_t group_size = layer.group_size, groups = layer.in_features / group_size;
    const int64_t input_bytes = OnCodes ? 1 : 2, steps = group_size * input_bytes / x.bytes;
    const uint8_t* block = panel_of(layer, panel);
    for (int64_t group = 0; group < groups; ++group, block += int4_block(group_size, Asymmetric)) {
      const GroupHeader<Asymmetric> header(block);
      prefetch.header(int4_header(Asymmetric));
      unpack<OnCodes>(block + int4_header(Asymmetric), group_size / 8, integers, weights, prefetch);
      const uint8_t* activations = x.x + row * x.stride + group * group_size * input_bytes;
      multiply<OnCodes>(x, activations, rows, weights, steps, parts, [](int64_t) {});
      for (int64_t r = 0; r < rows; ++r)
        for (int half = 0; half < 2; ++half)
          add(header, half, parts[r] + half * kHalf, (row + r) * groups + group, sums[r] + half * kHalf);
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t half = 0; half < 2; ++half)
        y.store(row + r, panel * kPanel + half * kHalf, _mm512_load_ps(sums[r] + half * kHalf));
  }

  void add(const GroupHeader<Asymmetric>& header, int half, const int32_t* part, int64_t index, float* sums) const {
    const __m512 sum = _mm512_load_ps(sums);
    if constexpr (OnCodes) {
      const __m512i dot = _mm512_add_epi32(_mm512_load_si512(part), _mm512_set1_epi32(-8 * codes.sums[index]));
      _mm512_store_ps(sums, header.add(half, sum, dot, static_cast<float>(codes.sums[index]), codes.scales[index]));
    } else {
      const __m512 dot = _mm512_castsi512_ps(_mm512_load_si512(part));
      _mm512_store_ps(sums, header.add(half, sum, dot, Asymmetric ? exact.sums[index] : 0));
    }
  }
};

template <bool OnCodes>
void linear_int4_amx(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads) {
  Permuted exact{};
  Codes codes{};
  if (OnCodes)
    codes = quantized(layer, layer.group_size, x, threads);
  else
    exact = permuted(layer, x, threads);
  const TileRows on_codes{reinterpret_cast<const uint8_t*>(codes.values), codes.stride, std::min(layer.group_size, 64)};
  const TileRows on_values{reinterpret_cast<const uint8_t*>(exact.values), layer.in_features * int64_t{2}, 64};
  const TileRows& rows = OnCodes ? on_codes : on_values;
  if (layer.asymmetric)
    run_tiles(Int4<OnCodes, true>{layer, rows, exact, codes, y, signed_integers()}, layer, x.rows, threads);
  else
    run_tiles(Int4<OnCodes, false>{layer, rows, exact, codes, y, signed_integers()}, layer, x.rows, threads);
}

}  // namespace

void linear_amx(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads) {
  const auto format = static_cast<Format>(layer.format);
  if (format == Format::int4) return linear_int4_amx<false>(layer, x, y, threads);
  if (format == Format::int4_a8) return linear_int4_amx<true>(layer, x, y, threads);
  if (format == Format::bf16) {
    const Rows activations = padded(layer, x, threads);
    const TileRows rows{reinterpret_cast<const uint8_t*>(activations.x), activations.stride * 2, 64};
    return run_tiles(Bf16{layer, rows, y}, layer, x.rows, threads);
  }
  const Codes codes = quantized(layer, layer.in_features, x, threads);
  const TileRows rows{reinterpret_cast<const uint8_t*>(codes.values), codes.stride, 64};
  run_tiles(Int8{layer, rows, codes, y}, layer, x.rows, threads);
}

}  // namespace erollout
