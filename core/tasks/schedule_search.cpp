#include "tasks/schedule_search.h"

#include <charconv>
#include <cmath>
#include <cstdio>

#include "base/error.h"
#include "tasks/latency_model.h"

namespace pyra::tasks {
namespace {

// A probe is aimed this much above what was asked for, so that the same measurement made again meets it too.
constexpr double kMargin = 1.01;
constexpr double kTolerance = 1.03;  // beyond this, tokens are given back

constexpr int64_t kAccuracyImages = 1000;

double positive_number(const std::string& text, const std::string& what) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || !(value > 0) || !std::isfinite(value))
    fail(ExitCode::usage, what, " is '", text, "', expected ",
         what.find("macs") != what.npos ? "a share of the dense model's multiply-adds (0.5) or a count (6.2e8)"
                                        : "a number above 1");
  return value;
}

class Finder {
 public:
  Finder(Model& model, const ScheduleGoal& goal, const SearchContext& context, Progress& progress)
      : model_(model),
        config_(model.file.config),
        goal_(goal),
        context_(context),
        progress_(progress),
        dense_(model.file.config, model.file.weights) {
    attach(RemovalCounts(size_t(config_.depth), 0));
    merger_ = model_.vit->merge()->merger;
  }

  FoundSchedule run() {
    const double target = goal_.speedup ? fit_latency() : macs_target();
    solve(target);
    if (goal_.speedup && goal_.latency_table.empty() && confirm(target)) judge_again();
    attach(found_.remove);
    if (!goal_.data.empty() && found_.likeness) measure_accuracy();
    return found_;
  }

 private:
  void attach(const RemovalCounts& remove) {
    attach_merge(model_, context_.plugins, context_.choice, join(remove, ","), context_.proportional_attention,
                 context_.fresh_seed);
  }
  [[nodiscard]] double likeness_of(const RemovalCounts& remove) {
    attach(remove);
    return likeness_->of(model_);
  }
  [[nodiscard]] std::vector<int64_t> leaving(const RemovalCounts& remove) const {
    sdk::Schedule schedule{.text = {}, .remove = remove, .prune = {}, .merge = {}};
    return merger_->tokens_after(merger_->resolve(schedule, config_.shape()), config_.shape());
  }
  [[nodiscard]] TokenPath path(const RemovalCounts& remove) const { return {config_.tokens(), leaving(remove)}; }
  [[nodiscard]] double macs(const RemovalCounts& remove) const {
    return double(nn::count_macs(config_, leaving(remove)));
  }
  [[nodiscard]] RemovalCounts everything() const { return RemovalCounts(size_t(config_.depth), config_.tokens() / 2); }
  [[nodiscard]] std::string name() const { return context_.choice.name; }

  [[nodiscard]] double macs_target() const;
  double fit_latency();
  void measure_samples(std::vector<LatencySample>& samples);
  void read_samples(std::vector<LatencySample>& samples) const;
  void solve(double target);
  bool confirm(double target);
  void judge_again();
  void measure_accuracy();
  [[nodiscard]] Timing probe(const RemovalCounts& remove, int64_t pairs, double seconds);
  [[noreturn]] void give_up(const Timing& best) const;
  [[nodiscard]] JudgeImages judge_images() const;
  [[nodiscard]] double cost(const RemovalCounts& remove) const {
    return goal_.speedup ? latency_.time(path(remove)) / dense_time_ : macs(remove);
  }
  [[nodiscard]] const Stopwatch& stopwatch() {
    if (!stopwatch_) stopwatch_.emplace(dense_, model_.file.preprocess, context_.engine, context_.batch);
    return *stopwatch_;
  }

  Model& model_;
  const nn::VitConfig config_;
  const ScheduleGoal& goal_;
  const SearchContext& context_;
  Progress& progress_;
  nn::Vit dense_;
  std::shared_ptr<const sdk::TokenMerger> merger_;
  std::optional<Stopwatch> stopwatch_;
  std::optional<Likeness> likeness_;
  LatencyModel latency_;
  double dense_time_ = 1;
  FoundSchedule found_;
};

double Finder::macs_target() const {
  const int64_t dense = nn::count_macs(config_), target = wanted_macs(goal_.macs, dense);
  if (const double least = macs(everything()); least > double(target))
    fail(ExitCode::usage, "--target-macs ", goal_.macs, " is ", target, " multiply-adds, and the most that ", name(),
         " can remove from this model leaves ", int64_t(least), " (", fixed(least / double(dense), 3), " of dense)");
  return double(target);
}

Timing Finder::probe(const RemovalCounts& remove, int64_t pairs, double seconds) {
  attach(remove);
  return stopwatch().time(*model_.vit, pairs, seconds);
}

void Finder::give_up(const Timing& best) const {
  char text[256];
  std::snprintf(text, sizeof text,
                "a speed-up of %.2f was not reached: the fastest schedule tried runs %.2fx as fast as dense "
                "(quartiles %.2f to %.2f, batch time %.4f s against %.4f s); no file was written",
                *goal_.speedup, best.speedup, best.low, best.high, best.compressed, best.dense);
  fail(ExitCode::untrusted, text);
}

