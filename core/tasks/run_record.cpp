#include "tasks/run_record.h"

#include <cmath>

#include "base/error.h"
#include "io/atomic_file.h"
#include "io/json.h"
#include "io/json_fields.h"
#include "tasks/run_folder.h"

namespace pyra::tasks {
namespace fs = std::filesystem;
namespace {

constexpr size_t kMaxMetrics = size_t{64} << 20;
constexpr int kMaxLineDepth = 8;
constexpr size_t kMaxCurves = 1000;  // trainings of a run: one a learning rate tried

/// run.toml is a file of the run here, not something the user typed.
io::Recipe read_resolved(const fs::path& path) {
  try {
    return io::read_recipe(path, {});
  } catch (const Error& error) {
    throw Error(ExitCode::input, error.what());
  }
}

double finite_number(const io::JsonFields& line, const char* key) {
  const double value = line.number(key);
  if (!std::isfinite(value)) line.refuse(key, "is not finite");
  return value;
}

double share(const io::JsonFields& line, const char* key) {
  const double value = line.number(key);
  if (!(value >= 0 && value <= 1)) line.refuse(key, cat("is ", value, ", expected 0 to 1"));
  return value;
}

/// Sorts the lines of metrics.jsonl into curves. Positions are steps until finish() knows how many an epoch has.
class CurveReader {
 public:
  void add(const io::JsonFields& line) {
    const std::string kind = line.string("kind");
    if (kind != "train" && kind != "eval") {
      line.refuse("kind", cat("is '", printable(kind), "', expected 'train' or 'eval'"));
    }
    Curve& curve = curve_of(line);
    const int64_t step = line.integer("step");
    if (step < 0) line.refuse("step", cat("is ", step, ", expected a count"));
    if (kind == "eval") {
      curve.split = line.string("split");
      curve.evaluations.push_back({.at = double(step), .accuracy = share(line, "accuracy")});
      return;
    }
    if (!curve.epochs.empty() && double(step) <= curve.epochs.back().at) {
      line.refuse("step", cat("is ", step, ", and the epoch before ended at ", curve.epochs.back().at));
    }
    curve.epochs.push_back({.at = double(step),
                            .loss = finite_number(line, "loss"),
                            .accuracy = share(line, "accuracy"),
                            .lr = finite_number(line, "lr")});
  }

  std::vector<Curve> finish() && {
    for (Curve& curve : curves_) {
      // The first epoch is whole unless training ended in it, and then it is all there is.
      const double first = curve.epochs.empty() ? 1 : std::max(1.0, curve.epochs.front().at);
      for (EpochPoint& point : curve.epochs) point.at /= first;
      for (EvaluationPoint& point : curve.evaluations) point.at /= first;
    }
    return std::move(curves_);
  }

 private:
  Curve& curve_of(const io::JsonFields& line) {
    const std::string training = line.string("training");
    if (!curves_.empty() && curves_.back().training == training) return curves_.back();
    if (curves_.size() == kMaxCurves) line.refuse("training", cat("is the ", kMaxCurves + 1, "th, too many"));
    return curves_.emplace_back(Curve{.training = training, .split = {}});
  }

  std::vector<Curve> curves_;
};

std::vector<Curve> read_curves(const fs::path& path) {
  const std::string text = io::read_file(path, kMaxMetrics);
  if (!text.ends_with('\n')) {
    fail(ExitCode::input, path.string(), text.empty() ? ": is empty" : ": ends in the middle of a line",
         "; the run is damaged");
  }
  CurveReader reader;
  int64_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    const std::string where = cat(path.string(), ":", ++number);
    const nlohmann::json line = io::parse_json(std::string_view(text).substr(begin, end - begin), where, kMaxLineDepth);
    reader.add({line, where});
    begin = end + 1;
  }
  return std::move(reader).finish();
}

/// The result must be one of the evaluations that were written down.
void check_same_run(const RunRecord& record, const RunFolder& run) {
  const Curve& last = record.curves.back();
  if (last.epochs.empty() || last.evaluations.empty()) {
    fail(ExitCode::input, run.metrics().string(), ": holds no ", last.epochs.empty() ? "epoch" : "evaluation",
         " of training '", printable(last.training), "'; the run is damaged");
  }
  for (const EvaluationPoint& point : last.evaluations) {
    if (point.accuracy == record.result.accuracy) return;
  }
  fail(ExitCode::input, run.report().string(), ": tells an accuracy of ", record.result.accuracy,
       " and no evaluation in ", run.metrics().string(), " does: they are not of one run");
}

int64_t bytes_in(const fs::path& folder) {
  int64_t bytes = 0;
  std::error_code error;
  for (auto entry = fs::directory_iterator(folder, error); !error && entry != fs::end(entry); entry.increment(error)) {
    if (entry->is_regular_file(error)) bytes += int64_t(entry->file_size(error));
  }
  return bytes;
}

}  // namespace

RunRecord read_run(const fs::path& folder) {
  const RunFolder run{folder};
  std::error_code error;
  if (!fs::is_directory(folder, error)) fail(ExitCode::input, folder.string(), ": is no run folder");
  if (!fs::exists(run.recipe(), error)) {
    fail(ExitCode::input, run.recipe().string(), ": is missing; expected a run folder of `pyractl finetune`");
  }
  if (!fs::exists(run.report(), error)) {
    fail(ExitCode::input, run.report().string(), ": is missing: the run is not finished; go on with it by `pyractl ",
         "finetune --out ", folder.string(), " --resume`");
  }
  RunRecord record{.folder = folder,
                   .name = fs::weakly_canonical(folder, error).filename().string(),
                   .recipe = read_resolved(run.recipe()),
                   .result = read_finetune_report(run.report()),
                   .curves = read_curves(run.metrics()),
                   .classes = {},
                   .base_fingerprint = {}};
  check_same_run(record, run);
  const AdapterInfo adapter = read_adapter_info(run);
  record.classes = adapter.classes.names;
  record.base_fingerprint = adapter.base_fingerprint;
  record.adapter_bytes = bytes_in(run.adapter());
  return record;
}

}  // namespace pyra::tasks
