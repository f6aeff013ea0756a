#include "tasks/rate_search_task.h"

#include <csignal>
#include <limits>
#include <nlohmann/json.hpp>

#include "nn/config.h"
#include "tasks/compress.h"
#include "tasks/tiny_task.h"
#include "train/checkpoint.h"

using namespace pyra;
using test::check_error;

namespace {

/// The tiny task with a model of four blocks: the first keeps all, so two would leave little to search.
class SearchTask {
 public:
  SearchTask() { write_model(3); }

  test::TinyTask task;

  void write_model(uint64_t seed, bool damaged = false) const {
    nn::VitConfig config = test::tiny_config();
    config.depth = 4;
    io::ModelFile file{.config = config,
                       .preprocess = {.size = 16},
                       .class_names = {},
                       .merge = {},
                       .weights = nn::random_weights(config, seed),
                       .provenance = {}};
    if (damaged) file.weights.at("norm.weight")[0] = std::numeric_limits<float>::max();  // logits overflow
    io::write_model(task.folder / "model.safetensors", file);
  }

  [[nodiscard]] tasks::CompressOptions options(const std::string& out) const {
    tasks::RateSearchOptions search;
    search.data = task.folder / "data";
    search.epochs = 4;
    search.lr = 0.1;
    search.batch = 8;
    tasks::CompressOptions options;
    options.run.model = task.folder / "model.safetensors";
    options.run.device = "cpu";
    options.run.dtype = "fp32";
    options.merge = "diffrate";
    options.target_macs = "0.6";
    options.out = task.folder / out;
    options.measure = false;
    options.search = std::move(search);
    return options;
  }
};

/// Asks for the end, as ctrl-C does, once the search has gone over so many images.
class Interrupter final : public Progress {
 public:
  explicit Interrupter(int64_t after) : after_(after) {}
  std::string notes;
  void begin(std::string_view label, int64_t, std::string_view) override { searching_ = label == "search"; }
  void update(int64_t done, std::string_view) override {
    if (searching_ && done >= after_) raise_pending_signal(SIGINT);
  }
  void end() override {}
  void note(std::string_view line) override { notes += line; }

 private:
  int64_t after_;
  bool searching_ = false;
};

tasks::CompressResult compress(const tasks::CompressOptions& options, Progress& progress = silent_progress()) {
  return tasks::compress(options, test::built_plugins(), progress);
}

}  // namespace

TEST_CASE("a search gives counts within the target, and a model that carries them", "[rate_search]") {
  const SearchTask shop;
  auto options = shop.options("fast.safetensors");
  options.search->schedule_out = shop.task.folder / "counts.toml";
  const auto result = compress(options);
  REQUIRE(result.search.has_value());
  const tasks::RateSearchReport& search = *result.search;
  CHECK(search.train_split == "train800");
  CHECK(search.images == 18);
  CHECK(search.steps == 4 * 2);
  CHECK(search.macs <= search.target);
  CHECK(result.compressed.macs == search.macs);
  CHECK(double(search.macs) > 0.5 * double(result.dense.macs));
  CHECK(result.prune == search.counts.prune);
  CHECK(result.merge == search.counts.merge);
  CHECK(result.compressed.label == "diffrate-searched");

  CHECK(search.judged_split == "val200");
  CHECK(search.judged_images == 9);
  REQUIRE(search.judged.size() == 5);
  CHECK(search.judged[1].counts == search.counts);
  for (const auto& judged : search.judged) {
    CAPTURE(judged.label);
    CHECK(judged.correct >= 0);
    CHECK(judged.correct <= 9);
    CHECK((judged.label == "dense" || judged.macs <= search.target));
  }

  // The file, read by --schedule, is the same compression, and the model's own counts are enough to run it.
  auto given = shop.options("given.safetensors");
  given.search.reset();
  given.target_macs.clear();
  given.schedule = (shop.task.folder / "counts.toml").string();
  const auto again = compress(given);
  CHECK(again.prune == result.prune);
  CHECK(again.merge == result.merge);
  const auto model = tasks::load_model(shop.task.folder / "fast.safetensors", test::built_plugins());
  CHECK(tasks::tokens_after(model) == result.merge);
  CHECK(model.file.provenance.at("searched_on") == "data");
  CHECK_FALSE(std::filesystem::exists(shop.task.folder / "fast.safetensors.search"));

  // Named again without a schedule, the merger keeps the counts it has.
  const auto same = tasks::load_for_running({.model = shop.task.folder / "fast.safetensors",
                                             .device = "cpu",
                                             .dtype = "fp32",
                                             .set = {"merge.name=diffrate"}},
                                            test::built_plugins());
  CHECK(tasks::tokens_after(same) == result.merge);
}

