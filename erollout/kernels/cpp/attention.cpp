#include "attention.h"

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "common.h"
#include "threads.h"
#include "vector_math.h"

namespace erollout {
namespace {

constexpr int64_t kChunk = 64;     // keys that are scored before the running maximum moves
constexpr int64_t kTileRows = 48;  // (token, head) rows of a tile, about
constexpr int kRowBlock = 6;       // rows of one kernel call: 6 x 4 sums stay in registers
constexpr int kPanels = kChunk / 16;

// What one task works in, small enough for the core's own cache.
struct Workspace {
  Workspace(int64_t rows, int64_t head_size, Scratch& scratch) {
    const int64_t width = round_up(head_size, 16);
    int64_t bytes = 0;
    const auto take = [&bytes](int64_t size) {
      const int64_t at = bytes;
      bytes += round_up(size, 64);
      return at;
    };
    const int64_t at[] = {take(rows * head_size * 2), take(kChunk * head_size * 2), take(kChunk * width * 2),
                          take(rows * kChunk * 4),    take(rows * kChunk * 2),      take(rows * width * 4),
                          take(rows * 4),             take(rows * 4),               take(rows * 4),
                          take(rows * 4),             take(head_size * 2)};
    char* base = static_cast<char*>(scratch.at_least(bytes));
    query = reinterpret_cast<bf16*>(base + at[0]);
    keys = reinterpret_cast<uint32_t*>(base + at[1]);
    values = reinterpret_cast<uint32_t*>(base + at[2]);
    scores = reinterpret_cast<float*>(base + at[3]);
    weights = reinterpret_cast<bf16*>(base + at[4]);
    sums = reinterpret_cast<float*>(base + at[5]);
    maximum = reinterpret_cast<float*>(base + at[6]);
    total = reinterpret_cast<float*>(base + at[7]);
    shrink = reinterpret_cast<float*>(base + at[8]);
    visible = reinterpret_cast<int32_t*>(base + at[9]);
    zeros = reinterpret_cast<bf16*>(base + at[10]);
    std::memset(zeros, 0, head_size * 2);
  }

  bf16* query;       // [rows][head_size]
  uint32_t* keys;    // [head_size / 2][kChunk]: pairs along the head
  uint32_t* values;  // [kChunk / 2][width]: pairs of keys; width is head_size in whole vectors
  float* scores;     // [rows][kChunk], times scale and log2(e)
  bf16* weights;     // [rows][kChunk]
  float* sums;       // [rows][width]: the weighted values so far
  float* maximum;    // [rows], of the scores so far
  float* total;      // [rows], of the weights so far
  float* shrink;     // [rows]: by how much the sums shrink as the maximum moves
  int32_t* visible;  // [rows]: keys of the chunk that a row sees
  bf16* zeros;       // [head_size]: stands for keys beyond the end
};

// Columns of a 16 x 16 matrix of 32-bit values, in place.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

// 16 keys -> columns [panel x 16, + 16) of scratch.keys.
void pack_keys(const bf16* const* rows, int64_t head_size, uint32_t* packed) {
  const int64_t pairs = head_size / 2;
  for (int64_t first = 0; first < pairs; first += 16) {
    const int64_t count = std::min<int64_t>(16, pairs - first);
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi32(first_lanes16(count), rows[i] + 2 * first);
    transpose(r);
    for (int i = 0; i < count; ++i) _mm512_store_si512(packed + (first + i) * kChunk, r[i]);
  }
}

// Rows of two neighbouring keys -> a row of scratch.values.
void pack_values(const bf16* even, const bf16* odd, int64_t head_size, uint32_t* packed) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kLow), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  int64_t d = 0;
  for (; d + 32 <= head_size; d += 32) {
    const __m512i a = _mm512_loadu_si512(even + d), b = _mm512_loadu_si512(odd + d);
    _mm512_store_si512(packed + d, _mm512_permutex2var_epi16(a, first, b));
    _mm512_store_si512(packed + d + 16, _mm512_permutex2var_epi16(a, second, b));
  }
  for (; d < head_size; d += 16) {
    const __mmask16 lanes = first_lanes16(head_size - d);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, even + d));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, odd + d));
    _mm512_store_si512(packed + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

// scores of `Rows` rows with 16 x `Panels` keys, scaled.
template <int Rows, int Panels>
void score(const bf16* query, int64_t head_size, const uint32_t* keys, float scale, float* scores) {
  __m512 sum[Rows][Panels];
  for (int r = 0; r < Rows; ++r)
    for (int p = 0; p < Panels; ++p) sum[r][p] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < head_size / 2; ++pair) {
    __m512i key[Panels];
    for (int p = 0; p < Panels; ++p) key[p] = _mm512_load_si512(keys + pair * kChunk + p * 16);
    for (int r = 0; r < Rows; ++r) {
      int32_t both;
      std::memcpy(&both, query + r * head_size + 2 * pair, 4);
      const __m512i q = _mm512_set1_epi32(both);
      for (int p = 0; p < Panels; ++p) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], (__m512bh)q, (__m512bh)key[p]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int p = 0; p < Panels; ++p)
      _mm512_store_ps(scores + r * kChunk + p * 16, _mm512_mul_ps(sum[r][p], _mm512_set1_ps(scale)));
}