/// A handful of schedules of different shapes, each beside dense.
void Finder::measure_samples(std::vector<LatencySample>& samples) {
  std::vector<RemovalCounts> schedules{scaled_high(config_, 3)};
  for (const double factor : {0.25, 0.5, 1.0, 1.6}) schedules.push_back(scaled_high(config_, factor));
  const int64_t even = std::max<int64_t>(1, config_.patches() / (2 * config_.depth));
  for (const int64_t count : {even, 2 * even}) schedules.emplace_back(size_t(config_.depth), count);
  RemovalCounts late(size_t(config_.depth), 0);
  std::fill(late.begin() + config_.depth / 2, late.end(), 3 * even);
  schedules.push_back(late);
  samples.push_back({path(RemovalCounts(size_t(config_.depth), 0)), 1.0});
  progress_.begin("timing", int64_t(schedules.size()), "schedules");
  for (size_t i = 0; i < schedules.size(); ++i) {
    const Timing timing = probe(schedules[i], 3, 1.0);
    if (i == 0 && timing.speedup < *goal_.speedup) give_up(timing);
    samples.push_back({path(schedules[i]), 1 / timing.speedup});
    progress_.update(int64_t(i) + 1, fixed(timing.speedup, 2) + "x");
  }
  progress_.end();
}

void Finder::read_samples(std::vector<LatencySample>& samples) const {
  const auto tokens_leaving = [&](const std::string& merger, const std::string& schedule) {
    const auto plugin = context_.plugins.merger(merger, {}, goal_.latency_table.string());
    const sdk::Schedule resolved = plugin->resolve(nn::parse_schedule(schedule, config_), config_.shape());
    return plugin->tokens_after(resolved, config_.shape());
  };
  samples = read_latency_table(goal_.latency_table, config_.arch, context_.batch,
                               path(RemovalCounts(size_t(config_.depth), 0)), tokens_leaving);
}

/// The share of dense time that is aimed at.
double Finder::fit_latency() {
  if (!(*goal_.speedup > 1 && *goal_.speedup <= 100))
    fail(ExitCode::usage, "--target-speedup is ", *goal_.speedup, ", expected more than 1 and at most 100");
  std::vector<LatencySample> samples;
  goal_.latency_table.empty() ? measure_samples(samples) : read_samples(samples);
  latency_ = LatencyModel::fit(samples);
  dense_time_ = latency_.time(path(RemovalCounts(size_t(config_.depth), 0)));
  found_.model_error = latency_.worst_error(samples);
  const double target = 1 / (*goal_.speedup * kMargin), least = cost(everything());
  if (least > target && !goal_.latency_table.empty())
    fail(ExitCode::untrusted, goal_.latency_table.string(), ": a speed-up of ", fixed(*goal_.speedup, 2),
         " is not reached by it: removing all that can be removed makes ", fixed(1 / least, 2),
         "; no file was written");
  return std::max(target, least);
}

JudgeImages Finder::judge_images() const {
  if (goal_.data.empty()) return noise_images(goal_.images, config_.image_size);
  const data::Dataset dataset = data::Dataset::open(goal_.data);
  for (const char* split : {"train800", "train"})
    if (dataset.has_split(split)) return images_of_split(dataset, split, goal_.images, model_.file.preprocess);
  fail(ExitCode::input, goal_.data.string(), ": has no split train800 or train to search on (it has ",
       join(dataset.splits()), ")");
}

void Finder::solve(double target) {
  ScheduleProblem problem{.depth = config_.depth,
                          .limit = config_.tokens() / 2,
                          .cost = [this](const RemovalCounts& remove) { return cost(remove); },
                          .target = target,
                          .quality = {},
                          .tries = goal_.tries,
                          .seed = goal_.seed,
                          .shapes = {}};
  for (const char* known : {"high", "low"}) {
    const RemovalCounts counts = nn::parse_schedule(known, config_).remove;
    problem.shapes.emplace_back(counts.begin(), counts.end());
  }
  if (goal_.tries == 0) {
    found_.remove = scale_to_cost(problem.shapes[0], problem);
    // Shapes that thin out cannot remove as much as an even one can.
    if (found_.remove.empty()) found_.remove = scale_to_cost(std::vector<double>(size_t(config_.depth), 1.0), problem);
    found_.uniform = scale_to_cost(std::vector<double>(size_t(config_.depth), 1.0), problem);
  } else {
    likeness_.emplace(model_, judge_images(), context_.engine, context_.batch);
    problem.quality = [this](const RemovalCounts& remove) { return likeness_of(remove); };
    progress_.begin("search", goal_.tries, "schedules");
    ScheduleAnswer answer = solve_schedule(problem, [&](int64_t tries, double best, double uniform) {
      progress_.update(tries, cat("likeness ", fixed(best, 4), ", uniform ", fixed(uniform, 4)));
    });
    progress_.end();
    found_.remove = std::move(answer.remove);
    found_.uniform = std::move(answer.uniform);
    found_.tries = answer.tries;
    found_.likeness = answer.quality;
    found_.uniform_likeness = answer.uniform_quality;
  }
  if (found_.remove.empty()) fail(ExitCode::internal, "no schedule was found below a cost that one reaches");
  if (goal_.speedup) found_.predicted = 1 / cost(found_.remove);
}

