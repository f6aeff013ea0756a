// What tests share: a folder that goes away, a program run as a user runs it, tensors compared with evidence.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace pyra::test {

/// A fresh folder, removed with everything in it at the end of the scope.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

/// An environment variable's value as long as this lives; what it was afterwards.
class EnvironmentVariable {
 public:
  EnvironmentVariable(const char* name, const std::string& value) : name_(name) {
    if (const char* before = std::getenv(name)) before_ = before;
    setenv(name, value.c_str(), 1);
  }
  ~EnvironmentVariable() {
    if (before_) {
      setenv(name_, before_->c_str(), 1);
    } else {
      unsetenv(name_);
    }
  }
  EnvironmentVariable(const EnvironmentVariable&) = delete;
  EnvironmentVariable& operator=(const EnvironmentVariable&) = delete;

 private:
  const char* name_;
  std::optional<std::string> before_;
};

struct RunResult {
  int exit_code = 0;  ///< 128 + n when signal n ended it
  std::string out, err;
};

/// Runs a program (no shell) in `folder` (default: the current one) and waits for it.
[[nodiscard]] RunResult run(const std::vector<std::string>& arguments, const std::filesystem::path& folder = {});
/// The built pyractl with the built plugins.
[[nodiscard]] RunResult pyractl(std::vector<std::string> arguments, const std::filesystem::path& folder = {});

/// max |a - b|, in double; infinity when shapes differ or either has a NaN.
[[nodiscard]] double max_difference(const at::Tensor& a, const at::Tensor& b);

}  // namespace pyra::test
