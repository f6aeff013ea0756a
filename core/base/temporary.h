// Files that nobody sees and that are gone with the process, however it ends.
#pragma once
#include <filesystem>

#include "base/descriptor.h"

namespace pyra {

/// $TMPDIR where it is set, else /var/tmp where it can be written (it lies on a disk; /tmp is memory on many systems),
/// else /tmp. Whether it is there is not looked at.
[[nodiscard]] std::filesystem::path temporary_folder();

/// An empty file without a name in that folder, for reading and writing. Error(output) with folder and reason.
[[nodiscard]] Descriptor unnamed_file(const std::filesystem::path& folder);

}  // namespace pyra
