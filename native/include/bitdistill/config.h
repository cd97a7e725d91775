// What config.json says, checked: the C++ twin of bitdistill/models/families.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bitdistill/json.h"

namespace bitdistill {

enum class Activation { kSilu, kGeluTanh, kRelu2 };

// RoPE of one layer type: inverse frequencies of the head's first half, float32 as transformers computes them.
struct Rope {
  std::vector<float> inv_freq;
};

// A block linear's place and shape; weight is [out, in].
struct LinearSpec {
  std::string name;
  std::uint32_t in = 0;
  std::uint32_t out = 0;
  bool bias = false;
  bool ternary = false;  // in the surgery plan
  bool subln = false;
};

struct LayerSpec {
  LinearSpec q, k, v, o, gate, up, down;
  bool sliding = false;
};

struct ModelConfig {
  std::string family;
  std::uint32_t vocab = 0, hidden = 0, intermediate = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0;
  std::uint32_t max_positions = 0;  // 0: not stated
  std::uint32_t sliding_window = 0;
  bool tied = false;
  bool qk_norm = false;
  bool sub_norms = false;        // BitNet b1.58: norms of its own before the o and down projections
  bool four_norms = false;       // Gemma 3: norms after attention and feed-forward too
  float norm_offset = 0.0f;      // Gemma multiplies by 1 + w
  float embedding_scale = 1.0f;  // Gemma: sqrt(hidden)
  float attention_scale = 0.0f;
  float logit_softcap = 0.0f;  // 0: none
  float norm_eps = 1e-6f;
  Activation activation = Activation::kSilu;
  Rope rope_full, rope_sliding;
  std::vector<LayerSpec> blocks;
  std::vector<std::int32_t> eos_ids;
  bool packed = false;
  bool quantize_activations = true;
};

// Parses and checks a config.json. Throws ModelError for unsupported models, ArtifactError for damaged students.
ModelConfig parse_config(const json::Value& root, const std::string& where);

}  // namespace bitdistill
