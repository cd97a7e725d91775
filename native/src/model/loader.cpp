#include "bitdistill/loader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "../io/folder.h"
#include "bitdistill/errors.h"

namespace bitdistill {

namespace {

using Shape = std::vector<std::uint64_t>;

std::string show(const Shape& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

bool is_float(DType dtype) { return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16; }

FloatType float_type(DType dtype) {
  return dtype == DType::kF32 ? FloatType::kF32 : dtype == DType::kF16 ? FloatType::kF16 : FloatType::kBF16;
}

// True if none of n values has all exponent bits set (NaN or infinity). Simple enough to be vectorized.
template <class Bits>
bool all_finite(const std::uint8_t* data, std::size_t n, Bits mask) {
  Bits bad = 0;
  for (std::size_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, data + sizeof(Bits) * i, sizeof(Bits));
    bad |= static_cast<Bits>((bits & mask) == mask);
  }
  return bad == 0;
}

// Checks a mapped float matrix in pieces and gives their pages back: most will be read again only when they are used.
void check_finite(const TensorView& tensor, const std::string& name) {
  constexpr std::size_t kPiece = std::size_t{4} << 20;
  for (std::size_t at = 0; at < tensor.bytes; at += kPiece) {
    const std::size_t size = std::min(kPiece, tensor.bytes - at);
    const std::uint8_t* piece = tensor.data + at;
    const bool good = tensor.dtype == DType::kF32 ? all_finite<std::uint32_t>(piece, size / 4, 0x7F800000u)
                      : tensor.dtype == DType::kBF16 ? all_finite<std::uint16_t>(piece, size / 2, 0x7F80u)
                                                     : all_finite<std::uint16_t>(piece, size / 2, 0x7C00u);
    if (!good) to_float32(tensor, name);  // throws, naming the value
    release_pages(piece, size);
  }
}

// Hands out the tensors of the folder, each once, checked; what is left over at the end is an error.
class Tensors {
 public:
  Tensors(const std::string& folder, const std::vector<std::unique_ptr<SafetensorsFile>>& files) : folder_(folder) {
    for (const auto& file : files) {
      for (const auto& [name, view] : file->tensors()) left_.emplace(name, view);  // unique: checked with the index
    }
  }

  TensorView take(const std::string& name, const Shape& shape, bool floats, DType dtype = DType::kF32) {
    const auto found = left_.find(name);
    if (found == left_.end()) {
      throw ArtifactError(folder_ + ": tensor " + name + " is missing; the folder is incomplete, export again");
    }
    TensorView view = std::move(found->second);
    left_.erase(found);
    if (view.shape != shape) {
      throw ArtifactError(view.place(name) + ": shape " + show(view.shape) + ", not " + show(shape) + "; export again");
    }
    if (floats ? !is_float(view.dtype) : view.dtype != dtype) {
      throw ArtifactError(view.place(name) + ": dtype " + view.dtype_text.substr(0, 20) + ", not " +
                          (floats ? "BF16 or F16 or F32" : dtype_name(dtype)) + "; export again");
    }
    return view;
  }

  std::vector<float> vector(const std::string& name, std::uint64_t n, float offset = 0.0f) {
    std::vector<float> values = to_float32(take(name, {n}, true), name);
    for (float& value : values) value += offset;
    return values;
  }

  void finish() const {
    if (left_.empty()) return;
    const auto& [name, view] = *left_.begin();
    throw ArtifactError(view.place(name) + ": unexpected tensor; the folder belongs to another model or plan");
  }

