#include "bitdistill/config.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "bitdistill/errors.h"

namespace bitdistill {

namespace {

constexpr std::int64_t kMaxLayers = 1024;
// A damaged size must not overflow an index: every extent stays below 2^26, so products of two fit 64 bits.
constexpr std::int64_t kMaxExtent = std::int64_t{1} << 26;

// What differs between families (models/families.py).
struct Family {
  bool qk_norm;
  bool gemma;
  std::int64_t head_dim;  // 0: hidden / heads
  bool tied;
  double rope_theta;
  bool qkv_bias;  // always; else by attention_bias
  bool attention_bias;
  bool mlp_bias;
  bool sliding;
  bool sub_norms;
};

const std::map<std::string, Family>& families() {
  static const std::map<std::string, Family> table = {
      {"llama", {false, false, 0, false, 1e4, false, true, true, false, false}},
      {"qwen2", {false, false, 0, false, 1e4, true, false, false, true, false}},
      {"qwen3", {true, false, 128, false, 1e4, false, true, false, true, false}},
      {"gemma3_text", {true, true, 256, true, 1e6, false, true, false, true, false}},
      {"bitnet", {false, false, 0, false, 5e5, false, true, false, false, true}},
  };
  return table;
}

class Reader {
 public:
  Reader(const json::Value& root, const std::string& where) : root_(root), where_(where) {}

  [[noreturn]] void fail(const std::string& what, const std::string& remedy) const {
    throw ModelError(where_ + ": " + what + "; " + remedy);
  }
  [[noreturn]] void damaged(const std::string& key, const std::string& what) const {
    fail(key + " is " + what, "the config is damaged or not a causal language model's");
  }

  std::int64_t positive(const json::Value& object, const char* key, std::int64_t fallback = -1) const {
    const json::Value* value = object.get(key);
    if (value == nullptr) {
      if (fallback > 0) return fallback;
      damaged(key, "missing");
    }
    if (value->kind != json::Kind::kInt || value->integer < 1 || value->integer > kMaxExtent) {
      damaged(key, "not an integer between 1 and " + std::to_string(kMaxExtent) + " (byte " +
                       std::to_string(value->offset) + ")");
    }
    return value->integer;
  }

  double number(const json::Value& object, const char* key, double fallback) const {
    const json::Value* value = object.get(key);
    if (value == nullptr) return fallback;
    if (!value->is_number() || !(value->number > 0.0)) {
      damaged(key, "not a positive number (byte " + std::to_string(value->offset) + ")");
    }
    return value->number;
  }

  bool flag(const char* key, bool fallback) const {
    const json::Value* value = root_.get(key);
    return value == nullptr ? fallback : value->truthy();
  }

