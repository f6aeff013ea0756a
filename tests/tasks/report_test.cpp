#include "tasks/report.h"

#include <cmath>
#include <locale>

#include "pages.h"
#include "tasks/tiny_task.h"

using namespace pyra;
using test::check_error;
using test::TinyTask;
namespace fs = std::filesystem;

namespace {

tasks::Report report(std::vector<fs::path> runs, tasks::ReportOptions options = {}) {
  options.runs = std::move(runs);
  return tasks::report(options);
}

void replace(const fs::path& file, const std::string& from, const std::string& to) {
  std::string text = test::get(file);
  const size_t at = text.find(from);
  REQUIRE(at != std::string::npos);
  test::put(file, text.replace(at, from.size(), to));
}

/// Another value for a key of a JSON file.
void set_json(const fs::path& file, const std::string& key, const nlohmann::json& value) {
  auto document = nlohmann::json::parse(test::get(file));
  document[key] = value;
  test::put(file, document.dump());
}

/// A run that never was: enough of one to be compared.
tasks::RunRecord made_up(const std::string& merge, int64_t seed, double accuracy, double speed) {
  tasks::RunRecord run;
  run.name = cat(merge, "-", seed);
  run.recipe.seed = seed;
  run.recipe.data = "/data/task";
  run.recipe.merge.name = merge;
  run.result.merge = merge;
  run.result.peft = "lora";
  run.result.seed = seed;
  run.result.device = "cpu";
  run.result.processor = "A CPU";
  run.result.protocol = "vtab";
  run.result.accuracy = accuracy;
  run.result.eval_images_per_second = speed;
  run.result.images_per_second = speed / 3;
  return run;
}

struct Continental : std::numpunct<char> {
  char do_decimal_point() const override { return ','; }
  char do_thousands_sep() const override { return '.'; }
  std::string do_grouping() const override { return "\3"; }
};

}  // namespace

TEST_CASE("a run is read back as it was reported", "[report]") {
  const TinyTask task;
  test::put(task.folder / "data/classes.txt", "red\ngreen\nblue\n");
  const auto trained = task.finetune("run", {"train.lr=[1e-6, 0.01]", "train.epochs=3", "train.eval_every=1"});
  const tasks::RunRecord run = tasks::read_run(task.folder / "run");
  CHECK(run.name == "run");
  CHECK(to_json(run.result) == to_json(trained));
  CHECK_FALSE(run.result.processor.empty());
  CHECK(run.recipe.train.epochs == 3);
  CHECK(run.classes == std::vector<std::string>{"red", "green", "blue"});
  CHECK(run.adapter_bytes > 0);
  REQUIRE(run.curves.size() == 3);  // two trials and the one that counts
  CHECK(run.curves[0].split == "val200");
  CHECK(run.curves[2].split == "test");
  for (const tasks::Curve& curve : run.curves) {
    REQUIRE(curve.epochs.size() == 3);
    for (size_t i = 0; i < 3; ++i) CHECK(curve.epochs[i].at == double(i + 1));
    CHECK(curve.evaluations.back().at == 3);
  }
  CHECK(run.curves[2].evaluations.back().accuracy == trained.accuracy);

  // As earlier versions wrote it.
  auto document = nlohmann::json::parse(test::get(task.folder / "run/report.json"));
  for (const char* key : {"device", "device_memory_bytes", "peak_memory_bytes", "processor"}) document.erase(key);
  test::put(task.folder / "run/report.json", document.dump());
  const tasks::RunRecord old = tasks::read_run(task.folder / "run");
  CHECK(old.result.device == "cpu");
  CHECK(old.result.processor.empty());
}

