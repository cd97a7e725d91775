// Speed of a whole model: prefill, one sequence, eight sequences together; rounds are interleaved, medians printed.
//
//   bench_model FOLDER [THREADS] [ROUNDS] [HEAD] [LAYOUT] [PREFILL] [STEPS]
//
// The instruction set is BITDISTILL_ISA's. One thread is timed by its processor time, which other processes of a
// shared machine disturb less.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bitdistill/errors.h"
#include "bitdistill/kernels.h"
#include "bitdistill/model.h"

using namespace bitdistill;

namespace {

bool g_processor_time = false;
double now() {
  timespec t;
  clock_gettime(g_processor_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

HeadType head_type(const std::string& name) {
  if (name == "float") return HeadType::kFloat;
  if (name == "screened") return HeadType::kScreened;
  if (name == "screened4") return HeadType::kScreened4;
  throw ModelError("head '" + name + "' is none of float, screened, screened4");
}

// Seconds of `steps` greedy steps of `sequences` sequences.
double decode(const std::shared_ptr<Model>& model, std::int64_t sequences, std::int64_t steps) {
  std::vector<std::unique_ptr<Sequence>> rows;
  std::vector<std::int32_t> last;
  std::vector<Model::Draw> draws(static_cast<std::size_t>(sequences));
  for (std::int64_t i = 0; i < sequences; ++i) {
    rows.push_back(std::make_unique<Sequence>(model));
    last.push_back(static_cast<std::int32_t>(i + 1));
  }
  const double start = now();
  for (std::int64_t s = 0; s < steps; ++s) {
    std::vector<Segment> segments;
    for (std::size_t i = 0; i < rows.size(); ++i) segments.push_back({rows[i].get(), &last[i], 1});
    last = model->step(segments, draws);
  }
  return now() - start;
}

double prefill(const std::shared_ptr<Model>& model, const std::vector<std::int32_t>& tokens) {
  Sequence sequence(model);
  const double start = now();
  model->step({{&sequence, tokens.data(), static_cast<std::int64_t>(tokens.size())}}, {Model::Draw{}});
  return now() - start;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::fprintf(stderr, "bench_model FOLDER [THREADS] [ROUNDS] [HEAD] [LAYOUT] [PREFILL] [STEPS]\n");
    return 2;
  }
  const auto text = [&](int i, const char* fallback) { return std::string(argc > i ? argv[i] : fallback); };
  const auto number = [&](int i, int fallback) { return argc > i ? std::atoi(argv[i]) : fallback; };
  const int rounds = number(3, 5), length = number(6, 512), steps = number(7, 32);
  ModelOptions options;
  options.threads = number(2, 1);
  options.head = head_type(text(4, "screened4"));
  options.layout = text(5, "2bit") == "base3" ? Layout::kBase3Rows16 : Layout::kTwoBitRows16;
  options.kv = KvType::kFloat16;
  g_processor_time = options.threads == 1;
  const auto model = Model::load(argv[1], options);
  std::mt19937 random(1);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(length));
  for (std::int32_t& t : tokens) t = static_cast<std::int32_t>(random() % model->config().vocab);
  std::vector<double> one, eight, prompt;
  for (int round = 0; round <= rounds; ++round) {  // the first is a warm-up
    const double a = decode(model, 1, round ? steps : 2), b = decode(model, 8, round ? steps : 2);
    const double c = length ? prefill(model, tokens) : 1.0;
    if (round == 0) continue;
    one.push_back(a);
    eight.push_back(b);
    prompt.push_back(c);
  }
  std::vector<double> ratios;
  for (std::size_t i = 0; i < one.size(); ++i) ratios.push_back(8 * one[i] / eight[i]);
  std::printf("%s, %d threads: one %.2f ms a step (%.1f tokens/s), eight %.2f ms (%.1f tokens/s), %.2f times; "
              "prefill %d: %.3f s (%.1f tokens/s)\n",
              isa_name(current_isa()), options.threads, 1e3 * median(one) / steps, steps / median(one),
              1e3 * median(eight) / steps, 8 * steps / median(eight), median(ratios), length, median(prompt),
              length / median(prompt));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "bench_model: %s\n", error.what());
  return 1;
}
