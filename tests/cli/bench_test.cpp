// pyractl bench as a user runs it: rows, JSON, comparisons and their exit codes, on models that take milliseconds.
#include <set>

#include "fixtures.h"

using namespace pyra;
using namespace pyra::test;
using nlohmann::json;

namespace {

// A handful of tokens, so that a run takes a second.
const std::string kSmall = "bench --arch vit_ti_patch16_64 --dtype fp32 --threads 1 ";
const std::string kShort = "--repetitions 5 --min-time 0.005 --warmup 2 ";
// What comparisons measure: little enough work for a test, enough of it in the merger.
const std::string kCompared =
    "bench --arch vit_ti_patch8_64 --merge tome --schedule 4 --batch 2 --dtype fp32 --threads 1 ";

// The two answers to a program that became slower. Which one a real clock gives depends on what else the machine does
// (a shared one has shown 1174 % of noise); what each is given for is tested below on times without a clock.
constexpr int kSlow = 5;
constexpr int kUnknown = 8;

std::set<std::string> names(const json& document) {
  std::set<std::string> found;
  for (const json& row : document["benchmarks"]) found.insert(row["run_name"].get<std::string>());
  return found;
}

// Every time of the rows whose name holds `part` takes `factor` as long.
json slowed(json document, const std::string& part, double factor) {
  for (json& row : document["benchmarks"])
    if (row["name"].get<std::string>().find(part) != std::string::npos)
      row["real_time"] = row["real_time"].get<double>() * factor;
  return document;
}

// Repetitions without noise: what the exit codes make of them must not depend on the machine that runs the tests.
json quiet(json document) {
  for (json& row : document["benchmarks"]) row["real_time"] = 10 + 0.001 * double(row.value("repetition_index", 0) % 3);
  for (json& ms : document["context"]["control_ms"]) ms = 5;
  return document;
}

}  // namespace

TEST_CASE("bench prints Google Benchmark's JSON with a dense row beside the merged one", "[bench]") {
  const Workshop shop;
  const json document = json_of(shop, kSmall + kShort + "--merge tome --schedule 2 --batch 1,3 ");
  CHECK(names(document) == std::set<std::string>{"infer/vit_ti_patch16_64/dense/cpu/fp32/b1",
                                                 "infer/vit_ti_patch16_64/tome-2/cpu/fp32/b1",
                                                 "infer/vit_ti_patch16_64/dense/cpu/fp32/b3",
                                                 "infer/vit_ti_patch16_64/tome-2/cpu/fp32/b3"});
  const json& context = document["context"];
  CHECK(context["json_schema_version"] == 1);
  CHECK(context["device"] == "cpu");
  CHECK(context["driver"] == "none");
  CHECK(context["threads"] == 1);
  CHECK(context["dtype"] == "fp32");
  CHECK(context["control_ms"].size() == 5);
  CHECK_FALSE(context["cpu_model"].get<std::string>().empty());
  CHECK_FALSE(context["commit"].get<std::string>().empty());
  REQUIRE(document["benchmarks"].size() == 4 * (5 + 4));
  std::map<std::string, int64_t> macs;
  for (const json& row : document["benchmarks"]) {
    CHECK(row["time_unit"] == "ms");
    CHECK(row["peak_memory_bytes"] > 1 << 20);
    macs[row["run_name"]] = row["macs"];
    if (row["run_type"] != "iteration") continue;
    CHECK(row["real_time"] > 0.0);
    CHECK(row["items_per_second"].get<double>() ==
          Approx(1e3 * row["batch"].get<double>() / row["real_time"].get<double>()));
    CHECK(row["real_time"].get<double>() * row["iterations"].get<double>() > 0.5);  // milliseconds of work were timed
  }
  CHECK(macs["infer/vit_ti_patch16_64/tome-2/cpu/fp32/b1"] < macs["infer/vit_ti_patch16_64/dense/cpu/fp32/b1"]);
}

TEST_CASE("throughput rows stand beside those of one batch after another", "[bench]") {
  const Workshop shop;
  const std::string line = kSmall + "--mode infer,throughput --merge tome --schedule 2 --batch 2 --repetitions 3 ";
  const json document = json_of(shop, line + "--min-time 0.001 ");
  CHECK(names(document) == std::set<std::string>{"infer/vit_ti_patch16_64/dense/cpu/fp32/b2",
                                                 "infer/vit_ti_patch16_64/tome-2/cpu/fp32/b2",
                                                 "throughput/vit_ti_patch16_64/dense/cpu/fp32/b2",
                                                 "throughput/vit_ti_patch16_64/tome-2/cpu/fp32/b2"});
  write_bytes(shop / "base.json", quiet(document).dump());
  const RunResult same = in(shop, "bench --compare base.json base.json --ratio-only --quiet ");
  CHECK(same.exit_code == 0);
  CHECK_THAT(same.out, Catch::Contains("throughput/vit_ti_patch16_64/tome-2/cpu/fp32/b2"));
}

