// Softmax attention over cached keys and values.
#include <algorithm>

#include "scratch.h"

namespace bitdistill {

namespace {

// Rows of a prompt that meet the keys together, and keys (or values) that are widened to float32 for them at a time:
// both stay in the first-level cache.
constexpr std::int64_t kQueryRows = 16, kKeyRows = 32;
// Bytes of a head's keys and of its values that are asked for while the head before is computed. In decode they lie in
// many short stretches, which nothing has read since the last token: their latencies should overlap.
constexpr std::int64_t kFetchBytes = 16384;

struct Range {
  std::int64_t first, last;
  Range within(std::int64_t begin, std::int64_t end) const { return {std::max(first, begin), std::min(last, end)}; }
  std::int64_t count() const { return std::max(last - first, std::int64_t{0}); }
};

}  // namespace

// The unit of work is a key-value head and a few rows that follow each other in one sequence. Each score is one sum of
// products and each output lane is summed in the order of positions, so a row's bits do not depend on its company.
struct Model::Attention {
  const Model& model;
  const Scratch& s;
  std::int64_t width, heads, group;  // query heads of a key-value head
  FloatType type;
  std::int64_t window;
  std::vector<KvSpan> spans;
  std::vector<float> scores, wide;  // [query head of the group][row][position]; widened keys or values
  // [query head of the group][row]: the queries of a few rows and their outputs, side by side. In their places they are
  // a power of two apart, so that sixteen of them share a few sets of the first-level cache.
  std::vector<float> queries, outputs;

  Attention(const Model& m, std::size_t layer, const Scratch& scratch) : model(m), s(scratch) {
    const ModelConfig& config = m.config();
    width = config.head_dim;
    heads = config.heads;
    group = config.heads / config.kv_heads;
    type = m.options_.kv == KvType::kInt8      ? FloatType::kI8
           : m.options_.kv == KvType::kFloat16 ? FloatType::kF16
                                               : FloatType::kF32;
    window = m.weights_->blocks[layer].sliding ? config.sliding_window : 0;
  }

  Range positions(const Row& row) const {
    const std::int64_t last = row.position + 1;
    return {window != 0 && last > window ? last - window : 0, last};
  }

  // body(rows of keys or values, their scales or null, number of the first of them, a FloatMatrix): for a single row as
  // they are stored, else widened and in parts.
  template <class Body>
  void each_part(bool keys, bool whole, const Body& body) {
    std::int64_t done = 0;
    for (const KvSpan& span : spans) {
      const FloatMatrix all = {span.n, width, type, keys ? span.keys : span.values};
      const float* scales = keys ? span.key_scales : span.value_scales;
      const std::int64_t step = whole ? span.n : kKeyRows;
      for (std::int64_t t = 0; t < span.n; t += step) {
        const std::int64_t n = std::min(step, span.n - t);
        FloatMatrix part = all;
        if (!whole) {
          wide.resize(static_cast<std::size_t>(kKeyRows * width));
          widen(all, t, t + n, wide.data());
          part = {n, width, FloatType::kF32, wide.data()};
        }
        body(part, scales == nullptr ? nullptr : scales + t, done + t);
      }
      done += span.n;
    }
  }

  void fetch(std::size_t layer, const Row& row, std::int64_t kv_head) {
    const Range seen = positions(row);
    spans.clear();
    row.sequence->spans(layer, static_cast<std::size_t>(kv_head), seen.first, seen.last, spans);
    for (const KvSpan& span : spans) {
      const std::int64_t bytes = std::min(span.n * width * float_bytes(type), kFetchBytes);
      for (std::int64_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(span.keys + i);
        __builtin_prefetch(span.values + i);
      }
    }
  }

