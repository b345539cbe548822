#include <algorithm>
#include <functional>
#include <vector>

#include "sampling.h"
#include "sampling_math.h"

namespace erollout {
namespace {

constexpr float kMassScale = 0x1p40f;
constexpr int kCuts = 7;           // thresholds of one pass
constexpr int64_t kSorted = 256;   // so few values are sorted instead of being narrowed down further

int64_t integer_mass(float mass) { return std::llrint(static_cast<double>(mass) * kMassScale); }

struct Masses {  // of sixteen values, in two halves
  __m512i low, high;
  explicit Masses(__m512 masses) {
    const __m512 scaled = _mm512_mul_ps(masses, _mm512_set1_ps(kMassScale));
    low = _mm512_cvtps_epi64(_mm512_castps512_ps256(scaled));
    high = _mm512_cvtps_epi64(_mm512_extractf32x8_ps(scaled, 1));
  }
};

// masses = exp(values - largest), 0 for NaN; their sum.
int64_t weigh(const float* values, float* masses, int64_t count, float largest) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes16(count - i);
    const __m512 x = _mm512_mask_loadu_ps(_mm512_set1_ps(kNegativeInfinity), lanes, values + i);
    __m512 mass = exp_nonpositive(_mm512_sub_ps(x, _mm512_set1_ps(largest)));
    mass = _mm512_max_ps(mass, _mm512_setzero_ps());  // in this order NaN becomes 0
    mass = _mm512_maskz_mov_ps(lanes, mass);
    _mm512_storeu_ps(masses + i, mass);
    const Masses both(mass);
    sum = _mm512_add_epi64(sum, _mm512_add_epi64(both.low, both.high));
  }
  return _mm512_reduce_add_epi64(sum);
}

// Mass of the values from each cut on.
void masses_above(const float* values, const float* masses, int64_t count, const float* cuts, int64_t* above) {
  __m512i sums[kCuts];
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes16(count - i);
    const __m512 x = _mm512_maskz_loadu_ps(lanes, values + i);
    const Masses both(_mm512_maskz_loadu_ps(lanes, masses + i));
    for (int c = 0; c < kCuts; ++c) {
      const __mmask16 over = _mm512_cmp_ps_mask(x, _mm512_set1_ps(cuts[c]), _CMP_GE_OQ);
      sums[c] = _mm512_mask_add_epi64(sums[c], static_cast<__mmask8>(over), sums[c], both.low);
      sums[c] = _mm512_mask_add_epi64(sums[c], static_cast<__mmask8>(over >> 8), sums[c], both.high);
    }
  }
  for (int c = 0; c < kCuts; ++c) above[c] = _mm512_reduce_add_epi64(sums[c]);
}

// Move the values in [low, high) and their masses to the front; how many they are.
int64_t keep_between(float* values, float* masses, int64_t count, float low, float high) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes16(count - i);
    const __m512 x = _mm512_maskz_loadu_ps(lanes, values + i);
    const __m512 mass = _mm512_maskz_loadu_ps(lanes, masses + i);
    const __mmask16 inside = _mm512_mask_cmp_ps_mask(lanes, x, _mm512_set1_ps(low), _CMP_GE_OQ) &
                             _mm512_cmp_ps_mask(x, _mm512_set1_ps(high), _CMP_LT_OQ);
    if (!inside) continue;
    _mm512_storeu_ps(values + kept, _mm512_maskz_compress_ps(inside, x));  // registers: compressing into memory is slow
    _mm512_storeu_ps(masses + kept, _mm512_maskz_compress_ps(inside, mass));
    kept += __builtin_popcount(inside);
  }
  return kept;
}

}  // namespace

float top_k_floor(float* values, int64_t count, int64_t k) {
  if (k > count) return kNegativeInfinity;
  std::nth_element(values, values + (k - 1), values + count, std::greater<float>());
  return values[k - 1];
}

float top_p_floor(float* values, float* masses, int64_t count, float largest, double p) {
  const int64_t total = weigh(values, masses, count, largest);
  if (total <= 0 || !(largest < std::numeric_limits<float>::infinity())) return largest;
  const double wanted = static_cast<double>(total) * p;
  // The answer lies in [low, high): the mass from low on suffices, that from high on (`above`) does not.
  float low = std::max(largest - 30.0f, std::numeric_limits<float>::lowest());  // exp(-30) is less than half a unit of mass
  float high = std::nextafter(largest, std::numeric_limits<float>::infinity());
  int64_t above = 0;
  while (true) {
    count = keep_between(values, masses, count, low, high);
    float cuts[kCuts];
    for (int c = 0; c < kCuts; ++c) cuts[c] = low + (high - low) * (static_cast<float>(c + 1) / (kCuts + 1));
    const bool splits = std::any_of(cuts, cuts + kCuts, [&](float cut) { return cut > low && cut < high; });
    if (count <= kSorted || !splits) break;
    int64_t from[kCuts];
    masses_above(values, masses, count, cuts, from);
    float new_low = low;
    for (int c = 0; c < kCuts; ++c) {
      if (!(cuts[c] > low && cuts[c] < high)) continue;
      if (static_cast<double>(above + from[c]) < wanted) {
        high = cuts[c];
        above += from[c];
        break;
      }
      new_low = cuts[c];
    }
    low = new_low;
  }
  static thread_local std::vector<std::pair<float, float>> sorted;
  sorted.clear();
  for (int64_t i = 0; i < count; ++i) sorted.emplace_back(values[i], masses[i]);
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  for (const auto& [value, mass] : sorted) {
    above += integer_mass(mass);
    if (!(static_cast<double>(above) < wanted)) return value;
  }
  return sorted.empty() ? largest : sorted.back().first;
}

}  // namespace erollout
