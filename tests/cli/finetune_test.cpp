// finetune from outside: its memory does not grow with the data; what it cannot take.
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
