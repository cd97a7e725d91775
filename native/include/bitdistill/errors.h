// Typed errors. Each says place, value and remedy in one line; the binding turns them into the Python classes
// of the same names in bitdistill.errors.
#pragma once

#include <stdexcept>
#include <string>

namespace bitdistill {

// The message with control characters (from names in a damaged file) shown as '?': one line, no early end.
inline std::string one_line(std::string message) {
  for (char& c : message) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  }
  return message;
}

// A folder or file is corrupt, incomplete or malformed.
struct ArtifactError : std::runtime_error {
  explicit ArtifactError(const std::string& message) : std::runtime_error(one_line(message)) {}
};

// The model cannot be used: unsupported family or variant, a request outside its limits.
struct ModelError : std::runtime_error {
  explicit ModelError(const std::string& message) : std::runtime_error(one_line(message)) {}
};

}  // namespace bitdistill