 private:
  const std::string& folder_;
  std::map<std::string, TensorView> left_;
};

// A matrix to check, and to repack or map, by one of the pool's threads.
struct Job {
  Linear* linear = nullptr;
  Table* table = nullptr;
  std::string name;
  TensorView codes;
  float scale = 1.0f;
};

void run_float(Job& job, FloatMatrix& matrix) {
  check_finite(job.codes, job.name);
  matrix.rows = static_cast<std::int64_t>(job.codes.shape[0]);
  matrix.cols = static_cast<std::int64_t>(job.codes.shape[1]);
  matrix.type = float_type(job.codes.dtype);
  matrix.data = job.codes.data;
}

// The weights-only ablation (activations not quantized): w_hat = codes * scale as a dense float32 matrix.
void run_dequantized(Job& job, Linear& linear) {
  const TernaryMatrix packed = repack(job.codes.data, linear.spec.out, linear.spec.in, Layout::kTwoBitRows16, job.scale,
                                      job.codes.place(job.name));
  linear.dense_storage.resize(std::size_t{linear.spec.out} * linear.spec.in);
  std::vector<std::int8_t> row(linear.spec.in);
  for (std::uint32_t r = 0; r < linear.spec.out; ++r) {
    unpack_row(packed, r, row.data());
    for (std::uint32_t c = 0; c < linear.spec.in; ++c) {
      linear.dense_storage[std::size_t{r} * linear.spec.in + c] = static_cast<float>(row[c]) * job.scale;
    }
  }
  linear.dense = {linear.spec.out, linear.spec.in, FloatType::kF32, linear.dense_storage.data()};
}

void run(Job& job, Layout layout, bool quantize_activations) {
  if (job.table != nullptr) {
    run_float(job, job.table->matrix);
    job.table->file = job.codes.mapped;
  } else if (!job.linear->spec.ternary) {
    run_float(job, job.linear->dense);
  } else if (!quantize_activations) {
    run_dequantized(job, *job.linear);
  } else {
    job.linear->codes = repack(job.codes.data, job.linear->spec.out, job.linear->spec.in, layout, job.scale,
                               job.codes.place(job.name));
    job.linear->ternary = true;
  }
  if (job.linear != nullptr && job.linear->spec.ternary) release_pages(job.codes.data, job.codes.bytes);
}

void plan_linear(const LinearSpec& spec, Tensors& tensors, Linear& linear, std::vector<Job>& jobs) {
  linear.spec = spec;
  Job job;
  job.linear = &linear;
  if (spec.ternary) {
    if (spec.in > kMaxColumns) {
      throw ModelError(spec.name + ": in_features " + std::to_string(spec.in) + " exceeds " +
                       std::to_string(kMaxColumns) + ": a sum of int8 products could pass 2^24; use a smaller model");
    }
    job.name = spec.name + ".codes";
    job.codes = tensors.take(job.name, {spec.out, (spec.in + 3) / 4}, false, DType::kU8);
    const TensorView scale = tensors.take(spec.name + ".scale", {}, false, DType::kF32);
    std::memcpy(&job.scale, scale.data, sizeof job.scale);
    if (!std::isfinite(job.scale) || !(job.scale > 0.0f)) {
      throw ArtifactError(scale.place(spec.name + ".scale") + ": " + std::to_string(job.scale) +
                          " is not positive and finite; re-export the student");
    }
  } else {
    job.name = spec.name + ".weight";
    job.codes = tensors.take(job.name, {spec.out, spec.in}, true);
  }
  if (spec.bias) linear.bias = tensors.vector(spec.name + ".bias", spec.out);
  if (spec.subln) linear.subln = tensors.vector(spec.name + ".subln.weight", spec.in);
  jobs.push_back(std::move(job));
}

void plan_block(const ModelConfig& config, std::size_t index, Tensors& tensors, Block& block, std::vector<Job>& jobs) {
  const LayerSpec& spec = config.blocks[index];
  const std::string name = "model.layers." + std::to_string(index) + ".";
  const float offset = config.norm_offset;
  block.sliding = spec.sliding;
  block.input_norm = tensors.vector(name + "input_layernorm.weight", config.hidden, offset);
  block.post_attention = tensors.vector(name + "post_attention_layernorm.weight", config.hidden, offset);
  if (config.four_norms) {
    block.pre_feedforward = tensors.vector(name + "pre_feedforward_layernorm.weight", config.hidden, offset);
    block.post_feedforward = tensors.vector(name + "post_feedforward_layernorm.weight", config.hidden, offset);
  }
  if (config.sub_norms) {
    block.attention_sub = tensors.vector(name + "self_attn.attn_sub_norm.weight", config.hidden);
    block.mlp_sub = tensors.vector(name + "mlp.ffn_sub_norm.weight", config.intermediate);
  }
  if (config.qk_norm) {
    block.q_norm = tensors.vector(name + "self_attn.q_norm.weight", config.head_dim, offset);
    block.k_norm = tensors.vector(name + "self_attn.k_norm.weight", config.head_dim, offset);
  }
  plan_linear(spec.q, tensors, block.q, jobs);
  plan_linear(spec.k, tensors, block.k, jobs);
  plan_linear(spec.v, tensors, block.v, jobs);
  plan_linear(spec.o, tensors, block.o, jobs);
  plan_linear(spec.gate, tensors, block.gate, jobs);
  plan_linear(spec.up, tensors, block.up, jobs);
  plan_linear(spec.down, tensors, block.down, jobs);
}

void plan_table(const std::string& name, Tensors& tensors, const ModelConfig& config, Table& table,
                std::vector<Job>& jobs) {
  Job job;
  job.table = &table;
  job.name = name;
  job.codes = tensors.take(name, {config.vocab, config.hidden}, true);
  jobs.push_back(std::move(job));
}

template <class F>
void for_each_linear(const std::vector<Block>& blocks, F f) {
  for (const Block& b : blocks) {
    for (const Linear* linear : {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down}) f(*linear);
  }
}

}  // namespace

std::int64_t Weights::ternary_bytes() const {
  std::int64_t total = 0;
  for_each_linear(blocks, [&](const Linear& linear) { total += linear.ternary ? linear.codes.bytes() : 0; });
  return total;
}

std::int64_t Weights::dense_bytes() const {
  std::int64_t total = 0;
  for_each_linear(blocks, [&](const Linear& linear) {
    if (!linear.ternary) total += linear.dense.rows * linear.dense.cols * float_bytes(linear.dense.type);
  });
  return total;
}

std::unique_ptr<Weights> load_weights(const std::string& folder, Layout layout, ThreadPool& pool) {
  auto weights = std::make_unique<Weights>();
  const json::Value root = read_config_json(folder);
  weights->config = parse_config(root, folder + "/config.json");
  const ModelConfig& config = weights->config;
  check_manifest(folder, root);
  weights->files = open_weight_files(folder);
  Tensors tensors(folder, weights->files);
  std::vector<Job> jobs;
  plan_table("model.embed_tokens.weight", tensors, config, weights->embedding, jobs);
  weights->blocks.resize(config.layers);
  for (std::size_t i = 0; i < config.layers; ++i) plan_block(config, i, tensors, weights->blocks[i], jobs);
  weights->final_norm = tensors.vector("model.norm.weight", config.hidden, config.norm_offset);
  if (!config.tied) plan_table("lm_head.weight", tensors, config, weights->head, jobs);
  tensors.finish();
  pool.parallel_for(static_cast<std::int64_t>(jobs.size()), 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) run(jobs[static_cast<std::size_t>(i)], layout, config.quantize_activations);
  });
  if (config.tied) weights->head = weights->embedding;
  return weights;
}

}  // namespace bitdistill
