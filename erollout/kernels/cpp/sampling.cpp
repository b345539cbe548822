#include "sampling.h"

#include <algorithm>

#include "sampling_math.h"
#include "threads.h"

namespace erollout {
namespace {

// A row of logits on the grid of tiles; what is not this rank's token is -inf.
template <class Element>
struct Source {
  const Element* data;  // of grid column `begin`
  int64_t begin, end;

  static __m512 plain(const float* from) { return _mm512_loadu_ps(from); }
  static __m512 plain(const bf16* from) { return load_bf16(from); }
  static __m512 masked(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
  static __m512 masked(const bf16* from, __mmask16 lanes) { return load_bf16(from, lanes); }
  static float scalar(float value) { return value; }
  static float scalar(bf16 value) { return to_float(value); }

  __m512 load(int64_t column) const {
    if (column >= begin && column + 16 <= end) return plain(data + (column - begin));
    const __mmask16 lanes = first_lanes16(end - column) & ~first_lanes16(begin - column);
    if (!lanes) return _mm512_set1_ps(kNegativeInfinity);
    return _mm512_mask_mov_ps(_mm512_set1_ps(kNegativeInfinity), lanes, masked(data + (column - begin), lanes));
  }

  float at(int64_t column) const { return column >= begin && column < end ? scalar(data[column - begin]) : kNegativeInfinity; }
};

// The largest logit of each block, NaN ignored; the largest of all.
template <class Element>
float block_maxima(const Source<Element>& x, int64_t width, float* maxima) {
  __m512 largest = _mm512_set1_ps(kNegativeInfinity);
  for (int64_t tile = 0; tile < width; tile += kTile)
    for (int64_t column = 0; column < kColumns; column += 16) {
      __m512 most = _mm512_set1_ps(kNegativeInfinity);
      for (int64_t lane = 0; lane < kLanes; ++lane)
        most = _mm512_max_ps(x.load(tile + lane * kColumns + column), most);  // in this order NaN is dropped
      _mm512_store_ps(maxima + tile / kLanes + column, most);
      largest = _mm512_max_ps(largest, most);
    }
  return _mm512_reduce_max_ps(largest);
}

// log of the sum of exponentials; -inf without any, NaN for a row with NaN or +inf.
template <class Element>
double normalizer(const Source<Element>& x, int64_t width, float largest) {
  if (largest == kNegativeInfinity) {
    bool has_nan = false;
    for (int64_t column = 0; column < width; column += 16) {
      const __m512 values = x.load(column);
      has_nan |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q) != 0;
    }
    return has_nan ? std::nan("") : kNegativeInfinity;
  }
  const __m512 offset = _mm512_set1_ps(largest);
  __m512d total[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
  for (int64_t tile = 0; tile < width; tile += kTile) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t column = tile; column < tile + kTile; column += 64)
      for (int64_t part = 0; part < 4; ++part)
        sums[part] = _mm512_add_ps(sums[part], exp_nonpositive(_mm512_sub_ps(x.load(column + 16 * part), offset)));
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    total[0] = _mm512_add_pd(total[0], _mm512_cvtps_pd(_mm512_castps512_ps256(sum)));
    total[1] = _mm512_add_pd(total[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1)));
  }
  return static_cast<double>(largest) + std::log(_mm512_reduce_add_pd(_mm512_add_pd(total[0], total[1])));
}

struct Best {
  double value = kNegativeInfinity;
  int64_t column = -1;  // of the grid
};

// The lowest column with the largest logit.
template <class Element>
Best greedy(const Source<Element>& x, int64_t width, float largest) {
  if (largest == kNegativeInfinity) return {};
  for (int64_t column = 0; column < width; column += 16)
    if (const __mmask16 equal = _mm512_cmp_ps_mask(x.load(column), _mm512_set1_ps(largest), _CMP_EQ_OQ))
      return {largest, column + __builtin_ctz(equal)};
  return {};
}

