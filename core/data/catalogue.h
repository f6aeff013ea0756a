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
  bool named = false;  ///< by classes.txt or folders, so a label beyond them is wrong
};

/// Faults of lists go to `faults` where it is given, see OpenOptions.
using Faults = std::vector<std::string>*;

/// From list files below `root` ("" or "folder/"); nothing when there are none. Error(input) names list and line.
[[nodiscard]] std::optional<Catalogue> read_lists(const FileStore& store, const std::string& root,
                                                  Faults faults = nullptr);

/// Adds the split of a list file that lies anywhere; its paths begin at `root` of the data set.
void add_list(Catalogue& catalogue, const std::filesystem::path& list, const std::string& root, Faults faults);

/// From <split>/<class>/<image> or <class>/<image> below `root`, the latter split 80/20, class by class, always alike;
/// nothing when there are no images.
[[nodiscard]] std::optional<Catalogue> read_image_folder(const FileStore& store, const std::string& root);

}  // namespace pyra::data