  // Rows [begin, begin + count) of the pass.
  void run(std::size_t layer, const std::vector<Row>& rows, std::int64_t begin, std::int64_t count, std::int64_t kv_head,
           float* out) {
    const Row* row = rows.data() + begin;
    const Range all = {positions(row[0]).first, positions(row[count - 1]).last};
    const std::int64_t n = all.count(), ld = heads * width;
    const float* q = s.q.data() + begin * ld + kv_head * group * width;
    out += begin * ld + kv_head * group * width;
    const auto range = [&](std::int64_t r) {
      const Range own = positions(row[r]);
      return Range{own.first - all.first, own.last - all.first};
    };
    spans.clear();
    row->sequence->spans(layer, static_cast<std::size_t>(kv_head), all.first, all.last, spans);
    scores.resize(static_cast<std::size_t>(n * group * count));
    const auto scores_of = [&](std::int64_t g, std::int64_t r) { return scores.data() + (g * count + r) * n; };
    const bool single = count == 1;
    float* y = out;
    if (single) {
      std::fill_n(out, group * width, 0.0f);
    } else {
      queries.resize(static_cast<std::size_t>(group * count * width));
      outputs.assign(queries.size(), 0.0f);
      y = outputs.data();
      for (std::int64_t g = 0; g < group; ++g) {
        for (std::int64_t r = 0; r < count; ++r) {
          std::copy_n(q + r * ld + g * width, width, queries.data() + (g * count + r) * width);
        }
      }
    }
    each_part(true, single, [&](const FloatMatrix& keys, const float* scales, std::int64_t at) {
      if (single) {
        matmul(keys, q, group, width, scores.data() + at, n, 0, keys.rows);
      } else {
        matmul(keys, queries.data(), group * count, width, scores.data() + at, n, 0, keys.rows);
      }
      for (std::int64_t i = 0; scales != nullptr && i < group * count; ++i) {
        for (std::int64_t t = 0; t < keys.rows; ++t) scores[static_cast<std::size_t>(i * n + at + t)] *= scales[t];
      }
    });
    for (std::int64_t g = 0; g < group; ++g) {
      for (std::int64_t r = 0; r < count; ++r) softmax(scores_of(g, r), range(r));
    }
    // Positions that all rows see; those before (of a window) and after (the rows' own) belong to some rows only.
    Range common = {range(count - 1).first, range(0).last};
    if (common.count() == 0) common = {n, n};
    each_part(false, single, [&](const FloatMatrix& values, const float* scales, std::int64_t at) {
      const std::int64_t end = at + values.rows;
      for (std::int64_t i = 0; scales != nullptr && i < group * count; ++i) {
        for (std::int64_t t = 0; t < values.rows; ++t) scores[static_cast<std::size_t>(i * n + at + t)] *= scales[t];
      }
      const auto some = [&](const Range& part, std::int64_t g, std::int64_t r, std::int64_t number) {
        if (part.count() == 0) return;
        const FloatMatrix inner = {part.count(), width, values.type,
                                   static_cast<const std::uint8_t*>(values.data) +
                                       (part.first - at) * width * float_bytes(values.type)};
        mix(inner, scores_of(g, r) + part.first, number, n, y + (g * count + r) * width, width);
      };
      if (single) return some({at, end}, 0, 0, group);
      for (std::int64_t g = 0; g < group; ++g) {
        for (std::int64_t r = 0; r < count; ++r) some(range(r).within(at, std::min(common.first, end)), g, r, 1);
        some(common.within(at, end), g, 0, count);
        for (std::int64_t r = 0; r < count; ++r) some(range(r).within(std::max(common.last, at), end), g, r, 1);
      }
    });
    if (single) return;
    for (std::int64_t g = 0; g < group; ++g) {
      for (std::int64_t r = 0; r < count; ++r) {
        std::copy_n(outputs.data() + (g * count + r) * width, width, out + r * ld + g * width);
      }
    }
  }

  void softmax(float* row, const Range& range) const {
    row += range.first;
    for (std::int64_t t = 0; t < range.count(); ++t) row[t] *= model.config().attention_scale;
    const float inverse = 1.0f / exp_minus_max(row, range.count());
    for (std::int64_t t = 0; t < range.count(); ++t) row[t] *= inverse;
  }
};

void Model::attend(std::size_t layer, const std::vector<Row>& rows, Scratch& s) const {
  s.mixed.resize(rows.size() * config().heads * config().head_dim);
  std::vector<std::int64_t> begins;
  std::int64_t positions = 0;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const auto at = static_cast<std::int64_t>(r);
    const bool follows = r > 0 && rows[r].sequence == rows[r - 1].sequence && rows[r].position == rows[r - 1].position + 1;
    if (!follows || at - begins.back() == kQueryRows) begins.push_back(at);
    positions += rows[r].position + 1;
  }
  const auto blocks = static_cast<std::int64_t>(begins.size());
  begins.push_back(static_cast<std::int64_t>(rows.size()));
  // Head by head, since later rows have more to do than earlier ones.
  const std::int64_t count = blocks * config().kv_heads;
  parallel(count, 1, 2 * positions * std::int64_t{config().heads} * config().head_dim,
           [&](std::int64_t begin, std::int64_t end, int) {
             Attention attention(*this, layer, s);
             for (std::int64_t i = begin; i < end; ++i) {
               const auto block = static_cast<std::size_t>(i % blocks), next = static_cast<std::size_t>((i + 1) % blocks);
               if (i + 1 < end && begins[next + 1] - begins[next] == 1) {
                 attention.fetch(layer, rows[static_cast<std::size_t>(begins[next])], (i + 1) / blocks);
               }
               attention.run(layer, rows, begins[block], begins[block + 1] - begins[block], i / blocks, s.mixed.data());
             }
           });
}

}  // namespace bitdistill
