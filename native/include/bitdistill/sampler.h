// Choosing the next token from logits: greedy, or seeded sampling.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitdistill {

struct SamplerOptions {
  double temperature = 0.0;  // 0: greedy
  std::uint32_t top_k = 0;   // 0: all
  double top_p = 1.0;
  std::uint64_t seed = 0;
};

// The first of the largest logits.
std::int32_t greedy(const float* logits, std::size_t vocab);

// Temperature, then top-k, then top-p (the order of transformers), then one draw. The draw is a pure function of
// (seed, stream, step), so a sequence gives the same tokens alone or in a batch.
std::int32_t sample(const float* logits, std::size_t vocab, const SamplerOptions& options, std::uint64_t stream,
                    std::uint64_t step);

// Throws ModelError for values outside their ranges.
void check(const SamplerOptions& options);

}  // namespace bitdistill
