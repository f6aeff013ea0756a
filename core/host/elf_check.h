// A look at a shared object before the loader maps it: a file that was cut short passes the loader's own checks and
// ends the process with SIGBUS when its missing pages are touched.
#pragma once
#include <filesystem>
#include <string>

namespace pyra::host {

/// Why `file` cannot be a whole shared object for this machine, or "".
[[nodiscard]] std::string check_elf(const std::filesystem::path& file);

}  // namespace pyra::host
