// The files of a model folder: manifest, index, shards.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bitdistill/json.h"
#include "bitdistill/safetensors.h"

namespace bitdistill {

// config.json as JSON. Throws ModelError if there is none.
json::Value read_config_json(const std::string& folder);

// Checks bitdistill.json, where there is one, against config.json and the sizes of the files it lists. Hashes are the
// caller's choice (bitdistill.artifact.verify): they cost a pass over every byte.
void check_manifest(const std::string& folder, const json::Value& config);

// The safetensors files: model.safetensors, or the shards of its index, which must agree with them.
std::vector<std::unique_ptr<SafetensorsFile>> open_weight_files(const std::string& folder);

}  // namespace bitdistill
