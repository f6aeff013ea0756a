#include "tasks/compress.h"

#include <numeric>

#include "fixtures.h"

using namespace pyra;
using namespace pyra::test;

TEST_CASE("compress shows both models and writes one that eval runs") {
  const Workshop shop;
  const auto document = json_of(
      shop, "compress model.safetensors --merge tome --schedule 3 --out fast.safetensors --batch 2 --dtype fp32");
  CHECK(document["dense"]["tokens"] == std::vector<int>{17, 17, 17});
  CHECK(document["compressed"]["tokens"] == std::vector<int>{14, 11, 8});
  CHECK(document["schedule"]["remove"] == std::vector<int>{3, 3, 3});
  CHECK(document["compressed"]["macs"] < document["dense"]["macs"]);
  CHECK(document["speedup"] > 0.0);
  CHECK(document["timed_pairs"] >= 5);
  CHECK(document["dense"]["batch_seconds"] > 0.0);
  const auto evaluated = json_of(shop, "eval fast.safetensors --data task --dtype fp32");
  CHECK(evaluated["merge"] == "tome-3");
  CHECK(evaluated["macs"] == document["compressed"]["macs"]);
  CHECK(evaluated["loss"] == json_of(shop,
                                     "eval model.safetensors --data task --dtype fp32 --set merge.name=tome "
                                     "--set merge.schedule=3")["loss"]);

  // Another schedule takes the place of this one: nothing was trained for it.
  const auto again =
      json_of(shop, "compress fast.safetensors --merge tome --schedule 1 --out slow.safetensors --no-measure");
  CHECK(again["compressed"]["tokens"] == std::vector<int>{16, 15, 14});
  CHECK_FALSE(again.contains("speedup"));
}

TEST_CASE("compress prints a table") {
  const Workshop shop;
  const RunResult result =
      in(shop, "compress model.safetensors --merge tome --schedule 3 --out fast.safetensors --batch 2 --quiet");
  CAPTURE(result.err);
  CHECK(result.exit_code == 0);
  for (const char* part :
       {"dense", "compressed", "tokens 2", "MACs", "images/s", "speed-up", "written: fast.safetensors"})
    CHECK(result.out.find(part) != std::string::npos);
}

TEST_CASE("proportional attention can be left out, and stays out") {
  const Workshop shop;
  json_of(shop, "compress model.safetensors --merge tome --schedule 4 --out on.safetensors --no-measure");
  json_of(shop,
          "compress model.safetensors --merge tome --schedule 4 --out off.safetensors --no-measure "
          "--no-proportional-attention");
  CHECK(json_of(shop, "inspect off.safetensors")["merge"]["proportional_attention"] == false);
  CHECK(json_of(shop, "inspect on.safetensors")["merge"]["proportional_attention"] == true);
  CHECK(json_of(shop, "eval on.safetensors --data task --dtype fp32")["loss"] !=
        json_of(shop, "eval off.safetensors --data task --dtype fp32")["loss"]);
}

TEST_CASE("a target of multiply-adds is met from below, as nearly as one token allows") {
  const Workshop shop;
  for (const double share : {0.9, 0.75, 0.6}) {
    CAPTURE(share);
    const auto document = json_of(shop, cat("compress model.safetensors --merge tome --target-macs ", share,
                                            " --out fast.safetensors --no-measure"));
    CHECK(document["macs_ratio"] <= share);
    CHECK(document["macs_ratio"] > share - 0.06);
  }
  const int64_t dense = json_of(shop, "inspect model.safetensors")["dense_macs"];
  const auto absolute = json_of(shop, cat("compress model.safetensors --merge tome --target-macs ", dense * 3 / 4,
                                          " --out fast.safetensors --no-measure"));
  CHECK(absolute["compressed"]["macs"] <= dense * 3 / 4);
}

