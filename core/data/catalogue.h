// What a data set holds, as read from list files or from folders. Inside the room only.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "data/dataset.h"
#include "data/file_store.h"

namespace pyra::data {

struct Catalogue {
  std::vector<std::pair<std::string, std::vector<Sample>>> splits;
  std::vector<std::string> class_names;
};

/// From list files below `root` ("" or "folder/"); nothing when there are none. Error(input) names list and line.
[[nodiscard]] std::optional<Catalogue> read_lists(const FileStore& store, const std::string& root);

/// From <split>/<class>/<image> or <class>/<image> below `root`, the latter split 80/20 by `seed`, class by class;
/// nothing when there are no images.
[[nodiscard]] std::optional<Catalogue> read_image_folder(const FileStore& store, const std::string& root,
                                                         uint64_t seed);

}  // namespace pyra::data
