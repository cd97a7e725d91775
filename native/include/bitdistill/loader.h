// Reads a model folder (docs/format.md): a packed student, or a plain full-precision model, of any supported family.
//
// Exactly the tensors that config.json calls for must be there, of the right shape and dtype; codes, scales and
// floats are checked before use. Float matrices stay mapped; codes are repacked for the kernels.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bitdistill/config.h"
#include "bitdistill/kernels.h"
#include "bitdistill/safetensors.h"
#include "bitdistill/threads.h"

namespace bitdistill {

// A block linear: ternary, or a dense float matrix. `dense_storage` owns the matrix if it is not mapped.
struct Linear {
  LinearSpec spec;
  bool ternary = false;
  TernaryMatrix codes;
  FloatMatrix dense;
  std::vector<float> dense_storage;
  std::vector<float> bias;   // empty: none
  std::vector<float> subln;  // empty: none
};

struct Block {
  Linear q, k, v, o, gate, up, down;
  // Gains with the family's offset added. post_attention is Llama's norm before the MLP, or with four norms the one
  // after attention, when pre_feedforward is the norm before the MLP.
  std::vector<float> input_norm, post_attention, pre_feedforward, post_feedforward, q_norm, k_norm;
  std::vector<float> attention_sub, mlp_sub;  // BitNet b1.58's own norms before o and down; empty: none
  bool sliding = false;
};

// A float matrix in a mapped file, to read whole through the mapping, or row by row without making it resident.
struct Table {
  FloatMatrix matrix;
  const MappedFile* file = nullptr;

  std::int64_t row_bytes() const { return matrix.cols * float_bytes(matrix.type); }
  // Copies a row as it is stored.
  void read_row(std::int64_t row, void* out) const {
    const auto start = static_cast<std::size_t>(static_cast<const std::uint8_t*>(matrix.data) - file->data());
    file->read(start + static_cast<std::size_t>(row * row_bytes()), static_cast<std::size_t>(row_bytes()), out);
  }
};

struct Weights {
  ModelConfig config;
  Table embedding;
  Table head;  // the embedding itself when tied
  std::vector<float> final_norm;
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<SafetensorsFile>> files;

  std::int64_t ternary_bytes() const;  // packed codes of all blocks
  std::int64_t dense_bytes() const;    // float matrices of all blocks
};

// Throws ArtifactError or ModelError; the message names file, tensor and byte.
std::unique_ptr<Weights> load_weights(const std::string& folder, Layout layout, ThreadPool& pool);

}  // namespace bitdistill
