#include "bitdistill/json.h"

#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <unordered_set>

#include "bitdistill/errors.h"

namespace bitdistill::json {

const Value* Value::find(std::string_view key) const {
  for (const Member& member : members) {
    if (member.first == key) return &member.second;
  }
  return nullptr;
}

const Value* Value::get(std::string_view key) const {
  const Value* value = find(key);
  return value != nullptr && value->kind == Kind::kNull ? nullptr : value;
}

bool Value::truthy() const {
  switch (kind) {
    case Kind::kNull: return false;
    case Kind::kBool: return boolean;
    case Kind::kInt:
    case Kind::kFloat: return number != 0.0;
    case Kind::kString: return !text.empty();
    case Kind::kArray: return !items.empty();
    case Kind::kObject: return !members.empty();
  }
  return false;
}

namespace {

class Parser {
 public:
  Parser(std::string_view document, const std::string& where, const std::string& remedy)
      : text_(document), where_(where), remedy_(remedy) {}

  Value document() {
    Value value = parse_value(0);
    skip_space();
    if (at_ != text_.size()) fail("text after the JSON value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw ArtifactError(where_ + ": byte " + std::to_string(at_) + ": " + what + "; " + remedy_);
  }

  bool more() const { return at_ < text_.size(); }

  void skip_space() {
    while (more() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) ++at_;
  }

  char peek() const {
    if (!more()) fail("the JSON text ends here");
    return text_[at_];
  }

  void expect(char c) {
    if (peek() != c) fail(std::string("expected '") + c + "'");
    ++at_;
  }

  void literal(std::string_view word) {
    if (text_.compare(at_, word.size(), word) != 0) fail("not a JSON value");
    at_ += word.size();
  }

  Value parse_value(int depth) {
    skip_space();
    if (depth > kMaxDepth) fail("nested deeper than " + std::to_string(kMaxDepth));
    if (++nodes_ > kMaxNodes) fail("more than " + std::to_string(kMaxNodes) + " JSON values");
    Value value;
    value.offset = at_;
    switch (peek()) {
      case '{': parse_object(value, depth); break;
      case '[': parse_array(value, depth); break;
      case '"':
        value.kind = Kind::kString;
        value.text = parse_string();
        break;
      case 't': literal("true"); value.kind = Kind::kBool; value.boolean = true; break;
      case 'f': literal("false"); value.kind = Kind::kBool; break;
      case 'n': literal("null"); break;
      default: parse_number(value);
    }
    return value;
  }

  void parse_object(Value& value, int depth) {
    value.kind = Kind::kObject;
    ++at_;
    skip_space();
    if (peek() == '}') {
      ++at_;
      return;
    }
    std::unordered_set<std::string> seen;
    while (true) {
      skip_space();
      if (peek() != '"') fail("expected a string as object key");
      std::string key = parse_string();
      if (!seen.insert(key).second) fail("key '" + key.substr(0, 60) + "' is there twice");
      skip_space();
      expect(':');
      value.members.emplace_back(std::move(key), parse_value(depth + 1));
      skip_space();
      if (peek() == ',') {
        ++at_;
        continue;
      }
      expect('}');
      return;
    }
  }

  void parse_array(Value& value, int depth) {
    value.kind = Kind::kArray;
    ++at_;
    skip_space();
    if (peek() == ']') {
      ++at_;
      return;
    }
    while (true) {
      value.items.push_back(parse_value(depth + 1));
      skip_space();
      if (peek() == ',') {
        ++at_;
        continue;
      }
      expect(']');
      return;
    }
  }

  void parse_number(Value& value) {
    const std::size_t start = at_;
    auto digits = [&] {
      const std::size_t first = at_;
      while (more() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
      if (at_ == first) fail("not a JSON value");
    };
    if (peek() == '-') ++at_;
    const std::size_t first_digit = at_;
    digits();
    if (text_[first_digit] == '0' && at_ - first_digit > 1) fail("a number with a leading zero");
    bool integral = true;
    if (more() && text_[at_] == '.') {
      integral = false;
      ++at_;
      digits();
    }
    if (more() && (text_[at_] == 'e' || text_[at_] == 'E')) {
      integral = false;
      ++at_;
      if (more() && (text_[at_] == '+' || text_[at_] == '-')) ++at_;
      digits();
    }
    if (at_ - start > 64) fail("a number of more than 64 characters");
    const std::string digits_text(text_.substr(start, at_ - start));
    value.number = std::strtod(digits_text.c_str(), nullptr);
    value.kind = Kind::kFloat;
    if (integral) {
      errno = 0;
      const long long parsed = std::strtoll(digits_text.c_str(), nullptr, 10);
      if (errno == 0) {
        value.kind = Kind::kInt;
        value.integer = parsed;
      }  // beyond 64 bits it stays a float: whoever wants an integer refuses it
    }
    if (!std::isfinite(value.number)) fail("a number beyond float64");
  }

  unsigned hex4() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      code <<= 4;
      if (c >= '0' && c <= '9') code |= static_cast<unsigned>(c - '0');
      else if (c >= 'a' && c <= 'f') code |= static_cast<unsigned>(c - 'a' + 10);
      else if (c >= 'A' && c <= 'F') code |= static_cast<unsigned>(c - 'A' + 10);
      else fail("a \\u escape needs four hex digits");
    }
    return code;
  }