// sums = sums x shrink + weights x values for `Rows` rows and 16 x `Panels` of the head, over the first `visible` keys.
template <int Rows, int Panels>
void accumulate(const bf16* weights, const float* shrink, int64_t visible, const uint32_t* values, int64_t width, float* sums) {
  __m512 sum[Rows][Panels];
  for (int r = 0; r < Rows; ++r)
    for (int p = 0; p < Panels; ++p)
      sum[r][p] = _mm512_mul_ps(_mm512_load_ps(sums + r * width + p * 16), _mm512_set1_ps(shrink[r]));
  const auto add = [&](int64_t pair, __m512i keep) {
    __m512i value[Panels];
    for (int p = 0; p < Panels; ++p) value[p] = _mm512_and_si512(keep, _mm512_load_si512(values + pair * width + p * 16));
    for (int r = 0; r < Rows; ++r) {
      int32_t both;
      std::memcpy(&both, weights + r * kChunk + 2 * pair, 4);
      const __m512i w = _mm512_set1_epi32(both);
      for (int p = 0; p < Panels; ++p) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], (__m512bh)w, (__m512bh)value[p]);
    }
  };
  for (int64_t pair = 0; pair < visible / 2; ++pair) add(pair, _mm512_set1_epi32(-1));
  if (visible % 2) add(visible / 2, _mm512_set1_epi32(0xFFFF));  // the odd key's partner is beyond the row's position
  for (int r = 0; r < Rows; ++r)
    for (int p = 0; p < Panels; ++p) _mm512_store_ps(sums + r * width + p * 16, sum[r][p]);
}

using Score = void (*)(const bf16*, int64_t, const uint32_t*, float, float*);
using Accumulate = void (*)(const bf16*, const float*, int64_t, const uint32_t*, int64_t, float*);

template <int Rows>
constexpr std::array<Score, kPanels> kScoresOf = {score<Rows, 1>, score<Rows, 2>, score<Rows, 3>, score<Rows, 4>};
template <int Rows>
constexpr std::array<Accumulate, 4> kAccumulatesOf = {accumulate<Rows, 1>, accumulate<Rows, 2>, accumulate<Rows, 3>,
                                                      accumulate<Rows, 4>};
constexpr std::array<Score, kPanels> kScore[kRowBlock] = {kScoresOf<1>, kScoresOf<2>, kScoresOf<3>,
                                                          kScoresOf<4>, kScoresOf<5>, kScoresOf<6>};
constexpr std::array<Accumulate, 4> kAccumulate[kRowBlock] = {kAccumulatesOf<1>, kAccumulatesOf<2>, kAccumulatesOf<3>,
                                                              kAccumulatesOf<4>, kAccumulatesOf<5>, kAccumulatesOf<6>};

