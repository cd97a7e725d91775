// One transformer block: norms, projections, rotary positions, attention, MLP.
#include <algorithm>
#include <cmath>

#include "bitdistill/errors.h"
#include "scratch.h"

namespace bitdistill {

namespace {

// Work of a few microseconds: less than handing it over may take.
constexpr std::int64_t kSmallWork = 1 << 17;

std::int64_t row_groups(const Linear& linear) { return (linear.spec.out + kGroupRows - 1) / kGroupRows; }

void add_bias(const Linear& linear, float* y, std::int64_t ldy, std::int64_t n, std::int64_t begin, std::int64_t end) {
  if (linear.bias.empty()) return;
  for (std::int64_t t = 0; t < n; ++t) {
    for (std::int64_t o = begin; o < end; ++o) y[t * ldy + o] += linear.bias[static_cast<std::size_t>(o)];
  }
}

}  // namespace

void Model::parallel(std::int64_t count, std::int64_t grain, std::int64_t work,
                     const std::function<void(std::int64_t, std::int64_t, int)>& body) const {
  if (work < kSmallWork) body(0, count, 0);
  else pool_->parallel_for(count, grain, body);
}

void Model::norm_rows(const float* x, const std::vector<float>& gain, std::int64_t n, float* y) const {
  const auto width = static_cast<std::int64_t>(gain.size());
  parallel(n, 1, 4 * n * width, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) rmsnorm(x + r * width, gain.data(), width, config().norm_eps, y + r * width);
  });
}

void Model::project(const float* x, std::int64_t ldx, std::int64_t n, const std::vector<Product>& products,
                    Scratch& s) const {
  // A linear with a SubLN of its own has its own input; the others share one.
  std::vector<Product> shared;
  for (const Product& product : products) {
    if (product.linear->subln.empty()) {
      shared.push_back(product);
      continue;
    }
    const std::int64_t width = product.linear->spec.in;
    if (product.linear->ternary) {
      const RowOf normed = [&](std::int64_t r, float* room) {
        rmsnorm(x + r * ldx, product.linear->subln.data(), width, config().norm_eps, room);
        return room;
      };
      run_products(nullptr, 0, n, {product}, &normed, s.own);
      continue;
    }
    s.sub.resize(static_cast<std::size_t>(n * width));
    parallel(n, 1, 4 * n * width, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t r = begin; r < end; ++r) {
        rmsnorm(x + r * ldx, product.linear->subln.data(), width, config().norm_eps, s.sub.data() + r * width);
      }
    });
    run_products(s.sub.data(), width, n, {product}, nullptr, s.own);
  }
  if (!shared.empty()) run_products(x, ldx, n, shared, nullptr, s.quantized);
}

void Model::project_normed(const std::vector<float>& norm, std::int64_t n, const std::vector<Product>& products,
                           Scratch& s) const {
  const auto width = static_cast<std::int64_t>(norm.size());
  bool plain = true;
  for (const Product& product : products) plain &= product.linear->ternary && product.linear->subln.empty();
  if (plain) {
    const RowOf normed = [&](std::int64_t r, float* room) {
      rmsnorm(s.x.data() + r * width, norm.data(), width, config().norm_eps, room);
      return room;
    };
    return run_products(nullptr, 0, n, products, &normed, s.quantized);
  }
  s.normed.resize(static_cast<std::size_t>(n * width));
  norm_rows(s.x.data(), norm, n, s.normed.data());
  project(s.normed.data(), width, n, products, s);
}

