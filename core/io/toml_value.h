// A TOML value with the place it stands at, and typed access that names what is wrong.
#pragma once
#include <toml++/toml.h>

#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "sdk/parameters.h"

namespace pyra::io {

/// One value and where it stands: "recipe vit.toml:12" or "--set train.batch=x". Every method is Error(usage) with
/// key, got and expected when the value does not fit.
class TomlValue {
 public:
  /// `typed` is the text of an override as the user wrote it: where a string is expected, 2024 is one too.
  TomlValue(const toml::node& node, std::string where, std::string key, const std::string* typed = nullptr);

  [[nodiscard]] const std::string& key() const { return key_; }
  [[nodiscard]] const std::string& where() const { return where_; }
  [[nodiscard]] const toml::node& node() const { return node_; }
  [[nodiscard]] bool boolean() const;
  [[nodiscard]] int64_t integer(int64_t low, int64_t high) const;
  /// Finite and accepted by `fits`, which `expected` puts in words: "more than 0". An integer is taken for a number.
  [[nodiscard]] double number(const std::function<bool(double)>& fits, std::string_view expected) const;
  [[nodiscard]] std::vector<double> numbers(const std::function<bool(double)>& fits, std::string_view expected) const;
  [[nodiscard]] std::string string() const;
  /// One of `words`.
  [[nodiscard]] std::string choice(const std::vector<std::string>& words) const;
  /// Any value that a plugin may declare.
  [[nodiscard]] sdk::ParameterValue parameter() const;

  [[noreturn]] void refuse(const std::string& reason) const;

 private:
  [[nodiscard]] double number_of(const toml::node& node, const std::function<bool(double)>& fits,
                                 std::string_view expected) const;
  [[noreturn]] void refuse_type(const toml::node& found, std::string_view expected) const;

  const toml::node& node_;
  std::string where_, key_;
  const std::string* typed_;
};

/// "an integer", "a string", "a table" …
[[nodiscard]] std::string_view toml_type(const toml::node& node);

/// Text as a TOML basic string, quoted.
[[nodiscard]] std::string toml_quoted(std::string_view text);

/// The shortest text that TOML reads as this very double: 1e-05, 2.0.
[[nodiscard]] std::string toml_number(double value);

}  // namespace pyra::io
