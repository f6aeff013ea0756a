// What is wrong with a data set, found before it is trained on: every image decoded, every label looked at.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/progress.h"

namespace pyra::tasks {

struct DataCheckOptions {
  std::filesystem::path data;  ///< folder or .tar
  std::filesystem::path list;  ///< one more list file to check beside the data set's own; empty: none
};

/// An image and what is to be said of it.
struct ImageNote {
  std::string image;  ///< as messages name it: "set.tar: images/1.png (test.txt:17)"
  std::string text;
};

/// Images of equal size and pixels, under different paths.
struct Duplicate {
  std::vector<std::string> images, splits;  ///< splits sorted, each once
  bool labels_differ = false;
};

struct SplitCheck {
  std::string name;
  int64_t images = 0, unreadable = 0;
  std::vector<int64_t> by_class;          ///< images, readable or not
  std::vector<std::string> not_in_train;  ///< classes of this split that no training image has
};

struct DataCheck {
  std::filesystem::path data;  ///< as found: see data::Dataset::open
  std::vector<std::string> class_names;
  std::vector<SplitCheck> splits;
  int64_t files = 0;  ///< different images, over all splits
  int64_t smallest_side = 0, largest_side = 0;
  int64_t common_height = 0, common_width = 0, of_common_size = 0;  ///< the size that most images have

  // Faults: the data cannot be used as they are.
  std::vector<std::string> wrong_lines;  ///< of list files: no label, a label out of range, a path that leads out
  std::vector<std::string> two_labels;   ///< one image listed with two labels
  std::vector<ImageNote> unreadable;     ///< missing or not decodable, with the reason
  // Warnings.
  std::vector<Duplicate> leaks;           ///< in two splits that should share no image
  std::vector<Duplicate> duplicates;      ///< within one split
  std::vector<std::string> listed_twice;  ///< the same line twice in a list
  std::vector<ImageNote> odd_sizes;
  std::vector<std::string> one_colour;
  std::vector<std::string> empty_classes;  ///< that have a name and no image in any split
  std::vector<std::string> empty_splits;
  std::vector<std::string> left_out;  ///< what is there and not looked at: data::Dataset::left_out

  [[nodiscard]] bool has_faults() const { return !wrong_lines.empty() || !two_labels.empty() || !unreadable.empty(); }
  [[nodiscard]] int64_t warnings() const;  ///< how many, of all kinds
};

/// Decodes every image once. Error(input) for what is no data set at all.
///
/// Splits that are made of one another (train800val200 and "train" of train800 and val200) share images and leak
/// nothing. Odd is a size with a side below 8 pixels, with one side more than 4 times the other, or, where at least
/// 95 % of the images have one size, another size.
[[nodiscard]] DataCheck check_data(const DataCheckOptions& options, Progress& progress = silent_progress());

}  // namespace pyra::tasks
