// The packed linears on odd shapes: every input and output ends at a guard page, so that one element too far is a fault. Compiled
// with the address and undefined-behaviour sanitizers, and with AMX's tiles in software (tile.h), by tests/test_native_linear.py.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"
#include "packed.h"

using namespace erollout;

extern "C" {
void erollout_linear_pack_bf16(const Linear*, const void*, int64_t, void*, void*);
void erollout_linear_pack_int4(const Linear*, const void*, const void*, const void*, void*, void*);
void erollout_linear_pack_int8(const Linear*, const void*, void*, void*);
}

namespace {

std::mt19937 generator(1);

// `count` elements that end where no page is mapped.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    bytes_ = (count * sizeof(T) + page - 1) / page * page + page;
    base_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + bytes_ - page, page, PROT_NONE)) std::abort();
    data_ = reinterpret_cast<T*>(base_ + bytes_ - page - count * sizeof(T));
  }
  ~Guarded() { munmap(base_, bytes_); }
  Guarded(const Guarded&) = delete;
  T* data() { return data_; }
  T& operator[](size_t index) { return data_[index]; }
  template <class Make>
  void fill(Make make) {
    for (size_t i = 0; i < count_; ++i) data_[i] = static_cast<T>(make());
  }

 private:
  size_t count_, bytes_;
  char* base_;
  T* data_;
};

float normal() { return std::normal_distribution<float>()(generator); }
int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

void check(bool holds, const char* what, const Linear& layer, int64_t rows) {
  if (holds) return;
  std::printf("%s: format %d, %d x %d, group %d, asymmetric %d, rows %ld\n", what, layer.format, layer.out_features,
              layer.in_features, layer.group_size, layer.asymmetric, static_cast<long>(rows));
  std::exit(1);
}

struct Case {
  Format format;
  int out_features, in_features, group_size;
  bool asymmetric;
};

void run(const Case& test, Threads& threads, bool extras) {
  const int n = test.out_features, k = test.in_features, groups = test.group_size ? k / test.group_size : 1;
  Guarded<bf16> weight(static_cast<size_t>(n) * k), scales(static_cast<size_t>(n) * groups), bias(n), pre_scale(k);
  Guarded<int8_t> values(static_cast<size_t>(n) * k), zero_points(static_cast<size_t>(n) * groups);
  Guarded<float> output_scales(n);
  weight.fill([] { return to_bf16(normal()); });
  scales.fill([] { return to_bf16(std::abs(normal()) / 16); });
  bias.fill([] { return to_bf16(normal()); });
  pre_scale.fill([] { return to_bf16(1 + std::abs(normal())); });
  output_scales.fill([] { return std::abs(normal()) / 127; });
  const bool int8 = test.format == Format::int8;
  values.fill([&] { return int8 ? integer(-127, 127) : integer(-8, 7); });
  zero_points.fill([] { return integer(-8, 7); });

  Linear layer{};
  layer.format = static_cast<int32_t>(test.format);
  layer.out_features = n;
  layer.in_features = k;
  layer.group_size = test.group_size;
  layer.asymmetric = test.asymmetric;
  layer.scale = int8 ? output_scales.data() : nullptr;
  layer.bias = extras ? bias.data() : nullptr;
  layer.pre_scale = extras ? pre_scale.data() : nullptr;
  Guarded<uint8_t> packed(packed_bytes(layer));  // a multiple of 64 bytes: aligned too
  layer.weight = packed.data();
  if (test.format == Format::bf16)
    erollout_linear_pack_bf16(&layer, weight.data(), k, packed.data(), &threads);
  else if (int8)
    erollout_linear_pack_int8(&layer, values.data(), packed.data(), &threads);
  else
    erollout_linear_pack_int4(&layer, values.data(), scales.data(), test.asymmetric ? zero_points.data() : nullptr, packed.data(),
                              &threads);

  for (const int64_t rows : {1, 2, 3, 5, 12, 13, 16, 17, 33, 48}) {
    Guarded<bf16> x(rows * k), y(rows * n), tiles(rows * n);
    x.fill([] { return to_bf16(normal()); });
    linear_avx512(layer, {x.data(), k, rows}, {layer, y.data(), n}, threads);
    linear_amx(layer, {x.data(), k, rows}, {layer, tiles.data(), n}, threads);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < n; ++i) {
        double sum = 0, size = 0;
        for (int64_t j = 0; j < k; ++j) {
          const float value = to_float(x[row * k + j]);
          const float input = extras ? to_float(to_bf16(value * to_float(pre_scale[j]))) : value;
          const int64_t group = test.group_size ? i * groups + j / test.group_size : i;
          const float entry = test.format == Format::bf16 ? to_float(weight[i * k + j])
                              : int8                      ? values[i * k + j] * output_scales[i]
                                     : (values[i * k + j] - (test.asymmetric ? zero_points[group] : 0)) * to_float(scales[group]);
          sum += static_cast<double>(input) * entry;
          size += std::abs(static_cast<double>(input) * entry);
        }
        if (extras) sum += to_float(bias[i]);
        const bool codes = test.format == Format::int4_a8 || int8;
        const double tolerance = std::abs(sum) / 128 + size * (codes ? 0.03 : 1e-5) + 1e-6;
        check(std::abs(to_float(y[row * n + i]) - sum) <= tolerance, "AVX-512 against double", layer, rows);
        check(std::abs(to_float(tiles[row * n + i]) - sum) <= tolerance, "AMX against double", layer, rows);
        if (codes) check(y[row * n + i] == tiles[row * n + i], "AMX bits against AVX-512 bits", layer, rows);
      }
    // The rows of one call, one by one and in other places.
    Guarded<bf16> again(n);
    for (const int64_t row : {int64_t{0}, rows / 2, rows - 1}) {
      linear_avx512(layer, {x.data() + row * k, k, 1}, {layer, again.data(), n}, threads);
      check(!std::memcmp(again.data(), y.data() + row * n, n * sizeof(bf16)), "bits of AVX-512 rows", layer, rows);
      linear_amx(layer, {x.data() + row * k, k, 1}, {layer, again.data(), n}, threads);
      check(!std::memcmp(again.data(), tiles.data() + row * n, n * sizeof(bf16)), "bits of AMX rows", layer, rows);
    }
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      {Format::bf16, 33, 70, 0, false},    {Format::bf16, 5, 3, 0, false},       {Format::bf16, 64, 64, 0, false},
      {Format::int8, 33, 70, 0, false},    {Format::int8, 5, 3, 0, false},       {Format::int8, 32, 192, 0, false},
      {Format::int4, 33, 96, 32, false},   {Format::int4, 17, 256, 128, true},   {Format::int4, 40, 192, 64, true},
      {Format::int4_a8, 33, 96, 32, true}, {Format::int4_a8, 17, 256, 128, true}, {Format::int4_a8, 40, 192, 64, false},
  };
  Threads one(1);
  auto three = std::make_unique<Threads>(3);
  for (const Case& test : cases) {
    run(test, one, false);
    run(test, *three, true);
  }
  std::puts("ok");
}