TEST_CASE("training rows count what trains and name the method where it is not lora", "[bench]") {
  const Workshop shop;
  const std::string line = kSmall + "--mode train --merge pyra --schedule 2 --batch 2 --repetitions 3 --warmup 1 ";
  const json lora = json_of(shop, line + "--min-time 0.001 --set peft.rank=4 ");
  CHECK(names(lora) == std::set<std::string>{"train/vit_ti_patch16_64/dense/cpu/fp32/b2",
                                             "train/vit_ti_patch16_64/pyra-2/cpu/fp32/b2"});
  // LoRA of rank 4 on 12 fused qkv layers of width 192, and the head.
  const int64_t dense_trained = 12 * 4 * (192 + 3 * 192) + 193 * 1000;
  CHECK(lora["benchmarks"][0]["trained_params"] == dense_trained);
  // PYRA's a [r], b and norm in blocks that merge: 17 tokens lose 2 in each of 7 blocks, then 1, then none is left to.
  CHECK(lora["benchmarks"].back()["trained_params"] == dense_trained + 7 * (2 + 3 * 192) + 1 + 3 * 192);
  const json bitfit = json_of(shop, line + "--min-time 0.001 --peft bitfit ");
  CHECK(names(bitfit) == std::set<std::string>{"train/vit_ti_patch16_64/dense+bitfit/cpu/fp32/b2",
                                               "train/vit_ti_patch16_64/pyra-2+bitfit/cpu/fp32/b2"});
}

TEST_CASE("bench --end-to-end goes from files to labels", "[bench]") {
  const Workshop shop;
  const std::string line =
      "bench model.safetensors --merge tome --schedule 3 --end-to-end --data task --batch 1,4 "
      "--dtype fp32 --repetitions 3 --min-time 0.001 --warmup 2 ";
  const json document = json_of(shop, line);
  CHECK(names(document) ==
        std::set<std::string>{"e2e/vit_test_patch4_16/dense/cpu/fp32/b1", "e2e/vit_test_patch4_16/tome-3/cpu/fp32/b1",
                              "e2e/vit_test_patch4_16/dense/cpu/fp32/b4", "e2e/vit_test_patch4_16/tome-3/cpu/fp32/b4"});
  size_t medians = 0;
  for (const json& row : document["benchmarks"]) {
    if (row["run_type"] == "iteration" || row["aggregate_name"] != "median") continue;
    ++medians;
    CHECK(row["latency_p99_ms"] >= row["latency_p50_ms"]);
    CHECK(row["latency_p50_ms"] > 0.0);
    std::vector<std::string> stages;
    for (const json& stage : row["profile"]) {
      stages.push_back(stage["step"]);
      CHECK(stage["ms"] > 0.0);
    }
    CHECK(stages == std::vector<std::string>{"read", "decode", "resize", "compute"});
  }
  CHECK(medians == 4);
  const RunResult table = in(shop, line);
  for (const char* part : {"latency of a batch", "decode", "images/s it allows"})
    CHECK_THAT(table.out, Catch::Contains(part));
  write_bytes(shop / "base.json", document.dump());
  CHECK(in(shop, "bench --compare base.json base.json").exit_code != 2);
  // Exit codes 5 and 8 are about speed; rows of both programs were found and compared.
  const RunResult against = in(shop, cat("bench model.safetensors --end-to-end --data task --batch 4 --repetitions 3 ",
                                         "--min-time 0.001 --warmup 2 --pairs 3 --against ", PYRACTL, " --json"));
  CAPTURE(against.out, against.err);
  CHECK(std::set<int>{0, 5, 8}.contains(against.exit_code));
  CHECK_THAT(against.out, Catch::Contains("e2e/vit_test_patch4_16/dense/cpu"));
  check_refusal(shop, {"bench --compare base.json --end-to-end --data nowhere", 3, {"nowhere"}});
  const std::string start = "bench model.safetensors --end-to-end ";
  for (const Refusal& refusal : std::vector<Refusal>{{start, 2, {"--data"}},
                                                     {"bench model.safetensors --data task", 2, {"--end-to-end"}},
                                                     {start + "--data none", 3, {"none"}},
                                                     {start + "--data task --split tset", 3, {"tset", "test"}},
                                                     {start + "--data task --batch 7", 3, {"6 images", "7"}}})
    check_refusal(shop, refusal);
}

