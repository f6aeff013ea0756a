#include "base/folder_lock.h"

#include <fcntl.h>
#include <sys/file.h>

#include <cerrno>

#include "base/error.h"

namespace pyra {

FolderLock::FolderLock(const std::filesystem::path& folder)
    : folder_(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  if (folder_.get() < 0) fail(ExitCode::output, folder.string(), ": cannot be opened: ", system_reason(errno));
  if (flock(folder_.get(), LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;
  fail(ExitCode::usage, folder.string(),
       ": another pyractl is writing into it; wait for that one, or give another --out");
}

}  // namespace pyra
