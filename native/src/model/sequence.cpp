#include <algorithm>
#include <cstring>

#include "bitdistill/errors.h"
#include "bitdistill/model.h"
#include "bitdistill/safetensors.h"

namespace bitdistill {

namespace {

std::size_t row_bytes(const Model& model) {
  const std::size_t each = model.options().kv == KvType::kFloat32 ? 4 : model.options().kv == KvType::kFloat16 ? 2 : 1;
  return model.config().head_dim * each;
}

std::size_t round_up(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

constexpr std::int64_t kGrowthRows = 512;

}  // namespace

// Cache: [layer][key, value][kv head] planes; a plane is [rows][head_dim], for int8 followed by [rows] scales.
std::int64_t Model::layer_rows(std::size_t layer, std::int64_t tokens) const {
  return weights_->blocks[layer].sliding ? std::min(tokens, ring_rows_) : tokens;
}

std::size_t Model::plane_bytes(std::int64_t rows) const {
  const auto n = static_cast<std::size_t>(rows);
  return round_up(n * row_bytes(*this)) + (options_.kv == KvType::kInt8 ? round_up(n * sizeof(float)) : 0);
}

std::size_t Model::planes_begin(std::size_t layer, std::int64_t tokens) const {
  const std::size_t sliding = sliding_before_[layer];
  return 2 * config().kv_heads * (sliding * plane_bytes(std::min(tokens, ring_rows_)) +
                                  (layer - sliding) * plane_bytes(tokens));
}

std::int64_t Model::kv_bytes(std::int64_t tokens) const {
  if (tokens < 0) throw ModelError("kv_bytes: " + std::to_string(tokens) + " tokens; give 0 or more");
  return static_cast<std::int64_t>(planes_begin(config().layers, tokens));
}

Sequence::Sequence(std::shared_ptr<const Model> model) : model_(std::move(model)) {}

Sequence::Sequence(const Sequence& parent, bool) : model_(parent.model_), parent_(&parent), base_(parent.length()) {}

std::int64_t Sequence::keepable(std::int64_t length) const {
  const std::int64_t ring = model_->ring_rows(), own = length - base_;
  // The next token looks back at window - 1 rows; a ring of window + kPassRows holds the last of `reached_`.
  const std::int64_t first = std::max(own + 1 - model_->config().sliding_window, std::int64_t{0});
  return ring == 0 || own <= 0 || first >= reached_ - ring ? length : base_;
}

void Sequence::truncate(std::int64_t length) {
  if (length < base_ || length > this->length()) {
    throw ModelError("sequence: cannot be cut to " + std::to_string(length) + " tokens, it holds " +
                     std::to_string(base_) + " to " + std::to_string(this->length()) + "; start a new one");
  }
  if (keepable(length) != length) {
    throw ModelError("sequence: cannot be cut to " + std::to_string(length) + " tokens, its sliding layers keep the " +
                     "last " + std::to_string(model_->ring_rows()) + " of " + std::to_string(base_ + reached_) +
                     "; start a new one");
  }
  tokens_.resize(static_cast<std::size_t>(length - base_));
  if (tokens_.empty()) reached_ = 0;
}

void Sequence::clear() {
  tokens_.clear();
  reached_ = 0;
}

std::uint8_t* Sequence::plane(std::size_t layer, int part, std::size_t head) const {
  const std::size_t bytes = model_->plane_bytes(model_->layer_rows(layer, capacity_));
  return cache_.data() + model_->planes_begin(layer, capacity_) +
         (static_cast<std::size_t>(part) * model_->config().kv_heads + head) * bytes;
}

void Sequence::store(std::size_t layer, int part, std::size_t head, std::int64_t slot, const float* row) {
  const std::int64_t rows = model_->layer_rows(layer, capacity_), dim = model_->config().head_dim;
  std::uint8_t* place = plane(layer, part, head);
  const auto at = static_cast<std::size_t>(slot % rows);
  std::uint8_t* to = place + at * row_bytes(*model_);
  switch (model_->options().kv) {
    case KvType::kFloat32: std::memcpy(to, row, static_cast<std::size_t>(dim) * sizeof(float)); break;
    case KvType::kFloat16: to_f16(row, reinterpret_cast<std::uint16_t*>(to), dim); break;
    case KvType::kInt8: {
      auto* scales = reinterpret_cast<float*>(place + round_up(static_cast<std::size_t>(rows) * row_bytes(*model_)));
      quantize_row(row, dim, reinterpret_cast<std::int8_t*>(to), scales + at);
      break;
    }
  }
}

void Sequence::reserve(std::int64_t own_tokens) {
  if (own_tokens <= capacity_) return;
  // A branch of a tree stays small. A text grows by half, at most by kGrowthRows: each token reads all keys and values
  // anyway, so a copy of them once in so many tokens costs little, and a reserve is memory in use (huge pages).
  std::int64_t wanted = own_tokens;
  if (parent_ == nullptr) {
    wanted = std::max(capacity_ + std::min(capacity_ / 2, kGrowthRows), own_tokens);
    wanted = (wanted + 63) / 64 * 64;
  }
  const std::size_t row = row_bytes(*model_), planes = 2 * std::size_t{model_->config().kv_heads};
  AlignedBuffer larger(model_->planes_begin(model_->config().layers, wanted));
  for (std::size_t layer = 0; layer < model_->config().layers && reached_ > 0; ++layer) {
    // A ring that is not full yet has never wrapped, so rows keep their places.
    const std::int64_t before = model_->layer_rows(layer, capacity_), after = model_->layer_rows(layer, wanted);
    const auto used = static_cast<std::size_t>(std::min(reached_, before));
    const std::uint8_t* from = cache_.data() + model_->planes_begin(layer, capacity_);
    std::uint8_t* to = larger.data() + model_->planes_begin(layer, wanted);
    for (std::size_t p = 0; p < planes; ++p, from += model_->plane_bytes(before), to += model_->plane_bytes(after)) {
      std::memcpy(to, from, used * row);
      if (model_->options().kv == KvType::kInt8) {
        std::memcpy(to + round_up(static_cast<std::size_t>(after) * row),
                    from + round_up(static_cast<std::size_t>(before) * row), used * sizeof(float));
      }
    }
    const std::size_t begin = model_->planes_begin(layer, capacity_);  // old and new are never in memory as a whole
    release_pages(cache_.data() + begin, model_->planes_begin(layer + 1, capacity_) - begin);
  }
  cache_ = std::move(larger);
  capacity_ = wanted;
}

void Sequence::spans(std::size_t layer, std::size_t head, std::int64_t first, std::int64_t last,
                     std::vector<KvSpan>& out) const {
  if (parent_ != nullptr && first < base_) parent_->spans(layer, head, first, std::min(last, base_), out);
  const std::int64_t rows = model_->layer_rows(layer, capacity_);
  const std::size_t row = row_bytes(*model_);
  for (std::int64_t begin = std::max(first, base_) - base_; begin < last - base_;) {
    const std::int64_t at = begin % rows, n = std::min(last - base_ - begin, rows - at);
    const std::uint8_t* places[2] = {plane(layer, 0, head), plane(layer, 1, head)};
    const float* scales[2] = {nullptr, nullptr};
    for (int part = 0; part < 2; ++part) {
      if (model_->options().kv == KvType::kInt8) {
        scales[part] =
            reinterpret_cast<const float*>(places[part] + round_up(static_cast<std::size_t>(rows) * row)) + at;
      }
      places[part] += static_cast<std::size_t>(at) * row;
    }
    out.push_back({places[0], places[1], scales[0], scales[1], n});
    begin += n;
  }
}

}  // namespace bitdistill
