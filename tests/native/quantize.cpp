// Quantising odd shapes in buffers that end where no page is mapped (sanitizers don't watch masked vectors); the numbers against
// what they stand for.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

extern "C" {
void* erollout_threads_create(int32_t count);
void erollout_threads_destroy(void* threads);
int32_t erollout_quantize_int4(const void* weight, int32_t is_bf16, int64_t rows, int64_t columns, int64_t group_size,
                               const double* importance, const float* ratios, int64_t num_ratios, int8_t* values, void* scales,
                               int8_t* zero_points, void* threads);
int32_t erollout_quantize_int8(const void* weight, int32_t is_bf16, int64_t rows, int64_t columns, int8_t* values, float* scales,
                               void* threads);
}

static int failures = 0;
#define CHECK(condition, ...) \
  if (!(condition)) { ++failures; std::printf("line %d: ", __LINE__); std::printf(__VA_ARGS__); std::printf("\n"); }

template <class T>
struct AtPageEnd {
  using value_type = T;
  static size_t mapped(size_t count) {
    const size_t page = sysconf(_SC_PAGESIZE);
    return (count * sizeof(T) + page - 1) / page * page;
  }
  T* allocate(size_t count) {
    const size_t bytes = mapped(count), page = sysconf(_SC_PAGESIZE);
    void* memory = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* end = static_cast<char*>(memory) + bytes;
    if (memory == MAP_FAILED || mprotect(end, page, PROT_NONE)) std::abort();
    return reinterpret_cast<T*>(end - count * sizeof(T));
  }
  void deallocate(T* data, size_t count) {
    char* end = reinterpret_cast<char*>(data + count);
    munmap(end - mapped(count), mapped(count) + sysconf(_SC_PAGESIZE));
  }
  bool operator==(const AtPageEnd&) const { return true; }
  bool operator!=(const AtPageEnd&) const { return false; }
};

template <class T>
using Tight = std::vector<T, AtPageEnd<T>>;

static float wide(uint16_t bits) {
  const uint32_t all = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &all, sizeof value);
  return value;
}

// Weights as fp32; halved into bf16 they keep their bits, as their low halves are zero.
static Tight<float> weights(int64_t count) {
  static std::mt19937 random(1);
  Tight<float> result(count);
  for (float& w : result) w = wide(static_cast<uint16_t>(random() % 0x300 + 0x3c00 + (random() & 1) * 0x8000));
  return result;
}

static Tight<uint16_t> narrow(const Tight<float>& source) {
  Tight<uint16_t> result(source.size());
  for (size_t i = 0; i < source.size(); ++i) std::memcpy(&result[i], reinterpret_cast<const char*>(&source[i]) + 2, 2);
  return result;
}

static void int4(int64_t rows, int64_t columns, int64_t group, bool bf16, int num_ratios, bool asymmetric, void* threads) {
  const Tight<float> plain = weights(rows * columns);
  const Tight<uint16_t> half = narrow(plain);
  const void* weight = bf16 ? static_cast<const void*>(half.data()) : plain.data();
  const Tight<float> ratios = num_ratios == 1 ? Tight<float>{1.0f} : Tight<float>{0.7f, 0.85f, 1.0f};
  const Tight<double> importance(columns, 0.25);
  Tight<int8_t> values(rows * columns, 99), zeros(asymmetric ? rows * columns / group : 0, 99);
  Tight<uint16_t> scales(rows * columns / group);
  const int32_t finite = erollout_quantize_int4(weight, bf16, rows, columns, group, importance.data(), ratios.data(), num_ratios,
                                                values.data(), scales.data(), asymmetric ? zeros.data() : nullptr, threads);
  CHECK(finite == 1, "finite weights refused");
  for (int64_t i = 0; i < rows * columns; ++i) {
    const float scale = wide(scales[i / group]);
    const float error = std::fabs((values[i] - (asymmetric ? zeros[i / group] : 0)) * scale - plain[i]);
    const bool inside = values[i] > -8 && values[i] < 7;  // what was not clipped
    CHECK(values[i] >= -8 && values[i] <= 7, "value %d", values[i]);
    CHECK(!inside || error <= 0.5001f * scale, "error %g of scale %g", error, scale);
    CHECK(inside || num_ratios > 1 || error <= 1.01f * scale, "clipped by %g of scale %g", error, scale);
  }
}

static void int8(int64_t rows, int64_t columns, bool bf16, void* threads) {
  Tight<float> plain = weights(rows * columns);
  const Tight<uint16_t> half = narrow(plain);
  Tight<int8_t> values(rows * columns);
  Tight<float> scales(rows);
  const void* weight = bf16 ? static_cast<const void*>(half.data()) : plain.data();
  CHECK(erollout_quantize_int8(weight, bf16, rows, columns, values.data(), scales.data(), threads) == 1, "refused");
  for (int64_t i = 0; i < rows * columns; ++i)
    CHECK(std::fabs(values[i] * scales[i / columns] - plain[i]) <= 0.5001f * scales[i / columns], "int8 value %d", values[i]);
  plain.back() = std::numeric_limits<float>::quiet_NaN();
  CHECK(erollout_quantize_int8(plain.data(), 0, rows, columns, values.data(), scales.data(), threads) == 0, "NaN passed");
}

int main() {
  for (int count : {1, 3}) {
    void* threads = erollout_threads_create(count);
    for (bool bf16 : {false, true}) {
      const int64_t shapes[][3] = {{1, 16, 16}, {7, 48, 16}, {33, 160, 32}, {9, 960, 64}, {3, 2304, 1152}};
      for (const auto& [rows, columns, group] : shapes) {
        int4(rows, columns, group, bf16, 1, false, threads);
        int4(rows, columns, group, bf16, 3, false, threads);
        int4(rows, columns, group, bf16, 1, true, threads);
      }
      for (int64_t columns : {1, 15, 17, 100}) int8(5, columns, bf16, threads);
    }
    erollout_threads_destroy(threads);
  }
  return failures != 0;
}
