#include <archive.h>
#include <archive_entry.h>
#include <unistd.h>

#include <set>
#include <unordered_map>

#include "base/descriptor.h"
#include "base/error.h"
#include "data/file_store.h"

namespace pyra::data {
namespace {

constexpr size_t kMaxNameBytes = 4096;

struct Extent {
  uint64_t offset = 0, size = 0;
};
using Index = std::unordered_map<std::string, Extent>;

struct FreeArchive {
  void operator()(archive* reader) const { archive_read_free(reader); }
};
using Reader = std::unique_ptr<archive, FreeArchive>;

/// Members of a compressed archive have no place of their own in the file.
void refuse_compressed(int fd, const std::string& path) {
  static constexpr std::pair<std::string_view, const char*> kCompressed[] = {{"\x1f\x8b", "gzip"},
                                                                             {"\xfd"
                                                                              "7zXZ",
                                                                              "xz"},
                                                                             {"\x28\xb5\x2f\xfd", "zstd"},
                                                                             {"BZh", "bzip2"},
                                                                             {"PK\x03\x04", "zip"}};
  char magic[8] = {};
  const ssize_t count = pread(fd, magic, sizeof magic, 0);
  for (const auto& [prefix, tool] : kCompressed) {
    if (std::string_view(magic, count > 0 ? size_t(count) : 0).starts_with(prefix)) {
      fail(ExitCode::input, path, ": compressed (", tool,
           "); images are read in place, so unpack it to a plain .tar first");
    }
  }
}

/// The member's safe name, or nothing for what is no plain file inside the archive's root: folders, links, devices,
/// absolute names, "..", sparse files (their bytes do not lie in one piece).
std::optional<std::string> file_name(archive_entry* entry, const char* name) {
  if (archive_entry_filetype(entry) != AE_IFREG || archive_entry_hardlink(entry) || archive_entry_symlink(entry) ||
      archive_entry_sparse_count(entry) > 0) {
    return {};
  }
  if (!name || std::strlen(name) > kMaxNameBytes) return {};
  return safe_path(name);
}

struct Contents {
  Index files;
  std::set<std::string> left_out;
};

void add_member(archive* reader, archive_entry* entry, uint64_t file_size, const std::string& path,
                Contents& contents) {
  // In the C locale only one of the two spellings can be had, depending on how the archive was written.
  const char* spelt = archive_entry_pathname(entry);
  if (!spelt) spelt = archive_entry_pathname_utf8(entry);
  const auto name = file_name(entry, spelt);
  if (!name) {
    const bool hidden = spelt && safe_path(spelt) && is_hidden(spelt);
    if (spelt && archive_entry_filetype(entry) != AE_IFDIR && !hidden)
      contents.left_out.emplace(spelt, strnlen(spelt, kMaxNameBytes));
    return;
  }
  const auto size = archive_entry_size(entry), offset = archive_filter_bytes(reader, 0);
  if (size < 0 || offset < 0 || uint64_t(offset) > file_size || uint64_t(size) > file_size - uint64_t(offset)) {
    fail(ExitCode::input, path, ": member ", printable(*name), " of ", size, " bytes at ", offset,
         " does not fit in the archive's ", file_size, " bytes; the archive is cut or damaged");
  }
  // As tar itself does: a later member of the same name replaces an earlier one.
  contents.files.insert_or_assign(*name, Extent{uint64_t(offset), uint64_t(size)});
}

Contents read_contents(int fd, uint64_t file_size, const std::string& path) {
  const Reader reader(archive_read_new());
  if (!reader) fail(ExitCode::device, path, ": no memory for an archive reader");
  constexpr size_t kBlockBytes = 64 << 10;
  const auto refuse = [&] {
    const char* reason = archive_error_string(reader.get());
    fail(ExitCode::input, path,
         ": not a readable .tar: ", reason ? printable(reason, kMaxNameBytes) : "unknown reason");
  };
  if (archive_read_support_format_tar(reader.get()) != ARCHIVE_OK ||
      archive_read_open_fd(reader.get(), fd, kBlockBytes) != ARCHIVE_OK) {
    refuse();
  }
  Contents contents;
  for (size_t count = 0;; ++count) {
    archive_entry* entry = nullptr;
    const int status = archive_read_next_header(reader.get(), &entry);
    if (status == ARCHIVE_EOF) return contents;
    if (status < ARCHIVE_WARN) refuse();
    if (count == kMaxFiles) fail(ExitCode::input, path, ": more than ", kMaxFiles, " members");
    add_member(reader.get(), entry, file_size, path, contents);
  }
}

class TarStore final : public FileStore {
 public:
  explicit TarStore(const std::string& path) : path_(path), file_(open_for_reading(path)) {
    refuse_compressed(file_.get(), path);
    contents_ = read_contents(file_.get(), regular_size(file_, path), path);
  }

  bool contains(const std::string& name) const override { return contents_.files.contains(name); }

  std::vector<uint8_t> read(const std::string& name, uint64_t limit) const override {
    const auto found = contents_.files.find(name);
    if (found == contents_.files.end()) fail(ExitCode::input, describe(name), ": no such member");
    const Extent extent = found->second;
    if (extent.size > limit) fail(ExitCode::input, describe(name), ": ", extent.size, " bytes; at most ", limit);
    std::vector<uint8_t> bytes(extent.size);
    read_at(file_, describe(name), extent.offset, {reinterpret_cast<char*>(bytes.data()), bytes.size()});
    return bytes;
  }

  std::vector<std::string> names() const override {
    std::vector<std::string> found;
    for (const auto& [name, extent] : contents_.files) {
      if (!is_hidden(name)) found.push_back(name);
    }
    std::ranges::sort(found);
    return found;
  }

  std::vector<std::string> left_out() const override { return {contents_.left_out.begin(), contents_.left_out.end()}; }

  std::optional<std::string> only_folder() const override {
    std::optional<std::string> only;
    for (const auto& [name, extent] : contents_.files) {
      const size_t slash = name.find('/');
      if (slash == std::string::npos || is_hidden(name)) continue;
      if (only && name.substr(0, slash) != *only) return {};
      only = name.substr(0, slash);
    }
    return only;
  }

  std::string describe(const std::string& name) const override { return cat(path_, ": ", shown_name(name)); }

 private:
  std::string path_;
  Descriptor file_;
  Contents contents_;
};

}  // namespace

std::unique_ptr<FileStore> open_tar(const std::filesystem::path& path) {
  return std::make_unique<TarStore>(path.string());
}

}  // namespace pyra::data
