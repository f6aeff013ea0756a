// Files that are whole or not there: temporary file beside the target, fsync, rename, fsync of the folder.
#pragma once
#include <filesystem>
#include <string>
#include <string_view>

namespace pyra::io {

/// Written in pieces, visible under its name only after commit(); removed by the destructor otherwise.
/// A link is followed; the permissions of a file that is replaced are kept; folders, devices and pipes are
/// refused. Every failure throws Error(output) with path and the system's reason.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path target);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  void write(std::string_view bytes);
  void commit();

 private:
  std::filesystem::path target_, temporary_;
  int descriptor_ = -1;
};

/// A whole file at once, as AtomicFile does it.
void write_file(const std::filesystem::path& target, std::string_view bytes);

/// Gives a file that was written and closed the name `target`, in the same folder, replacing what is there at once.
void move_file(const std::filesystem::path& from, const std::filesystem::path& target);

/// The whole file, at most `limit` bytes; Error(input) naming the path otherwise.
[[nodiscard]] std::string read_file(const std::filesystem::path& path, size_t limit);

}  // namespace pyra::io
