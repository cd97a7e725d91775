// The transformer: embedding, blocks, head, over any number of sequences at once.
//
// A forward pass takes segments (new tokens of a sequence) and runs all their rows together: one long prompt, many
// short ones, one token of each of several sequences, or a mix. A row's result does not depend on what else is in
// the pass, nor on the number of threads, nor on the instruction set.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bitdistill/loader.h"
#include "bitdistill/sampler.h"
#include "bitdistill/threads.h"

namespace bitdistill {

// kInt8: each key and value row of a head as int8 codes with a float32 scale of its own (absmax / 127).
enum class KvType { kFloat32, kFloat16, kInt8 };
// As stored; quantized to int8 or 4 bits a row; or these as a screen, which finds greedy and top-k choices of the stored
// head exactly from fewer bytes (src/model/head.h: always, and with a probability of 1 - 2e-10 a token).
enum class HeadType { kFloat, kInt8, kInt4, kScreened, kScreened4 };

struct ModelOptions {
  int threads = 1;
  Layout layout = Layout::kTwoBitRows16;
  KvType kv = KvType::kFloat32;
  HeadType head = HeadType::kFloat;
};

class Model;
class LowBitHead;

// Rows of one forward pass over the blocks: enough to make the integer products compute-bound, few enough to keep
// scratch small.
constexpr std::int64_t kPassRows = 256;

// Keys and values [n][head_dim] of consecutive positions; scales [n] where they are int8, else null.
struct KvSpan {
  const std::uint8_t* keys;
  const std::uint8_t* values;
  const float* key_scales;
  const float* value_scales;
  std::int64_t n;
};

// Tokens that have been run, with their keys and values. A sequence may continue another one (its parent) without
// copying it; the parent must outlive it and stay as it is.
//
// Layers with a sliding window keep a ring of the last `Model::ring_rows()` positions (the window, and one pass, since
// a pass stores all its keys before its first row looks back); the others keep every position.
class Sequence {
 public:
  explicit Sequence(std::shared_ptr<const Model> model);
  Sequence(const Sequence& parent, bool branch);

  std::int64_t length() const { return base_ + static_cast<std::int64_t>(tokens_.size()); }
  const std::vector<std::int32_t>& tokens() const { return tokens_; }  // own tokens, without the parent's
  // Forgets own tokens from position `length` on. Throws ModelError if that is not between the parent's and its own,
  // or if a ring no longer holds what the next token would look at (see keepable).
  void truncate(std::int64_t length);
  // `length` if the sequence can be cut there, else the parent's length: the longest part that still can be kept.
  std::int64_t keepable(std::int64_t length) const;
  std::int64_t kv_bytes() const { return static_cast<std::int64_t>(cache_.size()); }

 private:
  friend class Model;

  void reserve(std::int64_t own_tokens);
  // Forgets everything of its own: after a pass that failed half-way.
  void clear();
  // Writes the key (part 0) or value (part 1) of own token `slot`: head_dim floats.
  void store(std::size_t layer, int part, std::size_t head, std::int64_t slot, const float* row);
  // Own keys or values of a layer and key-value head: rows [capacity of the layer][head_dim], then, for int8, a scale
  // for each row.
  std::uint8_t* plane(std::size_t layer, int part, std::size_t head) const;
  // Keys and values of positions [first, last), oldest first.
  void spans(std::size_t layer, std::size_t head, std::int64_t first, std::int64_t last,
             std::vector<KvSpan>& out) const;

  std::shared_ptr<const Model> model_;
  const Sequence* parent_ = nullptr;
  std::int64_t base_ = 0;  // length of the parent
  std::int64_t capacity_ = 0;
  std::int64_t reached_ = 0;  // most own tokens so far: rings hold the last ones up to here
  std::vector<std::int32_t> tokens_;
  mutable AlignedBuffer cache_;
};

// New tokens of one sequence in a forward pass.
struct Segment {
  Sequence* sequence = nullptr;
  const std::int32_t* tokens = nullptr;
  std::int64_t count = 0;
};

enum class Wanted { kNone, kLast, kAll };

class Model : public std::enable_shared_from_this<Model> {
 public:
  static std::shared_ptr<Model> load(const std::string& folder, const ModelOptions& options);

  const ModelConfig& config() const { return weights_->config; }
  const Weights& weights() const { return *weights_; }
  const ModelOptions& options() const { return options_; }
  std::int64_t head_bytes() const;  // bytes of the output head that one token reads (rescored rows not counted)
  // Bytes of keys and values of a sequence with room for so many tokens; positions a layer with a window keeps at most
  // (0: no such layer).
  std::int64_t kv_bytes(std::int64_t tokens) const;
  std::int64_t ring_rows() const { return ring_rows_; }
  std::int64_t screened_tokens() const { return screened_tokens_; }
  std::int64_t rescored_rows() const { return rescored_rows_; }  // of all screened tokens together

  // Runs the segments and appends their tokens to their sequences. Returns logits [rows][vocab] in the order of the
  // segments: none, one for each segment's last token, or one for every token.
  // Throws ModelError for tokens or lengths out of range; sequences are then as they were.
  std::vector<float> forward(const std::vector<Segment>& segments, Wanted wanted) const;

