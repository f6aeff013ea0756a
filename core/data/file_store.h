// Where a data set's files lie: a folder, or the inside of an uncompressed .tar. Inside the room only.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace pyra::data {

/// Files by their path below the root, with '/' between folders. Thread-safe once open.
class FileStore {
 public:
  virtual ~FileStore() = default;
  [[nodiscard]] virtual bool contains(const std::string& name) const = 0;
  /// Error(input) when it is missing, larger than `limit` bytes or cannot be read whole.
  [[nodiscard]] virtual std::vector<uint8_t> read(const std::string& name, uint64_t limit) const = 0;
  /// All regular files that are not hidden, sorted; a folder is searched kMaxFolderDepth deep.
  [[nodiscard]] virtual std::vector<std::string> names() const = 0;
  /// What is there and not among the files, sorted: links that lead nowhere, folders that lie too deep; in a .tar
  /// links, devices, sparse files and names that lead out of the root. Nothing hidden.
  [[nodiscard]] virtual std::vector<std::string> left_out() const = 0;
  /// The name of the one folder at the root, if there is exactly one.
  [[nodiscard]] virtual std::optional<std::string> only_folder() const = 0;
  /// How messages name a file: "set/images/1.png", "set.tar: images/1.png". Others chose the name: control characters
  /// in it are escaped.
  [[nodiscard]] virtual std::string describe(const std::string& name) const = 0;
};

inline constexpr int kMaxFolderDepth = 8;
inline constexpr size_t kMaxFiles = 10'000'000;
inline constexpr uint64_t kMaxListBytes = 1ull << 31;

/// A folder's or a .tar's, by what `path` is; Error(input).
[[nodiscard]] std::unique_ptr<FileStore> open_store(const std::filesystem::path& path);
[[nodiscard]] std::unique_ptr<FileStore> open_tar(const std::filesystem::path& path);

/// The path without "." and doubled slashes; nothing for an absolute one, one with "..", and the empty one: what
/// others wrote must not lead out of the root.
[[nodiscard]] std::optional<std::string> safe_path(std::string_view path);

/// A name from a data set, for messages.
[[nodiscard]] std::string shown_name(const std::string& name);
inline constexpr size_t kMaxShownName = 1024;

/// Whether a file or one of its folders is hidden: its name begins with a dot.
[[nodiscard]] bool is_hidden(std::string_view path);

}  // namespace pyra::data
