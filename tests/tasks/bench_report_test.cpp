#include "tasks/bench_report.h"

#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "support.h"

using namespace pyra;
using namespace pyra::tasks;
using nlohmann::json;

namespace {

BenchReport sample() {
  BenchReport report;
  report.settings.arch = "vit_ti_patch8_112";
  report.settings.merge = "pyra";
  report.settings.schedule = "high";
  report.settings.modes = {"infer", "train"};
  report.settings.batches = {1, 32};
  report.settings.set = {"peft.rank=4"};
  report.machine = {.date = "2025-01-01T00:00:00+00:00", .host_name = "host", .executable = "pyractl", .num_cpus = 2};
  report.machine.caches = {{.type = "Data", .level = 1, .size = 32768, .num_sharing = 1}};
  report.machine.load_avg = {0.5, 0.25, 0.125};
  report.machine.library_build_type = "release";
  report.machine.cpu_model = "A CPU";
  report.machine.dtype = "fp32";
  report.machine.threads = 2;
  report.peak_memory = "process RSS peak";
  report.control_ms = {5, 5.1, 4.9};
  BenchRow row{.name = "train/vit_ti_patch8_112/pyra-high/cpu/fp32/b32", .batch = 32, .iterations = 4};
  row.real_ms = {100, 110, 90};
  row.cpu_ms = {200, 220, 180};
  row.macs = 1000;
  row.params = 2000;
  row.trained_params = 30;
  row.peak_memory_bytes = 123456789;
  report.rows.push_back(row);
  row.name = "train/vit_ti_patch8_112/dense/cpu/fp32/b32";
  row.slower_than_dense = true;
  report.rows.push_back(row);
  return report;
}

std::string input_error(const json& document) {
  try {
    (void)report_from_json(document, "base.json");
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::input);
    return error.what();
  }
  FAIL("nothing was thrown");
  return "";
}

}  // namespace

TEST_CASE("a report is Google Benchmark's JSON", "[bench]") {
  const json document = to_json(sample());
  const json& context = document["context"];
  for (const char* key : {"date", "host_name", "executable", "num_cpus", "mhz_per_cpu", "cpu_scaling_enabled", "caches",
                          "load_avg", "library_build_type", "json_schema_version", "device", "driver", "cpu_model",
                          "threads", "commit", "libtorch_version", "pyractl_version", "micro_kernel", "settings"}) {
    CAPTURE(key);
    CHECK(context.contains(key));
  }
  CHECK(context["json_schema_version"] == 1);
  CHECK(context["caches"][0] == json{{"type", "Data"}, {"level", 1}, {"size", 32768}, {"num_sharing", 1}});

  const json& benchmarks = document["benchmarks"];
  REQUIRE(benchmarks.size() == 2 * (3 + 4));
  const std::string name = "train/vit_ti_patch8_112/pyra-high/cpu/fp32/b32";
  for (size_t i = 0; i < 3; ++i) {
    const json& run = benchmarks[i];
    CHECK(run["name"] == name);
    CHECK(run["run_name"] == name);
    CHECK(run["run_type"] == "iteration");
    CHECK(run["repetition_index"] == i);
    CHECK(run["repetitions"] == 3);
    CHECK(run["iterations"] == 4);
    CHECK(run["time_unit"] == "ms");
    CHECK(run["peak_memory_bytes"] == 123456789);
    CHECK(run["macs"] == 1000);
    CHECK(run["params"] == 2000);
    CHECK(run["trained_params"] == 30);
    CHECK_FALSE(run.contains("slower_than_dense"));
  }
  CHECK(benchmarks[0]["items_per_second"] == Approx(320));
  const std::vector<std::pair<std::string, double>> aggregates{
      {"median", 100}, {"mean", 100}, {"stddev", 10}, {"cv", 0.1}};
  for (size_t i = 0; i < aggregates.size(); ++i) {
    const json& row = benchmarks[3 + i];
    CHECK(row["run_type"] == "aggregate");
    CHECK(row["aggregate_name"] == aggregates[i].first);
    CHECK(row["name"] == name + "_" + aggregates[i].first);
    CHECK(row["real_time"].get<double>() == Approx(aggregates[i].second));
    CHECK(row["cpu_time"].get<double>() == Approx(aggregates[i].first == "cv" ? 0.1 : 2 * aggregates[i].second));
    CHECK_FALSE(row.contains("repetition_index"));
  }
  CHECK(benchmarks[3]["relative_spread"].get<double>() == Approx(0.14826));  // 1.4826 * 10 / 100
  CHECK(benchmarks[6]["aggregate_unit"] == "percentage");
  CHECK(benchmarks[7]["slower_than_dense"] == true);
}

