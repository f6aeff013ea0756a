#include "tasks/compress.h"

#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>

#include "base/error.h"
#include "base/philox.h"
#include "engine/engine.h"
#include "tasks/assemble.h"

namespace pyra::tasks {
namespace {

using Clock = std::chrono::steady_clock;
using Counts = std::vector<int64_t>;

double quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  const double at = share * double(values.size() - 1);
  const auto below = size_t(at);
  const double above = values[std::min(below + 1, values.size() - 1)];
  return values[below] + (at - double(below)) * (above - values[below]);
}

at::Tensor timing_images(int64_t batch, int64_t size) {
  at::Tensor images = at::empty({batch, 3, size, size}, at::kFloat);
  const Philox random(0, RandomStream::bench);
  float* values = images.mutable_data_ptr<float>();
  for (int64_t i = 0; i < images.numel(); ++i) values[i] = 2 * random.uniform(uint64_t(i)) - 1;
  return images;
}

struct Timing {
  double dense = 0, compressed = 0;  ///< median seconds a batch
  double speedup = 0, low = 0, high = 0;
  int64_t pairs = 0;
};

/// Times the dense model and the compressed one in turns, so that a change of the machine's speed meets both.
class Stopwatch {
 public:
  Stopwatch(const nn::Vit& dense, const nn::Preprocess& preprocess, const engine::EngineOptions& options, int64_t batch)
      : images_(timing_images(batch, dense.config().image_size)),
        preprocess_(preprocess),
        options_(options),
        dense_(engine::make_engine(dense, preprocess, options)) {}

  /// At least `pairs` of runs, and more of them as long as `seconds` have not passed, up to four times as many.
  [[nodiscard]] Timing time(const nn::Vit& compressed, int64_t pairs, double seconds) const {
    const auto engine = engine::make_engine(compressed, preprocess_, options_);
    // Weights are packed and algorithms chosen on first use: not what is measured.
    static_cast<void>(once(*dense_));
    static_cast<void>(once(*engine));
    std::vector<double> dense_times, times, ratios;
    for (const auto start = Clock::now();
         int64_t(ratios.size()) < pairs || (int64_t(ratios.size()) < 4 * pairs && elapsed(start) < seconds);) {
      stop_if_asked("timing");
      dense_times.push_back(once(*dense_));
      times.push_back(once(*engine));
      ratios.push_back(dense_times.back() / times.back());
    }
    return {quantile(dense_times, 0.5), quantile(times, 0.5),   quantile(ratios, 0.5),
            quantile(ratios, 0.25),     quantile(ratios, 0.75), int64_t(ratios.size())};
  }

 private:
  static double elapsed(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }
  [[nodiscard]] double once(engine::Engine& engine) const { return engine.time_ms(images_, 1)[0] * 1e-3; }

  at::Tensor images_;
  nn::Preprocess preprocess_;
  engine::EngineOptions options_;
  std::unique_ptr<engine::Engine> dense_;
};

/// The model, its merger's name and parameters, and what a schedule makes of them.
class Candidate {
 public:
  Candidate(Model& model, const CompressOptions& options, const host::PluginRegistry& plugins)
      : model_(model), options_(options), plugins_(plugins) {
    check_keys(options.run.set, {"merge.*"});
    const io::Recipe asked = io::read_recipe({}, options.run.set);
    if (!asked.schedule.empty() || !asked.merge.name.empty() || !asked.proportional_attention)
      fail(ExitCode::usage,
           "--set takes the merger's own parameters here; use --merge, --schedule and "
           "--no-proportional-attention for the rest");
    choice_ = {.name = options.merge, .parameters = asked.merge.parameters};
  }

  void attach(const std::string& schedule) {
    attach_merge(model_, plugins_, choice_, schedule, options_.proportional_attention, std::nullopt);
  }

  [[nodiscard]] int64_t macs(const Counts& remove) {
    attach(join(remove, ","));
    return nn::count_macs(model_.file.config, tokens_after(model_));
  }

  [[nodiscard]] const nn::VitConfig& config() const { return model_.file.config; }
  [[nodiscard]] const nn::Vit& vit() const { return *model_.vit; }
  [[nodiscard]] const std::string& name() const { return choice_.name; }

