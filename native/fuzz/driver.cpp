// A plain mutating driver for compilers without libFuzzer (g++): no coverage feedback, the same targets.
//
//   TARGET -max_total_time=SECONDS [-runs=N] [-seed=N] CORPUS_FOLDER_OR_FILE...
//
// Each input is a seed with a few mutations: bits, bytes, numbers of note, copies, cuts, splices with other seeds.
// The input that runs is kept in crash-input, so that after a crash it is the one to look at. An input without
// an end is stopped after 30 seconds.
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Bytes = std::vector<std::uint8_t>;
constexpr std::size_t kMaxSize = 1 << 16;

std::mt19937_64 g_random;
std::size_t below(std::size_t n) { return n == 0 ? 0 : g_random() % n; }

void read_file(const std::string& path, std::vector<Bytes>& seeds) {
  std::ifstream file(path, std::ios::binary);
  if (file) seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

void read_seeds(const std::string& path, std::vector<Bytes>& seeds) {
  DIR* folder = ::opendir(path.c_str());
  if (folder == nullptr) return read_file(path, seeds);
  while (const dirent* entry = ::readdir(folder)) {
    if (entry->d_name[0] != '.') read_file(path + "/" + entry->d_name, seeds);
  }
  ::closedir(folder);
}

void put_number(Bytes& input) {
  static const std::uint64_t notable[] = {0, 1, 3, 4, 127, 128, 255, 256, 0x7fff, 0xffff, 100'000'001, 0x7fffffff,
                                          0xffffffff, 1ull << 40, 1ull << 63, ~0ull};
  const std::uint64_t value = notable[below(std::size(notable))];
  const std::size_t width = std::size_t{1} << below(4);
  if (below(2) == 0 && input.size() >= width) {
    std::memcpy(&input[below(input.size() - width + 1)], &value, width);
    return;
  }
  // In place of a decimal number, for the text formats.
  const std::string text = (below(4) == 0 ? "-" : "") + std::to_string(value);
  std::size_t at = below(input.size());
  while (at < input.size() && (input[at] < '0' || input[at] > '9')) ++at;
  std::size_t end = at;
  while (end < input.size() && input[end] >= '0' && input[end] <= '9') ++end;
  input.erase(input.begin() + static_cast<std::ptrdiff_t>(at), input.begin() + static_cast<std::ptrdiff_t>(end));
  input.insert(input.begin() + static_cast<std::ptrdiff_t>(at), text.begin(), text.end());
}

void mutate(Bytes& input, const std::vector<Bytes>& seeds) {
  static const char* words[] = {"null", "true", "{}", "[]", "\"\"", "[[[[", "\"dtype\"", "\"U8\"", "\"BF16\"", "\\ud800", "1e400", ",", "}"};
  const auto at = [&](std::size_t i) { return input.begin() + static_cast<std::ptrdiff_t>(i); };
  switch (below(9)) {
    case 0: if (!input.empty()) input[below(input.size())] ^= static_cast<std::uint8_t>(1u << below(8)); break;
    case 1: if (!input.empty()) input[below(input.size())] = static_cast<std::uint8_t>(g_random()); break;
    case 2: put_number(input); break;
    case 3: {  // cut a piece out
      const std::size_t begin = below(input.size()), end = begin + below(std::min<std::size_t>(input.size() - begin, 64) + 1);
      input.erase(at(begin), at(end));
      break;
    }
    case 4: {  // copy a piece
      const std::size_t begin = below(input.size()), n = below(std::min<std::size_t>(input.size() - begin, 64) + 1);
      const Bytes piece(at(begin), at(begin + n));
      input.insert(at(below(input.size() + 1)), piece.begin(), piece.end());
      break;
    }
    case 5: {  // the end of another seed
      const Bytes& other = seeds[below(seeds.size())];
      const std::size_t from = below(other.size());
      input.resize(below(input.size() + 1));
      input.insert(input.end(), other.begin() + static_cast<std::ptrdiff_t>(from), other.end());
      break;
    }
    case 6: {
      const std::string word = words[below(std::size(words))];
      input.insert(at(below(input.size() + 1)), word.begin(), word.end());
      break;
    }
    case 7: if (below(4) == 0) input.resize(below(input.size() + 1)); break;
    default: if (!input.empty()) input[below(input.size())] += static_cast<std::uint8_t>(below(3)) - 1; break;
  }
  if (input.size() > kMaxSize) input.resize(kMaxSize);
}

long number_of(const char* argument, const char* name, long fallback) {
  const std::size_t n = std::strlen(name);
  return std::strncmp(argument, name, n) == 0 ? std::atol(argument + n) : fallback;
}

}  // namespace

int main(int argc, char** argv) {
  long seconds = 60, runs = -1, seed = 1;
  std::vector<Bytes> seeds;
  for (int i = 1; i < argc; ++i) {
    seconds = number_of(argv[i], "-max_total_time=", seconds);
    runs = number_of(argv[i], "-runs=", runs);
    seed = number_of(argv[i], "-seed=", seed);
    if (argv[i][0] != '-') read_seeds(argv[i], seeds);
  }
  if (seeds.empty()) seeds.emplace_back();
  g_random.seed(static_cast<std::uint64_t>(seed));
  const int file = ::open("crash-input", O_RDWR | O_CREAT | O_TRUNC, 0644);
  if (file < 0 || ::ftruncate(file, kMaxSize + 8) != 0) std::abort();
  auto* kept = static_cast<std::uint8_t*>(::mmap(nullptr, kMaxSize + 8, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  if (kept == MAP_FAILED) std::abort();
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  long done = 0;
  for (; (runs < 0 || done < runs) && elapsed() < static_cast<double>(seconds); ++done) {
    Bytes input = seeds[below(seeds.size())];
    if (done < static_cast<long>(seeds.size())) input = seeds[static_cast<std::size_t>(done)];
    else for (std::size_t n = 1 + below(6); n > 0; --n) mutate(input, seeds);
    if (input.size() > kMaxSize) input.resize(kMaxSize);
    const std::uint64_t size = input.size();
    std::memcpy(kept, &size, 8);
    if (size != 0) std::memcpy(kept + 8, input.data(), size);
    ::alarm(30);  // an endless loop: SIGALRM ends the program; the input is in crash-input
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  ::alarm(0);
  ::ftruncate(file, 0);
  rusage used = {};
  ::getrusage(RUSAGE_SELF, &used);
  std::printf("Done %ld runs in %.0f second(s), peak RSS %ld MB\n", done, elapsed(), used.ru_maxrss / 1024);
  return 0;
}
