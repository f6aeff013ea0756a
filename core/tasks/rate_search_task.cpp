#include "tasks/rate_search_task.h"

#include <cmath>
#include <cstdio>
#include <limits>

#include "base/error.h"
#include "data/dataset.h"
#include "io/atomic_file.h"
#include "io/json.h"
#include "tasks/eval.h"
#include "tasks/schedule_search.h"
#include "tasks/training_plan.h"
#include "tasks/tuned_model.h"
#include "train/checkpoint.h"

namespace pyra::tasks {
namespace fs = std::filesystem;
namespace {

constexpr int64_t kJudgeBatch = 64, kMaxEpochs = 10000, kMaxBatch = 65536;
/// Distance from the target in the loss, in shares of the dense model: a tenth of it weighs as 1 GMAC did in the
/// published searches, which were over models of 1 to 18 GMACs.
constexpr double kUnit = 0.1;

using train::KeptCounts;
using Counts = std::vector<int64_t>;

fs::path checkpoint_folder(const fs::path& out) {
  return out.string() + ".search";
}

sdk::Schedule schedule_of(const KeptCounts& counts) {
  return {.text = "searched", .remove = {}, .prune = counts.prune, .merge = counts.merge};
}

/// What must not change between a search and its continuation, by the names that messages use.
using Identity = std::map<std::string, std::string>;

Identity parse_identity(const std::string& json, const std::string& where) {
  try {
    return io::parse_json(json, where).get<Identity>();
  } catch (const nlohmann::json::exception& error) {
    fail(ExitCode::input, where, ": ", io::json_reason(error));
  }
}

/// One GPU goes on where another stopped, up to the last bits; a GPU and the CPU compute too differently.
std::string device_kind(const std::string& device) {
  return device.substr(0, device.find(':'));
}

/// What a checkpoint says of `name`; one from before searches ran on GPUs is the CPU's.
std::string saved_value(const Identity& saved, const std::string& name) {
  const auto found = saved.find(name);
  if (found != saved.end()) return printable(found->second);
  return name == "--device" ? "cpu" : "not known";
}

void check_same_search(const Identity& saved, const Identity& mine, const std::string& where, Progress& progress) {
  for (const auto& [name, now] : mine) {
    const std::string was = saved_value(saved, name);
    if (was == now) continue;
    if (name != "threads")
      fail(ExitCode::usage, where, ": cannot go on with another search: ", name, " was ", was, ", now it is ", now,
           "; give it back its value, or remove that folder to start anew");
    progress.note(cat("the search began with ", was, " threads and goes on with ", now,
                      ": its last bits may differ from those of an unbroken one"));
  }
}

class RateSearchRun {
 public:
  RateSearchRun(Model& model, const RateSearchTask& task, const host::PluginRegistry& plugins, Progress& progress)
      : model_(model),
        config_(model.file.config),
        task_(task),
        plugins_(plugins),
        progress_(progress),
        folder_(checkpoint_folder(task.out)),
        dataset_(data::Dataset::open(task.options.data)) {
    check_classes(model.file, task.model_path.string(), dataset_);
  }

  RateSearchReport run();

 private:
  [[nodiscard]] train::RateSearchSettings settings() const;
  [[nodiscard]] Identity identity(const data::StoredSet& images, const train::RateSearchSettings& chosen) const;
  void take_up(train::RateSearch& search);
  void train(train::RateSearch& search);
  void save(const train::RateSearch& search);
  [[nodiscard]] KeptCounts resolved(const Counts& remove) const;
  [[nodiscard]] KeptCounts of_shape(const Counts& shape) const;
  [[nodiscard]] KeptCounts high_shaped() const;
  [[nodiscard]] KeptCounts uniform() const;
  [[nodiscard]] KeptCounts start() const;
  [[nodiscard]] int64_t macs(const KeptCounts& counts) const { return nn::count_macs(config_, counts.merge); }
  void load_judged();
  void judge();
  [[nodiscard]] int64_t count_correct(const data::StoredSet& images, int64_t& done);