TEST_CASE("schedule_for_macs takes no token more than it must") {
  // Every token is worth the same in every block, so the answer is known: the fewest tokens that reach the target.
  const auto macs_of = [](const std::vector<int64_t>& remove) {
    return 1000 - std::accumulate(remove.begin(), remove.end(), int64_t{0});
  };
  CHECK(tasks::schedule_for_macs(990, 4, 10, macs_of) == std::vector<int64_t>{3, 3, 2, 2});
  CHECK(tasks::schedule_for_macs(992, 4, 10, macs_of) == std::vector<int64_t>{2, 2, 2, 2});
  CHECK(tasks::schedule_for_macs(960, 4, 10, macs_of) == std::vector<int64_t>{10, 10, 10, 10});
  CHECK(tasks::schedule_for_macs(959, 4, 10, macs_of).empty());
}

TEST_CASE("diffrate takes kept counts from a file") {
  const Workshop shop;
  write_bytes(shop / "counts.toml", "prune = [17, 14, 12]\nmerge = [15, 12, 9]\n");
  const auto document = json_of(
      shop, "compress model.safetensors --merge diffrate --schedule counts.toml --out d.safetensors --no-measure");
  CHECK(document["compressed"]["tokens"] == std::vector<int>{15, 12, 9});
  // The file is enough: the counts are in it.
  std::filesystem::remove(shop / "counts.toml");
  CHECK(json_of(shop, "eval d.safetensors --data task --dtype fp32")["macs"] == document["compressed"]["macs"]);
}

TEST_CASE("compress refuses, and leaves no file") {
  const Workshop shop;
  write_bytes(shop / "short.toml", "prune = [17]\nmerge = [15]\n");
  write_bytes(shop / "typo.toml", "remov = [1, 1, 1]\n");
  write_bytes(shop / "cut.safetensors", read_bytes(shop / "model.safetensors").substr(0, 3000));
  const std::string tome = "compress model.safetensors --merge tome --out o.safetensors";
  for (const Refusal& refusal : std::vector<Refusal>{
           {tome + " --schedule hihg", 2, {"'hihg'"}},
           {tome + " --schedule 1,2,3,4", 2, {"4 entries", "3 blocks"}},
           {tome + " --schedule none.toml", 2, {"none.toml"}},
           {tome + " --schedule typo.toml", 2, {"typo.toml:1", "remove"}},
           {tome + " --schedule 1 --target-macs 0.5", 2, {"exactly one"}},
           {tome + " --target-macs half", 2, {"'half'"}},
           {tome + " --target-macs -1", 2, {"--target-macs"}},
           {tome + " --target-macs nan", 2, {"'nan'"}},
           {tome + " --target-macs 0.01", 2, {"tome", "of dense"}},
           {tome + " --target-macs 1e15", 2, {"nothing to compress"}},
           {tome + " --target-speedup 0.5", 2, {"--target-speedup"}},
           {tome + " --schedule 1 --set merge.partitoin=random", 2, {"partition"}},
           {tome + " --schedule 1 --set merge.schedule=2", 2, {"--schedule"}},
           {tome + " --schedule 1 --set train.lr=2", 2, {"train.lr"}},
           {"compress model.safetensors --merge tme --schedule 1 --out o.safetensors", 4, {"tme", "tome"}},
           {"compress model.safetensors --merge pyra --schedule 1 --out o.safetensors", 2, {"pyra", "finetune"}},
           {"compress model.safetensors --merge pyra --target-macs 0.5 --out o.safetensors", 2, {"pyra", "finetune"}},
           {"compress model.safetensors --merge diffrate --schedule short.toml --out o.safetensors", 2, {"short.toml"}},
           {"compress none.safetensors --merge tome --schedule 1 --out o.safetensors", 3, {"none.safetensors"}},
           {"compress cut.safetensors --merge tome --schedule 1 --out o.safetensors", 3, {"cut.safetensors"}},
           {"compress model.safetensors --merge tome --schedule 1 --out nowhere/o.safetensors", 9, {"nowhere"}},
       })
    check_refusal(shop, refusal);
  check_json_refusal(shop, tome + " --schedule hihg", 2);
}

TEST_CASE("a speed-up no schedule reaches is exit 7 with the figures and without a file") {
  const Workshop shop;
  check_refusal(shop, {"compress model.safetensors --merge tome --target-speedup 99 --batch 1 --out o.safetensors",
                       7,
                       {"--target-speedup 99", "as fast as dense", "no file was written"}});
}
