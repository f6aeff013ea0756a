// The members of a JSON object from a file, each of the type that is expected or an error that names it.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace pyra::io {

/// Errors are Error(input): "model.safetensors: metadata 'pyra': arch.depth is a string, expected an integer".
class JsonFields {
 public:
  /// Keeps a reference to `object`, which must be an object.
  JsonFields(const nlohmann::json& object, std::string where, std::string path = {});

  [[nodiscard]] bool has(const char* key) const { return object_.contains(key); }
  [[nodiscard]] JsonFields object(const char* key) const;
  [[nodiscard]] bool boolean(const char* key) const;
  [[nodiscard]] int64_t integer(const char* key) const;
  [[nodiscard]] double number(const char* key) const;
  [[nodiscard]] std::string string(const char* key) const;
  [[nodiscard]] std::vector<int64_t> integers(const char* key) const;
  [[nodiscard]] std::vector<double> numbers(const char* key) const;
  [[nodiscard]] std::vector<std::string> strings(const char* key) const;
  [[nodiscard]] const nlohmann::json& value(const char* key) const;
  [[nodiscard]] const nlohmann::json& whole() const { return object_; }

  /// Throws Error(input): where, this object's path and key, then `reason`.
  [[noreturn]] void refuse(const std::string& key, const std::string& reason) const;

 private:
  [[nodiscard]] const nlohmann::json& typed(const char* key, bool (nlohmann::json::*is)() const noexcept,
                                            const char* expected) const;
  [[nodiscard]] int64_t to_integer(const char* key, const nlohmann::json& value) const;

  const nlohmann::json& object_;
  std::string where_, path_;
};

}  // namespace pyra::io
