#include "tasks/data_check.h"

#include <algorithm>
#include <limits>
#include <map>
#include <set>
#include <tuple>

#include "base/error.h"
#include "data/survey.h"

namespace pyra::tasks {
namespace {

constexpr int64_t kSmallSide = 8, kMaxAspect = 4;
constexpr int64_t kCommonPercent = 95;

bool is_training(const std::string& split) {
  return split == "train" || split == "train800" || split == "train800val200";
}

/// Whether one split is made of the other, or both of the same images, by what they are called.
bool overlap_by_design(const std::string& a, const std::string& b, bool vtab) {
  static const std::set<std::string> kWhole{"train", "train800val200"}, kParts{"train800", "val200"};
  const auto contains = [&](const std::string& whole, const std::string& part) {
    return kWhole.contains(whole) && (kParts.contains(part) || kWhole.contains(part)) && vtab;
  };
  return contains(a, b) || contains(b, a);
}

/// One file of the data set and where it is listed.
struct File {
  data::Sample sample;  ///< the first that names it
  std::vector<std::string> splits;
};

class Check {
 public:
  Check(const DataCheckOptions& options, Progress& progress)
      : dataset_(data::Dataset::open(options.data, {.list = options.list, .faults = &report_.wrong_lines})) {
    report_.data = dataset_.path();
    report_.class_names = dataset_.class_names();
    vtab_ = dataset_.has_split("train800val200");
    for (const std::string& split : dataset_.splits()) read_split(split);
    std::vector<data::Sample> samples;
    samples.reserve(files_.size());
    for (const File& file : files_) samples.push_back(file.sample);
    looks_ = data::survey(dataset_, samples, progress);
  }

  DataCheck run() {
    report_.files = int64_t(files_.size());
    find_unreadable();
    find_sizes();
    find_duplicates();
    compare_classes();
    return std::move(report_);
  }

 private:
  void read_split(const std::string& name);
  void find_unreadable();
  void find_sizes();
  void find_duplicates();
  void compare_classes();
  void judge_group(const std::vector<size_t>& group);
  void note_leak(const File& file);
  [[nodiscard]] bool share_by_fault(const std::set<std::string>& splits) const;
  [[nodiscard]] std::string describe(size_t file) const { return dataset_.describe(files_[file].sample); }
  [[nodiscard]] SplitCheck& split(const std::string& name) {
    return *std::ranges::find(report_.splits, name, &SplitCheck::name);
  }

