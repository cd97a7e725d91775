// config.json, and what it says about a model.
#include "bitdistill/config.h"
#include "bitdistill/errors.h"
#include "target.h"

using namespace bitdistill;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Stopwatch stopwatch;
  try {
    const json::Value root = json::parse({reinterpret_cast<const char*>(data), size}, "config.json", "mend it");
    const ModelConfig config = parse_config(root, "config.json");
    require(config.blocks.size() == config.layers, "one block a layer");
    require(config.heads % config.kv_heads == 0, "heads");
    require(config.rope_full.inv_freq.size() == config.head_dim / 2, "rope");
  } catch (const ArtifactError& error) {
    require_message(error.what());
  } catch (const ModelError& error) {
    require_message(error.what());
  }
  return 0;
}