TEST_CASE("numbers that are not finite become null", "[bench]") {
  BenchReport report = sample();
  report.rows[0].cpu_ms[1] = std::numeric_limits<double>::quiet_NaN();
  report.machine.mhz_per_cpu = std::numeric_limits<double>::infinity();
  const std::string text = to_json(report).dump();
  CHECK(text.find("nan") == std::string::npos);
  CHECK(json::parse(text)["benchmarks"][1]["cpu_time"].is_null());
  CHECK(json::parse(text)["context"]["mhz_per_cpu"].is_null());
}

TEST_CASE("a report reads back what was written", "[bench]") {
  const BenchReport report = sample();
  const BenchReport read = report_from_json(json::parse(to_json(report).dump()), "base.json");
  CHECK(to_json(read)["benchmarks"] == to_json(report)["benchmarks"]);
  CHECK(to_json(read)["context"]["settings"] == to_json(report)["context"]["settings"]);
  CHECK(read.control_ms == report.control_ms);
  CHECK(read.machine.cpu_model == "A CPU");
  CHECK(read.machine.threads == 2);
}

TEST_CASE("a report from elsewhere is refused by the key that is wrong", "[bench]") {
  const json good = to_json(sample());
  const auto changed = [&](const char* pointer, const json& value) {
    json document = good;
    document[json::json_pointer(pointer)] = value;
    return input_error(document);
  };
  CHECK_THAT(input_error(json::array()), Catch::Contains("base.json: the text is an array"));
  CHECK_THAT(input_error(json::object()), Catch::Contains("base.json: context is missing"));
  CHECK_THAT(changed("/context/threads", "two"), Catch::Contains("base.json: context.threads"));
  CHECK_THAT(changed("/context/threads", -1), Catch::Contains("base.json: context.threads"));
  CHECK_THAT(changed("/context/settings/batches", json::array({1e18})), Catch::Contains("settings.batches"));
  CHECK_THAT(changed("/context/settings/repetitions", 1 << 30), Catch::Contains("settings.repetitions"));
  CHECK_THAT(changed("/context/settings/modes", json::array({1})), Catch::Contains("settings.modes"));
  CHECK_THAT(changed("/benchmarks", 7), Catch::Contains("base.json: benchmarks is"));
  CHECK_THAT(changed("/benchmarks", json::array()), Catch::Contains("benchmarks holds no iteration row"));
  CHECK_THAT(changed("/benchmarks/1/real_time", 0), Catch::Contains("benchmarks[1].real_time"));
  CHECK_THAT(changed("/benchmarks/1/real_time", nullptr), Catch::Contains("benchmarks[1].real_time is null"));
  CHECK_THAT(changed("/benchmarks/1/time_unit", "h"), Catch::Contains("expected ns, us, ms or s"));
  CHECK_THAT(changed("/benchmarks/1/iterations", 1e300), Catch::Contains("benchmarks[1].iterations"));
}

TEST_CASE("other time units are understood", "[bench]") {
  json document = to_json(sample());
  for (json& run : document["benchmarks"]) {
    run["time_unit"] = "us";
    run["real_time"] = run["real_time"].get<double>() * 1000;
  }
  CHECK(report_from_json(document, "base.json").rows[0].real_ms[0] == Approx(100));
}

TEST_CASE("a merged row knows its dense row", "[bench]") {
  CHECK(dense_name("infer/vit/pyra-high/cpu/bf16/b32") == "infer/vit/dense/cpu/bf16/b32");
  CHECK(dense_name("train/vit@160/tome-16,8+bitfit/cpu/fp32/b1") == "train/vit@160/dense+bitfit/cpu/fp32/b1");
  CHECK(dense_name("infer/vit/dense/cpu/bf16/b32") == "infer/vit/dense/cpu/bf16/b32");
  CHECK(dense_name("throughput/vit/pyra-high/cuda/bf16/b32") == "throughput/vit/dense/cuda/bf16/b32");
  CHECK(dense_name("e2e/vit/pyra-high/cuda/bf16/b32") == "e2e/vit/dense/cuda/bf16/b32");
  CHECK(dense_name("else/vit/pyra-high/cuda/bf16/b32").empty());
  CHECK(dense_name("BM_memcpy/8").empty());
}

TEST_CASE("a report file that is none is exit 3 with its name", "[bench]") {
  const test::TempDir folder;
  const auto refused = [&](const std::string& name, const std::string& text) {
    std::ofstream(folder / name) << text;
    try {
      (void)read_report(folder / name);
    } catch (const Error& error) {
      CHECK(error.code() == ExitCode::input);
      CHECK_THAT(error.what(), Catch::Contains(name));
      return;
    }
    FAIL("nothing was thrown for " << name);
  };
  refused("empty.json", "");
  refused("cut.json", to_json(sample()).dump().substr(0, 700));
  refused("deep.json", std::string(100000, '['));
  refused("twice.json", R"({"context": {}, "context": {}, "benchmarks": []})");
  CHECK_THROWS_AS(read_report(folder / "none.json"), Error);
}
