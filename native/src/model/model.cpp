#include "bitdistill/model.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "bitdistill/errors.h"
#include "head.h"
#include "scratch.h"

namespace bitdistill {

Model::Model(std::unique_ptr<ThreadPool> pool, std::unique_ptr<Weights> weights, const ModelOptions& options)
    : pool_(std::move(pool)), weights_(std::move(weights)), options_(options), scratch_(new Scratch) {
  sliding_before_.push_back(0);
  for (const Block& block : weights_->blocks) sliding_before_.push_back(sliding_before_.back() + block.sliding);
  if (sliding_before_.back() != 0) ring_rows_ = (config().sliding_window + kPassRows + 63) / 64 * 64;
  if (options_.head != HeadType::kFloat) {
    const bool four = options_.head == HeadType::kInt4 || options_.head == HeadType::kScreened4;
    low_bit_head_ = std::make_unique<LowBitHead>(weights_->head.matrix, four ? 4 : 8, *pool_);
  }
}

Model::~Model() = default;

std::shared_ptr<Model> Model::load(const std::string& folder, const ModelOptions& options) {
  current_isa();  // an impossible BITDISTILL_ISA is said before any work
  auto pool = std::make_unique<ThreadPool>(options.threads);
  auto weights = load_weights(folder, options.layout, *pool);
  return std::shared_ptr<Model>(new Model(std::move(pool), std::move(weights), options));
}

std::int64_t Model::head_bytes() const {
  const FloatMatrix& head = weights_->head.matrix;
  return low_bit_head_ != nullptr ? low_bit_head_->bytes() : head.rows * head.cols * float_bytes(head.type);
}

void Model::check(const std::vector<Segment>& segments) const {
  std::set<const Sequence*> seen;
  for (const Segment& segment : segments) {
    if (segment.sequence->model_.get() != this) throw ModelError("forward: a sequence belongs to another model");
    if (!seen.insert(segment.sequence).second) throw ModelError("forward: a sequence is there twice; join its tokens");
    if (segment.count < 1) throw ModelError("forward: a segment without tokens; give one token at least");
    for (std::int64_t i = 0; i < segment.count; ++i) {
      const std::int32_t token = segment.tokens[i];
      if (token < 0 || static_cast<std::uint32_t>(token) >= config().vocab) {
        throw ModelError("token id " + std::to_string(token) + " at position " +
                         std::to_string(segment.sequence->length() + i) + " is not below the vocabulary of " +
                         std::to_string(config().vocab) + "; use the model's own tokenizer");
      }
    }
    const std::int64_t length = segment.sequence->length() + segment.count;
    if (config().max_positions != 0 && length > config().max_positions) {
      throw ModelError("a sequence of " + std::to_string(length) + " tokens passes max_position_embeddings " +
                       std::to_string(config().max_positions) + "; shorten the prompt or max_new_tokens");
    }
  }
}

void Model::extend_rope(std::int64_t positions) const {
  if (positions <= rope_positions_) return;
  const std::int64_t target = (positions + 255) / 256 * 256;
  const auto extend = [&](const Rope& rope, RopeTable& table) {
    for (std::int64_t p = rope_positions_; p < target; ++p) {
      for (const float f : rope.inv_freq) {
        const float angle = static_cast<float>(p) * f;  // float32, as transformers
        table.cos.push_back(std::cos(angle));
        table.sin.push_back(std::sin(angle));
      }
    }
  };
  extend(config().rope_full, rope_full_);
  extend(config().rope_sliding, rope_sliding_);
  rope_positions_ = target;
}

void Model::run(const std::vector<Segment>& segments, const std::vector<std::int64_t>& wanted, const std::int64_t* top,
                std::vector<float>& logits, std::vector<std::int32_t>& best) const {
  std::vector<Row> rows;
  std::int64_t positions = 0;
  for (const Segment& segment : segments) {
    Sequence& sequence = *segment.sequence;
    sequence.reserve(sequence.length() - sequence.base_ + segment.count);
    for (std::int64_t i = 0; i < segment.count; ++i) {
      const std::int64_t position = sequence.length() + i;
      rows.push_back({&sequence, segment.tokens[i], position, position - sequence.base_});
    }
    positions = std::max(positions, sequence.length() + segment.count);
  }
  extend_rope(positions);
  logits.resize(wanted.size() * config().vocab);
  best.assign(wanted.size(), -1);
  std::size_t done = 0;
  const ThreadPool::Burst burst(*pool_);
  for (std::int64_t start = 0; start < static_cast<std::int64_t>(rows.size()); start += kPassRows) {
    const std::int64_t end = std::min(start + kPassRows, static_cast<std::int64_t>(rows.size()));
    std::vector<std::int64_t> here;
    for (std::size_t i = done; i < wanted.size() && wanted[i] < end; ++i) here.push_back(wanted[i] - start);
    try {
      run_pass({rows.begin() + start, rows.begin() + end}, here, top == nullptr ? nullptr : top + done,
               logits.data() + done * config().vocab, best.data() + done);
    } catch (...) {  // memory ran out, or a file was cut short: rings may have lost what the sequences rely on
      for (const Segment& segment : segments) segment.sequence->clear();
      throw;
    }
    done += here.size();
  }
  for (const Segment& segment : segments) {
    auto& tokens = segment.sequence->tokens_;
    tokens.insert(tokens.end(), segment.tokens, segment.tokens + segment.count);
    segment.sequence->reached_ = std::max(segment.sequence->reached_, static_cast<std::int64_t>(tokens.size()));
  }
}

void Model::run_pass(const std::vector<Row>& all, const std::vector<std::int64_t>& wanted, const std::int64_t* top,
                     float* logits, std::int32_t* best) const {
  Scratch& s = *scratch_;
  std::vector<Row> rows = all;
  embed(rows, s);
  for (std::size_t layer = 0; layer < config().layers; ++layer) {
    const bool last = layer + 1 == config().layers;
    // After the last keys and values only the rows whose logits are wanted go on.
    attention_block(layer, all, last ? &wanted : nullptr, rows, s);
    if (rows.empty()) return;
    mlp_block(layer, static_cast<std::int64_t>(rows.size()), s);
  }
  const auto n = static_cast<std::int64_t>(rows.size());
  s.normed.resize(rows.size() * config().hidden);
  norm_rows(s.x.data(), weights_->final_norm, n, s.normed.data());
  head(s.normed.data(), n, top, logits, best);
}

void Model::embed(const std::vector<Row>& rows, Scratch& s) const {
  const std::size_t hidden = config().hidden;
  const Table& table = weights_->embedding;
  s.x.resize(rows.size() * hidden);
  std::vector<std::uint8_t> stored(static_cast<std::size_t>(table.row_bytes()));
  const FloatMatrix row = {1, table.matrix.cols, table.matrix.type, stored.data()};
  for (std::size_t r = 0; r < rows.size(); ++r) {
    float* x = s.x.data() + r * hidden;
    table.read_row(rows[r].token, stored.data());
    dequantize_row(row, 0, x);
    if (config().embedding_scale != 1.0f) {
      for (std::size_t i = 0; i < hidden; ++i) x[i] *= config().embedding_scale;
    }
  }
}

std::vector<float> Model::forward(const std::vector<Segment>& segments, Wanted wanted) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  check(segments);
  std::vector<std::int64_t> rows;
  std::int64_t next = 0;
  for (const Segment& segment : segments) {
    for (std::int64_t i = 0; i < segment.count; ++i, ++next) {
      if (wanted == Wanted::kAll || (wanted == Wanted::kLast && i + 1 == segment.count)) rows.push_back(next);
    }
  }
  return run(segments, rows);
}

