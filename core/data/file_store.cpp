#include "data/file_store.h"

#include <fstream>
#include <mutex>

#include "base/error.h"

namespace pyra::data {
namespace {

namespace fs = std::filesystem;

class FolderStore final : public FileStore {
 public:
  explicit FolderStore(fs::path root) : root_(std::move(root)) {}

  bool contains(const std::string& name) const override {
    std::error_code ignored;
    return fs::is_regular_file(root_ / name, ignored);
  }

  std::vector<uint8_t> read(const std::string& name, uint64_t limit) const override {
    const fs::path path = root_ / name;
    std::error_code error;
    const uint64_t size = fs::file_size(path, error);
    if (error) fail(ExitCode::input, describe(name), ": ", error.message());
    if (size > limit) fail(ExitCode::input, describe(name), ": ", size, " bytes; at most ", limit);
    std::vector<uint8_t> bytes(size);
    std::ifstream in(path, std::ios::binary);
    if (!in.read(reinterpret_cast<char*>(bytes.data()), std::streamsize(size))) {
      fail(ExitCode::input, describe(name), ": cannot be read");
    }
    return bytes;
  }

  std::vector<std::string> names() const override { return listing().files; }

  std::vector<std::string> left_out() const override { return listing().others; }

  std::optional<std::string> only_folder() const override {
    std::optional<std::string> only;
    for (const auto& item : items(root_)) {
      if (!item.is_directory() || is_hidden(item.path().filename().string())) continue;
      if (only) return {};
      only = item.path().filename().string();
    }
    return only;
  }

  std::string describe(const std::string& name) const override { return (root_ / shown_name(name)).string(); }

 private:
  static fs::directory_iterator items(const fs::path& folder) {
    std::error_code error;
    fs::directory_iterator found(folder, error);
    if (error) fail(ExitCode::input, folder.string(), ": ", error.message());
    return found;
  }

  struct Listing {
    std::vector<std::string> files, others;
  };

  /// Made by whoever asks first: a data set with list files asks never.
  const Listing& listing() const {
    std::call_once(listed_, [this] {
      Listing found;
      list("", 0, found);
      std::ranges::sort(found.files);
      std::ranges::sort(found.others);
      listing_ = std::move(found);
    });
    return listing_;
  }

  void add(std::string name, std::vector<std::string>& to) const {
    if (to.size() == kMaxFiles) fail(ExitCode::input, root_.string(), ": more than ", kMaxFiles, " files");
    to.push_back(std::move(name));
  }

  // Links to folders are followed, as data sets are often assembled from them; the depth bounds a cycle.
  void list(const std::string& below, int depth, Listing& found) const {
    if (depth == kMaxFolderDepth) return add(below.substr(0, below.size() - 1), found.others);
    for (const auto& item : items(root_ / below)) {
      const std::string name = item.path().filename().string();
      if (is_hidden(name)) continue;
      std::error_code ignored;
      if (item.is_directory(ignored))
        list(below + name + '/', depth + 1, found);
      else
        add(below + name, item.is_regular_file(ignored) ? found.files : found.others);
    }
  }

  fs::path root_;
  mutable std::once_flag listed_;
  mutable Listing listing_;
};

}  // namespace

std::unique_ptr<FileStore> open_store(const fs::path& path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (fs::is_directory(status)) return std::make_unique<FolderStore>(path);
  if (fs::is_regular_file(status)) return open_tar(path);
  fail(ExitCode::input, path.string(), ": ",
       fs::exists(status) ? "neither a folder nor a .tar" : "no such file or folder",
       "; a data set is a folder or a .tar");
}

std::optional<std::string> safe_path(std::string_view path) {
  if (path.starts_with('/') || path.find('\0') != std::string_view::npos) return {};
  std::string clean;
  for (const std::string& part : split(path, '/')) {
    if (part == "..") return {};
    if (part.empty() || part == ".") continue;
    if (!clean.empty()) clean += '/';
    clean += part;
  }
  if (clean.empty()) return {};
  return clean;
}

std::string shown_name(const std::string& name) {
  return printable(name, kMaxShownName);
}

bool is_hidden(std::string_view path) {
  return path.starts_with('.') || path.find("/.") != std::string_view::npos;
}

}  // namespace pyra::data
