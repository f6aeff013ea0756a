#include "fixtures.h"
#include "pages.h"

using namespace pyra;
using namespace pyra::test;

namespace {

/// A run of one epoch of two steps, and its figures.
nlohmann::json train(const Workshop& shop, const std::string& run, const std::string& more = "") {
  return json_of(shop, "finetune --model model.safetensors --data task --out " + run +
                           " --device cpu --set train.epochs=1 --set train.batch=3 --set peft.rank=2 " + more);
}

}  // namespace

TEST_CASE("report writes a page and says what is on it") {
  const Workshop shop;
  const auto trained = train(shop, "run");
  const auto document = json_of(shop, "report run --out page.html");
  CHECK(document["out"] == "page.html");
  REQUIRE(document["runs"].size() == 1);
  CHECK(document["runs"][0]["accuracy"] == trained["accuracy"]);
  CHECK(document["runs"][0]["processor"] == trained["processor"]);
  CHECK(page_fault(read_bytes(shop / "page.html")).empty());
  const RunResult human = in(shop, "report run --out page.html");
  CHECK(human.exit_code == 0);
  CHECK(human.out.find("page.html") != std::string::npos);
  CHECK(human.out.find("images/s") != std::string::npos);
  // Without a page, the figures alone.
  const auto before = shop.listing();
  CHECK(json_of(shop, "report run")["runs"] == document["runs"]);
  CHECK(shop.listing() == before);
}

TEST_CASE("report takes the predictions that eval wrote") {
  const Workshop shop;
  train(shop, "run");
  const auto seen = json_of(shop, "eval model.safetensors --data task --dtype fp32 --predictions p.csv");
  const auto document = json_of(shop, "report --predictions p.csv run --out page.html");
  REQUIRE(document["predictions"].size() == 1);
  const auto& predictions = document["predictions"][0];
  CHECK(predictions["images"] == seen["images"]);
  CHECK(predictions["correct"] == seen["correct"]);
  CHECK(predictions["classes"].size() == 6);
  CHECK(predictions["classes"][2]["class"] == "class-2");
  int images = 0, correct = 0;
  for (const auto& cell : predictions["confusion"]) {
    images += cell["images"].get<int>();
    if (cell["label"] == cell["predicted"]) correct += cell["images"].get<int>();
  }
  CHECK(images == seen["images"]);
  CHECK(correct == seen["correct"]);
  CHECK(read_bytes(shop / "page.html").find("Confusion matrix") != std::string::npos);
}

TEST_CASE("report --pareto takes seeds together") {
  const Workshop shop;
  for (const char* seed : {"1", "2"}) {
    train(shop, cat("dense-", seed), cat("--set seed=", seed));
    train(shop, cat("pyra-", seed), cat("--set merge.name=pyra --set merge.schedule=3 --set seed=", seed));
  }
  const auto document = json_of(shop, "report dense-1 dense-2 pyra-1 pyra-2 --pareto");
  REQUIRE(document["boards"].size() == 1);
  const auto& entries = document["boards"][0]["entries"];
  REQUIRE(entries.size() == 2);
  for (const auto& entry : entries) CHECK(entry["seeds"].size() == 2);
  CHECK(json_of(shop, "report dense-1 dense-2 pyra-1 pyra-2")["boards"][0]["entries"].size() == 4);
  CHECK(json_of(shop, "report dense-1 pyra-1 --speed training")["speed"] == "training");
}

