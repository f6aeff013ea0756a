#include "tasks/bench_report.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/text.h"
#include "io/json.h"
#include "io/json_fields.h"
#include "tasks/bench_stats.h"

namespace pyra::tasks {
namespace {

using io::JsonFields;
using nlohmann::json;

constexpr size_t kMaxReportBytes = size_t{64} << 20;

json number(double value) {
  return std::isfinite(value) ? json(value) : json(nullptr);
}

double mean(const std::vector<double>& values) {
  double sum = 0;
  for (double value : values) sum += value;
  return sum / double(values.size());
}

double deviation(const std::vector<double>& values) {
  if (values.size() < 2) return 0;
  const double centre = mean(values);
  double squares = 0;
  for (double value : values) squares += (value - centre) * (value - centre);
  return std::sqrt(squares / double(values.size() - 1));
}

json settings_json(const BenchSettings& s) {
  return {{"model", s.model},       {"arch", s.arch},
          {"merge", s.merge},       {"schedule", s.schedule},
          {"data", s.data},         {"split", s.split},
          {"peft", s.peft},         {"modes", s.modes},
          {"batches", s.batches},   {"device", s.device},
          {"dtype", s.dtype},       {"threads", s.threads},
          {"set", s.set},           {"repetitions", s.repetitions},
          {"min_time", s.min_time}, {"max_time", s.max_time},
          {"warmup", s.warmup}};
}

json context_json(const BenchReport& report) {
  const BenchMachine& m = report.machine;
  json caches = json::array();
  for (const CpuCache& cache : m.caches)
    caches.push_back(
        {{"type", cache.type}, {"level", cache.level}, {"size", cache.size}, {"num_sharing", cache.num_sharing}});
  json control = json::array();
  for (double ms : report.control_ms) control.push_back(number(ms));
  return {{"date", m.date},
          {"host_name", m.host_name},
          {"executable", m.executable},
          {"num_cpus", m.num_cpus},
          {"mhz_per_cpu", number(m.mhz_per_cpu)},
          {"cpu_scaling_enabled", m.cpu_scaling_enabled},
          {"caches", caches},
          {"load_avg", m.load_avg},
          {"library_version", m.pyractl_version},
          {"library_build_type", m.library_build_type},
          {"json_schema_version", 1},
          {"device", m.device},
          {"driver", m.driver},
          {"gpu_clock_mhz", m.gpu_clock_mhz},
          {"gpu_memory_bytes", m.gpu_memory_bytes},
          {"cpu_model", m.cpu_model},
          {"micro_kernel", m.micro_kernel},
          {"commit", m.commit},
          {"libtorch_version", m.libtorch_version},
          {"pyractl_version", m.pyractl_version},
          {"dtype", m.dtype},
          {"threads", m.threads},
          {"peak_memory", report.peak_memory},
          {"control_ms", control},
          {"settings", settings_json(report.settings)}};
}

// What every entry of a row carries, aggregate or not.
json common_json(const BenchRow& row, size_t family, int64_t threads) {
  json entry{{"family_index", family}, {"per_family_instance_index", 0},
             {"run_name", row.name},   {"repetitions", row.real_ms.size()},
             {"threads", threads},     {"time_unit", "ms"},
             {"batch", row.batch},     {"macs", row.macs},
             {"params", row.params},   {"peak_memory_bytes", row.peak_memory_bytes}};
  if (row.trained_params) entry["trained_params"] = *row.trained_params;
  if (row.slower_than_dense) entry["slower_than_dense"] = true;
  return entry;
}

void append_row(json& benchmarks, const BenchRow& row, size_t family, int64_t threads) {
  const json common = common_json(row, family, threads);
  std::vector<double> rates;
  for (size_t i = 0; i < row.real_ms.size(); ++i) {
    rates.push_back(1000.0 * double(row.batch) / row.real_ms[i]);
    json entry = common;
    entry.update({{"name", row.name},
                  {"run_type", "iteration"},
                  {"repetition_index", i},
                  {"iterations", row.iterations},
                  {"real_time", number(row.real_ms[i])},
                  {"cpu_time", number(row.cpu_ms[i])},
                  {"items_per_second", number(rates.back())}});
    benchmarks.push_back(std::move(entry));
  }
  if (row.real_ms.empty()) return;
  const auto aggregate = [&](const char* name, const char* unit, auto&& statistic) {
    json entry = common;
    entry.update({{"name", row.name + "_" + name},
                  {"run_type", "aggregate"},
                  {"aggregate_name", name},
                  {"aggregate_unit", unit},
                  {"iterations", row.real_ms.size()},
                  {"real_time", number(statistic(row.real_ms))},
                  {"cpu_time", number(statistic(row.cpu_ms))},
                  {"items_per_second", number(statistic(rates))}});
    benchmarks.push_back(std::move(entry));
  };
  aggregate("median", "time", [](const std::vector<double>& values) { return median(values); });
  benchmarks.back()["relative_spread"] = number(relative_spread(row.real_ms));
  for (const engine::Stage& stage : row.profile)
    benchmarks.back()["profile"].push_back({{"step", stage.name},
                                            {"calls", stage.calls},
                                            {"ms", number(stage.ms)},
                                            {"bytes", number(stage.bytes)},
                                            {"operations", number(stage.operations)}});
  for (const auto& [name, share] : {std::pair("latency_p50_ms", 0.5), std::pair("latency_p99_ms", 0.99)})
    if (!row.latency_ms.empty()) benchmarks.back()[name] = number(quantile(row.latency_ms, share));
  aggregate("mean", "time", mean);
  aggregate("stddev", "time", deviation);
  aggregate("cv", "percentage", [](const std::vector<double>& values) { return deviation(values) / mean(values); });
}

// Every count is bounded, so that sums of a few cannot overflow.
int64_t count(const JsonFields& fields, const char* key, int64_t limit = int64_t{1} << 60) {
  const int64_t value = fields.integer(key);
  if (value < 0 || value > limit) fields.refuse(key, cat("is ", value, ", expected 0 to ", limit));
  return value;
}

double positive(const JsonFields& fields, const char* key) {
  const double value = fields.number(key);
  if (!(value > 0)) fields.refuse(key, cat("is ", value, ", expected a number above 0"));
  return value;
}

std::vector<double> positives(const JsonFields& fields, const char* key) {
  const std::vector<double> values = fields.numbers(key);
  if (!std::all_of(values.begin(), values.end(), [](double value) { return value > 0; }))
    fields.refuse(key, "holds a number that is not above 0");
  return values;
}

BenchSettings settings_from(const JsonFields& fields) {
  BenchSettings s;
  s.model = fields.string("model");
  s.arch = fields.string("arch");
  s.merge = fields.string("merge");
  s.schedule = fields.string("schedule");
  s.peft = fields.string("peft");
  s.modes = fields.strings("modes");
  if (fields.has("data")) s.data = fields.string("data");
  if (fields.has("split")) s.split = fields.string("split");
  s.batches = fields.integers("batches");
  s.device = fields.string("device");
  s.dtype = fields.string("dtype");
  s.threads = count(fields, "threads", kMaxBenchThreads);
  s.set = fields.strings("set");
  s.repetitions = count(fields, "repetitions", kMaxBenchRepetitions);
  s.min_time = positive(fields, "min_time");
  s.max_time = positive(fields, "max_time");
  s.warmup = count(fields, "warmup", kMaxBenchRepetitions);
  return s;
}

// Only what comparisons look at; the rest of the context is for readers.
BenchMachine machine_from(const JsonFields& fields) {
  BenchMachine m;
  m.date = fields.string("date");
  m.host_name = fields.string("host_name");
  m.num_cpus = count(fields, "num_cpus");
  m.device = fields.string("device");
  m.driver = fields.string("driver");
  m.cpu_model = fields.string("cpu_model");
  m.micro_kernel = fields.string("micro_kernel");
  m.commit = fields.string("commit");
  m.libtorch_version = fields.string("libtorch_version");
  m.pyractl_version = fields.string("pyractl_version");
  m.library_build_type = fields.string("library_build_type");
  m.dtype = fields.string("dtype");
  m.threads = count(fields, "threads", kMaxBenchThreads);
  return m;
}

double unit_in_ms(const JsonFields& fields) {
  static const std::map<std::string, double> units{{"ns", 1e-6}, {"us", 1e-3}, {"ms", 1.0}, {"s", 1e3}};
  const std::string unit = fields.string("time_unit");
  const auto found = units.find(unit);
  if (found == units.end()) fields.refuse("time_unit", cat("is '", unit, "', expected ns, us, ms or s"));
  return found->second;
}

void add_repetition(std::vector<BenchRow>& rows, std::map<std::string, size_t>& index, const JsonFields& fields) {
  const auto [place, is_new] = index.try_emplace(fields.string("name"), rows.size());
  if (is_new) rows.push_back({.name = place->first});
  BenchRow& row = rows[place->second];
  const double unit = unit_in_ms(fields);
  row.real_ms.push_back(positive(fields, "real_time") * unit);
  row.cpu_ms.push_back(fields.number("cpu_time") * unit);
  row.iterations = count(fields, "iterations");
  row.batch = count(fields, "batch", kMaxBenchBatch);
  row.macs = count(fields, "macs");
  row.params = count(fields, "params");
  row.peak_memory_bytes = count(fields, "peak_memory_bytes");
  if (fields.has("trained_params")) row.trained_params = count(fields, "trained_params");
  row.slower_than_dense = fields.has("slower_than_dense") && fields.boolean("slower_than_dense");
}

}  // namespace

std::string dense_name(const std::string& row_name) {
  std::vector<std::string> parts = split(row_name, '/');
  if (parts.size() != 6 || std::ranges::find(kBenchModes, parts[0]) == kBenchModes.end()) return "";
  const size_t plus = parts[2].find('+');
  parts[2] = "dense" + (plus == std::string::npos ? "" : parts[2].substr(plus));
  return join(parts, "/");
}

json to_json(const BenchReport& report) {
  json benchmarks = json::array();
  for (size_t i = 0; i < report.rows.size(); ++i) append_row(benchmarks, report.rows[i], i, report.machine.threads);
  return {{"context", context_json(report)}, {"benchmarks", std::move(benchmarks)}};
}

BenchReport report_from_json(const json& document, const std::string& where) {
  const JsonFields top(document, where);
  const JsonFields context = top.object("context");
  BenchReport report;
  report.machine = machine_from(context);
  report.settings = settings_from(context.object("settings"));
  report.control_ms = positives(context, "control_ms");
  report.peak_memory = context.string("peak_memory");
  std::map<std::string, size_t> index;
  const json& benchmarks = top.value("benchmarks");
  if (!benchmarks.is_array()) top.refuse("benchmarks", cat("is ", io::json_type(benchmarks), ", expected an array"));
  for (size_t i = 0; i < benchmarks.size(); ++i) {
    const JsonFields fields(benchmarks[i], where, cat("benchmarks[", i, "]."));
    if (fields.string("run_type") == "iteration") add_repetition(report.rows, index, fields);
  }
  if (report.rows.empty()) top.refuse("benchmarks", "holds no iteration row");
  return report;
}

BenchReport read_report(const std::filesystem::path& path) {
  return report_from_json(io::read_json(path, kMaxReportBytes), path.string());
}

}  // namespace pyra::tasks
