// finetune from outside: its memory does not grow with the data; what it cannot take.
#include "base/folder_lock.h"
#include "fixtures.h"

using namespace pyra;

namespace {

const std::filesystem::path kDemo = std::filesystem::path(PYRA_SOURCE_DIR) / "recipes/demo";

/// Bytes that a training of the demo's model took at most, up to its first step, on so many images.
int64_t peak_of_training(const test::TempDir& folder, int count) {
  std::string list;
  for (int i = 0; i < count; ++i) list += cat("images/", i % 4, ".ppm ", i % 2, "\n");
  test::write_bytes(folder / "data/train.txt", list);
  const test::RunResult result =
      test::pyractl({"finetune", "--dry-run", "--json", "--device", "cpu", "--set",
                     "model=" + (kDemo / "vit_ti_patch8_112.safetensors").string(), "--set", "data=data", "--set",
                     "out=run", "--set", "peft.name=lora", "--set", "train.batch=2"},
                    folder.path());
  INFO(result.err);
  REQUIRE(result.exit_code == 0);
  const auto document = nlohmann::json::parse(result.out);
  CHECK(document["train_images"] == count);
  return document["peak_memory_bytes"];
}

}  // namespace

TEST_CASE("ten times the images take no more memory to train on") {
  const test::TempDir folder;
  for (int i = 0; i < 4; ++i) test::write_bytes(folder / cat("data/images/", i, ".ppm"), test::ppm(8, uint64_t(i)));
  test::write_bytes(folder / "data/test.txt", "images/0.ppm 0\nimages/1.ppm 1\n");
  // Decoded, 2700 images of 112 px are 97 MiB.
  const int64_t few = peak_of_training(folder, 300), many = peak_of_training(folder, 3000);
  INFO(few << " bytes with 300 images, " << many << " with 3000");
  CHECK(double(many) < 1.05 * double(few));
}

TEST_CASE("finetune refuses paths that its recipe could not hold") {
  const test::Workshop shop;
  const test::RunResult result = test::in(shop, "finetune --model model.safetensors --data task --out r\xff --quiet");
  CHECK(result.exit_code == 2);
  CHECK(result.err.find("UTF-8") != std::string::npos);
  CHECK_FALSE(std::filesystem::exists(shop / "r\xff"));
}

TEST_CASE("one process at a time trains in a run folder") {
  const test::Workshop shop;
  const std::string start = "finetune --model model.safetensors --data task --device cpu --set train.epochs=2 --quiet";
  REQUIRE(test::in(shop, start + " --out run").exit_code == 0);
  {
    const FolderLock other(shop / "run");
    const std::string before = test::read_bytes(shop / "run/metrics.jsonl");
    const test::RunResult result = test::in(shop, "finetune --out run --resume --quiet");
    CHECK(result.exit_code == 2);
    CHECK(result.err.find("another pyractl is writing into it") != std::string::npos);
    CHECK(test::read_bytes(shop / "run/metrics.jsonl") == before);
  }
  CHECK(test::in(shop, "finetune --out run --resume --quiet").exit_code == 0);
  // The folder of a run that another process has just begun is new, and its own no more.
  std::filesystem::create_directory(shop / "empty");
  const FolderLock other(shop / "empty");
  CHECK(test::in(shop, start + " --out empty").exit_code == 2);
  CHECK(std::filesystem::is_empty(shop / "empty"));
}

TEST_CASE("a finished run whose checkpoint is gone is not trained anew") {
  const test::Workshop shop;
  const std::string start = "finetune --model model.safetensors --data task --device cpu --set train.epochs=1 --quiet";
  REQUIRE(test::in(shop, start + " --out run").exit_code == 0);
  std::filesystem::remove_all(shop / "run/checkpoint");
  const std::string report = test::read_bytes(shop / "run/report.json");
  const test::RunResult result = test::in(shop, "finetune --out run --resume --quiet");
  CHECK(result.exit_code == 3);
  CHECK(result.err.find("was finished") != std::string::npos);
  CHECK(test::read_bytes(shop / "run/report.json") == report);
}

TEST_CASE("a recipe's [merge] without a merger is refused") {
  const test::Workshop shop;
  const std::string start = "finetune --model model.safetensors --data task --out run --device cpu --dry-run --quiet ";
  for (const char* setting : {"--set merge.schedule=high", "--set merge.schdule=high"}) {
    CAPTURE(setting);
    const test::RunResult result = test::in(shop, start + setting);
    CHECK(result.exit_code == 2);
    CHECK(result.err.find("merge.name") != std::string::npos);
  }
  CHECK(test::in(shop, start + "--set merge.schedule=4 --set merge.name=none").exit_code == 0);
}

TEST_CASE("no command writes over what it reads") {
  const test::Workshop shop;
  REQUIRE(test::in(shop,
                   "finetune --model model.safetensors --data task --out run --device cpu --set train.epochs=1 "
                   "--set peft.name=lora --quiet")
              .exit_code == 0);
  std::filesystem::create_symlink("model.safetensors", shop / "link.safetensors");
  const std::map<std::string, std::string> commands{
      {"eval model.safetensors --data task --predictions model.safetensors", "model.safetensors"},
      {"eval model.safetensors --data task --predictions task/test.txt", "task/test.txt"},
      {"compress model.safetensors --merge tome --schedule 2 --out model.safetensors", "model.safetensors"},
      {"compress model.safetensors --merge tome --schedule 2 --out link.safetensors", "model.safetensors"},
      {"merge-lora run --out run/adapter/adapter_model.safetensors", "run/adapter/adapter_model.safetensors"},
      {"merge-lora run --out model.safetensors --model model.safetensors", "model.safetensors"},
      {"report run --out run/metrics.jsonl", "run/metrics.jsonl"},
      {"convert model.safetensors --out model.safetensors", "model.safetensors"}};
  for (const auto& [command, file] : commands) {
    CAPTURE(command);
    const std::string before = test::read_bytes(shop / file);
    const test::RunResult result = test::in(shop, command + " --quiet");
    CHECK(result.exit_code == 2);
    CHECK(result.err.find("read") != std::string::npos);
    CHECK(test::read_bytes(shop / file) == before);
  }
  CHECK(test::in(shop, "merge-lora run --out run/merged.safetensors --quiet").exit_code == 0);
}
