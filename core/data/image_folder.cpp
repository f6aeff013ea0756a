#include <set>

#include "base/error.h"
#include "base/philox.h"
#include "data/catalogue.h"
#include "data/image.h"
#include "nn/config.h"

namespace pyra::data {
namespace {

struct Found {
  std::string split, class_name, path;
};

/// Images below `root` with the folders they lie in; Error(input) when they lie at different depths.
std::vector<Found> find_images(const FileStore& store, const std::string& root) {
  std::vector<Found> images;
  size_t depth = 0;
  for (const std::string& path : store.names()) {
    if (!path.starts_with(root) || !is_image_name(path)) continue;
    const std::vector<std::string> parts = split(std::string_view(path).substr(root.size()), '/');
    if (depth == 0) depth = parts.size();
    if (parts.size() != depth || depth < 2 || depth > 3) {
      fail(ExitCode::input, store.describe(path),
           ": an image out of place; in an image folder all lie in <class>/<image> ",
           "or all in <split>/<class>/<image>, and ",
           images.empty() ? "this is the first" : store.describe(images[0].path),
           images.empty() ? "" : " does not lie as deep");
    }
    images.push_back({depth == 3 ? parts[0] : "", parts[depth - 2], path});
  }
  return images;
}

/// Not a run's seed: every command has to leave the same images untouched by training.
constexpr uint64_t kSplitSeed = 0;

/// A fifth of each class, rounded, chosen by the class's number alone, is "test", the rest "train".
std::vector<std::pair<std::string, std::vector<Sample>>> split_by_class(
    const std::vector<std::vector<Sample>>& classes) {
  std::vector<Sample> train, test;
  for (size_t label = 0; label < classes.size(); ++label) {
    const std::vector<Sample>& samples = classes[label];
    const size_t tests = (samples.size() * 2 + 5) / 10;
    std::vector<bool> is_test(samples.size());
    const auto order = Philox(kSplitSeed, RandomStream::split, label).permutation(int64_t(samples.size()));
    for (size_t i = 0; i < tests; ++i) is_test[size_t(order[i])] = true;
    for (size_t i = 0; i < samples.size(); ++i) (is_test[i] ? test : train).push_back(samples[i]);
  }
  return {{"train", std::move(train)}, {"test", std::move(test)}};
}

}  // namespace

std::optional<Catalogue> read_image_folder(const FileStore& store, const std::string& root) {
  const std::vector<Found> images = find_images(store, root);
  if (images.empty()) return {};
  std::set<std::string> names;
  for (const Found& image : images) names.insert(image.class_name);
  if (names.size() > size_t(nn::kMaxClasses)) {
    fail(ExitCode::input, store.describe(root), ": ", names.size(), " classes; at most ", nn::kMaxClasses);
  }
  Catalogue catalogue{.splits = {}, .class_names = {names.begin(), names.end()}, .named = true};
  std::map<std::string, std::vector<Sample>> splits;
  std::vector<std::vector<Sample>> classes(names.size());
  for (const Found& image : images) {
    const auto label =
        std::ranges::lower_bound(catalogue.class_names, image.class_name) - catalogue.class_names.begin();
    (image.split.empty() ? classes[size_t(label)] : splits[image.split]).push_back({image.path, label, {}});
  }
  if (splits.empty()) {
    catalogue.splits = split_by_class(classes);
  } else {
    catalogue.splits.assign(splits.begin(), splits.end());
  }
  return catalogue;
}

}  // namespace pyra::data
