#include "io/toml_value.h"

#include <charconv>
#include <cmath>

#include "base/error.h"

namespace pyra::io {
std::string_view toml_type(const toml::node& node) {
  switch (node.type()) {
    case toml::node_type::table:
      return "a table";
    case toml::node_type::array:
      return "a list";
    case toml::node_type::string:
      return "a string";
    case toml::node_type::integer:
      return "an integer";
    case toml::node_type::floating_point:
      return "a number with a fraction";
    case toml::node_type::boolean:
      return "a boolean";
    default:
      return "a date or time";
  }
}

TomlValue::TomlValue(const toml::node& node, std::string where, std::string key, const std::string* typed)
    : node_(node), where_(std::move(where)), key_(std::move(key)), typed_(typed) {}

void TomlValue::refuse(const std::string& reason) const {
  fail(ExitCode::usage, where_, ": ", key_, " ", reason);
}

void TomlValue::refuse_type(const toml::node& found, std::string_view expected) const {
  refuse(cat(&found == &node_ ? "is " : "holds ", toml_type(found), ", expected ", expected));
}

bool TomlValue::boolean() const {
  if (!node_.is_boolean()) refuse_type(node_, "true or false");
  return node_.as_boolean()->get();
}

int64_t TomlValue::integer(int64_t low, int64_t high) const {
  if (!node_.is_integer()) refuse_type(node_, "an integer");
  const int64_t value = node_.as_integer()->get();
  if (value < low || value > high) refuse(cat("is ", value, ", expected ", low, " to ", high));
  return value;
}

double TomlValue::number_of(const toml::node& node, const std::function<bool(double)>& fits,
                            std::string_view expected) const {
  if (!node.is_number()) refuse_type(node, cat("a number, ", expected));
  const double value = node.is_integer() ? double(node.as_integer()->get()) : node.as_floating_point()->get();
  if (!std::isfinite(value) || !fits(value))
    refuse(cat(&node == &node_ ? "is " : "holds ", value, ", expected ", expected));
  return value;
}

double TomlValue::number(const std::function<bool(double)>& fits, std::string_view expected) const {
  return number_of(node_, fits, expected);
}

std::vector<double> TomlValue::numbers(const std::function<bool(double)>& fits, std::string_view expected) const {
  if (!node_.is_array()) refuse_type(node_, "a list of numbers");
  std::vector<double> values;
  for (const toml::node& item : *node_.as_array()) values.push_back(number_of(item, fits, expected));
  return values;
}

std::string TomlValue::string() const {
  if (node_.is_string()) return node_.as_string()->get();
  if (!typed_) refuse_type(node_, "a string");
  return *typed_;
}

std::string TomlValue::choice(const std::vector<std::string>& words) const {
  const std::string word = string();
  if (std::find(words.begin(), words.end(), word) == words.end()) {
    refuse(cat("is '", printable(word), "', expected one of ", join(words), did_you_mean(word, words)));
  }
  return word;
}

sdk::ParameterValue TomlValue::parameter() const {
  if (node_.is_boolean()) return node_.as_boolean()->get();
  if (node_.is_integer()) return node_.as_integer()->get();
  if (node_.is_floating_point()) return node_.as_floating_point()->get();
  if (node_.is_string()) return node_.as_string()->get();
  if (!node_.is_array()) refuse_type(node_, "a number, a boolean, a string or a list of strings");
  std::vector<std::string> list;
  for (const toml::node& item : *node_.as_array()) {
    if (!item.is_string()) refuse_type(item, "strings");
    list.push_back(item.as_string()->get());
  }
  return list;
}

std::string toml_quoted(std::string_view text) {
  constexpr std::string_view kHex = "0123456789ABCDEF";
  std::string quoted = "\"";
  for (const char letter : text) {
    const auto byte = static_cast<unsigned char>(letter);
    if (letter == '"' || letter == '\\') {
      quoted.append(1, '\\').append(1, letter);
    } else if (byte < 0x20 || byte == 0x7F) {
      quoted.append("\\u00").append(1, kHex[byte >> 4]).append(1, kHex[byte & 15]);
    } else {
      quoted += letter;
    }
  }
  return quoted + "\"";
}

std::string toml_number(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char text[32];
  std::string number(text, std::to_chars(text, text + sizeof text, value).ptr);
  // Without a point or an exponent TOML would read an integer.
  return number.find_first_of(".e") == std::string::npos ? number + ".0" : number;
}

}  // namespace pyra::io
