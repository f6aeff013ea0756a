#include "io/zip_reader.h"

#include <archive.h>
#include <archive_entry.h>

#include <cstring>
#include <limits>
#include <set>

#include "base/descriptor.h"
#include "base/error.h"

namespace pyra::io {
namespace {

constexpr size_t kMaxNameBytes = 4096, kBlockBytes = 64 << 10;
constexpr std::string_view kZipMagic("PK\x03\x04", 4);

std::string name_of(archive_entry* entry) {
  // In the C locale only one of the two spellings can be had, depending on how the archive was written.
  const char* name = archive_entry_pathname(entry);
  if (!name) name = archive_entry_pathname_utf8(entry);
  return name ? std::string(name, strnlen(name, kMaxNameBytes + 1)) : "";
}

}  // namespace

struct ZipReader::State {
  struct Free {
    void operator()(archive* reader) const { archive_read_free(reader); }
  };

  std::filesystem::path path;
  ZipLimits limits;
  Descriptor file;
  std::unique_ptr<archive, Free> reader{archive_read_new()};
  Entry entry;
  uint64_t left = 0;  // of the entry
  size_t count = 0;
  uint64_t total = 0;
  std::set<std::string> names;

  [[nodiscard]] std::string where() const {
    return entry.name.empty() ? path.string() : cat(path.string(), ": ", printable(entry.name));
  }
  [[noreturn]] void refuse(const std::string& reason) const { fail(ExitCode::input, where(), ": ", reason); }
  [[noreturn]] void refuse_damaged() const {
    const char* reason = archive_error_string(reader.get());
    refuse(cat("not a readable zip archive: ", reason ? printable(reason) : "it is cut or damaged"));
  }
  void check(archive_entry* found);
};

void ZipReader::State::check(archive_entry* found) {
  entry.name = name_of(found);
  if (entry.name.empty() || entry.name.size() > kMaxNameBytes) {
    entry.name.clear();
    refuse(cat("holds an entry without a name, or with one of more than ", kMaxNameBytes, " bytes"));
  }
  if (archive_entry_is_encrypted(found)) refuse("is encrypted");
  if (archive_entry_filetype(found) != AE_IFREG) refuse("is no plain file");
  if (!archive_entry_size_is_set(found) || archive_entry_size(found) < 0) refuse("does not state its size");
  if (!names.insert(entry.name).second) refuse("stands twice in the archive");
  entry.size = left = uint64_t(archive_entry_size(found));
  if (entry.size > limits.bytes - total)
    refuse(cat("is stated as ", entry.size, " bytes, with which the archive would unpack to more than ", limits.bytes,
               ", the limit for a file of its size; a zip bomb?"));
  total += entry.size;
}

ZipReader::ZipReader(const std::filesystem::path& path, const ZipLimits& limits) : state_(std::make_unique<State>()) {
  State& state = *state_;
  if (!state.reader) throw std::bad_alloc();
  state.path = path;
  state.limits = limits;
  state.file = open_for_reading(path);
  (void)regular_size(state.file, path);
  // The directory at the archive's end is what counts: a reader of local headers alone may see other files.
  if (archive_read_support_format_zip_seekable(state.reader.get()) != ARCHIVE_OK ||
      archive_read_open_fd(state.reader.get(), state.file.get(), kBlockBytes) != ARCHIVE_OK)
    state.refuse_damaged();
}

ZipReader::~ZipReader() = default;

std::optional<ZipReader::Entry> ZipReader::next() {
  State& state = *state_;
  for (;;) {
    state.entry = {};
    archive_entry* found = nullptr;
    const int status = archive_read_next_header(state.reader.get(), &found);
    if (status == ARCHIVE_EOF) return {};
    if (status < ARCHIVE_WARN) state.refuse_damaged();
    // A mere warning for names in another character set, and for an entry whose own header contradicts the directory.
    const char* warning = status == ARCHIVE_WARN ? archive_error_string(state.reader.get()) : nullptr;
    if (warning && std::string_view(warning).starts_with("Inconsistent")) state.refuse_damaged();
    if (++state.count > state.limits.entries)
      state.refuse(cat("holds more than ", state.limits.entries, " entries, the limit for such a file"));
    if (archive_entry_filetype(found) == AE_IFDIR) continue;
    state.check(found);
    return state.entry;
  }
}

void ZipReader::read(std::span<char> bytes) {
  State& state = *state_;
  if (bytes.size() > state.left) state.refuse(cat("has ", state.entry.size, " bytes, too few for what it should hold"));
  for (size_t done = 0; done < bytes.size();) {
    const la_ssize_t got = archive_read_data(state.reader.get(), bytes.data() + done, bytes.size() - done);
    if (got < 0) state.refuse_damaged();
    if (got == 0) state.refuse(cat("is cut: ", bytes.size() - done, " bytes are missing"));
    done += size_t(got);
  }
  state.left -= bytes.size();
}

void ZipReader::finish() {
  State& state = *state_;
  if (state.left != 0) state.refuse(cat("has ", state.left, " bytes more than what it should hold"));
  char more = 0;
  const la_ssize_t got = archive_read_data(state.reader.get(), &more, 1);
  if (got > 0) state.refuse(cat("unpacks to more than the ", state.entry.size, " bytes it states"));
  if (got < 0) state.refuse_damaged();
}

std::string ZipReader::read_all() {
  std::string bytes(state_->left, '\0');
  read(bytes);
  finish();
  return bytes;
}

std::string ZipReader::where() const {
  return state_->where();
}

bool is_zip(const std::filesystem::path& path) {
  const Descriptor file = open_for_reading(path);
  char first[kZipMagic.size()] = {};
  if (regular_size(file, path) < sizeof first) return false;
  read_at(file, path, 0, first);
  return std::string_view(first, sizeof first) == kZipMagic;
}

std::optional<std::string> first_zip_entry(const std::filesystem::path& path) {
  if (!is_zip(path)) return {};
  try {
    constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();
    const auto entry = ZipReader(path, {.entries = 100, .bytes = kNoLimit}).next();
    if (entry) return entry->name;
  } catch (const Error&) {
    // Damaged: whoever reads it in earnest says how.
  }
  return {};
}

}  // namespace pyra::io
