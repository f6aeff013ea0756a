// The start of a plugin project that compiles as it is.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

namespace pyra::tasks {

/// Writes CMakeLists.txt, <name>.cpp and README.md into `folder`, made if need be, and returns their paths. `kind` is
/// "merge" or "peft"; `name` is a lower-case C identifier. Error(usage) for another kind or name, and when one of the
/// files is already there: nothing is overwritten.
[[nodiscard]] std::vector<std::filesystem::path> new_plugin(const std::string& kind, const std::string& name,
                                                            const std::filesystem::path& folder);

}  // namespace pyra::tasks
