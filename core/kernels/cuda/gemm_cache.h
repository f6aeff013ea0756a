// The algorithms that were found fastest, by shape, for one device and one version of its libraries.
#pragma once
#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

namespace pyra::kernels::cuda {

/// cuBLASLt's algorithm as it lets itself be written down: eight words.
using AlgorithmWords = std::array<uint64_t, 8>;

/// Thread-safe. The file is a convenience: one that is damaged, of another version or cannot be written is ignored.
class GemmCache {
 public:
  /// `file` may be empty: nothing is read or written. `version` names device, driver and library; entries of another
  /// version are not used.
  GemmCache(std::filesystem::path file, std::string version);

  /// The process's one for this file and version: engines made one after another agree at once.
  [[nodiscard]] static std::shared_ptr<GemmCache> shared(const std::filesystem::path& file, const std::string& version);

  [[nodiscard]] std::optional<AlgorithmWords> find(const std::string& shape) const;
  void add(const std::string& shape, const AlgorithmWords& words);
  /// Writes what was added since, whole or not at all. What another process wrote first stays there; what this one
  /// found or added stays here, so that all its passes agree.
  void save();

  /// $PYRA_CACHE_DIR, else $XDG_CACHE_HOME/pyra, else ~/.cache/pyra; empty where none is set or PYRA_CACHE_DIR is "".
  [[nodiscard]] static std::filesystem::path default_file();

 private:
  /// By version and shape: GPUs share a file.
  using Entries = std::map<std::pair<std::string, std::string>, AlgorithmWords>;
  [[nodiscard]] static Entries read(const std::filesystem::path& file);
  mutable std::mutex mutex_;
  std::filesystem::path file_;
  std::string version_;
  Entries entries_;
  bool changed_ = false;
};

}  // namespace pyra::kernels::cuda
