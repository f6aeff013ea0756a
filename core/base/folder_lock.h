// A folder that one process at a time writes into.
#pragma once
#include <filesystem>

#include "base/descriptor.h"

namespace pyra {

/// Held from construction to destruction, also by a process that is killed; it leaves no file behind. Error(usage)
/// where another process holds it, Error(output) where the folder cannot be opened. A file system that knows no locks
/// has none.
class FolderLock {
 public:
  explicit FolderLock(const std::filesystem::path& folder);

 private:
  Descriptor folder_;
};

}  // namespace pyra
