#include "tasks/compress.h"

#include "fixtures.h"

using namespace pyra;
using namespace pyra::test;

TEST_CASE("compress shows both models and writes one that eval runs") {
  const Workshop shop;
  const auto document =
      json_of(shop,
              "compress model.safetensors --merge tome --schedule 3 --out fast.safetensors --batch 2 --dtype fp32 "
              "--allow-slower");
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
      in(shop,
         "compress model.safetensors --merge tome --schedule 3 --out fast.safetensors --batch 2 --quiet "
         "--allow-slower");
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

TEST_CASE("a target's schedule is searched for on images, and beats the uniform one there") {
  const Workshop shop;
  const std::string line = "compress model.safetensors --merge tome --target-macs 0.7 --no-measure --tries 20 ";
  const auto found = json_of(shop, line + "--data task --out fast.safetensors");
  const auto& search = found["found"];
  CHECK(search["likeness"] >= search["uniform"]["likeness"]);
  CHECK(search["likeness"] <= 1.0);
  CHECK(search["tries"] <= 20);
  CHECK(search["split"] == "test");
  CHECK(search["accuracy"]["images"] == 6);
  CHECK(search["accuracy"]["interval95"][0] < search["accuracy"]["interval95"][1]);
  CHECK(json_of(shop, "eval fast.safetensors --data task --dtype fp32")["correct"] == search["accuracy"]["correct"]);
  // The same again is the same: everything is seeded.
  CHECK(json_of(shop, line + "--data task --out again.safetensors")["schedule"] == found["schedule"]);
  const auto unseen = json_of(shop, line + "--out noise.safetensors");
  CHECK(unseen["found"].contains("likeness"));
  CHECK_FALSE(unseen["found"].contains("accuracy"));
  const auto shape = json_of(shop,
                             "compress model.safetensors --merge diffrate --target-macs 0.7 --no-measure --tries 0 "
                             "--out shape.safetensors");
  CHECK_FALSE(shape["found"].contains("likeness"));
  CHECK(shape["macs_ratio"] <= 0.7);
}

TEST_CASE("a latency table of another machine stands for measuring on this one") {
  const Workshop shop;
  // Rows as bench writes them; dense takes 10 ms and every token that is gone early saves time.
  auto table = json_of(shop,
                       "bench model.safetensors --merge tome --schedule 1 --batch 4 --dtype fp32 --repetitions 3 "
                       "--min-time 0.001 --warmup 1");
  const nlohmann::json pattern = table["benchmarks"][0];
  table["benchmarks"].clear();
  const auto add = [&](const std::string& merge, double ms) {
    nlohmann::json row = pattern;
    row["name"] = row["run_name"] = cat("infer/vit_test_patch4_16/", merge, "/cpu/fp32/b4");
    row["real_time"] = ms;
    table["benchmarks"].push_back(row);
  };
  add("dense", 10);
  // 1 ms for each 17 tokens that a block takes in, and as much for those that its MLP takes.
  const auto ms = [](std::vector<double> remove) {
    double tokens = 17, time = 0;
    for (const double r : remove) time += tokens, tokens -= r, time += tokens;
    return time * 10 / (6 * 17);
  };
  add("tome-1", ms({1, 1, 1}));
  add("tome-3", ms({3, 3, 3}));
  add("tome-5,1", ms({5, 1, 0}));
  const std::string line =
      "compress model.safetensors --merge tome --target-speedup 1.5 --batch 4 --latency-table table.json "
      "--out fast.safetensors --no-measure --tries 12";
  write_bytes(shop / "table.json", table.dump());
  check_refusal(shop, {line, 3, {"table.json", "3 merged", "at least 4"}});
  add("tome-0,0,7", ms({0, 0, 7}));
  write_bytes(shop / "table.json", table.dump());
  const auto found = json_of(shop, line);
  CHECK(found["found"]["latency_model_error"] < 1e-3);
  CHECK(found["found"]["predicted_speedup"] >= 1.5);
  CHECK(found["found"]["predicted_speedup"] < 1.8);  // 17 tokens: one is worth a lot
  std::vector<double> remove;
  for (const auto& count : found["schedule"]["remove"]) remove.push_back(count.get<double>());
  CHECK(10 / ms(remove) == Approx(found["found"]["predicted_speedup"].get<double>()).epsilon(1e-3));
  check_refusal(shop, {"compress model.safetensors --merge tome --target-speedup 1.5 --latency-table table.json "
                       "--out o.safetensors",
                       3,
                       {"table.json", "no dense row", "batch 32"}});
}

TEST_CASE("what is slower than dense is refused with its figures, or written when that is wanted", "[timed]") {
  const Workshop shop;
  const std::string line =
      "compress model.safetensors --merge tome --schedule 1 --batch 1 --plugin-path " PYRA_OVERWORKED_PLUGINS
      " --out slow.safetensors";
  check_refusal(shop, {line, 7, {"slower", "as fast as dense", "--allow-slower"}});
  json_of(shop, line + " --allow-slower");
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

TEST_CASE("a search for diffrate's counts tells what it found and leaves a schedule") {
  const Workshop shop;
  const std::string search =
      "compress model.safetensors --merge diffrate --search --data task --target-macs 0.75 --no-measure --dtype fp32 ";
  const auto document = json_of(shop, search + "--out s.safetensors --schedule-out s.toml --search-epochs 2 --seed 4");
  const auto& found = document["search"];
  CHECK(found["split"] == "train800");
  CHECK(found["images"] == 6);
  CHECK(found["steps"] == 2);
  CHECK(found["macs"] <= found["target_macs"]);
  CHECK(document["macs_ratio"] <= 0.75);
  CHECK(document["macs_ratio"] > 0.65);
  CHECK(document["schedule"]["merge"] == document["compressed"]["tokens"]);
  CHECK(document["schedule"]["prune"][0] == 17);
  CHECK(found["judged"]["split"] == "val200");
  std::vector<std::string> labels;
  for (const auto& model : found["judged"]["models"]) {
    labels.push_back(model["label"]);
    CHECK(model["accuracy"] >= 0.0);
    CHECK(model["accuracy"] <= 1.0);
    if (labels.back() == "searched") CHECK(model["merge"] == document["schedule"]["merge"]);
  }
  CHECK(labels == std::vector<std::string>{"dense", "searched", "start", "high-shaped", "uniform"});

  const auto given =
      json_of(shop, "compress model.safetensors --merge diffrate --schedule s.toml --out g.safetensors --no-measure");
  CHECK(given["schedule"] == document["schedule"]);
  CHECK_FALSE(given.contains("search"));
  CHECK(json_of(shop, "eval s.safetensors --data task --dtype fp32")["loss"] ==
        json_of(shop, "eval g.safetensors --data task --dtype fp32")["loss"]);
  // The same command again gives the same counts, and a compressed model may be searched anew.
  CHECK(json_of(shop, search + "--out again.safetensors --search-epochs 2 --seed 4")["schedule"] ==
        document["schedule"]);
  (void)json_of(shop,
                "compress s.safetensors --merge diffrate --search --data task --target-macs 0.9 --no-measure "
                "--out t.safetensors --search-epochs 1");

  const RunResult table = in(shop, search + "--out p.safetensors --search-epochs 1 --quiet");
  CAPTURE(table.err);
  CHECK(table.exit_code == 0);
  for (const char* part : {"searched on train800", "prune", "merge", "accuracy on val200", "high-shaped", "uniform"})
    CHECK(table.out.find(part) != std::string::npos);
}

TEST_CASE("a search that makes no sense is refused, and leaves no file") {
  const Workshop shop;
  shop.copy_task("other");
  write_bytes(shop / "other/train800.txt", "images/0.ppm 0\nimages/1.ppm 9\n");
  shop.copy_task("empty");
  for (const char* list : {"train800", "train800val200"}) std::filesystem::remove(shop / cat("empty/", list, ".txt"));
  const std::string start = "compress model.safetensors --out o.safetensors --merge ";
  const std::string search = start + "diffrate --search --data task --target-macs 0.75";
  for (const Refusal& refusal : std::vector<Refusal>{
           {start + "tome --search --data task --target-macs 0.75", 2, {"--merge diffrate", "tome"}},
           {start + "diffrate --search --data task --schedule high", 2, {"--search needs --target-macs"}},
           {start + "diffrate --search --data task --target-speedup 2", 2, {"--search needs --target-macs"}},
           {start + "diffrate --search --target-macs 0.75", 2, {"--search needs --data"}},
           {start + "diffrate --resume --target-macs 0.75", 2, {"--resume", "--search"}},
           {search + " --search-epochs 0", 2, {"--search-epochs is 0", "1 to"}},
           {search + " --search-batch 0", 2, {"--search-batch is 0"}},
           {search + " --search-lr 0", 2, {"--search-lr is 0"}},
           {search + " --search-lr nan", 2, {"--search-lr"}},
           {search + " --seed -1", 2, {"--seed is -1"}},
           {search + " --schedule-out s.txt", 2, {"s.txt", ".toml"}},
           {search + " --schedule-out nowhere/s.toml", 9, {"nowhere"}},
           {start + "diffrate --search --data task --target-macs 0.05", 2, {"--target-macs", "the least"}},
           {start + "diffrate --search --data none --target-macs 0.75", 3, {"none"}},
           {start + "diffrate --search --data other --target-macs 0.75", 3, {"other"}},
           {start + "diffrate --search --data empty --target-macs 0.75", 3, {"search on", "train800"}},
       })
    check_refusal(shop, refusal);
  check_json_refusal(shop, search + " --search-epochs 0", 2);
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
           {tome + " --target-macs 0.7 --tries -1", 2, {"--tries"}},
           {tome + " --target-macs 0.7 --images 1", 2, {"--images"}},
           {tome + " --target-macs 0.7 --data none", 3, {"none"}},
           {tome + " --target-macs 0.7 --latency-table t.json", 2, {"--target-speedup"}},
           {tome + " --target-speedup 2 --latency-table none.json", 3, {"none.json"}},
           {tome + " --schedule 1 --data task", 2, {"--data", "--target-macs"}},
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
                       {"speed-up of 99", "as fast as dense", "no file was written"}});
}