// Gumbel-max over the tokens of blocks, as the torch sampler computes it: exact noise in double.
template <class Element>
class Race {
 public:
  Race(const Source<Element>& x, uint64_t key, int64_t first_id) : x_(x), key_(key), first_id_(first_id) {}

  const Best& best() const { return best_; }

  void enter(int64_t block) {
    const int64_t first = block / kColumns * kTile + block % kColumns;
    const uint64_t bits = random_bits(key_, static_cast<uint64_t>(first_id_ / kLanes + block) + kBlocks);
    const double smallest = std::log(uniform(bits)) * (-1.0 / kLanes);
    const double most_noise = -std::log(smallest);
    const int64_t leader = static_cast<int64_t>(bits & (kLanes - 1));
    offer(first + leader * kColumns, most_noise);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t column = first + lane * kColumns;
      if (lane == leader || !(x_.at(column) + most_noise >= best_.value)) continue;
      const double excess = -std::log(uniform(random_bits(key_, static_cast<uint64_t>(first_id_ + column))));
      offer(column, -std::log(excess + smallest));
    }
  }

 private:
  void offer(int64_t column, double noise) {
    const float logit = x_.at(column);
    const double value = noise + static_cast<double>(logit);
    if (!(logit > kNegativeInfinity)) return;
    if (value > best_.value || (value == best_.value && column < best_.column)) best_ = {value, column};
  }

  const Source<Element>& x_;
  const uint64_t key_;
  const int64_t first_id_;
  Best best_;
};

// maxima + noise + more than its error: above every token's value. Blocks without a logit keep -inf.
void bounds_from_maxima(float* maxima, int64_t blocks, uint64_t key, int64_t first_block) {
  const __m512 lowest = _mm512_set1_ps(kNegativeInfinity);
  for (int64_t block = 0; block < blocks; block += 16) {
    const __m512 most = _mm512_load_ps(maxima + block);
    const __m512 sum = _mm512_add_ps(most, block_noise(key, static_cast<uint64_t>(first_block + block)));
    const __m512 margin = _mm512_fmadd_ps(_mm512_abs_ps(sum), _mm512_set1_ps(0x1p-22f), _mm512_set1_ps(kNoiseMargin));
    const __mmask16 any = _mm512_cmp_ps_mask(most, lowest, _CMP_GT_OQ);
    _mm512_store_ps(maxima + block, _mm512_mask_add_ps(lowest, any, sum, margin));
  }
}

// The block with the largest bound.
int64_t leading(const float* bounds, int64_t blocks) {
  __m512 most = _mm512_load_ps(bounds);
  __m512i where = _mm512_setzero_si512();
  for (int64_t block = 16; block < blocks; block += 16) {
    const __m512 x = _mm512_load_ps(bounds + block);
    const __mmask16 more = _mm512_cmp_ps_mask(x, most, _CMP_GT_OQ);
    most = _mm512_mask_mov_ps(most, more, x);
    where = _mm512_mask_mov_epi32(where, more, _mm512_set1_epi32(static_cast<int32_t>(block)));
  }
  const __mmask16 at = _mm512_cmp_ps_mask(most, _mm512_set1_ps(_mm512_reduce_max_ps(most)), _CMP_EQ_OQ);
  const int lane = __builtin_ctz(at);
  alignas(64) int32_t starts[16];
  _mm512_store_si512(starts, where);
  return starts[lane] + lane;
}

// Blocks enter from the largest bound down, until no other can win. Destroys the maxima.
template <class Element>
Best gumbel_max(const Source<Element>& x, int64_t width, float* maxima, uint64_t key, int64_t first_id) {
  const int64_t blocks = width / kLanes;
  bounds_from_maxima(maxima, blocks, key, first_id / kLanes);
  Race<Element> race(x, key, first_id);
  while (true) {
    const int64_t block = leading(maxima, blocks);
    if (maxima[block] == kNegativeInfinity || static_cast<double>(maxima[block]) < race.best().value) return race.best();
    maxima[block] = kNegativeInfinity;
    race.enter(block);
  }
}