std::vector<std::int32_t> Model::step(const std::vector<Segment>& segments, const std::vector<Draw>& draws) const {
  if (draws.size() != segments.size()) throw ModelError("step: one draw for each sequence is needed");
  std::vector<std::int64_t> rows, top;
  std::int64_t next = 0;
  bool whole = false;  // a draw from the whole distribution needs every logit
  for (std::size_t i = 0; i < draws.size(); ++i) {
    const SamplerOptions& options = draws[i].options;
    bitdistill::check(options);
    next += segments[i].count;
    rows.push_back(next - 1);
    top.push_back(options.temperature == 0.0 ? 1 : options.top_k);
    whole |= top.back() == 0;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  check(segments);
  const std::vector<float>& logits = scratch_->logits;
  const std::vector<std::int32_t>& best = scratch_->best;
  run(segments, rows, whole ? nullptr : top.data(), scratch_->logits, scratch_->best);
  std::vector<std::int32_t> chosen;
  for (std::size_t i = 0; i < draws.size(); ++i) {
    if (best[i] >= 0) {
      chosen.push_back(best[i]);
      continue;
    }
    chosen.push_back(sample(logits.data() + i * config().vocab, config().vocab, draws[i].options, draws[i].stream,
                            draws[i].step));
  }
  return chosen;
}

std::vector<float> Model::score_tree(const std::vector<std::vector<std::int32_t>>& prompts,
                                     const std::vector<std::int32_t>& tokens,
                                     const std::vector<std::int32_t>& parents,
                                     const std::vector<Query>& queries) const {
  const auto nodes = static_cast<std::int32_t>(tokens.size());
  for (std::int32_t i = 0; i < nodes; ++i) {
    if (parents.size() != tokens.size() || parents[static_cast<std::size_t>(i)] < -1 ||
        parents[static_cast<std::size_t>(i)] >= i) {
      throw ModelError("score_tree: parents do not come before node " + std::to_string(i) + "; order the tree");
    }
  }
  for (const Query& query : queries) {
    if (query.node < -1 || query.node >= nodes || query.token < 0 ||
        static_cast<std::uint32_t>(query.token) >= config().vocab) {
      throw ModelError("score_tree: query (" + std::to_string(query.node) + ", " + std::to_string(query.token) +
                       ") is out of range; use the model's own tokenizer");
    }
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::size_t per_prompt = 1 + tokens.size(), vocab = config().vocab;
  std::vector<float> scores;
  std::vector<float> work(vocab);
  for (const std::vector<std::int32_t>& prompt : prompts) {
    std::vector<std::unique_ptr<Sequence>> owned;
    std::vector<Segment> segments;
    std::vector<std::int64_t> wanted;
    const auto length = static_cast<std::int64_t>(prompt.size());
    Sequence root(shared_from_this());
    check({{&root, prompt.data(), length}});
    // A node continues its parent, whose tokens count only after the pass: branches name their base themselves.
    segments.push_back({&root, prompt.data(), length});
    wanted.push_back(length - 1);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const Sequence& parent = parents[i] < 0 ? root : *owned[static_cast<std::size_t>(parents[i])];
      owned.push_back(std::make_unique<Sequence>(parent, true));
      owned.back()->base_ = (parents[i] < 0 ? length : parent.base_ + 1);
      segments.push_back({owned.back().get(), &tokens[i], 1});
      check({segments.back()});
      wanted.push_back(length + static_cast<std::int64_t>(i));
    }
    const std::vector<float> logits = run(segments, wanted);
    std::vector<float> log_norm(per_prompt);
    for (std::size_t n = 0; n < per_prompt; ++n) {
      work.assign(logits.begin() + static_cast<std::ptrdiff_t>(n * vocab),
                  logits.begin() + static_cast<std::ptrdiff_t>((n + 1) * vocab));
      const float top = *std::max_element(work.begin(), work.end());
      log_norm[n] = top + std::log(exp_minus_max(work.data(), static_cast<std::int64_t>(vocab)));
    }
    for (const Query& query : queries) {
      const auto n = static_cast<std::size_t>(query.node + 1);
      scores.push_back(logits[n * vocab + static_cast<std::size_t>(query.token)] - log_norm[n]);
    }
  }
  return scores;
}

}  // namespace bitdistill