/// Measures what was found; the fit is corrected by what comes out until it is as fast as asked for, and not much more.
/// Whether that changed it.
bool Finder::confirm(double target) {
  constexpr int64_t kTries = 6;
  const RemovalCounts solved = found_.remove;
  const std::vector<double> shape(found_.remove.begin(), found_.remove.end());
  RemovalCounts best;
  Timing fastest;
  for (int64_t i = 0; i < kTries; ++i) {
    const Timing timing = probe(found_.remove, 9, 4.0);
    progress_.note(cat("measured: ", fixed(timing.speedup, 2), "x as fast as dense"));
    if (timing.speedup > fastest.speedup) fastest = timing;
    const bool enough = timing.speedup >= *goal_.speedup;
    if (enough && (!found_.timing || timing.speedup < found_.timing->speedup))
      best = found_.remove, found_.timing = timing;
    if (enough && timing.speedup <= *goal_.speedup * kTolerance) break;
    // The model's cost of what was just measured was wrong by this factor.
    target *= timing.speedup / (*goal_.speedup * kMargin);
    const ScheduleProblem problem{.depth = config_.depth,
                                  .limit = config_.tokens() / 2,
                                  .cost = [this](const RemovalCounts& remove) { return cost(remove); },
                                  .target = std::max(target, cost(everything())),
                                  .quality = {},
                                  .shapes = {}};
    RemovalCounts next = scale_to_cost(shape, problem);
    if (next.empty() || next == found_.remove) break;
    found_.remove = std::move(next);
  }
  if (best.empty()) give_up(fastest);
  found_.remove = best;
  found_.predicted = 1 / cost(best);
  return best != solved;
}

/// What is said of the schedule has to be said of the one that is written, beside a uniform one of its own cost.
void Finder::judge_again() {
  const ScheduleProblem problem{.depth = config_.depth,
                                .limit = config_.tokens() / 2,
                                .cost = [this](const RemovalCounts& remove) { return cost(remove); },
                                .target = cost(found_.remove),
                                .quality = {},
                                .shapes = {}};
  found_.uniform = scale_to_cost(std::vector<double>(size_t(config_.depth), 1.0), problem);
  if (!likeness_) return;
  found_.likeness = likeness_of(found_.remove);
  found_.uniform_likeness = likeness_of(found_.uniform);
}

/// On images that neither the search nor, where there is a test split, the training has seen. Nothing is chosen by it.
void Finder::measure_accuracy() {
  const data::Dataset dataset = data::Dataset::open(goal_.data);
  if (dataset.num_classes() != config_.num_classes) return;
  for (const char* split : {"test", "val", "val200"}) {
    if (!dataset.has_split(split)) continue;
    found_.accuracy_split = split;
    const JudgeImages images =
        images_of_split(dataset, split, std::max(goal_.images, kAccuracyImages), model_.file.preprocess);
    const auto measure = [&] { return accuracy_on(model_, images, context_.engine, context_.batch); };
    attach(found_.uniform);
    found_.uniform_accuracy = measure();
    detach_merge(model_);
    found_.dense_accuracy = measure();
    attach(found_.remove);
    found_.accuracy = measure();
    return;
  }
}

}  // namespace

int64_t wanted_macs(const std::string& text, int64_t dense) {
  const double value = positive_number(text, "--target-macs");
  if (value < 1) return int64_t(value * double(dense));
  if (value >= double(dense))
    fail(ExitCode::usage, "--target-macs is ", text, " and the dense model needs ", dense,
         " already: nothing to compress");
  return int64_t(value);
}

RemovalCounts scaled_high(const nn::VitConfig& config, double factor) {
  RemovalCounts remove = nn::parse_schedule("high", config).remove;
  for (int64_t& count : remove) count = std::llround(double(count) * factor);
  return remove;
}

std::optional<ScheduleGoal> parse_goal(const std::string& schedule) {
  const auto after = [&](std::string_view word) { return schedule.substr(word.size()); };
  ScheduleGoal goal;
  if (schedule.starts_with("speedup:")) {
    goal.speedup = positive_number(after("speedup:"), "schedule speedup:");
    return goal;
  }
  if (schedule.starts_with("macs:")) {
    goal.macs = after("macs:");
    (void)positive_number(goal.macs, "schedule macs:");
    return goal;
  }
  return {};
}

FoundSchedule find_schedule(Model& model, const ScheduleGoal& goal, const SearchContext& context, Progress& progress) {
  if (goal.images < 2 || goal.images > 65536)
    fail(ExitCode::usage, "--images is ", goal.images, ", expected 2 to 65536");
  if (goal.tries < 0 || goal.tries > 100000) fail(ExitCode::usage, "--tries is ", goal.tries, ", expected 0 to 100000");
  return Finder(model, goal, context, progress).run();
}

}  // namespace pyra::tasks
