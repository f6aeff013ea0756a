// Schedules as users write them -> how many tokens leave each block.
#include <charconv>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/toml.h"
#include "nn/config.h"

namespace pyra::nn {
namespace {

constexpr uintmax_t kMaxScheduleFile = 1 << 20;
constexpr int64_t kMaxRemove = 1 << 20;

using Counts = std::vector<int64_t>;

// arXiv 2403.09192 and its authors' settings, for 197 tokens (198 distilled).
const Counts kHigh12{40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3};
const Counts kHigh24{20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1};
constexpr int64_t kPublishedPatches = 196;

Counts repeated(std::initializer_list<std::pair<int64_t, int64_t>> value_and_times) {
  Counts counts;
  for (const auto& [value, times] : value_and_times) counts.insert(counts.end(), size_t(times), value);
  return counts;
}

Counts published(bool high, bool deep, bool distilled) {
  if (deep) return high ? kHigh24 : repeated({{8, 23}, {6, 1}});
  if (high) return kHigh12;
  return distilled ? repeated({{16, 6}, {10, 6}}) : repeated({{16, 11}, {10, 1}});
}

/// The published list as it is where it was published; elsewhere the same share of patches is gone at the
/// same relative depth.
Counts named(bool high, const VitConfig& config) {
  const bool deep = config.depth > 18;
  const Counts list = published(high, deep, config.distilled);
  const auto depth = int64_t(list.size());
  if (config.depth == depth && config.patches() == kPublishedPatches) return list;

  std::vector<double> gone(list.size() + 1, 0.0);  // patches gone after j published blocks
  for (size_t j = 0; j < list.size(); ++j) gone[j + 1] = gone[j] + double(list[j]);
  Counts counts;
  int64_t total = 0;
  for (int64_t i = 0; i < config.depth; ++i) {
    const double at = double(i + 1) * double(depth) / double(config.depth);
    const auto below = std::min(size_t(at), list.size() - 1);
    const double share = (gone[below] + (at - double(below)) * double(list[below])) / double(kPublishedPatches);
    const auto target = int64_t(std::llround(share * double(config.patches())));
    counts.push_back(target - total);
    total = target;
  }
  return counts;
}

/// (r, inflection) of ToMe: linear from int(r (1 - i)) to 2 r - that, each cut to int.
Counts inflected(int64_t r, double inflection, int64_t depth) {
  const double first = double(int64_t(double(r) * (1 - inflection)));
  const double last = 2.0 * double(r) - first;
  Counts counts;
  for (int64_t i = 0; i < depth; ++i) {
    const double share = depth > 1 ? double(i) / double(depth - 1) : 0.0;
    counts.push_back(int64_t(first + (last - first) * share));
  }
  return counts;
}

template <class Number>
Number parse_number(const std::string& text, const std::string& whole) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || text.empty())
    fail(ExitCode::usage, "schedule '", whole, "': '", text,
         "' is not a number; expected low, high, dense, N, N@inflection, a,b,c,… or a .toml or .json file");
  return value;
}

void check_counts(const Counts& counts, int64_t depth, const std::string& where, bool may_be_short) {
  const auto size = int64_t(counts.size());
  if (size > depth || (size < depth && !may_be_short))
    fail(ExitCode::usage, where, " has ", size, " entries, the model has ", depth, " blocks");
  for (size_t i = 0; i < counts.size(); ++i)
    if (counts[i] < 0 || counts[i] > kMaxRemove)
      fail(ExitCode::usage, where, ": entry ", i, " is ", counts[i], ", expected 0 to ", kMaxRemove);
}

std::string read_small(const std::string& path) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  if (error) fail(ExitCode::usage, "schedule file ", path, ": ", error.message());
  if (size > kMaxScheduleFile)
    fail(ExitCode::usage, "schedule file ", path, " has ", size, " bytes, a schedule has at most ", kMaxScheduleFile);
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

