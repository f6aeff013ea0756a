// Pages that show what a merger does to an image: which patches become one token, block by block.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "base/progress.h"
#include "data/dataset.h"
#include "data/image.h"
#include "tasks/run_model.h"
#include "tasks/token_groups.h"

namespace pyra::tasks {

struct VisualizeOptions {
  RunOptions run;  ///< device and dtype play no part: the reference path on the CPU in fp32 computes what is shown
  std::filesystem::path data;
  std::string split = "test";
  int64_t images = 8;         ///< the first of the split
  std::filesystem::path out;  ///< folder; made where it is not there, pages of the same names are replaced
  data::BadImages bad_images = data::BadImages::fail;
};

struct VisualizeReport {
  std::filesystem::path index;               ///< a page with links to the others
  std::vector<std::filesystem::path> pages;  ///< one an image: "image-0001.html" …
};

/// Most images of one call.
inline constexpr int64_t kMaxVisualized = 10000;

/// Errors: usage for a model that merges no tokens or a count out of range; input as evaluate's; output. No file is
/// written before model and data are known to fit.
[[nodiscard]] VisualizeReport visualize(const VisualizeOptions& options, const host::PluginRegistry& plugins,
                                        Progress& progress = silent_progress());

/// What stands on one image's page.
struct TokenPicture {
  std::string path, label, prediction, model;
  double probability = 0;
  data::Image image;  ///< as the model sees it, size x size
  int64_t patch_size = 16, protected_tokens = 1;
  std::vector<TokenGroups> blocks;
};

/// The page: one SVG with the pixels as a PNG inside it and a panel for each block.
[[nodiscard]] std::string to_html(const TokenPicture& picture);

}  // namespace pyra::tasks