TEST_CASE("the page of a run holds its facts and asks for nothing", "[report]") {
  const TinyTask task;
  // Names that would be markup, were they taken for it.
  const std::string hostile = "<script>alert(1)<|script>&\"'";
  test::put(task.folder / "data/classes.txt", "<img src=x onerror=alert(1)>\n</td>&amp;\nblue\n");
  const auto trained = task.finetune(hostile, {"train.epochs=2"});
  std::string predictions = std::string(tasks::kPredictionsHeader) + "\n";
  for (int i = 0; i < 15; ++i) predictions += cat("\"<b>", i, "\",", i % 3, ",", i % 2, ",0.5\n");
  test::put(task.folder / "<i>p.csv", predictions);
  const auto out = task.folder / "report.html";
  const tasks::ReportOptions options{
      .runs = {task.folder / hostile}, .out = out, .predictions = {task.folder / "<i>p.csv"}};
  const tasks::Report made = tasks::report(options);
  const std::string page = test::get(out);
  CHECK(page == to_html(made));
  CHECK(test::page_fault(page).empty());
  CHECK(page.find("Run &lt;script&gt;alert(1)&lt;|script&gt;&amp;&quot;&#39;") != std::string::npos);
  CHECK(page.find("&lt;img src=x onerror=alert(1)&gt;") != std::string::npos);
  for (const std::string& fact :
       {std::string("vtab"), std::string("lora, pyra-4,2"), trained.processor, cat(trained.correct, " of 15 images"),
        grouped(trained.trained_parameters) + " trained", grouped(trained.macs) + " an image", trained.libtorch_version,
        std::string("Training loss"), std::string("Learning rate"), std::string("Confusion matrix")}) {
    CAPTURE(fact);
    CHECK(page.find(fact) != std::string::npos);
  }
  CHECK(test::count_of(page, "<svg ") == 4);
  CHECK(test::count_of(page, "<desc ") == 4);

  // The same files, the same bytes: again, and where numbers are written otherwise.
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Continental));
  (void)tasks::report(options);
  std::locale::global(before);
  CHECK(test::get(out) == page);
}

TEST_CASE("a bad run is named with its file, or left out and listed", "[report]") {
  const TinyTask task;
  (void)task.finetune("good", {"train.epochs=2"});
  const auto spoil = [&](const std::string& name, const std::function<void(const fs::path&)>& change) {
    fs::copy(task.folder / "good", task.folder / name, fs::copy_options::recursive);
    change(task.folder / name);
    return task.folder / name;
  };
  struct Case {
    fs::path run;
    std::vector<std::string> says;
  };
  const auto cut = [](const fs::path& file) { fs::resize_file(file, fs::file_size(file) - 20); };
  const std::vector<Case> cases{
      {task.folder / "none", {"none", "no run folder"}},
      {spoil("unfinished", [](const auto& run) { fs::remove(run / "report.json"); }),
       {"report.json", "not finished", "--resume"}},
      {spoil("no_recipe", [](const auto& run) { fs::remove(run / "run.toml"); }), {"run.toml", "missing"}},
      {spoil("bad_recipe", [](const auto& run) { test::put(run / "run.toml", "model = \n"); }), {"run.toml:1"}},
      {spoil("old_recipe", [](const auto& run) { test::put(run / "run.toml", "modle = \"x\"\n"); }), {"run.toml:1"}},
      {spoil("cut_report", [&](const auto& run) { cut(run / "report.json"); }), {"report.json", "JSON"}},
      {spoil("list_report", [](const auto& run) { test::put(run / "report.json", "[]"); }),
       {"report.json", "an array, expected an object"}},
      {spoil("accuracy", [](const auto& run) { set_json(run / "report.json", "accuracy", 7); }),
       {"report.json", "accuracy is 7", "0 to 1"}},
      {spoil("steps", [](const auto& run) { set_json(run / "report.json", "steps", -6); }),
       {"report.json", "steps is -"}},
      {spoil("macs", [](const auto& run) { replace(run / "report.json", "\"macs\"", "\"macz\""); }),
       {"report.json", "macs is missing"}},
      {spoil("peft", [](const auto& run) { set_json(run / "report.json", "peft", 12); }),
       {"report.json", "peft is an integer, expected a string"}},
      {spoil("no_metrics", [](const auto& run) { fs::remove(run / "metrics.jsonl"); }), {"metrics.jsonl"}},
      {spoil("empty_metrics", [](const auto& run) { test::put(run / "metrics.jsonl", ""); }),
       {"metrics.jsonl", "empty"}},
      {spoil("cut_metrics", [&](const auto& run) { cut(run / "metrics.jsonl"); }),
       {"metrics.jsonl", "middle of a line"}},
      {spoil("loss", [](const auto& run) { replace(run / "metrics.jsonl", "\"loss\":", "\"loss\":null,\"lost\":"); }),
       {"metrics.jsonl:1", "loss is null"}},
      {spoil("kind", [](const auto& run) { replace(run / "metrics.jsonl", "\"train\"", "\"trian\""); }),
       {"metrics.jsonl:1", "kind is 'trian'"}},
      {spoil("order", [](const auto& run) { replace(run / "metrics.jsonl", "\"step\":3,", "\"step\":9,"); }),
       {"metrics.jsonl:2", "step is 6"}},
      {spoil("mixed", [](const auto& run) { set_json(run / "report.json", "accuracy", 0.123); }),
       {"report.json", "metrics.jsonl", "not of one run"}},
      {spoil("no_adapter", [](const auto& run) { fs::remove_all(run / "adapter"); }), {"adapter"}},
      {spoil("cut_adapter", [&](const auto& run) { cut(run / "adapter/adapter_model.safetensors"); }),
       {"adapter_model.safetensors"}},
  };
  std::vector<fs::path> all{task.folder / "good"};
  for (const Case& bad : cases) {
    CAPTURE(bad.run.filename());
    check_error(ExitCode::input, bad.says, [&] { (void)report({task.folder / "good", bad.run}); });
    all.push_back(bad.run);
  }
  const auto out = task.folder / "r.html";
  check_error(ExitCode::input, {"--skip-bad"}, [&] { (void)report(all, {.out = out}); });
  CHECK_FALSE(fs::exists(out));
  const tasks::Report skipped = report(all, {.out = out, .skip_bad = true});
  CHECK(skipped.runs.size() == 1);
  REQUIRE(skipped.left_out.size() == cases.size());
  CHECK(skipped.left_out[1].second.find("not finished") != std::string::npos);
  CHECK(test::page_fault(test::get(out)).empty());
  CHECK(test::get(out).find("Left out") != std::string::npos);
  all.erase(all.begin());
  check_error(ExitCode::input, {"none of the", "none"}, [&] { (void)report(all, {.skip_bad = true}); });
}

