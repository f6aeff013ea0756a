#include "fixtures.h"

using namespace pyra;
using namespace pyra::test;

TEST_CASE("predict names classes with probabilities, a folder's images in order") {
  const Workshop shop;
  write_bytes(shop / "task/images/notes.txt", "not an image");
  const auto document = json_of(shop, "predict model.safetensors task/images --top 6 --dtype fp32");
  REQUIRE(document["predictions"].size() == 6);
  for (int i = 0; i < 6; ++i) {
    const auto& prediction = document["predictions"][size_t(i)];
    CHECK(prediction["path"] == cat("task/images/", i, ".ppm"));
    REQUIRE(prediction["top"].size() == 6);
    double sum = 0, last = 1;
    for (const auto& entry : prediction["top"]) {
      CHECK(entry["class"] == cat("class-", entry["label"].get<int>()));
      CHECK(entry["probability"] <= last);
      last = entry["probability"];
      sum += last;
    }
    CHECK(sum == Approx(1.0).epsilon(1e-6));
  }
  const auto one = json_of(shop, "predict model.safetensors task/images/2.ppm --top 2 --dtype fp32");
  REQUIRE(one["predictions"].size() == 1);
  CHECK(one["predictions"][0]["top"].size() == 2);
  CHECK(one["predictions"][0]["top"][0]["label"] == document["predictions"][2]["top"][0]["label"]);

  const RunResult human = in(shop, "predict model.safetensors task/images/2.ppm --dtype fp32");
  CHECK(human.exit_code == 0);
  CHECK(human.out.find(one["predictions"][0]["top"][0]["class"].get<std::string>()) != std::string::npos);
}

TEST_CASE("predict agrees with eval on every image") {
  const Workshop shop;
  const auto document = json_of(shop, "predict model.safetensors task/images --top 1 --dtype fp32");
  json_of(shop, "eval model.safetensors --data task --dtype fp32 --predictions p.csv");
  const std::vector<std::string> rows = split(read_bytes(shop / "p.csv"), '\n');
  for (size_t i = 0; i < 6; ++i)
    CHECK(split(rows.at(i + 1), ',').at(2) == std::to_string(document["predictions"][i]["top"][0]["label"].get<int>()));
}

TEST_CASE("predict takes a folder in batches of any size, a .tar, and leaves bad images out when asked") {
  const Workshop shop;
  const auto whole = json_of(shop, "predict model.safetensors task/images --device cpu --dtype fp32");
  CHECK(whole["skipped"].empty());
  CHECK(json_of(shop, "predict model.safetensors task/images --device cpu --dtype fp32 --batch 4") == whole);
  REQUIRE(run({"/bin/tar", "-cf", "task.tar", "-C", "task", "images"}, shop.path()).exit_code == 0);
  const auto packed = json_of(shop, "predict model.safetensors task.tar --device cpu --dtype fp32");
  REQUIRE(packed["predictions"].size() == 6);
  CHECK(packed["predictions"][3]["path"] == "images/3.ppm");
  CHECK(packed["predictions"][3]["top"] == whole["predictions"][3]["top"]);

  write_bytes(shop / "task/images/25.ppm", "P6\n16 16\n255\nshort");
  const auto rest =
      json_of(shop, "predict model.safetensors task/images --device cpu --dtype fp32 --batch 2 --bad-images skip");
  CHECK(rest["predictions"] == whole["predictions"]);
  REQUIRE(rest["skipped"].size() == 1);
  CHECK(rest["skipped"][0]["path"] == "task/images/25.ppm");
  CHECK(in(shop, "predict model.safetensors task/images --device cpu --dtype fp32 --bad-images skip")
            .out.find("skipped 1 images") != std::string::npos);
}

TEST_CASE("predict reads one image from stdin") {
  const Workshop shop;
  const auto piped = [&](const std::string& input) {
    return run({"/bin/bash", "-c", PYRACTL " predict model.safetensors - --json --quiet --dtype fp32 <" + input},
               shop.path());
  };
  const RunResult good = piped("task/images/2.ppm");
  CAPTURE(good.err);
  REQUIRE(good.exit_code == 0);
  CHECK(nlohmann::json::parse(good.out)["predictions"][0]["top"] ==
        json_of(shop, "predict model.safetensors task/images/2.ppm --dtype fp32")["predictions"][0]["top"]);
  const RunResult empty = piped("/dev/null");
  CHECK(empty.exit_code == 3);
  CHECK(empty.err.find("stdin is empty") != std::string::npos);
  const RunResult endless = piped("/dev/zero");
  CHECK(endless.exit_code == 3);
  CHECK(endless.err.find("stdin has more than") != std::string::npos);
  const RunResult other = piped("task/test.txt");
  CHECK(other.exit_code == 3);
  CHECK(other.err.find("stdin") != std::string::npos);
}

TEST_CASE("predict refuses what is no image, naming it") {
  const Workshop shop;
  std::filesystem::create_directory(shop / "empty");
  write_bytes(shop / "broken/a.ppm", ppm(16, 1));
  write_bytes(shop / "broken/b.ppm", "P6\n16 16\n255\nshort");
  write_bytes(shop / "broken/huge.pgm", "P5\n1000000 1000000\n255\nx");
  write_bytes(shop / "cut.safetensors", read_bytes(shop / "model.safetensors").substr(0, 3000));
  for (const Refusal& refusal : std::vector<Refusal>{
           {"predict model.safetensors none.jpg", 3, {"none.jpg"}},
           {"predict model.safetensors none.tar", 3, {"none.tar", "no such file", "an image"}},
           {"predict model.safetensors empty", 3, {"empty", "no image"}},
           {"predict model.safetensors task/test.txt", 3, {"test.txt"}},
           {"predict model.safetensors broken", 3, {"broken/b.ppm", "--bad-images skip"}},
           {"predict model.safetensors broken/huge.pgm", 3, {"huge.pgm"}},
           {"predict cut.safetensors task/images", 3, {"cut.safetensors"}},
           {"predict none.safetensors task/images", 3, {"none.safetensors"}},
       })
    check_refusal(shop, refusal);
  check_json_refusal(shop, "predict model.safetensors broken", 3);
}