void Model::run_products(const float* x, std::int64_t ldx, std::int64_t n, const std::vector<Product>& products,
                         const RowOf* row_of, QuantizedRows& quantized) const {
  std::int64_t groups = 0, work = 0;
  bool ternary = false;
  for (const Product& product : products) {
    groups += row_groups(*product.linear);
    ternary |= product.linear->ternary;
    // An integer product is worth about a quarter of a float one.
    work += n * product.linear->spec.in * product.linear->spec.out / (product.linear->ternary ? 4 : 1);
  }
  if (ternary) {
    quantized.resize(n, products[0].linear->spec.in);
    // A row is made and quantized in one go, while it is in a near cache; the rows are never all in memory.
    parallel(n, 1, (row_of == nullptr ? 8 : 16) * n * quantized.cols, [&](std::int64_t begin, std::int64_t end, int) {
      std::vector<float> room(row_of == nullptr ? 0 : static_cast<std::size_t>(quantized.cols));
      for (std::int64_t r = begin; r < end; ++r) {
        quantize_into(quantized, r, row_of == nullptr ? x + r * ldx : (*row_of)(r, room.data()));
      }
    });
  }
  parallel(groups, 1, work, [&](std::int64_t begin, std::int64_t end, int) {
    std::int64_t first = 0;  // group number of the product's first row
    for (const Product& product : products) {
      const Linear& linear = *product.linear;
      const std::int64_t from = std::max(begin - first, std::int64_t{0}) * kGroupRows;
      const std::int64_t to = std::min((end - first) * kGroupRows, std::int64_t{linear.spec.out});
      first += row_groups(linear);
      if (from >= to) continue;
      if (linear.ternary) matmul(linear.codes, quantized, product.y, product.ldy, from, to);
      else matmul(linear.dense, x, n, ldx, product.y, product.ldy, from, to);
      add_bias(linear, product.y, product.ldy, n, from, to);
    }
  });
}

void Model::add_rows(const float* x, std::int64_t n, std::int64_t width, float* y) const {
  parallel(n, 1, n * width, [&](std::int64_t begin, std::int64_t end, int) {
    axpy(1.0f, x + begin * width, y + begin * width, (end - begin) * width);
  });
}

// Normalizes q and k heads (q/k-norm), turns them by their positions, and writes keys and values to the caches.
void Model::rotate_and_store(std::size_t layer, const std::vector<Row>& rows, Scratch& s) const {
  const Block& block = weights_->blocks[layer];
  const std::size_t heads = config().heads, kv_heads = config().kv_heads, dim = config().head_dim, half = dim / 2;
  const RopeTable& table = block.sliding ? rope_sliding_ : rope_full_;
  const auto turn = [&](float* head, const std::vector<float>& gain, const Row& row) {
    if (!gain.empty()) rmsnorm(head, gain.data(), static_cast<std::int64_t>(dim), config().norm_eps, head);
    const float* cosine = table.cos.data() + static_cast<std::size_t>(row.position) * half;
    const float* sine = table.sin.data() + static_cast<std::size_t>(row.position) * half;
    for (std::size_t i = 0; i < half; ++i) {
      const float low = head[i], high = head[i + half];
      head[i] = low * cosine[i] - high * sine[i];
      head[i + half] = high * cosine[i] + low * sine[i];
    }
  };
  const auto turned = static_cast<std::int64_t>(rows.size() * (heads + kv_heads) * dim);
  parallel(static_cast<std::int64_t>(rows.size()), 1, 4 * turned, [&](std::int64_t begin, std::int64_t end, int) {
    for (auto r = static_cast<std::size_t>(begin); r < static_cast<std::size_t>(end); ++r) {
      const Row& row = rows[r];
      for (std::size_t h = 0; h < heads; ++h) turn(s.q.data() + (r * heads + h) * dim, block.q_norm, row);
      for (std::size_t h = 0; h < kv_heads; ++h) {
        float* key = s.k.data() + (r * kv_heads + h) * dim;
        turn(key, block.k_norm, row);
        row.sequence->store(layer, 0, h, row.slot, key);
        row.sequence->store(layer, 1, h, row.slot, s.v.data() + (r * kv_heads + h) * dim);
      }
    }
  });
}