TEST_CASE("a report that makes no sense, or cannot be written", "[report]") {
  const TinyTask task;
  (void)task.finetune("run", {"train.epochs=1"});
  check_error(ExitCode::usage, {"no run"}, [&] { (void)report({}); });
  check_error(ExitCode::usage, {"twice"}, [&] { (void)report({task.folder / "run", task.folder / "data/../run"}); });
  check_error(ExitCode::usage, {"2001 runs"}, [&] { (void)report(std::vector<fs::path>(2001, task.folder / "run")); });
  check_error(ExitCode::output, {"nowhere"},
              [&] { (void)report({task.folder / "run"}, {.out = task.folder / "nowhere/r.html"}); });
  check_error(ExitCode::output, {"folder"},
              [&] { (void)report({task.folder / "run"}, {.out = task.folder / "data"}); });
  test::put(task.folder / "p.csv", std::string(tasks::kPredictionsHeader) + "\na,3,0,1\n");
  check_error(ExitCode::input, {"p.csv:2", "label is 3"},
              [&] { (void)report({task.folder / "run"}, {.predictions = {task.folder / "p.csv"}}); });
}

TEST_CASE("runs that differ only in the seed are one entry with mean and deviation", "[report]") {
  std::vector<tasks::RunRecord> runs;
  for (int64_t seed = 0; seed < 3; ++seed) {
    runs.push_back(made_up("pyra-high", seed, 0.70 + 0.01 * double(seed), 300 + 10 * double(seed)));
    runs.push_back(made_up("tome-high", seed, 0.60, 300));
    runs.push_back(made_up("dense", seed, 0.80, 100));
  }
  const auto boards = tasks::compare_runs(runs, true, tasks::Speed::inference);
  REQUIRE(boards.size() == 1);
  const auto& entries = boards[0].entries;
  REQUIRE(entries.size() == 3);
  CHECK(entries[0].name == "lora, dense");
  CHECK(entries[1].name == "lora, pyra-high");
  CHECK(entries[2].name == "lora, tome-high");
  CHECK(entries[1].runs == std::vector<size_t>{0, 3, 6});
  CHECK(entries[1].accuracy.mean == Approx(0.71));
  CHECK(*entries[1].accuracy.deviation == Approx(0.01));
  CHECK(entries[1].images_per_second.mean == Approx(310));
  CHECK(*entries[1].images_per_second.deviation == Approx(10));
  CHECK(entries[0].front);
  CHECK(entries[1].front);
  CHECK_FALSE(entries[2].front);
  CHECK(tasks::compare_runs(runs, true, tasks::Speed::training)[0].entries[0].images_per_second.mean ==
        Approx(100.0 / 3));
  // Ungrouped, each stands for itself.
  const auto single = tasks::compare_runs(runs, false, tasks::Speed::inference);
  CHECK(single[0].entries.size() == 9);
  CHECK_FALSE(single[0].entries[0].accuracy.deviation.has_value());
}

