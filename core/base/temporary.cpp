#include "base/temporary.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

#include "base/error.h"

namespace pyra {

std::filesystem::path temporary_folder() {
  if (const char* asked = std::getenv("TMPDIR"); asked && *asked) return asked;
  return access("/var/tmp", W_OK | X_OK) == 0 ? "/var/tmp" : "/tmp";
}

Descriptor unnamed_file(const std::filesystem::path& folder) {
  Descriptor file(open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (file.get() >= 0) return file;
  std::string name = (folder / ".pyra-XXXXXX").string();  // not every file system has O_TMPFILE
  file = Descriptor(mkostemp(name.data(), O_CLOEXEC));
  if (file.get() < 0)
    fail(ExitCode::output, "no file can be made in ", folder.string(), ": ", system_reason(errno),
         "; TMPDIR names another folder");
  unlink(name.c_str());
  return file;
}

}  // namespace pyra