  DataCheck report_;  // first: opening the data set writes to it
  data::Dataset dataset_;
  bool vtab_ = false;
  std::vector<File> files_;
  std::map<std::string, size_t> by_path_;
  std::vector<data::Look> looks_;
};

void Check::read_split(const std::string& name) {
  SplitCheck split{.name = name, .images = 0, .unreadable = 0, .by_class = {}, .not_in_train = {}};
  split.by_class.resize(report_.class_names.size());
  for (const data::Sample& sample : dataset_.split(name)) {
    ++split.images;
    ++split.by_class.at(size_t(sample.label));
    const auto [found, is_new] = by_path_.emplace(sample.path, files_.size());
    if (is_new) {
      files_.push_back({sample, {name}});
      continue;
    }
    File& file = files_[found->second];
    if (file.sample.label != sample.label)
      report_.two_labels.push_back(cat(dataset_.describe(file.sample), " has label ", file.sample.label, ", and ",
                                       sample.origin.empty() ? sample.path : sample.origin, " gives it ",
                                       sample.label));
    if (file.splits.back() == name) {
      report_.listed_twice.push_back(dataset_.describe(sample));
    } else {
      file.splits.push_back(name);
    }
  }
  report_.splits.push_back(std::move(split));
}

void Check::find_unreadable() {
  for (size_t i = 0; i < files_.size(); ++i) {
    if (looks_[i].problem.empty()) continue;
    // The message opens with what the image is called.
    std::string reason = looks_[i].problem;
    if (const std::string name = describe(i) + ": "; reason.starts_with(name)) reason.erase(0, name.size());
    report_.unreadable.push_back({describe(i), reason});
    for (const std::string& name : files_[i].splits) ++split(name).unreadable;
  }
}

void Check::find_sizes() {
  std::map<std::pair<int64_t, int64_t>, int64_t> sizes;
  for (const data::Look& look : looks_)
    if (look.problem.empty()) ++sizes[{look.height, look.width}];
  if (sizes.empty()) return;
  const auto common = std::ranges::max_element(sizes, {}, [](const auto& item) { return item.second; });
  std::tie(report_.common_height, report_.common_width) = common->first;
  report_.of_common_size = common->second;
  const int64_t readable = report_.files - int64_t(report_.unreadable.size());
  const bool one_size = common->second * 100 >= readable * kCommonPercent;
  report_.smallest_side = std::numeric_limits<int64_t>::max();
  for (size_t i = 0; i < looks_.size(); ++i) {
    const data::Look& look = looks_[i];
    if (!look.problem.empty()) continue;
    const auto [low, high] = std::minmax(look.height, look.width);
    report_.smallest_side = std::min(report_.smallest_side, low);
    report_.largest_side = std::max(report_.largest_side, high);
    const std::string size = cat(look.width, " x ", look.height);
    if (low < kSmallSide) {
      report_.odd_sizes.push_back({describe(i), cat(size, ", a side below ", kSmallSide, " pixels")});
    } else if (high > kMaxAspect * low) {
      report_.odd_sizes.push_back({describe(i), cat(size, ", one side more than ", kMaxAspect, " times the other")});
    } else if (one_size && std::pair{look.height, look.width} != common->first) {
      report_.odd_sizes.push_back(
          {describe(i), cat(size, ", others have ", common->first.second, " x ", common->first.first)});
    }
    if (look.one_colour) report_.one_colour.push_back(describe(i));
  }
}

bool Check::share_by_fault(const std::set<std::string>& splits) const {
  for (auto a = splits.begin(); a != splits.end(); ++a)
    for (auto b = std::next(a); b != splits.end(); ++b)
      if (!overlap_by_design(*a, *b, vtab_)) return true;
  return false;
}

void Check::find_duplicates() {
  for (const File& file : files_) note_leak(file);
  std::map<data::Digest, std::vector<size_t>> groups;
  for (size_t i = 0; i < files_.size(); ++i)
    if (looks_[i].problem.empty()) groups[looks_[i].digest].push_back(i);
  std::vector<const std::vector<size_t>*> several;
  for (const auto& [digest, group] : groups)
    if (group.size() > 1) several.push_back(&group);
  // In the order in which the data set names them, not in that of their digests.
  std::ranges::sort(several, {}, [](const auto* group) { return group->front(); });
  for (const auto* group : several) judge_group(*group);
}

/// One file that is listed in two splits.
void Check::note_leak(const File& file) {
  const std::set<std::string> splits(file.splits.begin(), file.splits.end());
  if (share_by_fault(splits))
    report_.leaks.push_back({{dataset_.describe(file.sample)}, {splits.begin(), splits.end()}, false});
}

/// Files with equal pixels. Two of them leak when a split of one and a split of the other should share nothing; files
/// of train800 alone, say, stand in train800val200 too and are no more than duplicates.
void Check::judge_group(const std::vector<size_t>& group) {
  Duplicate duplicate;
  std::set<std::string> splits;
  bool leaks = false;
  for (const size_t i : group) {
    duplicate.images.push_back(describe(i));
    duplicate.labels_differ |= files_[i].sample.label != files_[group[0]].sample.label;
    const std::set<std::string> own(files_[i].splits.begin(), files_[i].splits.end());
    for (const std::string& mine : own)
      for (const std::string& theirs : splits) leaks |= mine != theirs && !overlap_by_design(mine, theirs, vtab_);
    splits.insert(own.begin(), own.end());
  }
  duplicate.splits.assign(splits.begin(), splits.end());
  (leaks ? report_.leaks : report_.duplicates).push_back(std::move(duplicate));
}

void Check::compare_classes() {
  std::vector<int64_t> trained(report_.class_names.size()), all(trained);
  bool has_training = false;
  report_.left_out = dataset_.left_out();
  for (const SplitCheck& split : report_.splits) {
    if (split.images == 0) report_.empty_splits.push_back(split.name);
    has_training |= is_training(split.name);
    for (size_t label = 0; label < all.size(); ++label) {
      all[label] += split.by_class[label];
      if (is_training(split.name)) trained[label] += split.by_class[label];
    }
  }
  for (size_t label = 0; label < all.size(); ++label) {
    const std::string& name = report_.class_names[label];
    if (all[label] == 0) report_.empty_classes.push_back(name);
    if (!has_training || trained[label] > 0) continue;
    for (SplitCheck& split : report_.splits)
      if (split.by_class[label] > 0) split.not_in_train.push_back(name);
  }
}

}  // namespace

int64_t DataCheck::warnings() const {
  size_t count = leaks.size() + duplicates.size() + listed_twice.size() + odd_sizes.size() + one_colour.size() +
                 empty_classes.size() + empty_splits.size() + left_out.size();
  for (const SplitCheck& split : splits) count += split.not_in_train.size();
  return int64_t(count);
}

DataCheck check_data(const DataCheckOptions& options, Progress& progress) {
  return Check(options, progress).run();
}

}  // namespace pyra::tasks
