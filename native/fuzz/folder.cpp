// A whole model folder: config.json, manifest, index and weights are read, and what loads is run.
//
// Input: one byte of options, then for each of config.json, bitdistill.json, model.safetensors and
// model.safetensors.index.json a length of three bytes (little-endian; 0xffffff: no such file) and its bytes.
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "bitdistill/errors.h"
#include "bitdistill/model.h"
#include "target.h"

using namespace bitdistill;

namespace {

// A directory in memory where there is one.
std::string make_folder() {
  for (const char* base : {"/dev/shm", "/tmp"}) {
    std::string pattern = std::string(base) + "/bitdistill-fuzz-XXXXXX";
    if (::mkdtemp(pattern.data()) != nullptr) return pattern;
  }
  std::abort();
}

struct Folder {
  const std::string path = make_folder();
  ~Folder() {
    for (const char* name : kNames) ::unlink((path + "/" + name).c_str());
    ::rmdir(path.c_str());
  }
  static constexpr const char* kNames[] = {"config.json", "bitdistill.json", "model.safetensors",
                                           "model.safetensors.index.json"};
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Stopwatch stopwatch;
  static const Folder folder;
  if (size < 1) return 0;
  const unsigned choice = data[0];
  std::size_t at = 1;
  for (const char* name : Folder::kNames) {
    const std::string path = folder.path + "/" + name;
    std::size_t length = 0xffffff;
    if (at + 3 <= size) {
      length = data[at] | std::size_t{data[at + 1]} << 8 | std::size_t{data[at + 2]} << 16;
      at += 3;
    }
    if (length == 0xffffff) {
      ::unlink(path.c_str());
      continue;
    }
    length = std::min(length, size - at);
    std::FILE* file = std::fopen(path.c_str(), "wb");
    if (file == nullptr || std::fwrite(data + at, 1, length, file) != length || std::fclose(file) != 0) std::abort();
    at += length;
  }
  ModelOptions options;
  options.layout = choice & 1 ? Layout::kBase3Rows16 : Layout::kTwoBitRows16;
  options.kv = choice & 2 ? KvType::kFloat16 : choice & 16 ? KvType::kInt8 : KvType::kFloat32;
  options.head = choice & 4 ? HeadType::kScreened : choice & 8 ? HeadType::kInt8 : HeadType::kFloat;
  try {
    const auto model = Model::load(folder.path, options);
    Sequence sequence(model);
    const std::int32_t tokens[3] = {0, 1, 0};
    const std::int64_t count = model->config().vocab > 1 ? 3 : 1;
    const auto logits = model->forward({{&sequence, tokens, count}}, Wanted::kAll);
    require(logits.size() == static_cast<std::size_t>(count) * model->config().vocab, "logits");
  } catch (const ArtifactError& error) {
    require_message(error.what());
  } catch (const ModelError& error) {
    require_message(error.what());
  }
  return 0;
}
