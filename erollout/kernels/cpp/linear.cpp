#include "linear.h"

#include "kernels.h"
#include "packed.h"

namespace erollout {

void linear(const Linear& layer, const bf16* x, int64_t x_stride, int64_t rows, bf16* y, int64_t y_stride, Threads& threads) {
  if (rows <= 0) return;
  const Rows input{x, x_stride, rows};
  const Outputs output{layer, y, y_stride};
  switch (static_cast<Format>(layer.format)) {
    case Format::bf16:
      return linear_bf16(layer, input, output, threads);
    case Format::int4:
      return linear_int4(layer, input, output, threads);
    case Format::int4_a8:
      return linear_int4_a8(layer, input, output, threads);
    case Format::int8:
      return linear_int8(layer, input, output, threads);
  }
}

}  // namespace erollout

extern "C" {

int64_t erollout_linear_struct_bytes() { return sizeof(erollout::Linear); }

void erollout_linear(const erollout::Linear* layer, const void* x, int64_t x_stride, int64_t rows, void* y, int64_t y_stride,
                     void* threads) {
  erollout::linear(*layer, static_cast<const erollout::bf16*>(x), x_stride, rows, static_cast<erollout::bf16*>(y), y_stride,
                   *static_cast<erollout::Threads*>(threads));
}
}
