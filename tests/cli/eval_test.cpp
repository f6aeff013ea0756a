#include "fixtures.h"

using namespace pyra;
using namespace pyra::test;

namespace {

/// The workshop's model with a merger in its file, made without the subcommands under test.
void write_merging_model(const std::filesystem::path& path, const std::string& name, int64_t r) {
  io::ModelFile file = Workshop::model_file();
  io::MergeSpec merge;
  merge.name = name;
  merge.schedule.text = std::to_string(r);
  merge.schedule.remove.assign(3, r);
  if (name == "pyra") {
    for (int block = 0; block < 3; ++block) {
      const std::string prefix = cat("blocks.", block, ".");
      merge.learned[prefix + "a"] = at::ones({r, 1});
      merge.learned[prefix + "b"] = at::full({1, 32}, 0.1);
      merge.learned[prefix + "norm.weight"] = at::ones({32});
      merge.learned[prefix + "norm.bias"] = at::zeros({32});
    }
  }
  file.merge = merge;
  io::write_model(path, file);
}

}  // namespace

TEST_CASE("eval states accuracy, denominator, loss and speed") {
  const Workshop shop;
  const auto document = json_of(shop, "eval model.safetensors --data task --dtype fp32 --predictions p.csv");
  CHECK(document["images"] == 6);
  CHECK(document["split"] == "test");
  CHECK(document["merge"] == "dense");
  CHECK(document["provenance"]["protocol"] == "vtab");
  CHECK(document["top5"] >= document["top1"]);
  CHECK(document["loss"] > 0.0);
  CHECK(document["images_per_second"] > 0.0);
  CHECK(document["forward_images_per_second"] >= document["images_per_second"]);

  // The predictions file agrees with what was printed.
  const std::vector<std::string> rows = split(read_bytes(shop / "p.csv"), '\n');
  REQUIRE(rows.size() == 8);
  CHECK(rows[0] == "path,label,predicted,probability");
  int correct = 0;
  for (int label = 0; label < 6; ++label) {
    const auto fields = split(rows[size_t(label) + 1], ',');
    REQUIRE(fields.size() == 4);
    CHECK(fields[0] == cat("images/", label, ".ppm"));
    CHECK(fields[1] == std::to_string(label));
    CHECK(std::stod(fields[3]) >= 1.0 / 6);
    correct += fields[1] == fields[2];
  }
  CHECK(document["correct"] == correct);

  const RunResult human = in(shop, "eval model.safetensors --data task --split val200 --dtype fp32");
  CHECK(human.exit_code == 0);
  CHECK(human.out.find(cat("(", correct, " of 6)")) != std::string::npos);
  CHECK(human.out.find("split val200") != std::string::npos);
}

TEST_CASE("a result does not depend on the batch or the threads") {
  const Workshop shop;
  const auto one = json_of(shop, "eval model.safetensors --data task --dtype fp32 --batch 1 --threads 1");
  const auto all = json_of(shop, "eval model.safetensors --data task --dtype fp32 --batch 6 --threads 2");
  CHECK(one["loss"].get<double>() == Approx(all["loss"].get<double>()).epsilon(1e-6));
  CHECK(one["correct"] == all["correct"]);
}

TEST_CASE("eval refuses what does not fit, naming it") {
  const Workshop shop;
  io::ModelFile other = Workshop::model_file();
  other.config.num_classes = 5;
  other.class_names.clear();
  other.weights = nn::random_weights(other.config, 1);
  io::write_model(shop / "five.safetensors", other);
  io::ModelFile renamed = Workshop::model_file();
  std::swap(renamed.class_names[1], renamed.class_names[2]);
  io::write_model(shop / "renamed.safetensors", renamed);
  io::ModelFile broken = Workshop::model_file();
  broken.weights["head.bias"] = at::full({6}, std::nan(""));
  io::write_model(shop / "nan.safetensors", broken);
  for (const char* name : {"missing", "labels", "huge", "negative", "corrupt", "escape"}) shop.copy_task(name);
  std::filesystem::remove(shop / "missing/images/3.ppm");
  write_bytes(shop / "labels/test.txt", "images/0.ppm 0\nimages/1.ppm 6\n");
  write_bytes(shop / "huge/test.txt", "images/0.ppm 99999999999999999999\n");
  write_bytes(shop / "negative/test.txt", "images/0.ppm -1\n");
  write_bytes(shop / "corrupt/images/4.ppm", "P6\n16 16\n255\nshort");
  write_bytes(shop / "escape/test.txt", "../model.safetensors 0\n");

  for (const Refusal& refusal : std::vector<Refusal>{
           {"eval none.safetensors --data task", 3, {"none.safetensors"}},
           {"eval model.safetensors --data nowhere", 3, {"nowhere"}},
           {"eval model.safetensors --data model.safetensors", 3, {"model.safetensors"}},
           {"eval task --data task", 3, {"task"}},
           {"eval model.safetensors --data task --split tset", 3, {"tset", "test"}},
           {"eval model.safetensors --data missing", 3, {"test.txt", "images/3.ppm"}},
           {"eval model.safetensors --data labels", 3, {"test.txt:2", "6"}},
           {"eval model.safetensors --data huge", 3, {"test.txt:1", "99999999999999999999"}},
           {"eval model.safetensors --data negative", 3, {"test.txt:1", "-1"}},
           {"eval model.safetensors --data corrupt", 3, {"images/4.ppm"}},
           {"eval model.safetensors --data escape", 3, {"test.txt:1"}},
           {"eval five.safetensors --data task", 3, {"five.safetensors", "5 classes", "has 6"}},
           {"eval renamed.safetensors --data task", 3, {"class 1", "'class-2'", "'class-1'"}},
           {"eval nan.safetensors --data task", 7, {"nan.safetensors", "not finite"}},
           {"compress nan.safetensors --merge tome --schedule 2 --out o", 7, {"nan.safetensors", "'head.bias'"}},
           {"finetune --model nan.safetensors --data task --out o", 7, {"nan.safetensors", "'head.bias'"}},
           {"finetune --model model.safetensors --data task --out o --set train.teacher=nan.safetensors",
            7,
            {"nan.safetensors", "'head.bias'"}},
           {"eval nan.safetensors --data task --predictions p.csv", 7, {"nan.safetensors", "not finite"}},
           {"eval model.safetensors --data task --predictions nowhere/p.csv", 9, {"nowhere"}},
       })
    check_refusal(shop, refusal);
  check_json_refusal(shop, "eval model.safetensors --data missing", 3);
}

