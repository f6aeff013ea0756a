#include "io/json_fields.h"

#include <limits>
#include <utility>

#include "base/error.h"
#include "io/json.h"

namespace pyra::io {
using nlohmann::json;

JsonFields::JsonFields(const json& object, std::string where, std::string path)
    : object_(object), where_(std::move(where)), path_(std::move(path)) {
  if (!object_.is_object()) {
    const std::string subject = path_.empty() ? "the text" : path_.substr(0, path_.size() - 1);
    fail(ExitCode::input, where_, ": ", subject, " is ", json_type(object_), ", expected an object");
  }
}

void JsonFields::refuse(const std::string& key, const std::string& reason) const {
  fail(ExitCode::input, where_, ": ", path_, printable(key), " ", reason);
}

const json& JsonFields::value(const char* key) const {
  const auto found = object_.find(key);
  if (found == object_.end()) refuse(key, "is missing");
  return *found;
}

const json& JsonFields::typed(const char* key, bool (json::*is)() const noexcept, const char* expected) const {
  const json& found = value(key);
  if (!(found.*is)()) refuse(key, cat("is ", json_type(found), ", expected ", expected));
  return found;
}

int64_t JsonFields::to_integer(const char* key, const json& value) const {
  if (!value.is_number_integer()) refuse(key, cat("is ", json_type(value), ", expected an integer"));
  if (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t(std::numeric_limits<int64_t>::max())) {
    refuse(key, cat("is ", value.get<uint64_t>(), ", too large"));
  }
  return value.get<int64_t>();
}

JsonFields JsonFields::object(const char* key) const {
  return {value(key), where_, path_ + key + "."};
}
bool JsonFields::boolean(const char* key) const {
  return typed(key, &json::is_boolean, "a boolean").get<bool>();
}
int64_t JsonFields::integer(const char* key) const {
  return to_integer(key, value(key));
}
double JsonFields::number(const char* key) const {
  return typed(key, &json::is_number, "a number").get<double>();
}
std::string JsonFields::string(const char* key) const {
  return typed(key, &json::is_string, "a string").get<std::string>();
}

std::vector<int64_t> JsonFields::integers(const char* key) const {
  std::vector<int64_t> list;
  for (const json& item : typed(key, &json::is_array, "an array")) list.push_back(to_integer(key, item));
  return list;
}

std::vector<double> JsonFields::numbers(const char* key) const {
  std::vector<double> list;
  for (const json& item : typed(key, &json::is_array, "an array")) {
    if (!item.is_number()) refuse(key, cat("holds ", json_type(item), ", expected numbers"));
    list.push_back(item.get<double>());
  }
  return list;
}

std::vector<std::string> JsonFields::strings(const char* key) const {
  std::vector<std::string> list;
  for (const json& item : typed(key, &json::is_array, "an array")) {
    if (!item.is_string()) refuse(key, cat("holds ", json_type(item), ", expected strings"));
    list.push_back(item.get<std::string>());
  }
  return list;
}

}  // namespace pyra::io