// One row's weights of a chunk; its running maximum and total move on.
void softmax(const Workspace& s, int64_t row, int64_t visible) {
  const float* scores = s.scores + row * kChunk;
  const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 score[kPanels];
  for (int p = 0; p < kPanels; ++p)
    score[p] = _mm512_mask_loadu_ps(none, first_lanes16(visible - 16 * p), scores + 16 * p);
  const __m512 highest = _mm512_max_ps(_mm512_max_ps(score[0], score[1]), _mm512_max_ps(score[2], score[3]));
  const float before = s.maximum[row];
  const float now = std::max(before, _mm512_reduce_max_ps(highest));
  __m512 weight[kPanels];
  for (int p = 0; p < kPanels; ++p) {
    const __m256i rounded = to_bf16(exp2(_mm512_sub_ps(score[p], _mm512_set1_ps(now))));
    _mm256_store_si256(reinterpret_cast<__m256i*>(s.weights + row * kChunk + 16 * p), rounded);
    weight[p] = to_float(rounded);
  }
  const float sum = sum_lanes(_mm512_add_ps(_mm512_add_ps(weight[0], weight[1]), _mm512_add_ps(weight[2], weight[3])));
  s.shrink[row] = before == now ? 1.0f : _mm512_cvtss_f32(exp2(_mm512_set1_ps(before - now)));
  s.total[row] = std::fma(s.total[row], s.shrink[row], sum);
  s.maximum[row] = now;
}

// One tile's attention with the query heads of one KV head.
class TileTask {
 public:
  TileTask(const AttentionShape& shape, const Tile& tile, int64_t kv_head, const bf16* cache, Scratch& scratch)
      : shape_(shape),
        tile_(tile),
        kv_head_(kv_head),
        per_kv_(shape.heads / shape.kv_heads),
        rows_(tile.tokens * per_kv_),
        size_(shape.head_size),
        width_(round_up(size_, 16)),
        head_values_(shape.cache_blocks * shape.block_size * size_),
        keys_(cache + kv_head * head_values_),
        values_(cache + (shape.kv_heads + kv_head) * head_values_),
        scale_(float(1.4426950408889634 / std::sqrt(double(size_)))),
        s_(rows_, size_, scratch) {}

  void run(const bf16* query, int64_t query_stride, bf16* output) {
    for (int64_t token = 0; token < tile_.tokens; ++token)
      std::memcpy(s_.query + token * per_kv_ * size_,
                  query + (tile_.first_row + token) * query_stride + kv_head_ * per_kv_ * size_, per_kv_ * size_ * 2);
    std::memset(s_.sums, 0, rows_ * width_ * 4);
    std::fill_n(s_.maximum, rows_, -std::numeric_limits<float>::infinity());
    std::fill_n(s_.total, rows_, 0.0f);
    const int64_t end = tile_.start + tile_.tokens;
    locate(0, std::min(kChunk, end), rows_of_[0]);
    prefetch(rows_of_[0], 0, kChunk);
    for (int64_t key = 0; key < end; key += kChunk) {
      const Located& current = rows_of_[key / kChunk % 2];
      Located& next = rows_of_[(key / kChunk + 1) % 2];
      locate(key + kChunk, std::clamp<int64_t>(end - key - kChunk, 0, kChunk), next);
      chunk(key, std::min(kChunk, end - key), current, next);
    }
    for (int64_t row = 0; row < rows_; ++row) finish(row, output);
  }

 private:
  // Where the keys and values of a chunk lie; zeros beyond its end.
  struct Located {
    int64_t count;
    const bf16* keys[kChunk];
    const bf16* values[kChunk];
  };

  void chunk(int64_t first, int64_t count, const Located& current, const Located& next) {
    const int64_t panels = (count + 15) / 16;
    for (int64_t panel = 0; panel < panels; ++panel) {
      prefetch(next, panel * 16, panel * 16 + 16);
      pack_keys(current.keys + panel * 16, size_, s_.keys + panel * 16);
    }
    for (int64_t pair = 0; 2 * pair < count; ++pair)
      pack_values(current.values[2 * pair], current.values[2 * pair + 1], size_, s_.values + pair * width_);
    // Rows of tokens before the chunk come first and have nothing to do.
    const int64_t skip = std::max<int64_t>(0, first - tile_.start) * per_kv_;
    for (int64_t row = skip; row < rows_; row += kRowBlock) {
      const int64_t rows = std::min<int64_t>(kRowBlock, rows_ - row);
      kScore[rows - 1][panels - 1](s_.query + row * size_, size_, s_.keys, scale_, s_.scores + row * kChunk);
    }
    for (int64_t row = skip; row < rows_; ++row) {
      s_.visible[row] = int32_t(std::min(count, tile_.start + row / per_kv_ + 1 - first));
      softmax(s_, row, s_.visible[row]);
    }
    for (int64_t row = skip; row < rows_;) row = add_values(row);
  }

