#include "io/json.h"

#include "io_support.h"
#include "support.h"

namespace pyra::io {

using test::check_error;

TEST_CASE("JSON is read as it stands") {
  const auto value = parse_json(R"( {"a": [1, -2.5, true, null, "\u00e9"], "b": {"a": {}}} )", "here");
  CHECK(value["a"][1] == -2.5);
  CHECK(value["a"][4] == "é");
  CHECK(value["b"]["a"].empty());
}

TEST_CASE("JSON that is not fit to be read says where it stands and why") {
  const auto refused = [](const std::string& text, const std::string& words) {
    INFO(printable(text));
    check_error(ExitCode::input, {"report.json: ", words}, [&] { (void)parse_json(text, "report.json"); });
  };
  refused("", "not valid JSON");
  refused("{\"a\": 1,\n \"b\": }", "line 2, column");
  refused(R"({"a": 1, "b": {"c": 1, "c": 2}})", "the key 'c' stands twice");
  refused(R"({"a": 1, "\u0061": 2})", "the key 'a' stands twice");
  refused(R"({"a": 1} x)", "not valid JSON");
  refused(std::string("{}\0x", 4), "NUL byte at offset 2");
  refused("\"\xff\"", "not valid JSON");
  refused("[1e999]", "not valid JSON");
  refused("[NaN]", "not valid JSON");
  refused(std::string(65, '['), "nested deeper than 64");
  refused(std::string(100'000, '['), "nested deeper than 64");
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += R"({"a":)";
  refused(objects, "nested deeper than 64");
}

TEST_CASE("the same key may stand in different objects, and depth has a limit, not a wall") {
  CHECK(parse_json(R"([{"a":1},{"a":2},{"b":{"a":3}}])", "here").size() == 3);
  const std::string deep = std::string(64, '[') + std::string(64, ']');
  CHECK_NOTHROW((void)parse_json(deep, "here"));
}

TEST_CASE("a JSON file is bounded") {
  const test::TempDir dir;
  test::put(dir / "a.json", "{\"x\": 1}");
  CHECK(read_json(dir / "a.json")["x"] == 1);
  check_error(ExitCode::input, {"a.json", "larger than 4 bytes"}, [&] { (void)read_json(dir / "a.json", 4); });
}

TEST_CASE("text that is not UTF-8 is quoted all the same") {
  CHECK(json_quoted("a\"\n") == R"("a\"\n")");
  CHECK(json_quoted("x\xffy") == "\"x\xEF\xBF\xBDy\"");
}

}  // namespace pyra::io
