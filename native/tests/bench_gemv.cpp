// Speed of the ternary products on their own, beside the read bandwidth measured in the same rounds.
//
//   bench_gemv [THREADS] [ROUNDS] [ISA]
//
// Decode: one "token" is every matrix of a 0.6B model's 28 layers (hidden 1024, q 2048, kv 1024, FFN 3072: 440M
// weights, 110 MB at 2 bits, far beyond the caches), one after the other, as a model would run them.
// Prefill: the same matrices of one layer against 512 tokens. Rounds are interleaved; medians are printed.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "bitdistill/kernels.h"
#include "bitdistill/threads.h"

using namespace bitdistill;

namespace {

// One thread is timed by its processor time, which other processes of a shared machine disturb less.
bool g_processor_time = false;
double now() {
  timespec t;
  clock_gettime(g_processor_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}
double seconds_since(double start) { return now() - start; }

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

const std::pair<int64_t, int64_t> kShapes[] = {{2048, 1024}, {1024, 1024}, {1024, 1024}, {1024, 2048},
                                               {3072, 1024}, {3072, 1024}, {1024, 3072}};
constexpr int kLayers = 28;

std::vector<TernaryMatrix> model(Layout layout, int layers) {
  std::mt19937_64 random(7);
  std::vector<TernaryMatrix> matrices;
  std::vector<std::vector<uint8_t>> files;
  for (const auto& shape : kShapes) {
    std::vector<uint8_t> bytes(static_cast<size_t>(shape.first * shape.second / 4));
    for (auto& b : bytes) {
      b = 0;
      for (int j = 0; j < 4; ++j) b = static_cast<uint8_t>(b << 2 | random() % 3);
    }
    files.push_back(bytes);
  }
  for (int l = 0; l < layers; ++l)
    for (size_t i = 0; i < files.size(); ++i)
      matrices.push_back(repack(files[i].data(), kShapes[i].first, kShapes[i].second, layout, 0.01f));
  return matrices;
}

QuantizedRows activations(int64_t tokens, int64_t cols) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  QuantizedRows x;
  x.resize(tokens, cols);
  std::vector<float> row(static_cast<size_t>(cols));
  for (int64_t t = 0; t < tokens; ++t) {
    for (float& v : row) v = normal(random);
    quantize_into(x, t, row.data());
  }
  return x;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1, rounds = argc > 2 ? std::atoi(argv[2]) : 15;
  g_processor_time = threads == 1;
  ThreadPool pool(threads);
  ThreadPool::Burst burst(pool);
  const Layout layouts[] = {Layout::kTwoBitRows16, Layout::kBase3Rows16};
  const char* names[] = {"2-bit", "base-3"};
  std::vector<TernaryMatrix> models[2] = {model(layouts[0], kLayers), model(layouts[1], kLayers)};
  const AlignedBuffer memory = bandwidth_memory(int64_t{256} << 20);
  std::map<int64_t, QuantizedRows> one, many;
  for (const auto& shape : kShapes) {
    if (!one.count(shape.second)) one[shape.second] = activations(1, shape.second);
    if (!many.count(shape.second)) many[shape.second] = activations(512, shape.second);
  }
  std::vector<float> y(3072 * 512);
  const auto pass = [&](const std::vector<TernaryMatrix>& matrices, size_t count,
                        const std::map<int64_t, QuantizedRows>& x) {
    const auto start = now();
    for (size_t i = 0; i < count; ++i) {
      const TernaryMatrix& m = matrices[i];
      const QuantizedRows& rows = x.at(m.cols);
      pool.parallel_rows(m.rows, [&](int64_t b, int64_t e, int) { matmul(m, rows, y.data(), m.rows, b, e); });
    }
    return seconds_since(start);
  };
  std::vector<Isa> isas;
  for (const Isa isa : available_isas())
    if (argc > 3 ? std::string(argv[3]) == isa_name(isa) : isa != Isa::kScalar) isas.push_back(isa);

  std::vector<double> read;
  std::map<std::pair<Isa, int>, std::vector<double>> decode, prefill;
  for (int round = 0; round < rounds; ++round) {
    read.push_back(read_bandwidth(pool, memory));
    for (const Isa isa : isas)
      for (int l = 0; l < 2; ++l) {
        set_isa(isa);
        decode[{isa, l}].push_back(pass(models[l], models[l].size(), one));
        if (round % 4 == 0) prefill[{isa, l}].push_back(pass(models[l], 7, many));
      }
  }
  double weights = 0;
  for (const auto& m : models[0]) weights += static_cast<double>(m.rows * m.cols);
  std::printf("threads %d, read bandwidth %.1f GB/s (best %.1f)\n", threads, median(read) / 1e9,
              *std::max_element(read.begin(), read.end()) / 1e9);
  for (const Isa isa : isas)
    for (int l = 0; l < 2; ++l) {
      double bytes = 0;
      for (const auto& m : models[l]) bytes += static_cast<double>(m.bytes());
      const double s = median(decode[{isa, l}]), g = median(prefill[{isa, l}]);
      std::printf("%-11s %-6s decode %6.2f ms/token, %5.1f GB/s packed = %3.0f%% of read bandwidth, %5.1f G weights/s; "
                  "prefill 512: %6.1f G MAC/s, %6.0f tokens/s\n",
                  isa_name(isa), names[l], s * 1e3, bytes / s / 1e9, 100 * bytes / s / median(read), weights / s / 1e9,
                  weights / kLayers * 512 / g / 1e9, 512 / (g * kLayers));
    }
  return 0;
}
