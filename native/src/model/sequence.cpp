#include <cstring>

#include "bitdistill/errors.h"
#include "bitdistill/model.h"

namespace bitdistill {

namespace {

std::size_t element_bytes(const Model& model) { return model.options().kv == KvType::kFloat32 ? 4 : 2; }

}  // namespace

Sequence::Sequence(std::shared_ptr<const Model> model) : model_(std::move(model)) {}

Sequence::Sequence(const Sequence& parent, bool) : model_(parent.model_), parent_(&parent), base_(parent.length()) {}

void Sequence::truncate(std::int64_t length) {
  if (length < base_ || length > this->length()) {
    throw ModelError("sequence: cannot be cut to " + std::to_string(length) + " tokens, it holds " +
                     std::to_string(base_) + " to " + std::to_string(this->length()) + "; start a new one");
  }
  tokens_.resize(static_cast<std::size_t>(length - base_));
}

// Layout: [layer][key, value][kv head][capacity][head_dim].
std::uint8_t* Sequence::cache(std::size_t layer, int part, std::size_t head) {
  const ModelConfig& config = model_->config();
  const std::size_t plane = static_cast<std::size_t>(capacity_) * config.head_dim * element_bytes(*model_);
  return cache_.data() + ((layer * 2 + static_cast<std::size_t>(part)) * config.kv_heads + head) * plane;
}

void Sequence::reserve(std::int64_t own_tokens) {
  if (own_tokens <= capacity_) return;
  const ModelConfig& config = model_->config();
  // A branch of a tree stays small; a text grows by half, so that copying costs a constant share.
  std::int64_t wanted = own_tokens;
  if (parent_ == nullptr) {
    wanted = capacity_ + capacity_ / 2 > own_tokens ? capacity_ + capacity_ / 2 : own_tokens;
    wanted = (wanted + 63) / 64 * 64;
  }
  const std::size_t row = config.head_dim * element_bytes(*model_);
  const std::size_t planes = std::size_t{config.layers} * 2 * config.kv_heads;
  AlignedBuffer larger(planes * static_cast<std::size_t>(wanted) * row);
  const std::size_t used = tokens_.size() * row;
  for (std::size_t plane = 0; plane < planes && used > 0; ++plane) {
    std::memcpy(larger.data() + plane * static_cast<std::size_t>(wanted) * row,
                cache_.data() + plane * static_cast<std::size_t>(capacity_) * row, used);
  }
  cache_ = std::move(larger);
  capacity_ = wanted;
}

void Sequence::spans(std::size_t layer, std::size_t head, std::int64_t first, std::int64_t last,
                     std::vector<KvSpan>& out) const {
  if (parent_ != nullptr && first < base_) parent_->spans(layer, head, first, last < base_ ? last : base_, out);
  const std::int64_t begin = first > base_ ? first : base_;
  if (begin >= last) return;
  const std::size_t row = model_->config().head_dim * element_bytes(*model_);
  const std::size_t skip = static_cast<std::size_t>(begin - base_) * row;
  out.push_back({cache(layer, 0, head) + skip, cache(layer, 1, head) + skip, last - begin});
}

}  // namespace bitdistill