template <class Value>
const Value* parameter(const RowFilter<Value>& filter, int64_t row) {
  const int64_t* end = filter.rows + filter.count;
  const int64_t* at = std::lower_bound(filter.rows, end, row);
  return at != end && *at == row ? filter.values + (at - filter.rows) : nullptr;
}

struct Buffers {  // of one thread
  Scratch maxima, processed, values, masses;
  static float* floats(Scratch& scratch, int64_t count) {
    return static_cast<float*>(scratch.at_least(static_cast<size_t>(count + 16) * sizeof(float)));
  }
};

template <class Element>
class Row {
 public:
  Row(const SamplingJob& job, int64_t row, Buffers& buffers)
      : job_(job),
        row_(row),
        buffers_(buffers),
        raw_{static_cast<const Element*>(job.logits) + row * job.logits_stride, job.margin, job.margin + job.size},
        maxima_(Buffers::floats(buffers.maxima, job.width / kLanes)),
        top_k_(parameter(job.top_k, row)),
        top_p_(parameter(job.top_p, row)),
        min_p_(parameter(job.min_p, row)) {
    temperature_ = job.temperature ? job.temperature[row] : 1.0f;
    penalty_ = job.penalty ? job.penalty[row] : 1.0f;
  }

  void run() {
    const float largest = block_maxima(raw_, job_.width, maxima_);
    const double raw_normalizer = job_.wants_facts ? normalizer(raw_, job_.width, largest) : 0.0;
    if (!job_.is_processed && !job_.processed && !changes()) return finish(raw_, largest, raw_normalizer, &raw_normalizer);
    float* y = job_.processed ? job_.processed + row_ * job_.width : Buffers::floats(buffers_.processed, job_.width);
    const Source<float> processed{y, 0, job_.width};
    if (!job_.is_processed) process(y);
    float most = changes() || job_.is_processed ? block_maxima(processed, job_.width, maxima_) : largest;
    if (!job_.is_processed && (top_k_ || top_p_ || min_p_)) filter(y, most);
    finish(processed, most, raw_normalizer, changes() || job_.is_processed ? nullptr : &raw_normalizer);
  }

 private:
  bool changes() const { return temperature_ != 1.0f || penalty_ != 1.0f || top_k_ || top_p_ || min_p_; }

  void process(float* y) const {
    for (int64_t column = 0; column < job_.width; column += 16) _mm512_storeu_ps(y + column, raw_.load(column));
    if (penalty_ != 1.0f) penalize(y);
    if (temperature_ == 1.0f) return;
    const __m512 divisor = _mm512_set1_ps(temperature_);
    for (int64_t column = 0; column < job_.width; column += 16)
      _mm512_storeu_ps(y + column, _mm512_div_ps(_mm512_loadu_ps(y + column), divisor));
  }

  void penalize(float* y) const {
    for (int64_t i = 0; i < job_.context_length; ++i) {
      const int64_t id = job_.context_ids[row_ * job_.context_length + i], column = id - job_.first_id;
      if (id < 0 || column < 0 || column >= job_.width) continue;
      const float logit = raw_.at(column);  // not y: an id may come twice
      y[column] = logit > 0 ? logit / penalty_ : logit * penalty_;
    }
  }

