// What is fuzzed: each reader with the files it starts from.
#pragma once
#include <filesystem>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "fuzz/mutator.h"

namespace pyra::fuzz {

/// A file that was read although it contradicts itself, or a message that helps nobody.
struct Finding : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Target {
  std::string name;
  std::vector<std::string> seeds;  ///< sound files
  std::vector<std::string> words;
  std::function<std::string(Random&, const std::string& seed, Words words)> forge;
  /// Throws Error where it is refused, Finding where it should have been.
  std::function<void(const std::string& bytes)> read;
  std::string named;  ///< what every message has to name
};

/// `folder` is there for the files to be read.
[[nodiscard]] std::vector<Target> all_targets(const std::filesystem::path& folder);

}  // namespace pyra::fuzz
