// The extension module bitdistill.engine._native: models and sequences for bitdistill.engine (kernels: kernels_py.cpp).
//
// Errors of the library become bitdistill.errors.ArtifactError and ModelError. Everything that computes releases the
// GIL. Arrays cross as numpy, token ids as contiguous int32.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <tuple>

#include "bitdistill/errors.h"
#include "bitdistill/kernels.h"
#include "bitdistill/model.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitdistill {

void register_kernels(nb::module_& module);  // kernels_py.cpp

namespace {

using Ids = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

// Names in a damaged file need not be UTF-8; what cannot be decoded is shown as a replacement character.
void raise_as(const char* type, const char* message) {
  nb::object text = nb::steal(PyUnicode_DecodeUTF8(message, static_cast<Py_ssize_t>(std::strlen(message)), "replace"));
  PyErr_SetObject(nb::module_::import_("bitdistill.errors").attr(type).ptr(), text.ptr());
}

void translate(const std::exception_ptr& error, void*) {
  try {
    std::rethrow_exception(error);
  } catch (const ArtifactError& e) {
    raise_as("ArtifactError", e.what());
  } catch (const ModelError& e) {
    raise_as("ModelError", e.what());
  }
}

template <class T>
T choice(const std::string& what, const std::string& name, const std::vector<std::pair<const char*, T>>& table) {
  std::string known;
  for (const auto& [key, value] : table) {
    if (name == key) return value;
    known += (known.empty() ? "" : ", ") + std::string(key);
  }
  throw ModelError(what + " '" + name + "' is not one of " + known);
}

std::shared_ptr<Model> load(const std::string& folder, int threads, const std::string& layout, const std::string& kv,
                            const std::string& head) {
  ModelOptions options;
  options.threads = threads;
  options.layout = choice<Layout>("layout", layout, {{"2bit", Layout::kTwoBitRows16}, {"base3", Layout::kBase3Rows16}});
  options.kv = choice<KvType>("kv", kv, {{"float32", KvType::kFloat32}, {"float16", KvType::kFloat16}, {"int8", KvType::kInt8}});
  options.head = choice<HeadType>("head", head, {{"float", HeadType::kFloat},
                                                        {"int8", HeadType::kInt8},
                                                        {"int4", HeadType::kInt4},
                                                        {"screened", HeadType::kScreened},
                                                        {"screened4", HeadType::kScreened4}});
  const nb::gil_scoped_release released;
  return Model::load(folder, options);
}

std::vector<Segment> segments_of(const std::vector<std::tuple<Sequence*, Ids>>& given) {
  std::vector<Segment> segments;
  for (const auto& [sequence, ids] : given) {
    if (sequence == nullptr) throw ModelError("forward: None is no sequence");
    segments.push_back({sequence, ids.data(), static_cast<std::int64_t>(ids.shape(0))});
  }
  return segments;
}

Logits forward(const Model& model, const std::vector<std::tuple<Sequence*, Ids>>& given, const std::string& wanted) {
  const std::vector<Segment> segments = segments_of(given);
  const auto which =
      choice<Wanted>("logits", wanted, {{"none", Wanted::kNone}, {"last", Wanted::kLast}, {"all", Wanted::kAll}});
  auto values = std::make_unique<std::vector<float>>();
  {
    const nb::gil_scoped_release released;
    *values = model.forward(segments, which);
  }
  const std::size_t vocab = model.config().vocab, rows = values->size() / vocab;
  float* data = values->data();
  nb::capsule owner(values.release(), [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
  return Logits(data, {rows, vocab}, owner);
}

SamplerOptions sampler(double temperature, std::uint32_t top_k, double top_p, std::uint64_t seed) {
  SamplerOptions options{temperature, top_k, top_p, seed};
  check(options);
  return options;
}

nb::dict describe(const Model& model) {
  const ModelConfig& config = model.config();
  nb::dict facts;
  facts["family"] = config.family;
  facts["vocab_size"] = config.vocab;
  facts["hidden_size"] = config.hidden;
  facts["layers"] = config.layers;
  facts["max_positions"] = config.max_positions;
  facts["packed"] = config.packed;
  facts["threads"] = model.options().threads;
  facts["eos_ids"] = config.eos_ids;
  facts["ternary_bytes"] = model.weights().ternary_bytes();
  facts["dense_bytes"] = model.weights().dense_bytes();
  facts["ring_rows"] = model.ring_rows();
  facts["head_bytes"] = model.head_bytes();
  facts["screened_tokens"] = model.screened_tokens();
  facts["rescored_rows"] = model.rescored_rows();
  return facts;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native engine of bitdistill; use bitdistill.engine.";
  nb::register_exception_translator(translate);
  register_kernels(m);

  nb::class_<Sequence>(m, "Sequence", "Tokens that a model has run, with their keys and values.")
      .def("__init__", [](Sequence* self, const std::shared_ptr<Model>& model) { new (self) Sequence(model); }, "model"_a)
      .def("__len__", [](const Sequence& self) { return self.length(); })
      .def_prop_ro("tokens", [](const Sequence& self) { return self.tokens(); }, "Token ids, oldest first.")
      .def_prop_ro("kv_bytes", &Sequence::kv_bytes, "Bytes of keys and values, reserve included.")
      .def("branch", [](const Sequence& self) { return new Sequence(self, true); }, nb::keep_alive<0, 1>(),
           "A sequence that goes on from here without a copy; this one must stay as it is meanwhile.")
      .def("keepable", &Sequence::keepable, "length"_a,
           "`length` if the sequence can be cut there, else the longest part that can be kept.")
      .def("truncate", &Sequence::truncate, "length"_a, "Forget the tokens from position `length` on.");

  nb::class_<SamplerOptions>(m, "Sampler", "How the next token is chosen.")
      .def("__init__",
           [](SamplerOptions* self, double temperature, std::uint32_t top_k, double top_p, std::uint64_t seed) {
             new (self) SamplerOptions(sampler(temperature, top_k, top_p, seed));
           },
           "temperature"_a, "top_k"_a, "top_p"_a, "seed"_a);

  nb::class_<Model>(m, "Model", "A model ready to run.")
      .def_static("load", &load, "folder"_a, "threads"_a, "layout"_a, "kv"_a, "head"_a)
      .def_prop_ro("facts", &describe)
      .def("kv_bytes", &Model::kv_bytes, "tokens"_a, "Bytes of keys and values of a sequence with so many tokens.")
      .def("forward", &forward, "segments"_a, "logits"_a,
           "Run (sequence, ids) segments; float32 logits [rows, vocab]: 'none', 'last' of each segment, or 'all'.")
      .def("step",
           [](const Model& self, const std::vector<std::tuple<Sequence*, Ids>>& given,
              const std::vector<SamplerOptions>& options, const std::vector<std::uint64_t>& streams, const std::vector<std::uint64_t>& steps) {
             const std::vector<Segment> segments = segments_of(given);
             const std::size_t count = segments.size();
             if (options.size() != count || streams.size() != count || steps.size() != count) {
               throw ModelError("step: samplers, streams and steps must be as many as segments");
             }
             std::vector<Model::Draw> draws;
             for (std::size_t i = 0; i < count; ++i) draws.push_back({options[i], streams[i], steps[i]});
             const nb::gil_scoped_release released;
             return self.step(segments, draws);
           },
           "segments"_a, "samplers"_a, "streams"_a, "steps"_a, "Run the segments and choose one next token for each.")
      .def("score_tree",
           [](const Model& self, const std::vector<std::vector<std::int32_t>>& prompts,
              const std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& parents,
              const std::vector<std::tuple<std::int32_t, std::int32_t>>& queries) {
             std::vector<Model::Query> wanted;
             for (const auto& [node, token] : queries) wanted.push_back({node, token});
             auto values = std::make_unique<std::vector<float>>();
             {
               const nb::gil_scoped_release released;
               *values = self.score_tree(prompts, tokens, parents, wanted);
             }
             float* data = values->data();
             nb::capsule owner(values.release(), [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
             return Logits(data, {prompts.size(), wanted.size()}, owner);
           },
           "prompts"_a, "tokens"_a, "parents"_a, "queries"_a,
           "Log-probabilities [prompts, queries] of tokens after each prompt and the nodes of a token tree.");
}

}  // namespace bitdistill
