// The file that `eval --predictions` writes, read back and counted: which class was taken for which.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace pyra::tasks {

/// The first line of such a file.
inline constexpr const char* kPredictionsHeader = "path,label,predicted,probability";

struct Confusion {
  std::filesystem::path file;
  int64_t classes = 0;  ///< known ones, or as many as the labels in the file need
  int64_t images = 0, correct = 0;
  std::map<std::pair<int64_t, int64_t>, int64_t> counts;  ///< by (label, predicted); only what occurs
};

/// What became of the images of one class.
struct ClassResult {
  int64_t images = 0, correct = 0;
  int64_t taken_for = -1, taken_images = 0;  ///< the wrong class most of them went to, the lowest of equals; -1: none
};

/// Reads the CSV (RFC 4180). `classes` 0: not known. Error(input) naming file and line: another header, a line that
/// has not four fields, a label that is no number or no class, a probability outside of 0 to 1, no image at all.
[[nodiscard]] Confusion read_predictions(const std::filesystem::path& file, int64_t classes);

/// By label.
[[nodiscard]] std::vector<ClassResult> class_results(const Confusion& confusion);

}  // namespace pyra::tasks
