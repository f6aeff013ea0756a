#include <charconv>

#include "base/error.h"
#include "data/catalogue.h"
#include "nn/config.h"

namespace pyra::data {
namespace {

constexpr const char* kLists[] = {"train800", "val200", "train800val200", "train", "val", "test"};

std::string_view trimmed_end(std::string_view line) {
  const size_t last = line.find_last_not_of(" \t\r");
  return line.substr(0, last == std::string_view::npos ? 0 : last + 1);
}

/// The lines of a text file, white space at their ends removed; blank ones are kept, so that numbers stay right.
std::vector<std::string> read_lines(const FileStore& store, const std::string& name) {
  const std::vector<uint8_t> bytes = store.read(name);
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
  if (space == std::string_view::npos) fail(ExitCode::input, where, ": got '", line, "'; expected 'path label'");
  const std::string_view path = trimmed_end(line.substr(0, space)), label = line.substr(space + 1);
  Sample sample;
  const auto [end, error] = std::from_chars(label.data(), label.data() + label.size(), sample.label);
  if (error != std::errc{} || end != label.data() + label.size()) {
    fail(ExitCode::input, where, ": label '", label, "' is not a number; expected 'path label'");
  }
  if (sample.label < 0 || sample.label >= classes) {
    fail(ExitCode::input, where, ": label ", sample.label, " is out of range; expected 0 to ", classes - 1);
  }
  const auto safe = safe_path(path);
  if (!safe) fail(ExitCode::input, where, ": path '", path, "' leads out of the data set");
  sample.path = root + *safe;
  return sample;
}

std::vector<Sample> read_list(const FileStore& store, const std::string& root, const std::string& list,
                              int64_t classes) {
  const std::vector<std::string> lines = read_lines(store, root + list);
  std::vector<Sample> samples;
  for (size_t i = 0; i < lines.size(); ++i) {
    if (lines[i].empty()) continue;
    const std::string where = cat(store.describe(root + list), ":", i + 1);
    samples.push_back(parse_line(lines[i], root, classes, where));
    samples.back().origin = cat(list, ":", i + 1);
  }
  if (samples.empty()) fail(ExitCode::input, store.describe(root + list), ": names no image");
  return samples;
}

}  // namespace

std::optional<Catalogue> read_lists(const FileStore& store, const std::string& root) {
  Catalogue catalogue;
  const std::string classes = root + "classes.txt";
  if (store.contains(classes)) catalogue.class_names = read_class_names(store, classes);
  const int64_t bound = catalogue.class_names.empty() ? nn::kMaxClasses : int64_t(catalogue.class_names.size());
  int64_t largest = 0;
  for (const std::string name : kLists) {
    const std::string list = name + ".txt";
    if (!store.contains(root + list)) continue;
    catalogue.splits.emplace_back(name, read_list(store, root, list, bound));
    for (const Sample& sample : catalogue.splits.back().second) largest = std::max(largest, sample.label);
  }
  if (catalogue.splits.empty()) return {};
  for (int64_t label = 0; int64_t(catalogue.class_names.size()) <= largest; ++label) {
    catalogue.class_names.push_back(std::to_string(label));
  }
  return catalogue;
}

}  // namespace pyra::data