  // From `row` on, the rows that see the same keys, as many as a kernel takes; the row after them.
  int64_t add_values(int64_t row) {
    int64_t end = row + 1;
    while (end < rows_ && end - row < kRowBlock && s_.visible[end] == s_.visible[row]) ++end;
    for (int64_t d = 0; d < width_; d += 64) {
      const int64_t panels = std::min<int64_t>(4, (width_ - d) / 16);
      kAccumulate[end - row - 1][panels - 1](s_.weights + row * kChunk, s_.shrink + row, s_.visible[row], s_.values + d, width_,
                                             s_.sums + row * width_ + d);
    }
    return end;
  }

  void locate(int64_t first, int64_t count, Located& located) const {
    int64_t block = first / shape_.block_size, offset = first % shape_.block_size;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (tile_.blocks[block] * shape_.block_size + offset) * size_;
      located.keys[i] = keys_ + at;
      located.values[i] = values_ + at;
      if (++offset == shape_.block_size) ++block, offset = 0;
    }
    located.count = count;
    for (int64_t i = count; i < kChunk; ++i) located.keys[i] = located.values[i] = s_.zeros;
  }

  // Into the second-level cache, keys [first, end): blocks lie too far apart for the processor to guess them.
  void prefetch(const Located& located, int64_t first, int64_t end) const {
    for (int64_t i = first; i < std::min(end, located.count); ++i)
      for (int64_t d = 0; d < size_; d += 32) {
        _mm_prefetch(reinterpret_cast<const char*>(located.keys[i] + d), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(located.values[i] + d), _MM_HINT_T1);
      }
  }

  void finish(int64_t row, bf16* output) {
    const int64_t token = row / per_kv_, head = kv_head_ * per_kv_ + row % per_kv_;
    bf16* to = output + ((tile_.first_row + token) * shape_.heads + head) * size_;
    const __m512 total = _mm512_set1_ps(s_.total[row]);
    for (int64_t d = 0; d < size_; d += 16)
      store_bf16(to + d, _mm512_div_ps(_mm512_load_ps(s_.sums + row * width_ + d), total), first_lanes16(size_ - d));
  }

  const AttentionShape& shape_;
  const Tile& tile_;
  const int64_t kv_head_, per_kv_, rows_, size_, width_, head_values_;
  const bf16* const keys_;
  const bf16* const values_;
  const float scale_;
  const Workspace s_;
  Located rows_of_[2];  // of the chunk at work and of the next
};

}  // namespace

std::vector<Tile> cut_into_tiles(const AttentionShape& shape, const Span* spans, int64_t count) {
  const int64_t tokens = std::max<int64_t>(1, kTileRows / (shape.heads / shape.kv_heads));
  std::vector<Tile> tiles;
  for (const Span* span = spans; span < spans + count; ++span)
    for (int64_t done = 0; done < span->tokens; done += tokens)
      tiles.push_back({span->first_row + done, span->start + done, std::min(tokens, span->tokens - done), span->blocks});
  return tiles;
}

void attention(const AttentionShape& shape, const std::vector<Tile>& tiles, const bf16* query, int64_t query_stride,
               const bf16* cache, bf16* output, Threads& threads) {
  threads.parallel_for(int64_t(tiles.size()) * shape.kv_heads, [&](int64_t task) {
    static thread_local Scratch scratch;
    TileTask(shape, tiles[task / shape.kv_heads], task % shape.kv_heads, cache, scratch).run(query, query_stride, output);
  });
}

}  // namespace erollout