  void filter(float* y, float largest) {
    const float floor = this->floor(y, largest);
    const __m512 least = _mm512_set1_ps(floor), lowest = _mm512_set1_ps(kNegativeInfinity);
    for (int64_t i = 0; i < job_.width; i += 16) {
      const __m512 x = _mm512_loadu_ps(y + i);
      _mm512_storeu_ps(y + i, _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, least, _CMP_LT_OQ), lowest));
    }
    for (int64_t i = 0; i < job_.width / kLanes; i += 16) {
      const __m512 x = _mm512_load_ps(maxima_ + i);
      _mm512_store_ps(maxima_ + i, _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, least, _CMP_LT_OQ), lowest));
    }
  }

  // The smallest logit that stays.
  float floor(const float* y, float largest) {
    float floor = kNegativeInfinity;
    float* values = Buffers::floats(buffers_.values, job_.width);
    if (top_k_) {
      const int64_t blocks = job_.width / kLanes;
      std::copy(maxima_, maxima_ + blocks, values);
      const int64_t count = gather(y, top_k_floor(values, blocks, *top_k_), values);
      floor = top_k_floor(values, count, *top_k_);
    }
    if (top_p_) {
      const int64_t count = gather(y, std::max(floor, largest - 30.0f), values);  // what is below has no mass
      float* masses = Buffers::floats(buffers_.masses, job_.width);
      floor = std::max(floor, top_p_floor(values, masses, count, largest, *top_p_));
    }
    if (min_p_) floor = std::max(floor, static_cast<float>(static_cast<double>(largest) + std::log(*min_p_)));
    return floor;
  }

  // The values of y above -inf that are at least `least`; how many they are.
  int64_t gather(const float* y, float least, float* values) const {
    int64_t count = 0;
    const __m512 lowest = _mm512_set1_ps(kNegativeInfinity);
    for (int64_t column = 0; column < job_.width; column += 16) {
      const __m512 x = _mm512_loadu_ps(y + column);
      const __mmask16 over = _mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_GE_OQ) & _mm512_cmp_ps_mask(x, lowest, _CMP_GT_OQ);
      if (!over) continue;
      _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(over, x));
      count += __builtin_popcount(over);
    }
    return count;
  }

  template <class Other>
  void finish(const Source<Other>& x, float largest, double raw_normalizer, const double* known_normalizer) {
    double processed_normalizer = 0.0;
    if (job_.wants_facts) processed_normalizer = known_normalizer ? *known_normalizer : normalizer(x, job_.width, largest);
    const bool is_greedy = job_.noisy[row_] == 0;
    const uint64_t key = stream_key(job_.seeds[row_], job_.positions[row_]);
    const Best best = is_greedy ? greedy(x, job_.width, largest) : gumbel_max(x, job_.width, maxima_, key, job_.first_id);
    const int64_t token = best.column < 0 ? 0 : job_.first_id + best.column;
    if (job_.token_ids) job_.token_ids[row_] = token;
    if (!job_.facts) return;
    job_.facts[row_ * 6] = best.value;
    if (!job_.wants_facts) return;
    const double facts[6] = {best.value,     static_cast<double>(token), raw_.at(best.column),
                             raw_normalizer, x.at(best.column),          processed_normalizer};
    std::copy(facts, facts + 6, job_.facts + row_ * 6);
  }

  const SamplingJob& job_;
  const int64_t row_;
  Buffers& buffers_;
  const Source<Element> raw_;
  float* const maxima_;
  const int64_t* const top_k_;
  const double* const top_p_;
  const double* const min_p_;
  float temperature_, penalty_;
};

}  // namespace

void sample(const SamplingJob& job, Threads& threads) {
  threads.parallel_for(job.rows, [&](int64_t row) {
    static thread_local Buffers buffers;
    if (job.is_bf16)
      Row<bf16>(job, row, buffers).run();
    else
      Row<float>(job, row, buffers).run();
  });
}

}  // namespace erollout

extern "C" {

int64_t erollout_sampling_job_bytes() { return sizeof(erollout::SamplingJob); }

void erollout_sample(const erollout::SamplingJob* job, void* threads) {
  erollout::sample(*job, *static_cast<erollout::Threads*>(threads));
}

// For tests: the largest noise of `count` (a multiple of 16) blocks, as the sampler bounds it, without the margin.
void erollout_block_noise(int64_t key, int64_t block, int64_t count, float* noise) {
  for (int64_t i = 0; i < count; i += 16)
    _mm512_storeu_ps(noise + i, erollout::block_noise(static_cast<uint64_t>(key), static_cast<uint64_t>(block + i)));
}
}