  // forward(kLast) on one token of each sequence, then a choice for each: greedy or sampled from (seed, stream, step).
  struct Draw {
    SamplerOptions options;
    std::uint64_t stream = 0, step = 0;
  };
  std::vector<std::int32_t> step(const std::vector<Segment>& segments, const std::vector<Draw>& draws) const;

  // A tree of tokens put after each prompt: node i continues node parents[i] (-1: the prompt itself, node order is
  // parents first). Returns, for every prompt and query (node or -1, token), the log-probability of the token there.
  struct Query {
    std::int32_t node, token;
  };
  std::vector<float> score_tree(const std::vector<std::vector<std::int32_t>>& prompts,
                                const std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& parents,
                                const std::vector<Query>& queries) const;

 private:
  friend class Sequence;
  struct Row;
  struct Scratch;
  struct Product;
  struct Attention;

  Model(std::unique_ptr<ThreadPool> pool, std::unique_ptr<Weights> weights, const ModelOptions& options);

  void check(const std::vector<Segment>& segments) const;
  void extend_rope(std::int64_t positions) const;
  // All rows of the segments, in passes of kPassRows; logits of the rows numbered in `wanted` (ascending).
  // `top`: how many of each row's largest logits are needed (the others may then be -infinity), or null: all.
  // Where a screen found the largest logit of a row with top 1, `best` holds its word and the row is not written out;
  // elsewhere `best` is -1.
  void run(const std::vector<Segment>& segments, const std::vector<std::int64_t>& wanted, const std::int64_t* top,
           std::vector<float>& logits, std::vector<std::int32_t>& best) const;
  std::vector<float> run(const std::vector<Segment>& segments, const std::vector<std::int64_t>& wanted) const {
    std::vector<float> logits;
    std::vector<std::int32_t> best;
    run(segments, wanted, nullptr, logits, best);
    return logits;
  }
  void run_pass(const std::vector<Row>& rows, const std::vector<std::int64_t>& wanted, const std::int64_t* top,
                float* logits, std::int32_t* best) const;
  void embed(const std::vector<Row>& rows, Scratch& s) const;
  void attention_block(std::size_t layer, const std::vector<Row>& all, const std::vector<std::int64_t>* keep,
                       std::vector<Row>& rows, Scratch& s) const;
  void mlp_block(std::size_t layer, std::int64_t n, Scratch& s) const;
  void rotate_and_store(std::size_t layer, const std::vector<Row>& rows, Scratch& s) const;
  void attend(std::size_t layer, const std::vector<Row>& rows, Scratch& s) const;
  // pool_->parallel_for, or in place when `work` (multiplications, about) is too little to be worth waking a thread.
  void parallel(std::int64_t count, std::int64_t grain, std::int64_t work,
                const std::function<void(std::int64_t, std::int64_t, int)>& body) const;
  void norm_rows(const float* x, const std::vector<float>& gain, std::int64_t n, float* y) const;
  // y = linear(x) for each product, all in one parallel region; x has n rows.
  void project(const float* x, std::int64_t ldx, std::int64_t n, const std::vector<Product>& products,
               Scratch& s) const;
  // project(norm(s.x))
  void project_normed(const std::vector<float>& norm, std::int64_t n, const std::vector<Product>& products,
                      Scratch& s) const;
  // `row_of`, if any, makes a row in the room it is given, or says where it is; all products are then ternary, and x is
  // not looked at.
  using RowOf = std::function<const float*(std::int64_t row, float* room)>;
  void run_products(const float* x, std::int64_t ldx, std::int64_t n, const std::vector<Product>& products,
                    const RowOf* row_of, QuantizedRows& quantized) const;
  void add_rows(const float* x, std::int64_t n, std::int64_t width, float* y) const;  // y += x
  void head(const float* hidden, std::int64_t n, const std::int64_t* top, float* logits, std::int32_t* best) const;
  void rescore(const float* hidden, std::int64_t token, float* part_tops, std::int64_t top, float* logits,
               std::int32_t* best) const;

  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<Weights> weights_;
  // Rows a layer keeps of `tokens`, bytes of one plane of them, and where a layer's planes begin.
  std::int64_t layer_rows(std::size_t layer, std::int64_t tokens) const;
  std::size_t plane_bytes(std::int64_t rows) const;
  std::size_t planes_begin(std::size_t layer, std::int64_t tokens) const;

  ModelOptions options_;
  std::int64_t ring_rows_ = 0;
  std::vector<std::size_t> sliding_before_;  // sliding layers below each layer; one entry more than layers
  std::unique_ptr<LowBitHead> low_bit_head_;
  mutable std::mutex mutex_;  // one pass at a time: passes share the pool and what follows
  // cos and sin of position * inv_freq: [position][head_dim / 2], for full and sliding layers.
  struct RopeTable {
    std::vector<float> cos, sin;
  };
  mutable RopeTable rope_full_, rope_sliding_;
  mutable std::int64_t rope_positions_ = 0;
  mutable std::unique_ptr<Scratch> scratch_;
  mutable std::int64_t screened_tokens_ = 0, rescored_rows_ = 0;

 public:
  ~Model();
};

}  // namespace bitdistill