 private:
  Model& model_;
  const CompressOptions& options_;
  const host::PluginRegistry& plugins_;
  io::PluginChoice choice_;
};

int64_t wanted_macs(const std::string& text, int64_t dense) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || !(value > 0) || !std::isfinite(value))
    fail(ExitCode::usage, "--target-macs is '", text,
         "', expected a share of the dense model's (0.5) or a count (6.2e8)");
  if (value < 1) return int64_t(value * double(dense));
  if (value >= double(dense))
    fail(ExitCode::usage, "--target-macs is ", text, " and the dense model needs ", dense,
         " already: nothing to compress");
  return int64_t(value);
}

void reach_macs(Candidate& candidate, const std::string& text) {
  const nn::VitConfig& config = candidate.config();
  const int64_t dense = nn::count_macs(config), target = wanted_macs(text, dense);
  const int64_t limit = config.tokens() / 2;
  const auto macs_of = [&](const Counts& remove) { return candidate.macs(remove); };
  const Counts remove = schedule_for_macs(target, config.depth, limit, macs_of);
  if (remove.empty()) {
    const int64_t least = candidate.macs(Counts(size_t(config.depth), limit));
    char share[16];
    std::snprintf(share, sizeof share, "%.3f", double(least) / double(dense));
    fail(ExitCode::usage, "--target-macs ", text, " is ", target, " multiply-adds, and the most that ",
         candidate.name(), " can remove from this model leaves ", least, " (", share, " of dense)");
  }
  candidate.attach(join(remove, ","));
}

/// The published high schedule, scaled: its shape is what trained models and ToMe's figures are known for.
Counts scaled_high(const nn::VitConfig& config, double factor) {
  Counts remove = nn::parse_schedule("high", config).remove;
  for (int64_t& count : remove) count = std::llround(double(count) * factor);
  return remove;
}

/// Bisects on the scale of `high` until the measured speed-up is just above the target, then measures it again.
Timing reach_speedup(Candidate& candidate, const Stopwatch& stopwatch, double target, Progress& progress) {
  constexpr double kLargest = 3.0;  // far beyond: every block is then cut to half
  constexpr int64_t kProbes = 7, kFinalTries = 4;
  const auto probe = [&](double factor, int64_t pairs, double seconds) {
    candidate.attach(join(scaled_high(candidate.config(), factor), ","));
    const Timing timing = stopwatch.time(candidate.vit(), pairs, seconds);
    char line[96];
    std::snprintf(line, sizeof line, "compress: %.2f of high's cut runs %.2fx as fast as dense", factor,
                  timing.speedup);
    progress.note(line);
    return timing;
  };
  const auto give_up = [&](const Timing& timing) {
    char text[256];
    std::snprintf(text, sizeof text,
                  "--target-speedup %.2f was not reached: the fastest schedule tried runs %.2fx as fast as dense "
                  "(quartiles %.2f to %.2f, batch time %.4f s against %.4f s); no file was written",
                  target, timing.speedup, timing.low, timing.high, timing.compressed, timing.dense);
    fail(ExitCode::untrusted, text);
  };
  double low = 0, high = kLargest;
  const Timing most = probe(high, 3, 2.0);
  if (most.speedup < target) give_up(most);
  for (int64_t i = 0; i < kProbes; ++i) {
    const double middle = (low + high) / 2;
    (probe(middle, 3, 2.0).speedup < target ? low : high) = middle;
  }
  // A probe is short and may have been lucky, so the figure that counts is a longer measurement of its own.
  Timing final_timing;
  for (int64_t i = 0; i < kFinalTries; ++i, high = std::min(high * 1.05, kLargest)) {
    final_timing = probe(high, 7, 4.0);
    if (final_timing.speedup >= target) return final_timing;
  }
  give_up(final_timing);
  return final_timing;
}

