// Quantising weights with the arithmetic of erollout/drafter/calibrators.py, bit for bit: what ModelOpt computes, on all weights
// of a model within a policy update.
//
// int4 scales are bf16 and found per group of a row: from the largest weight, or as the candidate range with the least weighted
// squared error (ModelOpt's fake quantisation, losses in double), or with a zero point. int8 scales are fp32, one per row.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "common.h"
#include "threads.h"

namespace erollout {
namespace {

constexpr float kTiniest = 1.0f / (1 << 24);  // a range not above this counts as zero
constexpr int64_t kRowsPerTask = 8;
constexpr int32_t kInfinity = 0x7f800000;

// One row's weights and where its numbers go.
struct Int4Row {
  const float* weight;      // [columns]
  const double* importance;  // [columns] or null
  int8_t* values;
  bf16* scales;
  int8_t* zero_points;      // or null: symmetric
};

struct Extremes {
  float largest;  // absolute
  float low, high;  // of the range that holds zero
  bool finite;
};

Extremes extremes(const float* weight, int64_t count) {
  const __m512i sign = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes16(count - k);
    const __m512 w = _mm512_maskz_loadu_ps(lanes, weight + k);
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(w), sign));
    low = _mm512_min_ps(low, w);
    high = _mm512_max_ps(high, w);
  }
  const int32_t bits = _mm512_reduce_max_epi32(largest);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return {value, _mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high), bits < kInfinity};
}

inline float rounded_scale(float range, float steps) {
  const float scale = to_float(to_bf16(range / steps));
  return range <= kTiniest || scale == 0 ? 1.0f : scale;
}

// sum importance (w - fake_quantised(w))^2 for a range of 7 scale.
double loss(const float* weight, const double* importance, int64_t group_size, float scale) {
  const float range = scale * 7.0f, inverse = range <= kTiniest ? 0.0f : 7.0f / range;
  // What a value becomes, by its low four bits; all zeros where the range counts as zero.
  const __m512 every_value = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512 dequantized = _mm512_maskz_div_ps(inverse == 0 ? 0 : 0xffff, every_value, factor);
  const __m512i least = _mm512_set1_epi32(-8), most = _mm512_set1_epi32(7);
  __m512d low_sum = _mm512_setzero_pd(), high_sum = _mm512_setzero_pd();
  for (int64_t k = 0; k < group_size; k += 16) {
    const __m512 w = _mm512_loadu_ps(weight + k);
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(w, factor));  // to nearest even
    const __m512i value = _mm512_max_epi32(_mm512_min_epi32(rounded, most), least);
    const __m512 error = _mm512_sub_ps(w, _mm512_permutexvar_ps(value, dequantized));
    __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(error));
    __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(error, 1));
    low = _mm512_mul_pd(low, low);
    high = _mm512_mul_pd(high, high);
    if (importance) {
      low_sum = _mm512_fmadd_pd(low, _mm512_loadu_pd(importance + k), low_sum);
      high_sum = _mm512_fmadd_pd(high, _mm512_loadu_pd(importance + k + 8), high_sum);
    } else {
      low_sum = _mm512_add_pd(low_sum, low);
      high_sum = _mm512_add_pd(high_sum, high);
    }
  }
  return _mm512_reduce_add_pd(_mm512_add_pd(low_sum, high_sum));
}

// The first of the candidates with the least loss.
float searched_scale(const float* weight, const double* importance, int64_t group_size, float largest, const float* ratios,
                     int64_t num_ratios) {
  float best = rounded_scale(largest * ratios[0], 7.0f);
  if (num_ratios == 1) return best;
  double least = loss(weight, importance, group_size, best);
  for (int64_t i = 1; i < num_ratios; ++i) {
    const float scale = rounded_scale(largest * ratios[i], 7.0f);
    const double candidate = loss(weight, importance, group_size, scale);
    if (candidate < least) {
      least = candidate;
      best = scale;
    }
  }
  return best;
}

