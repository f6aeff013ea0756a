// Parameters a plugin declares, so that recipes, --set and `plugins info` can check and show them.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace pyra::sdk {

using ParameterValue = std::variant<bool, int64_t, double, std::string, std::vector<std::string>>;

/// One declared parameter. The type is that of `default_value`.
struct Parameter {
  std::string name;  ///< as is_parameter_name() wants it, and no key that [merge] or [peft] has itself
  ParameterValue default_value;
  std::string help;
  std::optional<double> minimum{};     ///< inclusive; numbers only
  std::optional<double> maximum{};     ///< inclusive; numbers only
  std::vector<std::string> choices{};  ///< for strings, and for each entry of a list
};

/// Whether recipes can write it: ASCII letters, digits, _ and -.
[[nodiscard]] bool is_parameter_name(std::string_view name);

/// Why these declarations of a plugin of this kind ("merge", "peft") cannot serve: a name that recipes cannot write,
/// have already, or that stands twice, bounds of what is no number, a default that is not allowed. "" when they can.
[[nodiscard]] std::string check_declared(std::string_view kind, std::span<const Parameter> declared);

/// "integer", "number", "boolean", "string" or "list".
[[nodiscard]] std::string_view type_name(const ParameterValue& value);
/// The value as a recipe would write it.
[[nodiscard]] std::string to_text(const ParameterValue& value);

/// Values by name, each declared by the plugin and checked.
class Parameters {
 public:
  Parameters() = default;
  /// Defaults of `declared`, overridden by `given`. An unknown name, a wrong type or a value out of range
  /// throws Error(usage); `where` opens the message ("recipe vit.toml:12: [peft]"). An integer is taken for a number.
  Parameters(std::span<const Parameter> declared, const std::map<std::string, ParameterValue>& given,
             std::string_view where);

  /// The value of a declared parameter; asking for an undeclared one or another type is an internal error.
  [[nodiscard]] bool boolean(std::string_view name) const;
  [[nodiscard]] int64_t integer(std::string_view name) const;
  [[nodiscard]] double number(std::string_view name) const;
  [[nodiscard]] const std::string& string(std::string_view name) const;
  [[nodiscard]] const std::vector<std::string>& list(std::string_view name) const;
  [[nodiscard]] const std::map<std::string, ParameterValue, std::less<>>& all() const { return values_; }

 private:
  [[nodiscard]] const ParameterValue& at(std::string_view name) const;
  std::map<std::string, ParameterValue, std::less<>> values_;
};

}  // namespace pyra::sdk