TEST_CASE("what else differs makes another group, and its name says so", "[report]") {
  std::vector<tasks::RunRecord> runs(3, made_up("tome-high", 0, 0.6, 300));
  runs[1].recipe.train.batch = 64;
  runs[2].base_fingerprint = "another";
  runs[2].recipe.model = "/models/large.safetensors";
  runs.push_back(made_up("dense", 0, 0.5, 200));
  runs.back().recipe.out = "/elsewhere";
  runs.push_back(made_up("dense", 1, 0.5, 200));
  const auto entries = tasks::compare_runs(runs, true, tasks::Speed::inference)[0].entries;
  std::vector<std::string> names;
  for (const auto& entry : entries) names.push_back(entry.name);
  REQUIRE(names.size() == 4);
  CHECK(std::count(names.begin(), names.end(), "lora, dense") == 1);
  const auto has = [&](const std::string& part) {
    return std::count_if(names.begin(), names.end(), [&](const auto& name) { return name.find(part) != name.npos; });
  };
  CHECK(has("train.batch = 64") == 1);
  CHECK(has("train.batch = 32") == 2);
  CHECK(has("large.safetensors") == 1);
}

TEST_CASE("only like is compared with like", "[report]") {
  std::vector<tasks::RunRecord> runs(6, made_up("dense", 0, 0.6, 300));
  runs[1].recipe.data = "/data/other";
  runs[2].result.protocol = "paper";
  runs[2].result.test_selected = true;
  runs[3].result.processor = "Another CPU";
  runs[4].result.device = "cuda:0";
  runs[5].result.threads = 8;
  const auto boards = tasks::compare_runs(runs, false, tasks::Speed::inference);
  CHECK(boards.size() == 6);
  CHECK(std::count_if(boards.begin(), boards.end(),
                      [](const auto& board) { return board.caption.find("test-selected") != std::string::npos; }) == 1);
}

TEST_CASE("the front is what nothing beats", "[report]") {
  const Philox random(5, RandomStream::bench);
  for (uint64_t round = 0; round < 50; ++round) {
    std::vector<tasks::RunRecord> runs;
    const uint64_t count = 1 + random.below(round * 100, 20);
    for (uint64_t i = 0; i < count; ++i) {  // few values, so that many are equal
      runs.push_back(made_up("dense", int64_t(i), double(random.below(round * 100 + 2 * i + 1, 6)) / 6,
                             double(1 + random.below(round * 100 + 2 * i + 2, 6))));
    }
    const auto entries = tasks::compare_runs(runs, false, tasks::Speed::inference)[0].entries;
    size_t front = 0;
    for (const auto& a : entries) {
      bool beaten = false;
      for (const auto& b : entries) {
        const bool as_good = b.accuracy.mean >= a.accuracy.mean && b.images_per_second.mean >= a.images_per_second.mean;
        const bool better = b.accuracy.mean > a.accuracy.mean || b.images_per_second.mean > a.images_per_second.mean;
        beaten = beaten || (as_good && better);
      }
      REQUIRE(a.front != beaten);
      front += a.front;
    }
    REQUIRE(front > 0);
  }
}

TEST_CASE("many runs make one page and one document", "[report]") {
  const TinyTask task;
  std::vector<fs::path> runs;
  for (const char* merge : {"none", "tome"}) {
    for (const char* seed : {"0", "1"}) {
      const std::string name = cat(merge, "-", seed);
      (void)task.finetune(name, {"train.epochs=1", cat("merge.name=", merge), cat("seed=", seed)});
      runs.push_back(task.folder / name);
    }
  }
  const tasks::Report made = report(runs, {.out = task.folder / "all.html", .pareto = true});
  const std::string page = test::get(task.folder / "all.html");
  CHECK(test::page_fault(page).empty());
  CHECK(test::count_of(page, "<details") == 4);
  CHECK(page.find("Means over seeds") != std::string::npos);
  const auto document = nlohmann::json::parse(to_json(made));
  CHECK(document["grouped"] == true);
  CHECK(document["speed"] == "inference");
  CHECK(document["runs"].size() == 4);
  REQUIRE(document["boards"].size() == 1);
  const auto& entries = document["boards"][0]["entries"];
  REQUIRE(entries.size() == 2);
  int fronts = 0;
  for (const auto& entry : entries) {
    CHECK(entry["runs"].size() == 2);
    CHECK(entry["seeds"] == std::vector<int>{0, 1});
    CHECK(entry["accuracy"]["deviation"].is_number());
    fronts += entry["pareto"].get<bool>();
  }
  CHECK(fronts >= 1);
}
