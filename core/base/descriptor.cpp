#include "base/descriptor.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "base/error.h"

namespace pyra {
namespace {

struct stat stat_of(const Descriptor& file, const std::filesystem::path& path) {
  struct stat info {};
  if (fstat(file.get(), &info) != 0) fail(ExitCode::input, path.string(), ": cannot be read: ", system_reason(errno));
  return info;
}

}  // namespace

Descriptor::~Descriptor() {
  if (number_ >= 0) close(number_);
}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(number_, other.number_);
  return *this;
}

int Descriptor::release() {
  return std::exchange(number_, -1);
}

std::string system_reason(int error_number) {
  return std::system_category().message(error_number);
}

Descriptor open_for_reading(const std::filesystem::path& path) {
  Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0) fail(ExitCode::input, path.string(), ": cannot be opened: ", system_reason(errno));
  if (S_ISDIR(stat_of(file, path).st_mode)) {
    const bool is_run = std::filesystem::exists(path / "run.toml");
    fail(ExitCode::input, path.string(), ": is a folder, a file was expected",
         is_run ? "; a run becomes a model by `pyractl merge-lora`" : "");
  }
  return file;
}

uint64_t regular_size(const Descriptor& file, const std::filesystem::path& path) {
  const struct stat info = stat_of(file, path);
  if (!S_ISREG(info.st_mode)) fail(ExitCode::input, path.string(), ": is not a regular file");
  return uint64_t(info.st_size);
}

void read_at(const Descriptor& file, const std::filesystem::path& path, uint64_t offset, std::span<char> bytes) {
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t got = pread(file.get(), bytes.data() + done, bytes.size() - done, off_t(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(ExitCode::input, path.string(), ": cannot be read: ", system_reason(errno));
    if (got == 0) {
      fail(ExitCode::input, path.string(), ": became shorter while it was read: ", bytes.size(), " bytes expected at ",
           offset, ", got ", done);
    }
    done += size_t(got);
  }
}

}  // namespace pyra
