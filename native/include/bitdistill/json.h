// A strict, bounded JSON reader (RFC 8259): no comments, no NaN, no duplicate keys, valid UTF-8 only.
//
// Bounds: nesting kMaxDepth, kMaxNodes values in all; a document beyond them is refused, so hostile input costs
// neither stack nor memory out of proportion to its size. Every value remembers its byte offset for messages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace bitdistill::json {

constexpr int kMaxDepth = 32;
constexpr std::size_t kMaxNodes = 400'000;

enum class Kind : std::uint8_t { kNull, kBool, kInt, kFloat, kString, kArray, kObject };

class Value {
 public:
  using Member = std::pair<std::string, Value>;

  Kind kind = Kind::kNull;
  bool boolean = false;
  std::size_t offset = 0;     // of the value's first byte in the document
  std::int64_t integer = 0;   // kInt
  double number = 0.0;        // kInt and kFloat
  std::string text;           // kString
  std::vector<Value> items;   // kArray
  std::vector<Member> members;  // kObject, in the order of the document

  // The member of that name, or null if there is none or this is no object.
  const Value* find(std::string_view key) const;
  // As find, but a JSON null counts as absent.
  const Value* get(std::string_view key) const;
  bool is_number() const { return kind == Kind::kInt || kind == Kind::kFloat; }
  // Python's truth value of the JSON value: null, false, 0, "", [] and {} are false.
  bool truthy() const;
};

// Parses a whole document. Throws ArtifactError("<where>: byte <offset>: <what>; <remedy>").
Value parse(std::string_view document, const std::string& where, const std::string& remedy);

}  // namespace bitdistill::json
