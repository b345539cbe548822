#include "linear.h"

#include "kernels.h"
#include "packed.h"
#include "tile.h"

namespace erollout {

void linear_avx512(const Linear& layer, const Rows& x, const Outputs& y, Threads& threads) {
  switch (static_cast<Format>(layer.format)) {
    case Format::bf16:
      return linear_bf16(layer, x, y, threads);
    case Format::int4:
      return linear_int4(layer, x, y, threads);
    case Format::int4_a8:
      return linear_int4_a8(layer, x, y, threads);
    case Format::int8:
      return linear_int8(layer, x, y, threads);
  }
}

// Which kernels run is one choice per process where they differ in bits. On codes they don't, and few rows are faster without
// tiles.
static bool use_tiles(Format format, int64_t rows) {
  constexpr int64_t few = 8;
  return tile::available() && (format == Format::bf16 || format == Format::int4 || rows > few);
}

void linear(const Linear& layer, const bf16* x, int64_t x_stride, int64_t rows, bf16* y, int64_t y_stride, Threads& threads) {
  if (rows <= 0) return;
  const auto run = use_tiles(static_cast<Format>(layer.format), rows) ? linear_amx : linear_avx512;
  run(layer, {x, x_stride, rows}, {layer, y, y_stride}, threads);
}

}  // namespace erollout

extern "C" {

// Whether linears run on AMX tiles.
int32_t erollout_linear_uses_tiles() { return erollout::tile::available(); }

int64_t erollout_linear_struct_bytes() { return sizeof(erollout::Linear); }

void erollout_linear(const erollout::Linear* layer, const void* x, int64_t x_stride, int64_t rows, void* y, int64_t y_stride,
                     void* threads) {
  erollout::linear(*layer, static_cast<const erollout::bf16*>(x), x_stride, rows, static_cast<erollout::bf16*>(y), y_stride,
                   *static_cast<erollout::Threads*>(threads));
}
}
