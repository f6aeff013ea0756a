#include "train/metrics_log.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "base/error.h"

namespace pyra::train {
namespace {

[[noreturn]] void fail_writing(const std::filesystem::path& path) {
  fail(ExitCode::output, path.string(), ": cannot be written: ", std::strerror(errno));
}

}  // namespace

MetricsLog::MetricsLog(std::filesystem::path path, int64_t keep) : path_(std::move(path)) {
  descriptor_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
  struct stat status {};
  if (descriptor_ < 0 || fstat(descriptor_, &status) != 0) fail_writing(path_);
  size_ = std::min<int64_t>(keep, status.st_size);
  if (ftruncate(descriptor_, size_) != 0 || lseek(descriptor_, size_, SEEK_SET) != size_) fail_writing(path_);
}

MetricsLog::~MetricsLog() {
  if (descriptor_ >= 0) close(descriptor_);
}

void MetricsLog::append(std::string_view json) {
  std::string line(json);
  line += '\n';
  for (size_t done = 0; done < line.size();) {
    const ssize_t written = write(descriptor_, line.data() + done, line.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail_writing(path_);
    done += size_t(written);
  }
  size_ += int64_t(line.size());
}

int64_t MetricsLog::synced_size() {
  // A pipe or a device given as the log cannot be synced, and need not be.
  if (fsync(descriptor_) != 0 && errno == EIO) fail_writing(path_);
  return size_;
}

}  // namespace pyra::train
