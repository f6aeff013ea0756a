// One pass over a zip archive, by libarchive: .npz and torch.save's files are such.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>

namespace pyra::io {

/// What an archive may hold. Sizes are as its directory states them, and are summed before anything is unpacked.
struct ZipLimits {
  size_t entries = 0;
  uint64_t bytes = 0;  ///< of all entries together, unpacked
};

/// Errors are Error(input) naming the path, and the entry where there is one.
class ZipReader {
 public:
  struct Entry {
    std::string name;
    uint64_t size = 0;  ///< unpacked
  };

  ZipReader(const std::filesystem::path& path, const ZipLimits& limits);
  ~ZipReader();
  ZipReader(const ZipReader&) = delete;
  ZipReader& operator=(const ZipReader&) = delete;

  /// The next file, or nothing at the end; folders are passed over. An entry that is encrypted, is no plain file, has a
  /// name that stood before or no stated size is an error, and so is what goes beyond the limits.
  [[nodiscard]] std::optional<Entry> next();
  /// Fills `bytes` from where the last read of this entry ended.
  void read(std::span<char> bytes);
  /// After the entry's last byte: nothing may follow, and its checksum must be right.
  void finish();
  /// The whole entry, read and finished.
  [[nodiscard]] std::string read_all();
  /// "model.npz: cls.npy".
  [[nodiscard]] std::string where() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Whether a file opens as zip archives do.
[[nodiscard]] bool is_zip(const std::filesystem::path& path);

/// The name of the first file in a zip archive; nothing for a file that is no zip archive or holds no file.
[[nodiscard]] std::optional<std::string> first_zip_entry(const std::filesystem::path& path);

}  // namespace pyra::io