TEST_CASE("bench prints a table with the speed-up", "[bench]") {
  const Workshop shop;
  const RunResult result = in(shop, kSmall + kShort + "--merge tome --schedule 2 --batch 1 ");
  INFO(result.err);
  CHECK(result.exit_code == 0);
  for (const char* part : {"images/s", "spread", "MACs", "speed-up", "infer/vit_ti_patch16_64/tome-2/cpu/fp32/b1"})
    CHECK_THAT(result.out, Catch::Contains(part));
}

TEST_CASE("a merge slower than the dense model is said so", "[bench][timed]") {
  const Workshop shop;
  const std::string line = kCompared + kShort + "--plugin-path " PYRA_OVERWORKED_PLUGINS " ";
  bool marked = false;
  const json document = json_of(shop, line);
  for (const json& row : document["benchmarks"]) {
    if (row["run_name"] == "infer/vit_ti_patch8_64/dense/cpu/fp32/b2") CHECK_FALSE(row.contains("slower_than_dense"));
    marked |= row.contains("slower_than_dense");
  }
  CHECK(marked);
  CHECK_THAT(in(shop, line).out, Catch::Contains("SLOWER THAN DENSE"));
}

TEST_CASE("comparing two files: every verdict has its exit code", "[bench]") {
  const Workshop shop;
  const json base = quiet(json_of(shop, kSmall + kShort + "--merge tome --schedule 2 --batch 1 "));
  write_bytes(shop / "base.json", base.dump());
  const auto code = [&](const json& now, const std::string& options = "") {
    write_bytes(shop / "now.json", now.dump());
    const RunResult result = in(shop, "bench --compare base.json now.json --json --quiet " + options);
    if (result.exit_code != 2) CHECK(json::parse(result.out)["exit_code"] == result.exit_code);
    return result.exit_code;
  };
  CHECK(code(base) == 0);
  CHECK(code(slowed(base, "tome", 1.10)) == 5);
  CHECK(code(slowed(base, "", 1.10)) == 5);  // two rows: still 5, not a count
  CHECK(code(slowed(base, "tome", 1.10), "--max-regress 15%") == 0);
  CHECK(code(slowed(base, "tome", 0.80)) == 0);
  CHECK(code(slowed(base, "", 1.10), "--ratio-only") == 0);
  CHECK(code(slowed(base, "tome", 1.10), "--ratio-only") == 5);

  json noisy = base;
  for (json& row : noisy["benchmarks"])
    row["real_time"] = row["real_time"].get<double>() * (row.value("repetition_index", 0) % 2 ? 1.3 : 0.8);
  CHECK(code(noisy) == 8);

  json other = base;
  other["context"]["cpu_model"] = "Another CPU";
  CHECK(code(other) == 2);
  CHECK(code(other, "--ratio-only") == 0);

  json fewer = base;
  auto& rows = fewer["benchmarks"].get_ref<json::array_t&>();
  std::erase_if(rows,
                [](const json& row) { return row["run_name"].get<std::string>().find("dense") != std::string::npos; });
  CHECK(code(fewer) == 2);
  CHECK(code(fewer, "--allow-missing") == 0);
}

TEST_CASE("the table of a comparison names rows, changes and verdicts", "[bench]") {
  const Workshop shop;
  const json base = quiet(json_of(shop, kSmall + kShort + "--merge tome --schedule 2 --batch 1 "));
  write_bytes(shop / "base.json", base.dump());
  write_bytes(shop / "now.json", slowed(base, "tome", 1.10).dump());
  const RunResult result = in(shop, "bench --compare base.json now.json");
  CHECK(result.exit_code == 5);
  CHECK_THAT(result.out, Catch::Contains("+10.0%") && Catch::Contains("SLOW") && Catch::Contains("ok"));
}

TEST_CASE("bench refuses what it cannot do in one line with the right exit code", "[bench]") {
  const Workshop shop;
  write_bytes(shop / "broken.json", "{\"context\": ");
  write_bytes(shop / "other.json", "{\"benchmarks\": []}");
  const std::string small = "bench --arch vit_ti_patch16_64 ";
  const std::vector<Refusal> refusals{
      {"bench", 2, {"--arch"}},
      {"bench model.safetensors --arch vit_ti_patch16_64", 2, {"either a model file or --arch"}},
      {small + "--merge tome", 2, {"--schedule"}},
      {"bench --arch vit_tj_patch16_64", 2, {"vit_tj_patch16_64"}},
      {small + "--mode infers", 2, {"infers"}},
      {small + "--batch 0", 2, {"--batch"}},
      {small + "--btach 2", 2, {"--btach", "'--batch'"}},
      {small + "--set merge.name=tome", 2, {"--merge"}},
      {small + "--set train.lr=1", 2, {"train.lr"}},
      {small + "--set preprocess.size=32", 2, {"vit_base_patch16_160"}},
      {small + "--merge nothing --schedule 2", 4, {"nothing"}},
      {small + "--mode train --peft nothing", 4, {"nothing"}},
      {small + "--device cuda:99", 6, {"cuda:99"}},
      {"bench missing.safetensors", 3, {"missing.safetensors"}},
      {"bench broken.json", 3, {"broken.json"}},
      {"bench --compare missing.json", 3, {"missing.json"}},
      {"bench --compare broken.json", 3, {"broken.json"}},
      {"bench --compare other.json", 3, {"other.json: context is missing"}},
      {"bench --compare other.json --max-regress 3", 2, {"percent sign"}},
      {small + "--against ./missing", 2, {"./missing", "cannot be started"}},
      {small + "--against /bin/false", 2, {"/bin/false", "exit code 1"}},
      {small + "--against /bin/echo", 3, {"/bin/echo bench --json"}},
  };
  for (const Refusal& refusal : refusals) check_refusal(shop, refusal);
  check_json_refusal(shop, "bench --compare other.json", 3);
}

