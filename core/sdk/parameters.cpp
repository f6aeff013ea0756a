#include "sdk/parameters.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <iomanip>

#include "base/error.h"
#include "base/text.h"

namespace pyra::sdk {
namespace {

template <class... Cases>
struct Overloaded : Cases... {
  using Cases::operator()...;
};
template <class... Cases>
Overloaded(Cases...) -> Overloaded<Cases...>;  // Clang deduces an aggregate's arguments from version 17 on only

/// `value` in the declared type, or nothing when it is of another; a whole number is a number, not the reverse.
std::optional<ParameterValue> converted(const ParameterValue& value, const ParameterValue& declared) {
  if (value.index() == declared.index()) return value;
  if (std::holds_alternative<double>(declared) && std::holds_alternative<int64_t>(value)) {
    return double(std::get<int64_t>(value));
  }
  return std::nullopt;
}

void check_range(const Parameter& parameter, double value, const std::string& place) {
  const bool below = parameter.minimum && !(value >= *parameter.minimum);
  const bool above = parameter.maximum && !(value <= *parameter.maximum);
  if (!below && !above && std::isfinite(value)) return;
  std::string allowed = "expected a finite number";
  if (parameter.minimum && parameter.maximum) {
    allowed = cat("expected ", *parameter.minimum, " to ", *parameter.maximum);
  } else if (parameter.minimum) {
    allowed = cat("expected at least ", *parameter.minimum);
  } else if (parameter.maximum) {
    allowed = cat("expected at most ", *parameter.maximum);
  }
  fail(ExitCode::usage, place, " is ", value, "; ", allowed);
}

void check_choice(const Parameter& parameter, const std::string& value, const std::string& place) {
  const auto& choices = parameter.choices;
  if (choices.empty() || std::find(choices.begin(), choices.end(), value) != choices.end()) return;
  fail(ExitCode::usage, place, ": '", value, "' is none of its choices (", join(choices), ")",
       did_you_mean(value, choices));
}

void check_value(const Parameter& parameter, const ParameterValue& value, const std::string& place) {
  std::visit(Overloaded{[](bool) {}, [&](int64_t number) { check_range(parameter, double(number), place); },
                        [&](double number) { check_range(parameter, number, place); },
                        [&](const std::string& text) { check_choice(parameter, text, place); },
                        [&](const std::vector<std::string>& items) {
                          for (const std::string& item : items) check_choice(parameter, item, place);
                        }},
             value);
}

template <class T>
const T& get_as(const ParameterValue& value, std::string_view name) {
  if (const T* held = std::get_if<T>(&value)) return *held;
  fail(ExitCode::internal, "parameter '", name, "' was declared as ", type_name(value), " and asked for as ",
       type_name(ParameterValue(T{})));
}

}  // namespace

bool is_parameter_name(std::string_view name) {
  return !name.empty() && std::ranges::all_of(name, [](unsigned char c) {
    return c < 0x80 && (std::isalnum(c) != 0 || c == '_' || c == '-');
  });
}

std::string check_declared(std::string_view kind, std::span<const Parameter> declared) {
  const std::vector<std::string_view> taken =
      kind == "merge" ? std::vector<std::string_view>{"name", "schedule", "proportional_attention"}
                      : std::vector<std::string_view>{"name"};
  std::vector<std::string> names;
  for (const Parameter& parameter : declared) {
    const std::string place = cat("parameter '", parameter.name, "'");
    if (!is_parameter_name(parameter.name)) return cat(place, ": its name is not of letters, digits, _ and -");
    if (std::ranges::find(taken, parameter.name) != taken.end())
      return cat(place, ": recipes have a key of this name already");
    if (std::ranges::find(names, parameter.name) != names.end()) return cat(place, " is declared twice");
    names.push_back(parameter.name);
    const bool number = std::holds_alternative<int64_t>(parameter.default_value) ||
                        std::holds_alternative<double>(parameter.default_value);
    if (!number && (parameter.minimum || parameter.maximum)) return cat(place, " has bounds and is no number");
    const bool words = std::holds_alternative<std::string>(parameter.default_value) ||
                       std::holds_alternative<std::vector<std::string>>(parameter.default_value);
    if (!words && !parameter.choices.empty()) return cat(place, " has choices and is neither a string nor a list");
    try {
      check_value(parameter, parameter.default_value, cat(place, "'s default"));
    } catch (const Error& error) {
      return error.what();
    }
  }
  return {};
}

std::string_view type_name(const ParameterValue& value) {
  return std::visit(
      Overloaded{[](bool) { return "boolean"; }, [](int64_t) { return "integer"; }, [](double) { return "number"; },
                 [](const std::string&) { return "string"; }, [](const std::vector<std::string>&) { return "list"; }},
      value);
}

std::string to_text(const ParameterValue& value) {
  return std::visit(
      Overloaded{[](bool flag) { return std::string(flag ? "true" : "false"); },
                 [](int64_t number) { return std::to_string(number); }, [](double number) { return cat(number); },
                 [](const std::string& text) { return cat(std::quoted(text)); },
                 [](const std::vector<std::string>& items) {
                   std::vector<std::string> quoted;
                   quoted.reserve(items.size());
                   for (const std::string& item : items) quoted.push_back(cat(std::quoted(item)));
                   return cat('[', join(quoted), ']');
                 }},
      value);
}

Parameters::Parameters(std::span<const Parameter> declared, const std::map<std::string, ParameterValue>& given,
                       std::string_view where) {
  std::vector<std::string> names;
  for (const Parameter& parameter : declared) {
    names.push_back(parameter.name);
    values_[parameter.name] = parameter.default_value;
  }
  for (const auto& [name, value] : given) {
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) {
      fail(ExitCode::usage, where, ": unknown parameter '", name,
           "' (known: ", names.empty() ? std::string("none") : join(names), ")", did_you_mean(name, names));
    }
    const Parameter& parameter = declared[size_t(found - names.begin())];
    const std::string place = cat(where, ": ", name);
    const auto typed = converted(value, parameter.default_value);
    if (!typed) {
      fail(ExitCode::usage, place, " is ", to_text(value), " (", type_name(value), "); expected ",
           type_name(parameter.default_value), ", as in ", to_text(parameter.default_value));
    }
    check_value(parameter, *typed, place);
    values_[name] = *typed;
  }
}

const ParameterValue& Parameters::at(std::string_view name) const {
  const auto found = values_.find(name);
  if (found == values_.end()) fail(ExitCode::internal, "parameter '", name, "' was never declared");
  return found->second;
}

bool Parameters::boolean(std::string_view name) const {
  return get_as<bool>(at(name), name);
}

int64_t Parameters::integer(std::string_view name) const {
  return get_as<int64_t>(at(name), name);
}

double Parameters::number(std::string_view name) const {
  return get_as<double>(at(name), name);
}

const std::string& Parameters::string(std::string_view name) const {
  return get_as<std::string>(at(name), name);
}

const std::vector<std::string>& Parameters::list(std::string_view name) const {
  return get_as<std::vector<std::string>>(at(name), name);
}

}  // namespace pyra::sdk