TEST_CASE("report refuses what is no finished run, and writes no page") {
  const Workshop shop;
  train(shop, "run");
  train(shop, "broken");
  write_bytes(shop / "broken/report.json", "{");
  write_bytes(shop / "p.csv", "path,label,predicted,probability\na,6,0,1\n");
  for (const Refusal& refusal : std::vector<Refusal>{
           {"report", 2, {"RUN is required"}},
           {"report run", 2, {"--out", "--json"}},
           {"report run --ot page.html", 2, {"did you mean '--out'"}},
           {"report run run --out page.html", 2, {"twice"}},
           {"report run --speed fast --out page.html", 2, {"--speed"}},
           {"report nowhere --out page.html", 3, {"nowhere"}},
           {"report task --out page.html", 3, {"task", "run.toml"}},
           {"report run broken --out page.html", 3, {"broken/report.json", "--skip-bad"}},
           {"report broken --skip-bad --out page.html", 3, {"broken/report.json"}},
           {"report run --predictions p.csv --out page.html", 3, {"p.csv:2", "label is 6"}},
           {"report run --predictions none.csv --out page.html", 3, {"none.csv"}},
           {"report run --out nowhere/page.html", 9, {"nowhere"}},
       })
    check_refusal(shop, refusal);
  check_json_refusal(shop, "report broken", 3);
  const auto document = json_of(shop, "report run broken --skip-bad --out page.html");
  CHECK(document["runs"].size() == 1);
  REQUIRE(document["left_out"].size() == 1);
  CHECK(document["left_out"][0]["run"] == "broken");
}

TEST_CASE("eval --visualize draws the first images of the split") {
  const Workshop shop;
  const std::string eval =
      "eval model.safetensors --data task --dtype fp32 --set merge.name=tome --set merge.schedule=3";
  const auto document = json_of(shop, eval + " --visualize 2 --visualize-out pages");
  CHECK(document["images"] == 6);
  CHECK(document["visualization"]["index"] == "pages/index.html");
  CHECK(document["visualization"]["pages"] ==
        std::vector<std::string>{"pages/image-0001.html", "pages/image-0002.html"});
  for (const char* name : {"index", "image-0001", "image-0002"}) {
    const std::string page = read_bytes(shop / cat("pages/", name, ".html"));
    CAPTURE(page);
    CHECK(page_fault(page).empty());
    CHECK(page.find("tome-3") != std::string::npos);
  }
  const std::string page = read_bytes(shop / "pages/image-0002.html");
  for (const char* part : {"images/1.ppm", "class-1", "after block 0: 14 tokens", "after block 2: 8 tokens"})
    CHECK(page.find(part) != std::string::npos);
  CHECK(read_bytes(shop / "pages/index.html").find("href=\"image-0001.html\"") != std::string::npos);

  // More than there are; the folder is named after the model; the figures are those of eval alone.
  const auto all = json_of(shop, eval + " --visualize 99");
  CHECK(all["visualization"]["pages"].size() == 6);
  CHECK(all["visualization"]["index"] == "model_tokens/index.html");
  CHECK(all["loss"] == json_of(shop, eval)["loss"]);
}

TEST_CASE("eval --visualize refuses what has nothing to show") {
  const Workshop shop;
  shop.copy_task("corrupt");
  write_bytes(shop / "corrupt/images/0.ppm", "P6\n16 16\n255\nshort");
  const std::string tome = " --set merge.name=tome --set merge.schedule=3";
  for (const Refusal& refusal : std::vector<Refusal>{
           {"eval model.safetensors --data task --visualize 2", 2, {"model.safetensors", "merges no tokens"}},
           {"eval model.safetensors --data task --visualize 0" + tome, 2, {"--visualize"}},
           {"eval model.safetensors --data task --visualize-out pages" + tome, 2, {"--visualize"}},
           {"eval model.safetensors --data nowhere --visualize 2" + tome, 3, {"nowhere"}},
           {"eval model.safetensors --data task --split tset --visualize 2" + tome, 3, {"tset"}},
           {"eval model.safetensors --data task --visualize 2 --visualize-out model.safetensors" + tome,
            9,
            {"model.safetensors"}},
       })
    check_refusal(shop, refusal);
  const RunResult bad = in(shop, "eval model.safetensors --data corrupt --visualize 2 --quiet" + tome);
  CHECK(bad.exit_code == 3);
  CHECK(bad.err.find("images/0.ppm") != std::string::npos);
  const auto skipped = json_of(shop, "eval model.safetensors --data corrupt --visualize 2 --bad-images skip" + tome);
  CHECK(skipped["visualization"]["pages"].size() == 2);
}