 private:
  const json::Value& root_;
  const std::string& where_;
};

std::string activation_name(const json::Value& root, const Family& family) {
  const json::Value* name = root.get(family.gemma ? "hidden_activation" : "hidden_act");
  if (name == nullptr) return family.gemma ? "gelu_pytorch_tanh" : family.sub_norms ? "relu2" : "silu";
  return name->kind == json::Kind::kString ? name->text : "?";
}

// Inverse frequencies as transformers: 1 / theta^(2i / dim) in float32, then the scaling of rope_type.
Rope make_rope(const Reader& reader, const json::Value* parameters, double theta, std::uint32_t head_dim) {
  std::string type = "default";
  if (parameters != nullptr) {
    const json::Value* named = parameters->get("rope_type");
    if (named == nullptr) named = parameters->get("type");
    if (named != nullptr) type = named->text;
    if (parameters->get("partial_rotary_factor") != nullptr &&
        reader.number(*parameters, "partial_rotary_factor", 1.0) != 1.0) {
      reader.fail("partial_rotary_factor is not 1, which the engine does not run", "use another model");
    }
  }
  Rope rope;
  for (std::uint32_t i = 0; i < head_dim; i += 2) {
    const float exponent = static_cast<float>(i) / static_cast<float>(head_dim);
    rope.inv_freq.push_back(1.0f / static_cast<float>(std::pow(theta, static_cast<double>(exponent))));
  }
  if (type == "default") return rope;
  if (type != "linear" && type != "llama3") {
    reader.fail("rope_type '" + type.substr(0, 40) + "' is not one of default, linear, llama3", "use another model");
  }
  const auto factor = static_cast<float>(reader.number(*parameters, "factor", 1.0));
  if (type == "linear") {
    for (float& f : rope.inv_freq) f /= factor;
    return rope;
  }
  const double low = reader.number(*parameters, "low_freq_factor", 1.0);
  const double high = reader.number(*parameters, "high_freq_factor", 4.0);
  const double context = reader.number(*parameters, "original_max_position_embeddings", 8192.0);
  if (!(high > low)) reader.damaged("high_freq_factor", "not above low_freq_factor");
  for (float& f : rope.inv_freq) {
    const float wavelength = static_cast<float>(2.0 * M_PI) / f;
    if (wavelength > static_cast<float>(context / low)) {
      f /= factor;
    } else if (wavelength >= static_cast<float>(context / high)) {
      const float smooth = (static_cast<float>(context) / wavelength - static_cast<float>(low)) /
                           static_cast<float>(high - low);
      f = (1.0f - smooth) * f / factor + smooth * f;
    }
  }
  return rope;
}

void read_ropes(const json::Value& root, const Reader& reader, const Family& family, ModelConfig& config) {
  const json::Value* parameters = root.get("rope_parameters");
  const json::Value* full = parameters;
  const json::Value* sliding = parameters;
  if (parameters != nullptr && parameters->get("full_attention") != nullptr) full = parameters->get("full_attention");
  if (parameters != nullptr && parameters->get("sliding_attention") != nullptr) {
    sliding = parameters->get("sliding_attention");
  } else if (family.gemma) {
    sliding = nullptr;
  }
  if (parameters == nullptr) full = root.get("rope_scaling");  // older layout
  const double top_theta = reader.number(root, "rope_theta", family.rope_theta);
  const double full_theta = full == nullptr ? top_theta : reader.number(*full, "rope_theta", top_theta);
  config.rope_full = make_rope(reader, full, full_theta, config.head_dim);
  if (!family.gemma) {
    config.rope_sliding = config.rope_full;
    return;
  }
  const double local = reader.number(root, "rope_local_base_freq", 1e4);
  const double sliding_theta = sliding == nullptr ? local : reader.number(*sliding, "rope_theta", local);
  config.rope_sliding = make_rope(reader, sliding, sliding_theta, config.head_dim);
}

std::vector<bool> sliding_layers(const json::Value& root, const Reader& reader, const Family& family,
                                 std::uint32_t layers) {
  std::vector<bool> sliding(layers, false);
  if (!family.sliding) return sliding;
  if (const json::Value* types = root.get("layer_types"); types != nullptr && !types->items.empty()) {
    if (types->items.size() != layers) {
      reader.damaged("layer_types", "a list of " + std::to_string(types->items.size()) + ", not one a layer");
    }
    for (std::uint32_t i = 0; i < layers; ++i) {
      const std::string& type = types->items[i].text;
      if (type != "full_attention" && type != "sliding_attention") {
        reader.damaged("layer_types[" + std::to_string(i) + "]", "neither full_attention nor sliding_attention");
      }
      sliding[i] = type == "sliding_attention";
    }
    return sliding;
  }
  if (family.gemma) {
    const std::int64_t pattern =
        reader.positive(root, "sliding_window_pattern", reader.positive(root, "_sliding_window_pattern", 6));
    for (std::uint32_t i = 0; i < layers; ++i) sliding[i] = (i + 1) % pattern != 0;
  } else if (reader.flag("use_sliding_window", false) && root.get("sliding_window") != nullptr) {
    const json::Value* first = root.get("max_window_layers");
    const std::int64_t start = first == nullptr ? 28 : first->integer;
    for (std::uint32_t i = 0; i < layers; ++i) sliding[i] = static_cast<std::int64_t>(i) >= start;
  }
  return sliding;
}

LinearSpec spec(std::string name, std::uint32_t in, std::uint32_t out, bool bias) {
  LinearSpec linear;
  linear.name = std::move(name);
  linear.in = in;
  linear.out = out;
  linear.bias = bias;
  return linear;
}

void build_blocks(const Reader& reader, const Family& family, const std::vector<bool>& sliding, ModelConfig& config) {
  const std::uint32_t queries = config.heads * config.head_dim, keys = config.kv_heads * config.head_dim;
  const bool attention_bias = family.attention_bias && reader.flag("attention_bias", false);
  const bool qkv_bias = family.qkv_bias || attention_bias;
  const bool mlp_bias = family.mlp_bias && reader.flag("mlp_bias", false);
  for (std::uint32_t i = 0; i < config.layers; ++i) {
    const std::string block = "model.layers." + std::to_string(i);
    LayerSpec layer;
    layer.q = spec(block + ".self_attn.q_proj", config.hidden, queries, qkv_bias);
    layer.k = spec(block + ".self_attn.k_proj", config.hidden, keys, qkv_bias);
    layer.v = spec(block + ".self_attn.v_proj", config.hidden, keys, qkv_bias);
    layer.o = spec(block + ".self_attn.o_proj", queries, config.hidden, attention_bias);
    layer.gate = spec(block + ".mlp.gate_proj", config.hidden, config.intermediate, mlp_bias);
    layer.up = spec(block + ".mlp.up_proj", config.hidden, config.intermediate, mlp_bias);
    layer.down = spec(block + ".mlp.down_proj", config.intermediate, config.hidden, mlp_bias);
    layer.sliding = sliding[i];
    config.blocks.push_back(std::move(layer));
  }
}

// Marks the plan's linears; each must be one of the model's, of the same shape.
void apply_plan(const json::Value& section, const std::string& where, ModelConfig& config) {
  const std::string place = where + ": quantization_config";
  auto damaged = [&](const json::Value& at, const std::string& what) {
    throw ArtifactError(place + " (byte " + std::to_string(at.offset) + "): " + what + "; export the student again");
  };
  const json::Value* method = section.get("quant_method");
  if (method == nullptr || method->text != "bitdistill") {
    throw ModelError(place + ": quant_method '" + (method == nullptr ? "" : method->text.substr(0, 40)) +
                     "' is not bitdistill; export a packed student or use the full-precision model");
  }
  const json::Value* version = section.get("format_version");
  if (version == nullptr || version->kind != json::Kind::kInt || version->integer != 1) {
    damaged(section, "format_version is not 1");
  }
  const json::Value* packed = section.get("packed");
  if (packed == nullptr || packed->kind != json::Kind::kBool) damaged(section, "packed is neither true nor false");
  if (!packed->boolean) {
    throw ModelError(where + ": a latent student (not packed); the engine runs packed students: use "
                             "`bitdistill export` and load its folder");
  }
  config.packed = true;
  const json::Value* plan = section.get("plan");
  const json::Value* replace = plan == nullptr ? nullptr : plan->get("replace");
  if (replace == nullptr || replace->kind != json::Kind::kObject) damaged(section, "plan.replace is missing");
  const json::Value* activations = plan->get("quantize_activations");
  if (activations == nullptr || activations->kind != json::Kind::kBool) {
    damaged(*plan, "plan.quantize_activations is neither true nor false");
  }
  config.quantize_activations = activations->boolean;
  std::map<std::string, LinearSpec*> known;
  for (LayerSpec& layer : config.blocks) {
    for (LinearSpec* linear : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      known[linear->name] = linear;
    }
  }
  for (const auto& [name, entry] : replace->members) {
    const auto found = known.find(name);
    const json::Value* in = entry.get("in_features");
    const json::Value* out = entry.get("out_features");
    const json::Value* bias = entry.get("bias");
    const json::Value* subln = entry.get("subln");
    const bool whole = in != nullptr && out != nullptr && bias != nullptr && subln != nullptr &&
                       bias->kind == json::Kind::kBool && subln->kind == json::Kind::kBool;
    if (found == known.end() || !whole || in->integer != found->second->in || out->integer != found->second->out ||
        bias->boolean != found->second->bias) {
      damaged(entry, "the plan's " + name.substr(0, 80) + " is not a linear of this config");
    }
    found->second->ternary = true;
    found->second->subln = subln->boolean;
  }
}

void read_eos(const json::Value& root, ModelConfig& config) {
  const json::Value* eos = root.get("eos_token_id");
  if (eos == nullptr) return;
  const std::vector<json::Value> one = {*eos};
  for (const json::Value& id : eos->kind == json::Kind::kArray ? eos->items : one) {
    if (id.kind == json::Kind::kInt && id.integer >= 0 && id.integer < config.vocab) {
      config.eos_ids.push_back(static_cast<std::int32_t>(id.integer));
    }
  }
}

}  // namespace

ModelConfig parse_config(const json::Value& root, const std::string& where) {
  const Reader reader(root, where);
  if (root.kind != json::Kind::kObject) reader.fail("not a JSON object", "fetch the model again");
  const json::Value* type = root.get("model_type");
  const auto found = families().find(type == nullptr ? "" : type->text);
  if (found == families().end()) {
    reader.fail("model_type '" + (type == nullptr ? "" : type->text.substr(0, 40)) + "' is not supported",
                "supported are bitnet, gemma3_text, llama, qwen2, qwen3");
  }
  const Family& family = found->second;
  for (const char* key : {"attn_logit_softcapping", "use_bidirectional_attention"}) {
    if (const json::Value* value = root.get(key); family.gemma && value != nullptr && value->truthy()) {
      reader.fail(std::string(key) + " is set, which the engine does not run", "choose another model");
    }
  }
  ModelConfig config;
  config.family = found->first;
  auto size = [&](const char* key, std::int64_t fallback = -1) {
    return static_cast<std::uint32_t>(reader.positive(root, key, fallback));
  };
  config.vocab = size("vocab_size");
  config.hidden = size("hidden_size");
  config.intermediate = size("intermediate_size");
  config.layers = size("num_hidden_layers");
  config.heads = size("num_attention_heads");
  config.kv_heads = size("num_key_value_heads", family.gemma ? 4 : config.heads);
  config.head_dim = size("head_dim", family.head_dim != 0 ? family.head_dim : config.hidden / config.heads);
  if (config.layers > kMaxLayers) reader.damaged("num_hidden_layers", "over " + std::to_string(kMaxLayers));
  if (config.heads % config.kv_heads != 0) reader.damaged("num_attention_heads", "not a multiple of num_key_value_heads");
  if (config.head_dim % 2 != 0) reader.damaged("head_dim", "odd");
  if (std::int64_t{config.heads} * config.head_dim > kMaxExtent) reader.damaged("head_dim", "too large");
  if (root.get("max_position_embeddings") != nullptr) config.max_positions = size("max_position_embeddings");
  const json::Value* tied = root.get("tie_word_embeddings");
  config.tied = tied == nullptr ? family.tied : tied->truthy();
  config.qk_norm = family.qk_norm;
  config.four_norms = family.gemma;
  config.sub_norms = family.sub_norms;
  if (config.sub_norms && std::int64_t{config.heads} * config.head_dim != config.hidden) {
    reader.damaged("head_dim", "not hidden_size / num_attention_heads, as the attention norm's width asks");
  }
  config.norm_offset = family.gemma ? 1.0f : 0.0f;
  config.embedding_scale = family.gemma ? static_cast<float>(std::sqrt(static_cast<double>(config.hidden))) : 1.0f;
  config.norm_eps = static_cast<float>(reader.number(root, "rms_norm_eps", 1e-6));
  const double scalar = family.gemma ? reader.number(root, "query_pre_attn_scalar", 256.0) : config.head_dim;
  config.attention_scale = static_cast<float>(1.0 / std::sqrt(scalar));
  config.logit_softcap = family.gemma ? static_cast<float>(reader.number(root, "final_logit_softcapping", 0.0)) : 0.0f;
  const std::string activation = activation_name(root, family);
  if (activation == "silu") config.activation = Activation::kSilu;
  else if (activation == "gelu_pytorch_tanh") config.activation = Activation::kGeluTanh;
  else if (activation == "relu2") config.activation = Activation::kRelu2;
  else reader.fail("activation '" + activation.substr(0, 40) + "' is not silu, gelu_pytorch_tanh or relu2", "use another model");
  const std::vector<bool> sliding = sliding_layers(root, reader, family, config.layers);
  if (std::find(sliding.begin(), sliding.end(), true) != sliding.end()) {
    config.sliding_window = size("sliding_window", 4096);
  }
  read_ropes(root, reader, family, config);
  build_blocks(reader, family, sliding, config);
  if (const json::Value* section = root.get("quantization_config"); section != nullptr) {
    apply_plan(*section, where, config);
  }
  read_eos(root, config);
  return config;
}

}  // namespace bitdistill