TEST_CASE("a search that was interrupted goes on to the same counts and bytes", "[rate_search]") {
  const SearchTask shop;
  (void)compress(shop.options("unbroken.safetensors"));
  auto options = shop.options("broken.safetensors");
  const auto checkpoint = shop.task.folder / "broken.safetensors.search";
  for (const int64_t after : {8, 24, 40}) {
    Interrupter progress(after);
    check_error(ExitCode::interrupted, {"stopped by signal 2", "broken.safetensors.search", "--resume"},
                [&] { (void)compress(options, progress); });
    raise_pending_signal(0);
    CHECK(std::filesystem::exists(checkpoint / "last.safetensors"));
    CHECK_FALSE(std::filesystem::exists(options.out));
    options.search->resume = true;
  }
  const auto result = compress(options);
  CHECK(result.search->resumed);
  CHECK(test::get(options.out) == test::get(shop.task.folder / "unbroken.safetensors"));
  CHECK_FALSE(std::filesystem::exists(checkpoint));
}

TEST_CASE("a continuation of another search is refused", "[rate_search]") {
  const SearchTask shop;
  auto options = shop.options("o.safetensors");
  Interrupter progress(16);
  check_error(ExitCode::interrupted, {"stopped"}, [&] { (void)compress(options, progress); });
  raise_pending_signal(0);
  const auto refused = [&](const std::vector<std::string>& says, const tasks::CompressOptions& asked) {
    check_error(ExitCode::usage, says, [&] { (void)compress(asked); });
  };
  refused({"unfinished search", "--resume"}, options);
  options.search->resume = true;
  const auto with = [&](const auto& change) {
    auto changed = options;
    change(changed);
    return changed;
  };
  refused({"--search-lr was 0.1, now it is 0.2"}, with([](auto& o) { o.search->lr = 0.2; }));
  refused({"--search-epochs was 4"}, with([](auto& o) { o.search->epochs = 5; }));
  refused({"--search-batch was 8"}, with([](auto& o) { o.search->batch = 4; }));
  refused({"--seed was 0"}, with([](auto& o) { o.search->seed = 1; }));
  refused({"--target-macs was"}, with([](auto& o) { o.target_macs = "0.7"; }));
  shop.write_model(4);
  refused({"the model was"}, options);
  shop.write_model(3);
  test::put(shop.task.folder / "data/images/3.ppm", test::tiny_image(999, 0));
  refused({"the data was"}, options);
  test::put(shop.task.folder / "data/images/3.ppm", test::tiny_image(3, 0));
  test::put(shop.task.folder / "o.safetensors.search/last.safetensors", "cut");
  std::filesystem::remove(shop.task.folder / "o.safetensors.search/previous.safetensors");
  check_error(ExitCode::input, {"last.safetensors"}, [&] { (void)compress(options); });
}

TEST_CASE("a search begun on a GPU does not go on on the CPU, and one that knew no GPU does", "[rate_search]") {
  const SearchTask shop;
  auto options = shop.options("o.safetensors");
  Interrupter progress(16);
  check_error(ExitCode::interrupted, {"stopped"}, [&] { (void)compress(options, progress); });
  raise_pending_signal(0);
  options.search->resume = true;
  const auto folder = shop.task.folder / "o.safetensors.search";
  const auto change = [&](const auto& how) {
    auto checkpoint = train::read_checkpoint(folder);
    REQUIRE(checkpoint.has_value());
    nlohmann::json identity = nlohmann::json::parse(checkpoint->task);
    how(identity);
    checkpoint->task = identity.dump();
    train::write_checkpoint(folder, *checkpoint);
  };
  change([](auto& identity) { identity["--device"] = "cuda"; });
  check_error(ExitCode::usage, {"--device was cuda, now it is cpu"}, [&] { (void)compress(options); });
  change([](auto& identity) { identity.erase("--device"); });
  CHECK(compress(options).search->resumed);
}

TEST_CASE("a model whose loss is not finite is exit 7 and leaves no model", "[rate_search]") {
  const SearchTask shop;
  shop.write_model(3, /*damaged=*/true);
  check_error(ExitCode::untrusted, {"diverged at step 1"}, [&] { (void)compress(shop.options("o.safetensors")); });
  CHECK_FALSE(std::filesystem::exists(shop.task.folder / "o.safetensors"));
}

TEST_CASE("a search resumed without a checkpoint starts, and says so", "[rate_search]") {
  const SearchTask shop;
  auto options = shop.options("o.safetensors");
  options.search->resume = true;
  Interrupter progress(std::numeric_limits<int64_t>::max());
  CHECK_FALSE(compress(options, progress).search->resumed);
  CHECK(progress.notes.find("no checkpoint") != std::string::npos);
}

TEST_CASE("data without val200 gives counts and no judgement", "[rate_search]") {
  const SearchTask shop;
  std::filesystem::remove(shop.task.folder / "data/val200.txt");
  std::filesystem::remove(shop.task.folder / "data/train800.txt");
  std::filesystem::rename(shop.task.folder / "data/train800val200.txt", shop.task.folder / "data/train.txt");
  const auto result = compress(shop.options("o.safetensors"));
  CHECK(result.search->train_split == "train");
  CHECK(result.search->images == 27);
  CHECK(result.search->judged_split.empty());
  CHECK(result.search->judged.empty());
}