TEST_CASE("a file is measured with the merge it carries, beside itself without", "[bench]") {
  const Workshop shop;
  json_of(shop, "compress model.safetensors --merge tome --schedule 3 --out fast.safetensors --no-measure");
  const std::string model = "--dtype fp32 --threads 1 --batch 4 --min-time 0.001 --warmup 1 --repetitions 3";
  const json document = json_of(shop, "bench fast.safetensors " + model);
  CHECK(names(document) == std::set<std::string>{"infer/vit_test_patch4_16/dense/cpu/fp32/b4",
                                                 "infer/vit_test_patch4_16/tome-3/cpu/fp32/b4"});
  CHECK(document["context"]["settings"]["model"] == "fast.safetensors");
  const json larger = json_of(shop, "bench model.safetensors --set preprocess.size=24 " + model);
  CHECK(names(larger) == std::set<std::string>{"infer/vit_test_patch4_16@24/dense/cpu/fp32/b4"});
  const auto counted = json_of(shop, "inspect fast.safetensors");
  CHECK(document["benchmarks"][0]["params"] == counted["params"]);
}

TEST_CASE("a merger that works several times over never passes a comparison", "[bench][timed]") {
  const Workshop shop;
  write_bytes(shop / "base.json", json_of(shop, kCompared + "--repetitions 9 --min-time 0.02 --warmup 3 ").dump());
  for (int time = 0; time < 3; ++time) {
    const RunResult result = in(shop, "bench --compare base.json --quiet --plugin-path " PYRA_OVERWORKED_PLUGINS);
    INFO(result.out << result.err);
    CHECK((result.exit_code == kSlow || result.exit_code == kUnknown));
  }
}

TEST_CASE("twenty comparisons of a program with itself find at most one regression", "[bench][timed]") {
  const Workshop shop;
  write_bytes(shop / "base.json", json_of(shop, kCompared + "--repetitions 9 --min-time 0.01 --warmup 3 ").dump());
  int regressions = 0;
  for (int time = 0; time < 20; ++time) {
    const RunResult result = in(shop, "bench --compare base.json --quiet");
    INFO(result.out << result.err);
    CHECK((result.exit_code == 0 || result.exit_code == kSlow || result.exit_code == kUnknown));
    regressions += result.exit_code == kSlow;
  }
  CHECK(regressions <= 1);
}

TEST_CASE("bench --against judges another program, taken in turn", "[bench][timed]") {
  const Workshop shop;
  // The same program with other plugins stands for another build of it.
  const auto program = [&](const std::string& name, const std::string& plugins) {
    write_bytes(shop / name, "#!/bin/sh\nPYRA_PLUGIN_PATH='" + plugins + "' exec '" PYRACTL "' \"$@\"\n");
    std::filesystem::permissions(shop / name, std::filesystem::perms::owner_all);
  };
  program("slow", PYRA_OVERWORKED_PLUGINS);
  program("usual", "");
  const std::string against =
      kCompared + "--repetitions 3 --min-time 0.01 --warmup 2 --pairs 5 --ratio-only --against ";
  const RunResult faster = in(shop, against + "./slow");
  INFO(faster.out << faster.err);
  CHECK((faster.exit_code == 0 || faster.exit_code == kUnknown));
  if (faster.exit_code == 0) CHECK_THAT(faster.out, Catch::Contains("faster"));

  const std::vector<std::string> arguments = split(against + "./usual", ' ');
  std::vector<std::string> overworked{(shop / "slow").string()};
  overworked.insert(overworked.end(), arguments.begin(), arguments.end());
  const RunResult slower = run(overworked, shop.path());
  INFO(slower.out << slower.err);
  CHECK((slower.exit_code == kSlow || slower.exit_code == kUnknown));
}
