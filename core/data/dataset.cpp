#include "data/dataset.h"

#include "base/error.h"
#include "data/catalogue.h"
#include "data/file_store.h"
#include "data/image.h"

namespace pyra::data {

struct Dataset::State {
  std::filesystem::path path;
  std::unique_ptr<FileStore> store;
  Catalogue catalogue;
};

namespace {

/// The folders a data set's own root may be: where it was opened, or the only folder there.
std::vector<std::string> possible_roots(const FileStore& store) {
  std::vector<std::string> roots{""};
  if (const auto folder = store.only_folder()) roots.push_back(*folder + '/');
  return roots;
}

Catalogue read_catalogue(const FileStore& store, const std::filesystem::path& path, const OpenOptions& options) {
  const std::vector<std::string> roots = possible_roots(store);
  const auto with_list = [&](Catalogue catalogue, const std::string& root) {
    if (!options.list.empty()) add_list(catalogue, options.list, root, options.faults);
    return catalogue;
  };
  for (const std::string& root : roots) {
    if (auto lists = read_lists(store, root, options.faults)) return with_list(std::move(*lists), root);
  }
  // <folder>/<class>/<image> looks like one split; only a folder named as splits are is one.
  static constexpr std::string_view kSplitNames[] = {"train/", "val/", "test/"};
  const std::string& last = roots.back();
  const bool is_split = std::ranges::find(kSplitNames, last) != std::end(kSplitNames);
  const std::string root = is_split ? "" : last;
  if (auto folders = read_image_folder(store, root)) return with_list(std::move(*folders), root);
  fail(ExitCode::input, path.string(),
       ": no data set: neither list files (train800.txt, val200.txt, train800val200.txt, ",
       "train.txt, val.txt, test.txt) nor images in <class>/<image> or <split>/<class>/<image>");
}

/// Names of VTAB's tasks that NOAH's and PYRA's copies of it spell otherwise than its paper does.
constexpr std::pair<std::string_view, std::string_view> kAliases[] = {{"cifar", "cifar100"},
                                                                      {"oxford_pet", "oxford_iiit_pet"}};

std::filesystem::path existing_spelling(const std::filesystem::path& path) {
  std::error_code error;
  if (std::filesystem::exists(path, error)) return path;
  const std::filesystem::path plain = path.has_filename() ? path : path.parent_path();  // "task/"
  const std::string end = plain.extension() == ".tar" ? ".tar" : "";
  for (const auto& [one, other] : kAliases)
    for (const auto& [from, to] : {std::pair{one, other}, std::pair{other, one}}) {
      const std::filesystem::path spelling = plain.parent_path() / cat(to, end);
      if (plain.filename() == cat(from, end) && std::filesystem::exists(spelling, error)) return spelling;
    }
  return path;
}

const std::vector<Sample>* find(const Catalogue& catalogue, const std::string& name) {
  for (const auto& [split, samples] : catalogue.splits) {
    if (split == name) return &samples;
  }
  return name == "train" ? find(catalogue, "train800val200") : nullptr;
}

}  // namespace

Dataset::Dataset(std::shared_ptr<State> state) : state_(std::move(state)) {}
Dataset::~Dataset() = default;
Dataset::Dataset(Dataset&&) noexcept = default;
Dataset& Dataset::operator=(Dataset&&) noexcept = default;

Dataset Dataset::open(const std::filesystem::path& path) {
  return open(path, OpenOptions{});
}

Dataset Dataset::open(const std::filesystem::path& path, const OpenOptions& options) {
  auto state = std::make_shared<State>();
  state->path = existing_spelling(path);
  state->store = open_store(state->path);
  state->catalogue = read_catalogue(*state->store, state->path, options);
  return Dataset(std::move(state));
}

Dataset Dataset::unlabelled(const std::filesystem::path& path) {
  auto state = std::make_shared<State>();
  state->path = path;
  state->store = open_store(path);
  std::vector<Sample> samples;
  for (std::string& name : state->store->names())
    if (is_image_name(name)) samples.push_back({.path = std::move(name), .label = 0, .origin = {}});
  if (samples.empty())
    fail(ExitCode::input, path.string(), ": no image in it (",
         join(std::vector<std::string>(std::begin(kImageEndings), std::end(kImageEndings))), ")");
  state->catalogue = {.splits = {{kUnlabelled, std::move(samples)}}, .class_names = {"0"}, .named = false};
  return Dataset(std::move(state));
}

const std::filesystem::path& Dataset::path() const {
  return state_->path;
}
const std::vector<std::string>& Dataset::class_names() const {
  return state_->catalogue.class_names;
}
int64_t Dataset::num_classes() const {
  return int64_t(class_names().size());
}

std::vector<std::string> Dataset::splits() const {
  std::vector<std::string> names;
  for (const auto& [name, samples] : state_->catalogue.splits) names.push_back(name);
  return names;
}

bool Dataset::has_split(const std::string& name) const {
  return find(state_->catalogue, name) != nullptr;
}

const std::vector<Sample>& Dataset::split(const std::string& name) const {
  if (const auto* samples = find(state_->catalogue, name)) return *samples;
  std::vector<std::string> there = splits();  // names of folders, which others chose
  for (std::string& split : there) split = printable(split);
  fail(ExitCode::input, path().string(), ": no split '", printable(name), "'; there are ", join(there));
}

std::string Dataset::describe(const Sample& sample) const {
  const std::string file = state_->store->describe(sample.path);
  return sample.origin.empty() ? file : cat(file, " (", sample.origin, ")");
}

std::vector<std::string> Dataset::left_out() const {
  std::vector<std::string> names = state_->store->left_out();
  for (std::string& name : names) name = state_->store->describe(name);
  return names;
}

std::vector<uint8_t> Dataset::read(const Sample& sample) const {
  if (!state_->store->contains(sample.path)) fail(ExitCode::input, describe(sample), ": the image is missing");
  return state_->store->read(sample.path, kMaxImageBytes);
}

}  // namespace pyra::data
