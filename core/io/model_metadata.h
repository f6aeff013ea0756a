// What a model file says of itself beside its tensors: the metadata entry "pyra", a JSON object.
//   {"format": 1, "arch": {…}, "preprocess": {…}, "class_names": […], "merge": {…}, "provenance": {…}}
#pragma once
#include <string>
#include <string_view>

#include "io/model_file.h"

namespace pyra::io {

inline constexpr int64_t kModelFormat = 1;

/// Everything of `model` but its tensors.
[[nodiscard]] std::string model_metadata(const ModelFile& model);

/// The other way round. Error(input), `where` opens the text and the key is named: another format, a key that is
/// missing or of a wrong type, sizes that nn::check_config refuses, lists of a wrong length. Keys that format 1
/// does not have are ignored.
[[nodiscard]] ModelFile parse_model_metadata(std::string_view text, const std::string& where);

/// The shortest double that is this float again: 0.485, not 0.48500001430511475.
[[nodiscard]] double shortest(float value);

}  // namespace pyra::io
