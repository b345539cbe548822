// The decode model of one rank: what lies around its packed linear layers. Mirrored by ctypes in erollout/engine/model/native_model.py;
// a test compares the sizes. Every pointer is borrowed from a tensor that Python keeps alive.
#pragma once
#include <cstdint>

#include "attention.h"
#include "linear.h"

namespace erollout {

// What a model's layer lacks is null.
struct Layer {
  const bf16* input_norm;  // [hidden_size]
  const Linear* qkv_proj;  // query heads, key heads, value heads
  const Linear* o_proj;
  const bf16* post_attention_norm;  // [hidden_size]
  const Linear* gate_up_proj;       // gate over up
  const Linear* down_proj;
  const bf16* q_norm;  // [head_size], of every query head before the rotation
  const bf16* k_norm;  // [head_size], of every key head
};

struct Model {
  AttentionShape shape;
  int64_t num_layers;
  int64_t hidden_size;
  int64_t ffn_size;  // of this rank
  int64_t vocabulary;  // rows of the embedding
  int64_t max_positions;
  const bf16* embedding;  // [vocabulary][hidden_size]
  const bf16* norm;       // [hidden_size]
  const bf16* cosine;     // [max_positions][head_size]
  const bf16* sine;       // [max_positions][head_size], its first half negated
  const Linear* lm_head;
  const Layer* layers;
  float epsilon;
};

// The new tokens of one pass, and where its results go.
struct Pass {
  int64_t tokens;
  int64_t num_spans;
  int64_t num_logits;
  const int64_t* token_ids;   // [tokens]
  const int64_t* positions;   // [tokens]
  const int64_t* slots;       // [tokens]: block x block_size + offset
  const int64_t* logit_rows;  // [num_logits]
  const int64_t* spans;       // [num_spans][4]: first row, first position, tokens, where its block table begins in `tables`
  const int32_t* tables;
  bf16* cache;      // [layers][2 x kv_heads][blocks][block_size][head_size]
  bf16* hidden;     // [tokens][hidden_size]
  bf16* partial;    // [tokens][hidden_size]: a block's part of the sum over the ranks
  bf16* logits;     // [num_logits][out_features of lm_head]
  bf16* workspace;  // of workspace_size values
};

// The rounding is that of the torch model: norm statistics in fp32 with the normalised value and its product with the weight
// rounded to bf16, each product of the rotation and its sum rounded, silu rounded before the product with up.

int64_t workspace_size(const Model& model, int64_t tokens);

// hidden -> partial: norm, qkv_proj, norms of heads, rotation, keys and values into the cache, attention, o_proj.
void attention_block(const Model& model, int64_t layer, const Pass& pass, Threads& threads);

// hidden -> partial: norm, gate_up_proj, silu(gate) x up, down_proj.
void feed_forward_block(const Model& model, int64_t layer, const Pass& pass, Threads& threads);

// hidden -> logits: the wanted rows, norm, lm_head.
void head(const Model& model, const Pass& pass, Threads& threads);

// token_ids -> logits: all of the above, on a single rank.
void forward(const Model& model, const Pass& pass, Threads& threads);

}  // namespace erollout
