// The shell recipes that run pyractl many times, on tasks that take seconds.
#include <set>

#include "fixtures.h"

using namespace pyra;
using namespace pyra::test;
using nlohmann::json;

namespace {

/// Runs `recipe` of the source tree with the built program.
RunResult recipe(const Workshop& shop, const std::string& name, const std::string& arguments) {
  return run({"/bin/sh", "-c", "PYRACTL='" PYRACTL "' exec '" PYRA_SOURCE_DIR "/recipes/" + name + "' " + arguments},
             shop.path());
}

std::vector<json> lines_of(const std::filesystem::path& path) {
  std::vector<json> rows;
  for (const std::string& line : split(read_bytes(path), '\n'))
    if (!line.empty()) rows.push_back(json::parse(line));
  return rows;
}

}  // namespace

TEST_CASE("table1.sh counts what was published", "[recipes]") {
  const Workshop shop;
  const RunResult result = recipe(shop, "table1.sh", "");
  INFO(result.out << result.err);
  CHECK(result.exit_code == 0);
  CHECK(result.out.find("differs") == std::string::npos);
  CHECK_THAT(result.out, Catch::Contains("27,840 | 27,840"));
}

TEST_CASE("vtab1k.sh runs every method on every task once, in shards or not, and makes the table", "[recipes]") {
  const Workshop shop;
  std::filesystem::create_directory(shop / "data");
  shop.copy_task("data/first");
  shop.copy_task("data/second");
  const std::string line =
      "--model model.safetensors --data data --tasks first,second --methods linear_probe,tome_high --seeds 0 "
      "--device cpu --set train.epochs=1 --set train.batch=2 --set train.warmup_epochs=0 --out done ";
  const RunResult one = recipe(shop, "vtab1k.sh", line + "--shard 0/2");
  INFO(one.out << one.err);
  REQUIRE(one.exit_code == 0);
  CHECK(lines_of(shop / "done/results-0-of-2.jsonl").size() == 2);
  const RunResult all = recipe(shop, "vtab1k.sh", line);
  INFO(all.out << all.err);
  REQUIRE(all.exit_code == 0);
  const std::vector<json> rest = lines_of(shop / "done/results.jsonl");
  CHECK(rest.size() == 2);  // the first shard's are not done again
  for (const json& row : rest) {
    CHECK(row["protocol"] == "vtab");
    CHECK(row["test_selected"] == false);
    CHECK(row["train_split"] == "train800val200");
    // Swept over the plan's rates on val200.
    CHECK(row["choices"].size() == 2);
  }
  for (const char* part : {"| first | second | other |", "| linear_probe |", "| tome_high |"})
    CHECK_THAT(all.out, Catch::Contains(part));
  CHECK(read_bytes(shop / "done/table.md") ==
        recipe(shop, "vtab1k.sh", line + "--table").out.substr(0, read_bytes(shop / "done/table.md").size()));
}

TEST_CASE("vtab1k.sh checks a task against what VTAB-1k has before anything trains", "[recipes]") {
  const Workshop shop;
  std::filesystem::create_directory(shop / "data");
  shop.copy_task("data/cifar");  // the name that the authors' build script writes
  const RunResult wrong = recipe(shop, "vtab1k.sh", "--model model.safetensors --data data --out done --device cpu");
  CHECK(wrong.exit_code == 1);
  CHECK_THAT(wrong.err, Catch::Contains("data/cifar") && Catch::Contains("6 classes, VTAB-1k has 100") &&
                            Catch::Contains("not there, left out: caltech101"));
  CHECK_FALSE(std::filesystem::exists(shop / "done/results.jsonl"));
  const RunResult none = recipe(shop, "vtab1k.sh", "--model model.safetensors --data data --tasks svhn --out done");
  CHECK(none.exit_code == 1);
  CHECK_THAT(none.err, Catch::Contains("no folder or .tar for svhn"));
}

TEST_CASE("adverse_compression.sh draws accuracy over speed, and does nothing twice", "[recipes]") {
  const Workshop shop;
  const std::string line =
      "--large big=model.safetensors --small little=model.safetensors --data task --schedules '1;3' --seeds 0,1 "
      "--batch 2 --repetitions 3 --device cpu --set train.epochs=1 --set train.batch=2 --set train.warmup_epochs=0 "
      "--out done";
  const RunResult result = recipe(shop, "adverse_compression.sh", line);
  INFO(result.out << result.err);
  REQUIRE(result.exit_code == 0);
  CHECK(lines_of(shop / "done/results.jsonl").size() == 12);  // 2 seeds of: two dense, two mergers at two schedules
  const json speeds = json::parse(read_bytes(shop / "done/speeds.json"));
  CHECK(speeds.size() == 6);
  for (const char* part : {"| large | 1.00 |", "| LoRA + PYRA 3 |", "| LoRA + ToMe 1 |", "| small |"})
    CHECK_THAT(result.out, Catch::Contains(part));
  const std::string curve = read_bytes(shop / "done/curve.svg");
  CHECK_THAT(curve,
             Catch::Contains("big, LoRA + PYRA") && Catch::Contains("little, LoRA") && Catch::Contains("</svg>"));
  const RunResult again = recipe(shop, "adverse_compression.sh", line);
  CHECK(again.exit_code == 0);
  CHECK(again.out == result.out);
  CHECK(lines_of(shop / "done/results.jsonl").size() == 12);
  const RunResult two = recipe(shop, "adverse_compression.sh", "--large a=x,b=y --small c=z --data task --out other");
  CHECK(two.exit_code == 2);
  CHECK_THAT(two.err, Catch::Contains("expected one NAME=FILE"));
}