void check_options(const CompressOptions& options) {
  const int ways =
      int(!options.schedule.empty()) + int(!options.target_macs.empty()) + int(options.target_speedup.has_value());
  if (ways != 1)
    fail(ExitCode::usage, "exactly one of --schedule, --target-macs and --target-speedup is expected, got ", ways);
  if (options.merge.empty() || options.out.empty()) fail(ExitCode::usage, "--merge and --out are needed");
  if (options.target_speedup && !(*options.target_speedup > 1 && *options.target_speedup <= 100))
    fail(ExitCode::usage, "--target-speedup is ", *options.target_speedup, ", expected more than 1 and at most 100");
  if (options.batch < 1) fail(ExitCode::usage, "--batch is ", options.batch, ", expected at least 1");
  // Known now rather than after minutes of measuring.
  const std::filesystem::path folder = options.out.has_parent_path() ? options.out.parent_path() : ".";
  if (!std::filesystem::is_directory(folder))
    fail(ExitCode::output, options.out.string(), ": there is no folder ", folder.string(), " to write into");
}

CompressSide side(const Model& model) {
  CompressSide side{.label = merge_label(model),
                    .tokens = tokens_after(model),
                    .macs = nn::count_macs(model.file.config, tokens_after(model)),
                    .parameters = parameter_count(model),
                    .seconds = {}};
  if (side.tokens.empty()) side.tokens.assign(size_t(model.file.config.depth), model.file.config.tokens());
  return side;
}

}  // namespace

std::vector<int64_t> schedule_for_macs(int64_t target, int64_t depth, int64_t limit,
                                       const std::function<int64_t(const std::vector<int64_t>&)>& macs_of) {
  // The schedules stand in a row: step s takes s tokens in all, spread evenly, the first blocks taking the rest.
  const auto at = [&](int64_t step) {
    Counts remove(size_t(depth), step / depth);
    std::fill_n(remove.begin(), step % depth, step / depth + 1);
    return remove;
  };
  int64_t too_few = 0, enough = depth * limit;
  if (macs_of(at(enough)) > target) return {};
  while (enough - too_few > 1) {
    const int64_t middle = too_few + (enough - too_few) / 2;
    (macs_of(at(middle)) > target ? too_few : enough) = middle;
  }
  return at(enough);
}

CompressResult compress(const CompressOptions& options, const host::PluginRegistry& plugins, Progress& progress) {
  check_options(options);
  const at::InferenceMode no_gradients;
  const std::string device = resolve_device(options.run.device);
  const engine::Precision precision = resolve_precision(options.run.dtype, device);
  Model model = load_model(options.run.model, plugins);
  if (model.file.merge) {
    const io::MergeSpec& has = *model.file.merge;
    if (!has.learned.empty())
      fail(ExitCode::usage, options.run.model.string(), " already merges by ", has.name, " trained for schedule '",
           has.schedule.text, "', which cannot be replaced; compress the model it was made from, or train another");
    detach_merge(model);
  }
  CompressResult result;
  result.dense = side(model);
  const nn::Vit dense(model.file.config, model.file.weights);
  const Stopwatch stopwatch(dense, model.file.preprocess, {.device = device, .precision = precision}, options.batch);
  Candidate candidate(model, options, plugins);

  std::optional<Timing> timing;
  if (!options.schedule.empty()) candidate.attach(options.schedule);
  if (!options.target_macs.empty()) reach_macs(candidate, options.target_macs);
  if (options.target_speedup) timing = reach_speedup(candidate, stopwatch, *options.target_speedup, progress);
  if (options.measure && !timing) timing = stopwatch.time(*model.vit, 5, 10.0);

  result.compressed = side(model);
  result.arch = model.file.config.arch;
  result.device = device;
  result.dtype = engine::precision_name(precision);
  result.image_size = model.file.config.image_size;
  result.batch = options.batch;
  const sdk::Schedule& schedule = model.file.merge->schedule;
  result.remove = schedule.remove, result.prune = schedule.prune, result.merge = schedule.merge;
  if (timing) {
    result.runs = timing->pairs;
    result.dense.seconds = timing->dense;
    result.compressed.seconds = timing->compressed;
    result.speedup = timing->speedup;
    result.speedup_low = timing->low;
    result.speedup_high = timing->high;
  }
  stop_if_asked("compress");
  model.file.provenance["compressed_from"] = options.run.model.filename().string();
  io::write_model(options.out, model.file);
  return result;
}

}  // namespace pyra::tasks
