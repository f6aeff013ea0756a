// Which runs may be compared with which, the means of those that differ only in the seed, and the Pareto fronts.
#include <cmath>
#include <set>

#include "base/text.h"
#include "tasks/finetune_state.h"
#include "tasks/report.h"

namespace pyra::tasks {
namespace {

constexpr size_t kMaxDifferences = 3;  // named in an entry's name

using Settings = std::map<std::string, std::string>;

/// All that a result depends on but the seed: the recipe, and what stood behind "auto" and behind paths.
Settings settings_of(const RunRecord& run) {
  io::Recipe recipe = run.recipe;
  recipe.out.clear();
  recipe.seed = 0;
  recipe.train.checkpoint_every = 0;
  Settings settings = flatten_toml(io::to_toml(recipe));
  settings["model"] = run.base_fingerprint;
  settings["dtype"] = run.result.dtype;
  settings["merge"] = run.result.merge;
  return settings;
}

std::string board_of(const RunRecord& run) {
  const FinetuneReport& r = run.result;
  const std::string processor = r.processor.empty() ? "processor not recorded" : r.processor;
  return cat(run.recipe.data.string(), ", split ", r.test_split, ", protocol ", r.protocol,
             r.test_selected ? " (test-selected)" : "", ", ", r.device == "cpu" ? "cpu" : "cuda", ", ", processor,
             r.device == "cpu" ? ", " + std::to_string(r.threads) + (r.threads == 1 ? " thread" : " threads") : "");
}

Spread spread_of(const std::vector<double>& values) {
  Spread spread;
  for (const double value : values) spread.mean += value / double(values.size());
  if (values.size() < 2) return spread;
  double squares = 0;
  for (const double value : values) squares += (value - spread.mean) * (value - spread.mean);
  spread.deviation = std::sqrt(squares / double(values.size() - 1));
  return spread;
}

void measure(ReportEntry& entry, const std::vector<RunRecord>& runs, Speed speed) {
  std::vector<double> accuracies, speeds;
  for (const size_t run : entry.runs) {
    accuracies.push_back(runs[run].result.accuracy);
    speeds.push_back(images_per_second(runs[run].result, speed));
  }
  entry.accuracy = spread_of(accuracies);
  entry.images_per_second = spread_of(speeds);
}

void mark_front(std::vector<ReportEntry>& entries) {
  for (ReportEntry& entry : entries) {
    const auto beats = [&](const ReportEntry& other) {
      const double accuracy = other.accuracy.mean - entry.accuracy.mean;
      const double speed = other.images_per_second.mean - entry.images_per_second.mean;
      return accuracy >= 0 && speed >= 0 && (accuracy > 0 || speed > 0);
    };
    entry.front = std::none_of(entries.begin(), entries.end(), beats);
  }
}

/// How a name tells a setting: the model by its file, everything else as TOML.
std::string shown(const std::string& key, const RunRecord& run, const Settings& settings) {
  if (key == "model") return run.recipe.model.filename().string();
  const auto found = settings.find(key);
  return cat(key, " = ", found == settings.end() ? "not set" : found->second);
}

/// Keys that have not the same value, or none, in all of them.
std::set<std::string> varying_keys(const std::vector<const Settings*>& all) {
  std::set<std::string> keys;
  const Settings& first = *all.front();
  for (const Settings* other : all) {
    for (const auto& [key, value] : *other)
      if (const auto found = first.find(key); found == first.end() || found->second != value) keys.insert(key);
    for (const auto& [key, value] : first)
      if (!other->contains(key)) keys.insert(key);
  }
  return keys;
}

/// "lora, pyra-high" and, where several groups are called so, the settings in which they differ.
std::string group_name(const RunRecord& run, const Settings& settings, const std::set<std::string>& varying) {
  std::vector<std::string> differences;
  for (const std::string& key : varying) {
    differences.push_back(differences.size() < kMaxDifferences ? shown(key, run, settings) : "…");
    if (differences.size() > kMaxDifferences) break;
  }
  const std::string method = method_of(run.result);
  return differences.empty() ? method : cat(method, " (", join(differences, "; "), ")");
}

/// The runs of a board, one entry a group.
std::vector<ReportEntry> grouped_entries(const std::vector<RunRecord>& runs, const std::vector<size_t>& members) {
  std::map<Settings, std::vector<size_t>> groups;
  for (const size_t run : members) groups[settings_of(runs[run])].push_back(run);
  std::map<std::string, std::vector<const Settings*>> namesakes;
  for (const auto& [settings, group] : groups) namesakes[method_of(runs[group.front()].result)].push_back(&settings);
  std::map<std::string, std::set<std::string>> varying;
  for (const auto& [method, all] : namesakes) varying[method] = varying_keys(all);
  std::vector<ReportEntry> entries;
  for (const auto& [settings, group] : groups) {
    const RunRecord& first = runs[group.front()];
    entries.push_back({.name = group_name(first, settings, varying[method_of(first.result)]), .runs = group});
  }
  return entries;
}

}  // namespace

std::vector<ReportBoard> compare_runs(const std::vector<RunRecord>& runs, bool grouped, Speed speed) {
  std::map<std::string, std::vector<size_t>> members;
  for (size_t run = 0; run < runs.size(); ++run) members[board_of(runs[run])].push_back(run);
  std::vector<ReportBoard> boards;
  for (const auto& [caption, indices] : members) {
    ReportBoard board{.caption = caption, .entries = {}};
    if (grouped) {
      board.entries = grouped_entries(runs, indices);
    } else {
      for (const size_t run : indices) board.entries.push_back({.name = runs[run].name, .runs = {run}});
    }
    for (ReportEntry& entry : board.entries) measure(entry, runs, speed);
    mark_front(board.entries);
    std::stable_sort(board.entries.begin(), board.entries.end(),
                     [](const ReportEntry& a, const ReportEntry& b) { return a.accuracy.mean > b.accuracy.mean; });
    boards.push_back(std::move(board));
  }
  return boards;
}

}  // namespace pyra::tasks
