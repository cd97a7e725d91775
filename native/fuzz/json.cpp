// The JSON reader: any bytes give a value or an ArtifactError.
#include "bitdistill/errors.h"
#include "bitdistill/json.h"
#include "target.h"

using namespace bitdistill;

namespace {

// Walks the value, so that a reader that hands out bad memory is seen.
std::size_t count(const json::Value& value) {
  std::size_t nodes = 1 + value.text.size();
  for (const json::Value& item : value.items) nodes += count(item);
  for (const auto& [name, member] : value.members) nodes += name.size() + count(member);
  return nodes;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Stopwatch stopwatch;
  try {
    const json::Value value = json::parse({reinterpret_cast<const char*>(data), size}, "input", "mend it");
    require(count(value) >= 1, "a value has no nodes");
    require(value.offset < size, "an offset lies outside the document");
  } catch (const ArtifactError& error) {
    require_message(error.what());
  }
  return 0;
}
