#include <charconv>

#include "base/error.h"
#include "data/catalogue.h"
#include "nn/config.h"

namespace pyra::data {
namespace {

constexpr size_t kMaxFaults = 100'000;
constexpr const char* kLists[] = {"train800", "val200", "train800val200", "train", "val", "test"};

std::string_view trimmed_end(std::string_view line) {
  const size_t last = line.find_last_not_of(" \t\r");
  return line.substr(0, last == std::string_view::npos ? 0 : last + 1);
}

/// The lines of a text file, white space at their ends removed; blank ones are kept, so that numbers stay right.
std::vector<std::string> read_lines(const FileStore& store, const std::string& name) {
  const std::vector<uint8_t> bytes = store.read(name, kMaxListBytes);
  std::vector<std::string> lines = split({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, '\n');
  for (std::string& line : lines) line.resize(trimmed_end(line).size());
  return lines;
}

std::vector<std::string> read_class_names(const FileStore& store, const std::string& name) {
  std::vector<std::string> names = read_lines(store, name);
  while (!names.empty() && names.back().empty()) names.pop_back();
  if (names.empty() || names.size() > size_t(nn::kMaxClasses)) {
    fail(ExitCode::input, store.describe(name), ": ", names.size(), " classes; expected 1 to ", nn::kMaxClasses);
  }
  const auto blank = std::ranges::find(names, "");
  if (blank != names.end()) {
    fail(ExitCode::input, store.describe(name), ":", blank - names.begin() + 1, ": a blank line between class names");
  }
  return names;
}

/// A line "path label"; `where` is "list:line", `classes` bounds the label.
Sample parse_line(std::string_view line, const std::string& root, int64_t classes, const std::string& where) {
  // The path may hold spaces, the label cannot.
  const size_t space = line.rfind(' ');
  if (space == std::string_view::npos)
    fail(ExitCode::input, where, ": got '", printable(line), "'; expected 'path label'");
  const std::string_view path = trimmed_end(line.substr(0, space)), label = line.substr(space + 1);
  Sample sample;
  const auto [end, error] = std::from_chars(label.data(), label.data() + label.size(), sample.label);
  if (error != std::errc{} || end != label.data() + label.size()) {
    fail(ExitCode::input, where, ": label '", printable(label), "' is not a number; expected 'path label'");
  }
  if (sample.label < 0 || sample.label >= classes) {
    fail(ExitCode::input, where, ": label ", sample.label, " is out of range; expected 0 to ", classes - 1);
  }
  const auto safe = safe_path(path);
  if (!safe) fail(ExitCode::input, where, ": path '", printable(path), "' leads out of the data set");
  sample.path = root + *safe;
  return sample;
}

/// What `read` throws is a fault of the list, or ends it all where none are collected.
template <class Read>
void collect(Faults faults, Read&& read) {
  try {
    read();
  } catch (const Error& error) {
    if (!faults || error.code() != ExitCode::input || faults->size() == kMaxFaults) throw;
    faults->emplace_back(error.what());
  }
}

/// `list` is the file's name in `store`, `name` what a sample's origin calls it.
std::vector<Sample> read_list(const FileStore& store, const std::string& list, const std::string& name,
                              const std::string& root, int64_t classes, Faults faults) {
  const std::vector<std::string> lines = read_lines(store, list);
  std::vector<Sample> samples;
  for (size_t i = 0; i < lines.size(); ++i) {
    if (lines[i].empty()) continue;
    collect(faults, [&] {
      samples.push_back(parse_line(lines[i], root, classes, cat(store.describe(list), ":", i + 1)));
      samples.back().origin = cat(name, ":", i + 1);
    });
  }
  collect(faults, [&] {
    if (samples.empty()) fail(ExitCode::input, store.describe(list), ": names no image");
  });
  return samples;
}

/// Classes that no one named are called by their numbers.
void name_classes(Catalogue& catalogue) {
  int64_t largest = 0;
  for (const auto& [name, samples] : catalogue.splits)
    for (const Sample& sample : samples) largest = std::max(largest, sample.label);
  for (int64_t label = int64_t(catalogue.class_names.size()); label <= largest; ++label)
    catalogue.class_names.push_back(std::to_string(label));
}

}  // namespace

std::optional<Catalogue> read_lists(const FileStore& store, const std::string& root, Faults faults) {
  Catalogue catalogue;
  const std::string classes = root + "classes.txt";
  if (store.contains(classes)) catalogue.class_names = read_class_names(store, classes);
  const int64_t bound = catalogue.class_names.empty() ? nn::kMaxClasses : int64_t(catalogue.class_names.size());
  for (const std::string name : kLists) {
    const std::string list = name + ".txt";
    if (store.contains(root + list))
      catalogue.splits.emplace_back(name, read_list(store, root + list, list, root, bound, faults));
  }
  if (catalogue.splits.empty()) return {};
  catalogue.named = !catalogue.class_names.empty();
  name_classes(catalogue);
  return catalogue;
}

void add_list(Catalogue& catalogue, const std::filesystem::path& list, const std::string& root, Faults faults) {
  if (!std::filesystem::is_regular_file(list)) fail(ExitCode::input, list.string(), ": no such list file");
  const std::filesystem::path folder = list.has_parent_path() ? list.parent_path() : ".";
  const int64_t bound = catalogue.named ? int64_t(catalogue.class_names.size()) : nn::kMaxClasses;
  const std::string file = list.filename().string(), split = list.extension() == ".txt" ? list.stem().string() : file;
  std::erase_if(catalogue.splits, [&](const auto& item) { return item.first == split; });
  catalogue.splits.emplace_back(split, read_list(*open_store(folder), file, file, root, bound, faults));
  name_classes(catalogue);
}

}  // namespace pyra::data