sdk::Schedule from_toml(const std::string& path, const VitConfig& config) {
  const toml::table table = parse_toml(read_small(path), "schedule " + path);
  sdk::Schedule schedule;
  const std::vector<std::string> known{"remove", "prune", "merge"};
  for (const auto& [key, node] : table) {
    const std::string name(key.str());
    const std::string where = cat("schedule ", path, ":", node.source().begin.line, ": ", name);
    Counts* counts = name == "remove"  ? &schedule.remove
                     : name == "prune" ? &schedule.prune
                     : name == "merge" ? &schedule.merge
                                       : nullptr;
    if (!counts) fail(ExitCode::usage, where, " is not a key", did_you_mean(name, known));
    const toml::array* values = node.as_array();
    if (!values) fail(ExitCode::usage, where, " is ", "no list; expected integers, one a block");
    for (const auto& value : *values) {
      if (!value.is_integer()) fail(ExitCode::usage, where, " holds something that is no integer");
      counts->push_back(value.as_integer()->get());
    }
    check_counts(*counts, config.depth, where, name == "remove");
  }
  return schedule;
}

/// DiffRate's published lists: {model: {GFLOPs: {"prune_kept_num": "[197, …]", "merge_kept_num": "[…]"}}}.
/// `selector` is "model/GFLOPs", or empty where the file holds just one list.
sdk::Schedule from_published(const std::string& path, const std::string& selector, const VitConfig& config) {
  using nlohmann::json;
  const json document = json::parse(read_small(path), nullptr, false);
  if (!document.is_object()) fail(ExitCode::usage, "schedule ", path, ": not a JSON object");
  std::vector<std::string> names;
  const json* chosen = nullptr;
  for (const auto& [model, lists] : document.items())
    for (const auto& [gflops, entry] : lists.items()) {
      names.push_back(model + "/" + gflops);
      if (selector.empty() || selector == names.back()) chosen = &entry;
    }
  if (!chosen || (selector.empty() && names.size() != 1))
    fail(ExitCode::usage, "schedule ", path, ": name one of its lists as ", path,
         "#MODEL/GFLOPS: ", join(std::span<const std::string>(names)));
  const auto counts = [&](const char* key) {
    const json list = chosen->contains(key) && (*chosen)[key].is_string()
                          ? json::parse((*chosen)[key].get<std::string>(), nullptr, false)
                          : chosen->value(key, json());
    const std::string where = cat("schedule ", path, ": ", key);
    if (!list.is_array()) fail(ExitCode::usage, where, " is missing or no list");
    Counts values;
    for (const json& value : list) {
      if (!value.is_number_integer()) fail(ExitCode::usage, where, " holds something that is no integer");
      values.push_back(value.get<int64_t>());
    }
    check_counts(values, config.depth, where, false);
    return values;
  };
  sdk::Schedule schedule;
  schedule.prune = counts("prune_kept_num");
  schedule.merge = counts("merge_kept_num");
  return schedule;
}

sdk::Schedule read_schedule(const std::string& text, const VitConfig& config) {
  const std::string::size_type hash = text.find('#');
  const std::string path = text.substr(0, hash);
  if (path.ends_with(".toml")) return from_toml(path, config);
  if (path.ends_with(".json"))
    return from_published(path, hash == std::string::npos ? "" : text.substr(hash + 1), config);

  sdk::Schedule schedule;
  if (text == "dense") {
    schedule.remove.assign(size_t(config.depth), 0);
  } else if (text == "low" || text == "high") {
    schedule.remove = named(text == "high", config);
  } else if (const auto at = text.find('@'); at != std::string::npos) {
    const auto inflection = parse_number<double>(text.substr(at + 1), text);
    if (!(inflection >= -1 && inflection <= 1))
      fail(ExitCode::usage, "schedule '", text, "': inflection ", inflection, " is outside -1 to 1");
    schedule.remove = inflected(parse_number<int64_t>(text.substr(0, at), text), inflection, config.depth);
  } else if (text.find(',') != std::string::npos) {
    for (const std::string& piece : split(text, ',')) schedule.remove.push_back(parse_number<int64_t>(piece, text));
  } else {
    schedule.remove.assign(size_t(config.depth), parse_number<int64_t>(text, text));
  }
  check_counts(schedule.remove, config.depth, cat("schedule '", text, "'"), true);
  return schedule;
}

}  // namespace

sdk::Schedule parse_schedule(const std::string& text, const VitConfig& config) {
  sdk::Schedule schedule = read_schedule(text, config);
  schedule.text = text;
  // A list shorter than the model is deep merges nothing in the blocks it does not name (ToMe).
  if (!schedule.remove.empty()) schedule.remove.resize(size_t(config.depth), 0);
  return schedule;
}

}  // namespace pyra::nn
