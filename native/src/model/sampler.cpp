#include "bitdistill/sampler.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "bitdistill/errors.h"

namespace bitdistill {

namespace {

// SplitMix64's finaliser: a bijection of 64 bits with full avalanche.
std::uint64_t mix(std::uint64_t z) {
  z += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// Uniform in [0, 1), 53 bits.
double uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t step) {
  return static_cast<double>(mix(mix(mix(seed) ^ stream) ^ step) >> 11) * 0x1p-53;
}

struct Candidate {
  double weight;
  std::int32_t token;
};

}  // namespace

std::int32_t greedy(const float* logits, std::size_t vocab) {
  return static_cast<std::int32_t>(std::max_element(logits, logits + vocab) - logits);
}

void check(const SamplerOptions& options) {
  if (!(options.temperature >= 0.0) || !std::isfinite(options.temperature)) {
    throw ModelError("temperature " + std::to_string(options.temperature) + " is not a number of 0 or more; 0 is greedy");
  }
  if (!(options.top_p > 0.0) || !(options.top_p <= 1.0)) {
    throw ModelError("top_p " + std::to_string(options.top_p) + " is not above 0 and at most 1; 1 keeps every token");
  }
}

std::int32_t sample(const float* logits, std::size_t vocab, const SamplerOptions& options, std::uint64_t stream,
                    std::uint64_t step) {
  if (options.temperature == 0.0) return greedy(logits, vocab);
  const float top = *std::max_element(logits, logits + vocab);
  // Tokens this far below the best weigh less than (1 - top_p) / vocab each, so together less than 1 - top_p: top-p
  // would drop them after sorting. Without top-p nothing is dropped but what underflows.
  const double floor = options.top_p < 1.0 ? std::log((1.0 - options.top_p) / static_cast<double>(vocab)) : -745.0;
  std::vector<Candidate> candidates;
  for (std::size_t i = 0; i < vocab; ++i) {
    const double exponent = (static_cast<double>(logits[i]) - top) / options.temperature;
    if (exponent >= floor) candidates.push_back({std::exp(exponent), static_cast<std::int32_t>(i)});
  }
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
  };
  if (options.top_k > 0 && options.top_k < candidates.size()) {
    std::nth_element(candidates.begin(), candidates.begin() + options.top_k - 1, candidates.end(), before);
    candidates.resize(options.top_k);
  }
  double total = 0.0;
  if (options.top_p < 1.0) {
    std::sort(candidates.begin(), candidates.end(), before);
    for (const Candidate& c : candidates) total += c.weight;
    double kept = 0.0;
    std::size_t n = 0;
    while (n < candidates.size() && kept < options.top_p * total) kept += candidates[n++].weight;
    candidates.resize(std::max<std::size_t>(n, 1));
    total = kept;
  } else {
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
    for (const Candidate& c : candidates) total += c.weight;
  }
  double left = uniform(options.seed, stream, step) * total;
  for (const Candidate& c : candidates) {
    left -= c.weight;
    if (left < 0.0) return c.token;
  }
  return candidates.back().token;
}

}  // namespace bitdistill
