// Where a result may go: not over what it is made from.
#pragma once
#include <filesystem>
#include <vector>

namespace pyra::io {

/// Error(usage) where `out` is there already and is one of the `inputs`, by whatever name, or lies in one that is a
/// folder: writing would destroy what was read. Inputs that are empty or not there are passed over.
void keep_inputs(const std::filesystem::path& out, const std::vector<std::filesystem::path>& inputs);

}  // namespace pyra::io
