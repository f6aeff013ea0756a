#include "io/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <utility>

#include "base/descriptor.h"
#include "base/error.h"

namespace pyra::io {
namespace fs = std::filesystem;
namespace {

[[noreturn]] void fail_writing(const fs::path& target, const std::string& reason) {
  fail(ExitCode::output, target.string(), ": cannot be written: ", reason);
}

fs::path folder_of(const fs::path& target) {
  return target.parent_path().empty() ? fs::path(".") : target.parent_path();
}

/// Where the bytes go: a link is followed, so that it stays a link. A rename over a device or a pipe would
/// take it away from everybody else, so only regular files are replaced.
fs::path resolved(const fs::path& target) {
  std::error_code error;
  const fs::path real = fs::is_symlink(target, error) ? fs::weakly_canonical(target, error) : target;
  if (error && error != std::errc::no_such_file_or_directory) fail_writing(target, error.message());
  const fs::file_status status = fs::status(real, error);
  if (fs::is_directory(status)) fail_writing(target, "it is a folder");
  if (fs::exists(status) && !fs::is_regular_file(status)) fail_writing(target, "it is not a regular file");
  if (real.filename().empty()) fail_writing(target, "the name is empty");
  if (!fs::is_directory(folder_of(real), error)) {
    fail_writing(target, cat("the folder ", folder_of(real).string(), " does not exist"));
  }
  return real;
}

/// Creates a new file beside `target`: the same filesystem, so that the rename is atomic.
Descriptor create_beside(const fs::path& target, fs::path& name) {
  for (int attempt = 0; attempt < 100; ++attempt) {
    name = folder_of(target) / cat(".pyra-", getpid(), "-", attempt, ".tmp");
    Descriptor file(open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    if (file.get() >= 0) return file;
    if (errno != EEXIST) break;
  }
  const int reason = errno;
  name.clear();
  fail_writing(target, system_reason(reason));
}

void sync_folder(const fs::path& folder, const fs::path& target) {
  const Descriptor handle(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (handle.get() < 0) return;  // a folder that may be written but not listed
  // Some network filesystems cannot sync a folder; the rename itself has succeeded there.
  if (fsync(handle.get()) != 0 && errno == EIO) fail_writing(target, system_reason(errno));
}

}  // namespace

AtomicFile::AtomicFile(fs::path target) : target_(resolved(target)) {
  Descriptor file = create_beside(target_, temporary_);
  struct stat old {};
  if (stat(target_.c_str(), &old) == 0 && fchmod(file.get(), old.st_mode & 0777) != 0) {
    const int reason = errno;
    unlink(temporary_.c_str());
    fail_writing(target_, system_reason(reason));
  }
  descriptor_ = file.release();
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) close(descriptor_);
  if (!temporary_.empty()) unlink(temporary_.c_str());
}

void AtomicFile::write(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t done = ::write(descriptor_, bytes.data(), bytes.size());
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail_writing(target_, system_reason(errno));
    bytes.remove_prefix(size_t(done));
  }
}

void AtomicFile::commit() {
  if (fsync(descriptor_) != 0) fail_writing(target_, system_reason(errno));
  // close() is where a network filesystem reports that the bytes did not arrive.
  if (close(std::exchange(descriptor_, -1)) != 0) fail_writing(target_, system_reason(errno));
  if (std::rename(temporary_.c_str(), target_.c_str()) != 0) fail_writing(target_, system_reason(errno));
  temporary_.clear();
  sync_folder(folder_of(target_), target_);
}

void write_file(const fs::path& target, std::string_view bytes) {
  AtomicFile file(target);
  file.write(bytes);
  file.commit();
}

void move_file(const fs::path& from, const fs::path& target) {
  const fs::path real = resolved(target);
  if (std::rename(from.c_str(), real.c_str()) != 0) fail_writing(target, system_reason(errno));
  sync_folder(folder_of(real), target);
}

std::string read_file(const fs::path& path, size_t limit) {
  const Descriptor file = open_for_reading(path);
  std::string bytes;
  // Grown as bytes arrive, never by the size a file claims: pipes and /proc have none.
  for (char buffer[1 << 16];;) {
    const ssize_t got = read(file.get(), buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(ExitCode::input, path.string(), ": cannot be read: ", system_reason(errno));
    if (got == 0) return bytes;
    if (size_t(got) > limit - bytes.size()) {
      fail(ExitCode::input, path.string(), ": is larger than ", limit, " bytes, the limit for such a file");
    }
    bytes.append(buffer, size_t(got));
  }
}

}  // namespace pyra::io