// values = clamp(round((w + offset) / scale)).
void round_values(const float* weight, int64_t count, float offset, float scale, int least, int most, int8_t* values) {
  const __m512 divisor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(offset);
  const __m512i low = _mm512_set1_epi32(least), high = _mm512_set1_epi32(most);
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes16(count - k);
    const __m512 w = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, weight + k), shift);
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_div_ps(w, divisor));
    const __m512i value = _mm512_max_epi32(_mm512_min_epi32(rounded, high), low);
    _mm512_mask_cvtepi32_storeu_epi8(values + k, lanes, value);
  }
}

bool quantize_group(const Int4Row& row, int64_t group, int64_t group_size, const float* ratios, int64_t num_ratios) {
  const int64_t k = group * group_size;
  const float* weight = row.weight + k;
  const Extremes found = extremes(weight, group_size);
  float scale, offset = 0;
  if (row.zero_points) {
    scale = rounded_scale(found.high - found.low, 15.0f);
    const float zero_point = std::fmin(std::fmax(-8.0f - std::nearbyint(found.low / scale), -8.0f), 7.0f);
    offset = zero_point * scale;
    row.zero_points[group] = static_cast<int8_t>(zero_point);
  } else {
    scale = searched_scale(weight, row.importance ? row.importance + k : nullptr, group_size, found.largest, ratios, num_ratios);
  }
  row.scales[group] = to_bf16(scale);
  round_values(weight, group_size, offset, scale, -8, 7, row.values + k);
  return found.finite && std::isfinite(scale);
}

void widen(const void* weight, bool is_bf16, int64_t first, int64_t count, float* out) {
  if (!is_bf16) {
    std::memcpy(out, static_cast<const float*>(weight) + first, count * sizeof(float));
    return;
  }
  const bf16* source = static_cast<const bf16*>(weight) + first;
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes16(count - k);
    _mm512_mask_storeu_ps(out + k, lanes, load_bf16(source + k, lanes));
  }
}

// function(row, its weights in fp32) -> whether they are finite, for all rows; returns whether all are.
template <class Function>
bool for_rows(const void* weight, bool is_bf16, int64_t rows, int64_t columns, Threads& threads, const Function& function) {
  std::atomic<bool> finite{true};
  threads.parallel_for(ceil_div(rows, kRowsPerTask), [&](int64_t task) {
    static thread_local Scratch scratch;
    float* wide = static_cast<float*>(scratch.at_least(columns * sizeof(float)));
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      widen(weight, is_bf16, row * columns, columns, wide);
      if (!function(row, wide)) finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite.load();
}

}  // namespace
}  // namespace erollout

using namespace erollout;

extern "C" {

// weight: [rows, columns], bf16 or fp32, contiguous. group_size: a multiple of 16 that divides columns. importance: [columns] or
// null. zero_points: [rows, columns / group_size] or null: symmetric, with the best of `ratios`. Returns 1 when all is finite.
int32_t erollout_quantize_int4(const void* weight, int32_t is_bf16, int64_t rows, int64_t columns, int64_t group_size,
                               const double* importance, const float* ratios, int64_t num_ratios, int8_t* values, void* scales,
                               int8_t* zero_points, void* threads) {
  const int64_t groups = columns / group_size;
  return for_rows(weight, is_bf16, rows, columns, *static_cast<Threads*>(threads), [&](int64_t row, const float* wide) {
    const Int4Row numbers{wide, importance, values + row * columns, static_cast<bf16*>(scales) + row * groups,
                          zero_points ? zero_points + row * groups : nullptr};
    bool finite = true;
    for (int64_t group = 0; group < groups; ++group)
      finite &= quantize_group(numbers, group, group_size, ratios, num_ratios);
    return finite;
  });
}

// int8 per row; scales: fp32 [rows].
int32_t erollout_quantize_int8(const void* weight, int32_t is_bf16, int64_t rows, int64_t columns, int8_t* values, float* scales,
                               void* threads) {
  return for_rows(weight, is_bf16, rows, columns, *static_cast<Threads*>(threads), [&](int64_t row, const float* wide) {
    const Extremes found = extremes(wide, columns);
    scales[row] = found.largest <= kTiniest ? 1.0f : found.largest / 127.0f;
    round_values(wide, columns, 0, scales[row], -128, 127, values + row * columns);
    return found.finite;
  });
}
}