  Model& model_;
  const nn::VitConfig config_;
  const RateSearchTask& task_;
  const host::PluginRegistry& plugins_;
  Progress& progress_;
  fs::path folder_;
  data::Dataset dataset_;
  std::optional<data::StoredSet> judged_;
  Identity identity_;
  RateSearchReport report_;
};

train::RateSearchSettings RateSearchRun::settings() const {
  return {.target = double(task_.target),
          .unit = kUnit * double(nn::count_macs(config_)),
          .lr = task_.options.lr,
          .epochs = task_.options.epochs,
          .batch = task_.options.batch,
          .seed = uint64_t(task_.options.seed),
          .device = task_.device,
          .precision = task_.precision,
          .proportional_attention = task_.proportional_attention,
          .start = start()};
}

Identity RateSearchRun::identity(const data::StoredSet& images, const train::RateSearchSettings& s) const {
  Identity identity{{"the model", fingerprint(model_.file.weights)},
                    {"the data", fingerprint(images)},
                    {"--target-macs", std::to_string(task_.target)},
                    {"--search-epochs", std::to_string(s.epochs)},
                    {"--search-lr", cat(s.lr)},
                    {"--search-batch", std::to_string(s.batch)},
                    {"--seed", std::to_string(s.seed)},
                    {"--device", device_kind(s.device)},
                    {"--dtype", engine::precision_name(s.precision)},
                    {"--no-proportional-attention", s.proportional_attention ? "false" : "true"}};
  if (s.device == "cpu") identity.emplace("threads", std::to_string(at::get_num_threads()));
  return identity;
}

RateSearchReport RateSearchRun::run() {
  if (!task_.options.resume && fs::exists(folder_))
    fail(ExitCode::usage, folder_.string(), ": an unfinished search is there; go on with it by --resume, or remove it");
  report_.target = task_.target;
  report_.train_split = need_split(dataset_, {"train800", "train"}, "search on");
  const train::RateSearchSettings chosen = settings();
  const data::StoredSet images =
      data::load_split(dataset_, report_.train_split, model_.file.preprocess, data::BadImages::fail, progress_);
  load_judged();
  identity_ = identity(images, chosen);
  {  // what the search holds of a GPU is free again before the counts are judged there
    train::RateSearch search(*model_.vit, images, model_.file.preprocess, chosen);
    take_up(search);
    train(search);
    report_.images = images.labels.size(0);
    report_.steps = search.position().step;
    report_.seconds = search.position().seconds;
    report_.searched = search.counts();
    report_.searched_macs = macs(report_.searched);
    report_.counts = train::fit_counts(config_, report_.searched, task_.target);
    report_.macs = macs(report_.counts);
  }
  judge();
  return report_;
}

void RateSearchRun::take_up(train::RateSearch& search) {
  if (!task_.options.resume) return;
  const std::optional<train::Checkpoint> checkpoint = train::read_checkpoint(folder_, progress_);
  if (!checkpoint) {
    progress_.note(cat(folder_.string(), ": no checkpoint there, starting from the beginning"));
    return;
  }
  check_same_search(parse_identity(checkpoint->task, folder_.string()), identity_, folder_.string(), progress_);
  search.restore(checkpoint->position, checkpoint->tensors, folder_.string());
  report_.resumed = true;
}

void RateSearchRun::save(const train::RateSearch& search) {
  train::write_checkpoint(
      folder_, {.position = search.position(), .tensors = search.state(), .task = nlohmann::json(identity_).dump()});
}

void RateSearchRun::train(train::RateSearch& search) {
  const int64_t per_step = search.images_per_step();
  const double dense = double(nn::count_macs(config_));
  progress_.begin("search", search.steps_per_epoch() * task_.options.epochs * per_step, "images");
  while (!search.finished()) {
    if (const int signal_number = pending_signal()) {
      save(search);
      fail(static_cast<ExitCode>(128 + signal_number), "stopped by signal ", signal_number, " at step ",
           search.position().step, " of the search; everything is saved in ", folder_.string(),
           ": go on with the same command and --resume");
    }
    search.step();
    char note[64];
    std::snprintf(note, sizeof note, "loss %.3f  MACs %.3f of dense", search.last_cross_entropy(),
                  double(search.last_macs()) / dense);
    progress_.update(search.position().step * per_step, note);
    if (search.position().batch == 0) save(search);
  }
  progress_.end();
}

KeptCounts RateSearchRun::resolved(const Counts& remove) const {
  const auto merger = plugins_.merger("diffrate", {}, "--search");
  const sdk::Schedule schedule =
      merger->resolve({.text = "", .remove = remove, .prune = {}, .merge = {}}, config_.shape());
  return {schedule.prune, schedule.merge};
}

/// Removal counts of this shape that cost as much as the target, as the plugin makes kept counts of them.
KeptCounts RateSearchRun::of_shape(const Counts& shape) const {
  const ScheduleProblem problem{.depth = config_.depth,
                                .limit = config_.tokens() / 2,
                                .cost = [this](const RemovalCounts& remove) { return double(macs(resolved(remove))); },
                                .target = double(task_.target),
                                .quality = {},
                                .shapes = {}};
  const RemovalCounts remove = scale_to_cost({shape.begin(), shape.end()}, problem);
  return remove.empty() ? KeptCounts{} : resolved(remove);
}

KeptCounts RateSearchRun::high_shaped() const {
  return of_shape(scaled_high(config_, 1));
}

KeptCounts RateSearchRun::uniform() const {
  return of_shape(Counts(size_t(config_.depth), 1));
}

/// In the shape of high too, but for the first block, which keeps all.
KeptCounts RateSearchRun::start() const {
  return train::fit_counts(config_, resolved(scaled_high(config_, 1)), task_.target);
}

/// Before the search: bad images and a full disk are known now, not after it.
void RateSearchRun::load_judged() {
  for (const char* split : {"val200", "val"}) {
    if (!dataset_.has_split(split)) continue;
    report_.judged_split = split;
    judged_.emplace(data::load_split(dataset_, split, model_.file.preprocess, data::BadImages::fail, progress_));
    return;
  }
}

/// What the split for choosing says of the counts, and of counts that were not searched.
void RateSearchRun::judge() {
  if (!judged_) return;
  const data::StoredSet& images = *judged_;
  report_.judged_images = images.labels.size(0);
  const Counts all(size_t(config_.depth), config_.tokens());
  report_.judged = {{.label = "dense", .counts = {all, all}},
                    {.label = "searched", .counts = report_.counts},
                    {.label = "start", .counts = start()},
                    {.label = "high-shaped", .counts = high_shaped()},
                    {.label = "uniform", .counts = uniform()}};
  // A bipartite cut leaves at least half of the tokens, so those two cannot reach every target.
  std::erase_if(report_.judged, [](const JudgedCounts& judged) { return judged.counts.merge.empty(); });
  progress_.begin("judge", int64_t(report_.judged.size()) * report_.judged_images, "images");
  int64_t done = 0;
  for (JudgedCounts& judged : report_.judged) {
    judged.macs = macs(judged.counts);
    if (judged.label != "dense")
      attach_merge(model_, plugins_, {.name = "diffrate", .parameters = {}}, schedule_of(judged.counts),
                   task_.proportional_attention, std::nullopt);
    judged.correct = count_correct(images, done);
  }
  progress_.end();
  detach_merge(model_);
}

int64_t RateSearchRun::count_correct(const data::StoredSet& images, int64_t& done) {
  const auto engine = make_engine(model_, task_.device, task_.precision);
  int64_t correct = 0;
  for (int64_t first = 0; first < report_.judged_images; first += kJudgeBatch) {
    stop_if_asked("judging the counts");
    const int64_t count = std::min(kJudgeBatch, report_.judged_images - first);
    const at::Tensor logits = engine->run(images.images.range(first, count));
    correct += (logits.argmax(1) == images.labels.narrow(0, first, count)).sum().item<int64_t>();
    progress_.update(done += count);
  }
  return correct;
}

/// Every block but the first keeps one patch: the least there is.
void check_target(const nn::VitConfig& config, int64_t target) {
  Counts least(size_t(config.depth), config.protected_tokens() + 1);
  least[0] = config.tokens();
  const int64_t macs = nn::count_macs(config, least);
  if (target >= macs) return;
  fail(ExitCode::usage, "--target-macs asks for ", target, " multiply-adds, and the least that DiffRate, whose first ",
       "block keeps all tokens, can leave of this model is ", macs);
}

}  // namespace

RateSearchReport search_rates(Model& model, const RateSearchTask& task, const host::PluginRegistry& plugins,
                              Progress& progress) {
  check_target(model.file.config, task.target);
  return RateSearchRun(model, task, plugins, progress).run();
}

void check_rate_search(const RateSearchOptions& options) {
  if (options.data.empty()) fail(ExitCode::usage, "--search needs --data: a folder or .tar to search on");
  const auto in_range = [](const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) fail(ExitCode::usage, name, " is ", value, ", expected ", low, " to ", high);
  };
  in_range("--search-epochs", options.epochs, 1, kMaxEpochs);
  in_range("--search-batch", options.batch, 1, kMaxBatch);
  in_range("--seed", options.seed, 0, std::numeric_limits<int64_t>::max());
  if (!(options.lr > 0 && options.lr <= 100))
    fail(ExitCode::usage, "--search-lr is ", options.lr, ", expected more than 0 and at most 100");
  const fs::path& file = options.schedule_out;
  if (file.empty()) return;
  if (file.extension() != ".toml")
    fail(ExitCode::usage, "--schedule-out is ", file.string(), ", expected a .toml file, as --schedule takes");
  const fs::path folder = file.has_parent_path() ? file.parent_path() : ".";
  if (!fs::is_directory(folder))
    fail(ExitCode::output, file.string(), ": there is no folder ", folder.string(), " to write into");
}

sdk::Schedule searched_schedule(const RateSearchReport& report) {
  return schedule_of(report.counts);
}

void write_counts(const fs::path& path, const RateSearchReport& report) {
  io::write_file(path,
                 cat("# DiffRate counts found by `pyractl compress --search`: ", report.macs,
                     " multiply-adds.\n# What each block keeps, class token included; --schedule takes this file.\n",
                     "prune = [", join(report.counts.prune), "]\nmerge = [", join(report.counts.merge), "]\n"));
}

void drop_search_checkpoint(const fs::path& out) {
  std::error_code error;
  fs::remove_all(checkpoint_folder(out), error);
}

}  // namespace pyra::tasks
