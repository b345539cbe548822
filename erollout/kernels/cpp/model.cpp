#include "model.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common.h"
#include "model_rows.h"
#include "threads.h"
#include "vector_math.h"

namespace erollout {
namespace {

constexpr int64_t kRowsPerTask = 16;  // fewer rows are not worth a second thread

template <class Function>
void for_rows(int64_t rows, Threads& threads, Function&& function) {
  threads.parallel_for(ceil_div(rows, kRowsPerTask), [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) function(row);
  });
}

int64_t qkv_size(const Model& model) {
  return (model.shape.heads + 2 * model.shape.kv_heads) * model.shape.head_size;
}

int64_t attended_size(const Model& model) {
  return model.shape.heads * model.shape.head_size;
}

bf16* layer_cache(const Model& model, int64_t layer, const Pass& pass) {
  const AttentionShape& shape = model.shape;
  return pass.cache + layer * 2 * shape.kv_heads * shape.cache_blocks * shape.block_size * shape.head_size;
}

std::vector<Span> read_spans(const Pass& pass) {
  std::vector<Span> spans(pass.num_spans);
  for (int64_t i = 0; i < pass.num_spans; ++i) {
    const int64_t* span = pass.spans + 4 * i;
    spans[i] = {span[0], span[1], span[2], pass.tables + span[3]};
  }
  return spans;
}

// Normalise heads one by one where they are; without a weight they stay.
void norm_heads(const Model& model, const bf16* weight, bf16* x, int64_t heads) {
  const int64_t size = model.shape.head_size;
  if (!weight) return;
  for (int64_t head = 0; head < heads; ++head) rms_norm(x + head * size, weight, size, model.epsilon, x + head * size);
}

// Normalise a token's queries and keys, rotate its queries where they are, its keys into the cache, and copy its values there.
void rotate_and_store(const Model& model, const Layer& layer, const Pass& pass, int64_t token, bf16* qkv, bf16* cache) {
  const AttentionShape& shape = model.shape;
  const int64_t size = shape.head_size, head_values = shape.cache_blocks * shape.block_size * size;
  const bf16* cosine = model.cosine + pass.positions[token] * size;
  const bf16* sine = model.sine + pass.positions[token] * size;
  bf16* slot = cache + pass.slots[token] * size;
  bf16* keys = qkv + shape.heads * size;
  norm_heads(model, layer.q_norm, qkv, shape.heads);
  norm_heads(model, layer.k_norm, keys, shape.kv_heads);
  for (int64_t head = 0; head < shape.heads; ++head) rotate(qkv + head * size, cosine, sine, size, qkv + head * size);
  const bf16* values = keys + shape.kv_heads * size;
  for (int64_t head = 0; head < shape.kv_heads; ++head) {
    rotate(keys + head * size, cosine, sine, size, slot + head * head_values);
    std::memcpy(slot + (shape.kv_heads + head) * head_values, values + head * size, size * sizeof(bf16));
  }
}

void norm_rows(const Model& model, const bf16* weight, const bf16* x, int64_t rows, bf16* y, Threads& threads) {
  for_rows(rows, threads, [&](int64_t row) {
    rms_norm(x + row * model.hidden_size, weight, model.hidden_size, model.epsilon, y + row * model.hidden_size);
  });
}

// The tiles of a pass, the same for all layers.
struct Tiles {
  Tiles(const Model& model, const Pass& pass) {
    const std::vector<Span> spans = read_spans(pass);
    tiles = cut_into_tiles(model.shape, spans.data(), pass.num_spans);
    tokens = spans.empty() ? 0 : spans.back().first_row + spans.back().tokens;
  }

  std::vector<Tile> tiles;
  int64_t tokens;  // what follows them in the pass is padding
};

void attend(const Model& model, int64_t layer_index, const Pass& pass, const Tiles& tiles, Threads& threads) {
  const Layer& layer = model.layers[layer_index];
  bf16* cache = layer_cache(model, layer_index, pass);
  const int64_t tokens = pass.tokens, qkv_width = qkv_size(model), attended_width = attended_size(model);
  bf16* normed = pass.workspace;
  bf16* qkv = normed + tokens * model.hidden_size;
  bf16* attended = qkv + tokens * qkv_width;
  norm_rows(model, layer.input_norm, pass.hidden, tokens, normed, threads);
  linear(*layer.qkv_proj, normed, model.hidden_size, tokens, qkv, qkv_width, threads);
  for_rows(tokens, threads, [&](int64_t token) {
    rotate_and_store(model, layer, pass, token, qkv + token * qkv_width, cache);
  });
  attention(model.shape, tiles.tiles, qkv, qkv_width, cache, attended, threads);
  std::memset(attended + tiles.tokens * attended_width, 0, (tokens - tiles.tokens) * attended_width * sizeof(bf16));
  linear(*layer.o_proj, attended, attended_width, tokens, pass.partial, model.hidden_size, threads);
}

void add_partial(const Model& model, const Pass& pass, Threads& threads) {
  for_rows(pass.tokens, threads, [&](int64_t row) {
    add(pass.hidden + row * model.hidden_size, pass.partial + row * model.hidden_size, model.hidden_size);
  });
}

bool within(const int64_t* values, int64_t count, int64_t end) {
  return std::all_of(values, values + count, [end](int64_t value) { return value >= 0 && value < end; });
}

}  // namespace

