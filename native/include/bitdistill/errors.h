// Typed errors. Each says place, value and remedy in one line; the binding turns them into the Python classes
// of the same names in bitdistill.errors.
#pragma once

#include <stdexcept>
#include <string>

namespace bitdistill {

// A folder or file is corrupt, incomplete or malformed.
struct ArtifactError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The model cannot be used: unsupported family or variant, a request outside its limits.
struct ModelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace bitdistill