TEST_CASE("bad images are skipped only when asked, and counted") {
  const Workshop shop;
  write_bytes(shop / "task/images/4.ppm", "P6\n16 16\n255\nshort");
  const auto document = json_of(shop, "eval model.safetensors --data task --bad-images skip --dtype fp32");
  CHECK(document["images"] == 5);
  REQUIRE(document["skipped"].size() == 1);
  CHECK(document["skipped"][0]["path"].get<std::string>().find("images/4.ppm") != std::string::npos);
}

TEST_CASE("a merger without training may be exchanged by --set") {
  const Workshop shop;
  write_merging_model(shop / "tome.safetensors", "tome", 3);
  const std::string eval = "eval tome.safetensors --data task --dtype fp32";
  const auto own = json_of(shop, eval);
  CHECK(own["merge"] == "tome-3");
  const auto other = json_of(shop, eval + " --set merge.schedule=1");
  CHECK(other["merge"] == "tome-1");
  CHECK(other["macs"] > own["macs"]);
  const auto plain = json_of(shop, eval + " --set merge.proportional_attention=false");
  CHECK(plain["macs"] == own["macs"]);
  CHECK(plain["loss"] != own["loss"]);
  const auto dense = json_of(shop, eval + " --set merge.name=none");
  CHECK(dense["merge"] == "dense");
  CHECK(dense["loss"] == json_of(shop, "eval model.safetensors --data task --dtype fp32")["loss"]);
}

TEST_CASE("a PYRA model runs the schedule it was trained for and no other") {
  const Workshop shop;
  write_merging_model(shop / "pyra.safetensors", "pyra", 3);
  const std::string eval = "eval pyra.safetensors --data task --dtype fp32";
  const auto own = json_of(shop, eval);
  CHECK(own["merge"] == "pyra-3");
  CHECK(json_of(shop, eval + " --set merge.schedule=3,3,3")["loss"] == own["loss"]);
  const std::string trained = "trained for schedule '3'";
  for (const Refusal& refusal : std::vector<Refusal>{
           {eval + " --set merge.schedule=2", 2, {"pyra.safetensors", trained, "'2'", "finetune"}},
           {"predict pyra.safetensors task/images --set merge.schedule=2", 2, {"pyra.safetensors", trained}},
           {eval + " --set merge.name=tome", 2, {"pyra.safetensors", trained, "'tome'"}},
           {eval + " --set merge.proportional_attention=false", 2, {"pyra.safetensors", "proportional_attention"}},
           {eval + " --set merge.norm_eps=0.1", 2, {"pyra.safetensors", "'norm_eps'"}},
           {"compress pyra.safetensors --merge tome --schedule 2 --out o", 2, {"pyra.safetensors", trained}},
           {"compress pyra.safetensors --merge pyra --schedule 2 --out o", 2, {"pyra.safetensors", trained}},
           // Another resolution has other token counts, and so needs other weights.
           {eval + " --set preprocess.size=8", 2, {"pyra.safetensors", "blocks.0.a", "train"}},
       })
    check_refusal(shop, refusal);
}

TEST_CASE("preprocessing may be changed, and position embeddings follow the size") {
  const Workshop shop;
  const std::string eval = "eval model.safetensors --data task --dtype fp32";
  const auto usual = json_of(shop, eval);
  CHECK(json_of(shop, eval + " --set preprocess.size=24")["macs"] > usual["macs"]);
  CHECK(json_of(shop, eval + " --set preprocess.mean=[0.4,0.4,0.4]")["loss"] != usual["loss"]);
  CHECK(json_of(shop, eval + " --set preprocess.resize=crop")["loss"] != usual["loss"]);
  check_refusal(shop, {eval + " --set preprocess.size=21", 2, {"preprocess.size is 21", "model.safetensors"}});
}