// x += o(attention(norm(x))). With `keep`, only those rows of the pass go on after their keys and values are stored.
void Model::attention_block(std::size_t layer, const std::vector<Row>& all, const std::vector<std::int64_t>* keep,
                            std::vector<Row>& rows, Scratch& s) const {
  const Block& block = weights_->blocks[layer];
  const std::size_t hidden = config().hidden, queries = std::size_t{config().heads} * config().head_dim;
  const std::size_t keys = std::size_t{config().kv_heads} * config().head_dim;
  auto n = static_cast<std::int64_t>(all.size());
  s.q.resize(all.size() * queries);
  s.k.resize(all.size() * keys);
  s.v.resize(all.size() * keys);
  project_normed(block.input_norm, n,
                 {{&block.q, s.q.data(), static_cast<std::int64_t>(queries)},
                  {&block.k, s.k.data(), static_cast<std::int64_t>(keys)},
                  {&block.v, s.v.data(), static_cast<std::int64_t>(keys)}},
                 s);
  rotate_and_store(layer, all, s);
  if (keep != nullptr) {
    rows.clear();
    for (std::size_t to = 0; to < keep->size(); ++to) {
      const auto from = static_cast<std::size_t>((*keep)[to]);  // ascending, so never overwritten before it is read
      rows.push_back(all[from]);
      std::copy_n(s.x.data() + from * hidden, hidden, s.x.data() + to * hidden);
      std::copy_n(s.q.data() + from * queries, queries, s.q.data() + to * queries);
    }
    n = static_cast<std::int64_t>(rows.size());
    if (n == 0) return;
  }
  attend(layer, rows, s);
  if (!block.attention_sub.empty()) norm_rows(s.mixed.data(), block.attention_sub, n, s.mixed.data());
  s.out.resize(rows.size() * hidden);
  project(s.mixed.data(), static_cast<std::int64_t>(queries), n,
          {{&block.o, s.out.data(), static_cast<std::int64_t>(hidden)}}, s);
  if (config().four_norms) norm_rows(s.out.data(), block.post_attention, n, s.out.data());
  add_rows(s.out.data(), n, static_cast<std::int64_t>(hidden), s.x.data());
}

// x += down(act(gate(norm(x))) * up(norm(x)))
void Model::mlp_block(std::size_t layer, std::int64_t n, Scratch& s) const {
  const Block& block = weights_->blocks[layer];
  const auto hidden = static_cast<std::int64_t>(config().hidden), inner = static_cast<std::int64_t>(config().intermediate);
  s.gate.resize(static_cast<std::size_t>(n * inner));
  s.up.resize(static_cast<std::size_t>(n * inner));
  const std::vector<float>& gain = config().four_norms ? block.pre_feedforward : block.post_attention;
  project_normed(gain, n, {{&block.gate, s.gate.data(), inner}, {&block.up, s.up.data(), inner}}, s);
  const auto activate = [&](std::int64_t row, std::int64_t count, float* y) {
    const float* gate = s.gate.data() + row * inner;
    const float* up = s.up.data() + row * inner;
    if (config().activation == Activation::kSilu) silu_mul(gate, up, y, count * inner);
    else if (config().activation == Activation::kGeluTanh) gelu_tanh_mul(gate, up, y, count * inner);
    else relu2_mul(gate, up, y, count * inner);
  };
  const Product down = {&block.down, s.out.data(), hidden};
  if (block.down.ternary && block.mlp_sub.empty()) {
    const std::vector<float>& subln = block.down.subln;
    const RowOf activated = [&](std::int64_t r, float* room) {
      activate(r, 1, room);
      if (!subln.empty()) rmsnorm(room, subln.data(), inner, config().norm_eps, room);
      return room;
    };
    run_products(nullptr, 0, n, {down}, &activated, s.own);
  } else {
    parallel(n, 1, 16 * n * inner, [&](std::int64_t begin, std::int64_t end, int) {
      activate(begin, end - begin, s.gate.data() + begin * inner);
    });
    if (!block.mlp_sub.empty()) norm_rows(s.gate.data(), block.mlp_sub, n, s.gate.data());
    project(s.gate.data(), inner, n, {down}, s);
  }
  if (config().four_norms) norm_rows(s.out.data(), block.post_feedforward, n, s.out.data());
  add_rows(s.out.data(), n, hidden, s.x.data());
}

}  // namespace bitdistill