int64_t workspace_size(const Model& model, int64_t tokens) {
  return tokens * (model.hidden_size + std::max(qkv_size(model) + attended_size(model), 2 * model.ffn_size));
}

void attention_block(const Model& model, int64_t layer, const Pass& pass, Threads& threads) {
  attend(model, layer, pass, Tiles(model, pass), threads);
}

void feed_forward_block(const Model& model, int64_t layer_index, const Pass& pass, Threads& threads) {
  const Layer& layer = model.layers[layer_index];
  const int64_t ffn = model.ffn_size;
  bf16* normed = pass.workspace;
  bf16* gate_up = normed + pass.tokens * model.hidden_size;
  norm_rows(model, layer.post_attention_norm, pass.hidden, pass.tokens, normed, threads);
  linear(*layer.gate_up_proj, normed, model.hidden_size, pass.tokens, gate_up, 2 * ffn, threads);
  for_rows(pass.tokens, threads, [&](int64_t row) { silu_times(gate_up + row * 2 * ffn, gate_up + row * 2 * ffn + ffn, ffn); });
  linear(*layer.down_proj, gate_up, 2 * ffn, pass.tokens, pass.partial, model.hidden_size, threads);
}

void head(const Model& model, const Pass& pass, Threads& threads) {
  const int64_t size = model.hidden_size;
  for_rows(pass.num_logits, threads, [&](int64_t row) {
    rms_norm(pass.hidden + pass.logit_rows[row] * size, model.norm, size, model.epsilon, pass.workspace + row * size);
  });
  linear(*model.lm_head, pass.workspace, size, pass.num_logits, pass.logits, model.lm_head->out_features, threads);
}

void forward(const Model& model, const Pass& pass, Threads& threads) {
  const int64_t size = model.hidden_size;
  for (int64_t row = 0; row < pass.tokens; ++row)
    std::memcpy(pass.hidden + row * size, model.embedding + pass.token_ids[row] * size, size * sizeof(bf16));
  const Tiles tiles(model, pass);
  for (int64_t layer = 0; layer < model.num_layers; ++layer) {
    attend(model, layer, pass, tiles, threads);
    add_partial(model, pass, threads);
    feed_forward_block(model, layer, pass, threads);
    add_partial(model, pass, threads);
  }
  head(model, pass, threads);
}

}  // namespace erollout

using erollout::Model;
using erollout::Pass;
using erollout::Threads;

extern "C" {

int64_t erollout_model_size() { return sizeof(Model); }
int64_t erollout_layer_size() { return sizeof(erollout::Layer); }
int64_t erollout_pass_size() { return sizeof(Pass); }

int64_t erollout_workspace_size(const Model* model, int64_t tokens) { return erollout::workspace_size(*model, tokens); }

// 0, or which of the pass's inputs (1 token_ids, 2 positions, 3 slots, 4 logit_rows) leaves its bounds.
int32_t erollout_check_pass(const Model* model, const Pass* pass, int32_t with_token_ids) {
  using erollout::within;
  if (with_token_ids && !within(pass->token_ids, pass->tokens, model->vocabulary)) return 1;
  if (!within(pass->positions, pass->tokens, model->max_positions)) return 2;
  if (!within(pass->slots, pass->tokens, model->shape.cache_blocks * model->shape.block_size)) return 3;
  return within(pass->logit_rows, pass->num_logits, pass->tokens) ? 0 : 4;
}

void erollout_forward(const Model* model, const Pass* pass, void* threads) {
  erollout::forward(*model, *pass, *static_cast<Threads*>(threads));
}

void erollout_attention_block(const Model* model, int64_t layer, const Pass* pass, void* threads) {
  erollout::attention_block(*model, layer, *pass, *static_cast<Threads*>(threads));
}

void erollout_feed_forward_block(const Model* model, int64_t layer, const Pass* pass, void* threads) {
  erollout::feed_forward_block(*model, layer, *pass, *static_cast<Threads*>(threads));
}

void erollout_head(const Model* model, const Pass* pass, void* threads) {
  erollout::head(*model, *pass, *static_cast<Threads*>(threads));
}

// 2^x of `count` values, a multiple of 16: for its test.
void erollout_exp2(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) erollout::exp2(x + i, y + i);
}

// Attention alone, over pass->spans and one layer's cache.
void erollout_attention(const erollout::AttentionShape* shape, const Pass* pass, const erollout::bf16* query, int64_t query_stride,
                        erollout::bf16* output, void* threads) {
  const auto spans = erollout::read_spans(*pass);
  const auto tiles = erollout::cut_into_tiles(*shape, spans.data(), pass->num_spans);
  erollout::attention(*shape, tiles, query, query_stride, pass->cache, output, *static_cast<Threads*>(threads));
}
}
