#include "folder.h"

#include <sys/stat.h>

#include <map>
#include <set>

#include "bitdistill/errors.h"

namespace bitdistill {

namespace {

constexpr std::size_t kMaxJsonBytes = 32u << 20;
const char* const kRemedy = "make the folder again";

bool is_file(const std::string& path, std::uint64_t* bytes = nullptr) {
  struct stat status = {};
  if (::stat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode)) return false;
  if (bytes != nullptr) *bytes = static_cast<std::uint64_t>(status.st_size);
  return true;
}

std::string real_path(const std::string& path) {
  char* resolved = ::realpath(path.c_str(), nullptr);
  if (resolved == nullptr) return "";
  std::string text(resolved);
  ::free(resolved);
  return text;
}

std::string parent_of(const std::string& path) {
  const std::size_t slash = path.find_last_of('/');
  return slash == std::string::npos ? "" : path.substr(0, slash);
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// folder/name, refused unless it is a plain file name of this folder; a link may only lead to the folder itself or,
// in a hub cache (<cache>/snapshots/<revision>), to its blobs.
std::string inside(const std::string& folder, const std::string& name, const std::string& where) {
  const std::string path = folder + "/" + name;
  bool good = ends_with(name, ".safetensors") && name.find('/') == std::string::npos &&
              name.find('\\') == std::string::npos && name.find('\0') == std::string::npos && is_file(path);
  if (good) {
    const std::string home = real_path(folder), target = parent_of(real_path(path));
    const std::string snapshots = parent_of(home);
    good = target == home || (ends_with(snapshots, "/snapshots") && target == parent_of(snapshots) + "/blobs");
  }
  if (!good) {
    throw ArtifactError(where + ": names the weight file '" + name.substr(0, 80) +
                        "', which is not a plain file in this folder; " + kRemedy);
  }
  return path;
}

}  // namespace

json::Value read_config_json(const std::string& folder) {
  const std::string path = folder + "/config.json";
  if (!is_file(path)) throw ModelError(path + ": missing; this is not a Hugging Face model folder");
  return json::parse(read_text(path, kMaxJsonBytes), path, "fetch the model again");
}

void check_manifest(const std::string& folder, const json::Value& config) {
  const std::string path = folder + "/bitdistill.json";
  const json::Value* section = config.get("quantization_config");
  if (!is_file(path)) {
    if (section != nullptr) throw ArtifactError(path + ": missing; the student is incomplete, export it again");
    return;  // a plain Hugging Face folder
  }
  const json::Value root = json::parse(read_text(path, kMaxJsonBytes), path, kRemedy);
  auto fail = [&](const std::string& what) { throw ArtifactError(path + ": " + what + "; " + kRemedy); };
  const json::Value* version = root.get("format_version");
  if (version == nullptr || version->kind != json::Kind::kInt || version->integer != 1) {
    throw ArtifactError(path + ": format_version is not 1; install a matching version");
  }
  const json::Value* kind = root.get("kind");
  const bool student = section != nullptr;
  if (kind == nullptr || (kind->text == "teacher") == student) fail("kind does not go with config.json");
  const json::Value* files = root.get("files");
  if (files == nullptr || files->kind != json::Kind::kObject) fail("files is missing");
  for (const auto& [name, entry] : files->members) {
    const json::Value* bytes = entry.get("bytes");
    if (name.empty() || name[0] == '/' || name.find("..") != std::string::npos || bytes == nullptr) {
      fail("byte " + std::to_string(entry.offset) + ": file entry '" + name.substr(0, 80) + "' is not valid");
    }
    std::uint64_t size = 0;
    if (!is_file(folder + "/" + name, &size)) {
      throw ArtifactError(folder + "/" + name + ": missing; the artifact is incomplete, make it again");
    }
    if (bytes->kind != json::Kind::kInt || size != static_cast<std::uint64_t>(bytes->integer)) {
      throw ArtifactError(folder + "/" + name + ": " + std::to_string(size) + " bytes, manifest says " +
                          std::to_string(bytes->integer) + "; make the artifact again");
    }
  }
}

std::vector<std::unique_ptr<SafetensorsFile>> open_weight_files(const std::string& folder) {
  std::vector<std::unique_ptr<SafetensorsFile>> files;
  const std::string single = folder + "/model.safetensors", index = folder + "/model.safetensors.index.json";
  if (!is_file(index)) {
    if (!is_file(single)) throw ArtifactError(folder + ": no model.safetensors; the folder is incomplete, make it again");
    files.push_back(std::make_unique<SafetensorsFile>(inside(folder, "model.safetensors", folder)));
    return files;
  }
  if (is_file(single)) throw ArtifactError(folder + ": holds both model.safetensors and an index; remove one of them");
  const json::Value root = json::parse(read_text(index, kMaxJsonBytes), index, kRemedy);
  const json::Value* map = root.get("weight_map");
  if (map == nullptr || map->kind != json::Kind::kObject || map->members.empty()) {
    throw ArtifactError(index + ": weight_map is missing; " + kRemedy);
  }
  std::set<std::string> names;
  for (const auto& [tensor, shard] : map->members) names.insert(shard.text);
  std::map<std::string, std::string> owner;
  for (const std::string& name : names) {
    files.push_back(std::make_unique<SafetensorsFile>(inside(folder, name, index)));
    for (const auto& [tensor, view] : files.back()->tensors()) {
      if (!owner.emplace(tensor, name).second) {
        throw ArtifactError(view.place(tensor) + ": is in two shards; " + kRemedy);
      }
    }
  }
  for (const auto& [tensor, shard] : map->members) {
    const auto found = owner.find(tensor);
    if (found == owner.end() || found->second != shard.text) {
      throw ArtifactError(index + ": byte " + std::to_string(shard.offset) + ": disagrees with the shards about " +
                          tensor.substr(0, 120) + "; " + kRemedy);
    }
    owner.erase(found);
  }
  if (!owner.empty()) {
    throw ArtifactError(index + ": does not list " + owner.begin()->first.substr(0, 120) + "; " + kRemedy);
  }
  return files;
}

}  // namespace bitdistill
