#include "fixtures.h"

using namespace pyra;
using namespace pyra::test;

TEST_CASE("data check counts, warns, and exits with 3 where the data are at fault", "[cli]") {
  const Workshop shop;
  // The workshop's lists all name the same images.
  const auto leaky = json_of(shop, "data check task");
  CHECK(leaky.at("files") == 6);
  CHECK(leaky.at("faults") == false);
  CHECK(leaky.at("leaks").size() == 6);
  CHECK(leaky.at("splits")[0].at("images_by_class") == std::vector<int>(6, 1));

  shop.copy_task("spoilt");
  write_bytes(shop / "spoilt/images/3.ppm", "P6\n20 20\n255\nshort");
  write_bytes(shop / "spoilt/test.txt", "images/0.ppm 0\nimages/1.ppm 9\n");
  const RunResult result = in(shop, "data check spoilt --json --quiet");
  CHECK(result.exit_code == 3);
  const auto report = nlohmann::json::parse(result.out);
  CHECK(report.at("faults") == true);
  REQUIRE(report.at("unreadable").size() == 1);
  CHECK(report.at("unreadable")[0].at("image").get<std::string>().find("3.ppm") != std::string::npos);
  REQUIRE(report.at("wrong_lines").size() == 1);
  CHECK(report.at("wrong_lines")[0].get<std::string>().find("test.txt:2") != std::string::npos);

  const RunResult human = in(shop, "data check spoilt --quiet");
  CHECK(human.exit_code == 3);
  CHECK(human.err.empty());
  for (const char* part : {"FAULT    1 unreadable images", "3.ppm", "FAULT    1 wrong lines", "label 9", "warning  ",
                           "train800: 6 images, 1 a class", "not usable"}) {
    CAPTURE(part);
    CHECK(human.out.find(part) != std::string::npos);
  }
}

TEST_CASE("data check of a sound image folder says clean", "[cli]") {
  const Workshop shop;
  for (int i = 0; i < 4; ++i)
    write_bytes(shop / cat("photos/", i < 2 ? "train" : "test", "/", i % 2 ? "a" : "b", "/1.ppm"),
                ppm(16, 40 + uint64_t(i)));
  const RunResult result = in(shop, "data check photos");
  CHECK(result.exit_code == 0);
  CHECK(result.out.find("result   clean") != std::string::npos);
  CHECK(result.err.find("decode") != std::string::npos);
}

TEST_CASE("data check is refused where there is nothing to check", "[cli]") {
  const Workshop shop;
  check_refusal(shop, {"data check nowhere", 3, {"nowhere"}});
  check_refusal(shop, {"data check model.safetensors", 3, {"model.safetensors"}});
  check_refusal(shop, {"data check task --list none.txt", 3, {"none.txt"}});
  check_refusal(shop, {"data", 2, {"subcommand"}});
  check_refusal(shop, {"data chck task", 2, {"chck", "check"}});
  check_json_refusal(shop, "data check nowhere", 3);
}