  void append_escape(std::string& out) {
    const char c = peek();
    ++at_;
    switch (c) {
      case '"': out += '"'; return;
      case '\\': out += '\\'; return;
      case '/': out += '/'; return;
      case 'b': out += '\b'; return;
      case 'f': out += '\f'; return;
      case 'n': out += '\n'; return;
      case 'r': out += '\r'; return;
      case 't': out += '\t'; return;
      case 'u': break;
      default: fail("unknown escape in a string");
    }
    unsigned code = hex4();
    if (code >= 0xDC00 && code <= 0xDFFF) fail("a lone low surrogate");
    if (code >= 0xD800 && code <= 0xDBFF) {
      if (text_.compare(at_, 2, "\\u") != 0) fail("a lone high surrogate");
      at_ += 2;
      const unsigned low = hex4();
      if (low < 0xDC00 || low > 0xDFFF) fail("a lone high surrogate");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    auto put = [&](unsigned byte) { out += static_cast<char>(byte); };
    if (code < 0x80) {
      put(code);
    } else if (code < 0x800) {
      put(0xC0 | (code >> 6));
      put(0x80 | (code & 63));
    } else if (code < 0x10000) {
      put(0xE0 | (code >> 12));
      put(0x80 | ((code >> 6) & 63));
      put(0x80 | (code & 63));
    } else {
      put(0xF0 | (code >> 18));
      put(0x80 | ((code >> 12) & 63));
      put(0x80 | ((code >> 6) & 63));
      put(0x80 | (code & 63));
    }
  }

  // Copies one UTF-8 sequence; overlong forms, surrogates and values over U+10FFFF are refused.
  void append_utf8(std::string& out) {
    const auto lead = static_cast<unsigned char>(text_[at_]);
    const int extra = lead < 0x80 ? 0 : lead >= 0xC2 && lead < 0xE0 ? 1 : lead >= 0xE0 && lead < 0xF0 ? 2
                      : lead >= 0xF0 && lead < 0xF5 ? 3 : -1;
    if (extra < 0 || text_.size() - at_ <= static_cast<std::size_t>(extra)) fail("a string that is not UTF-8");
    for (int i = 1; i <= extra; ++i) {
      if ((static_cast<unsigned char>(text_[at_ + i]) & 0xC0) != 0x80) fail("a string that is not UTF-8");
    }
    const auto second = extra > 0 ? static_cast<unsigned char>(text_[at_ + 1]) : 0;
    if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) || (lead == 0xF0 && second < 0x90) ||
        (lead == 0xF4 && second > 0x8F)) {
      fail("a string that is not UTF-8");
    }
    out.append(text_.substr(at_, static_cast<std::size_t>(extra) + 1));
    at_ += static_cast<std::size_t>(extra) + 1;
  }

  std::string parse_string() {
    ++at_;
    std::string out;
    while (true) {
      const char c = peek();
      if (c == '"') {
        ++at_;
        return out;
      }
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      if (c == '\\') {
        ++at_;
        append_escape(out);
      } else {
        append_utf8(out);
      }
    }
  }

  std::string_view text_;
  const std::string& where_;
  const std::string& remedy_;
  std::size_t at_ = 0;
  std::size_t nodes_ = 0;
};

}  // namespace

Value parse(std::string_view document, const std::string& where, const std::string& remedy) {
  return Parser(document, where, remedy).document();
}

}  // namespace bitdistill::json
