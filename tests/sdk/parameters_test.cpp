#include "sdk/parameters.h"

#include "base/error.h"
#include "support.h"

using namespace pyra;
using sdk::Parameters;
using sdk::ParameterValue;

namespace {

const std::vector<sdk::Parameter> kDeclared{
    {.name = "rank", .default_value = int64_t{8}, .help = "", .minimum = 1, .maximum = 64},
    {.name = "alpha", .default_value = 0.5, .help = "", .minimum = 0},
    {.name = "limit", .default_value = 1.0, .help = "", .maximum = 2},
    {.name = "free", .default_value = 1.0, .help = ""},
    {.name = "stable", .default_value = false, .help = ""},
    {.name = "init", .default_value = std::string("kaiming"), .help = "", .choices = {"kaiming", "gaussian"}},
    {.name = "targets", .default_value = std::vector<std::string>{"qkv"}, .help = "", .choices = {"qkv", "proj"}}};

using Given = std::map<std::string, ParameterValue>;

Parameters make(const Given& given) {
  return {kDeclared, given, "recipe vit.toml:12: [peft]"};
}

}  // namespace

TEST_CASE("parameters are defaults overridden by what was given", "[parameters]") {
  const Parameters defaults = make({});
  CHECK(defaults.integer("rank") == 8);
  CHECK(defaults.number("alpha") == 0.5);
  CHECK_FALSE(defaults.boolean("stable"));
  CHECK(defaults.string("init") == "kaiming");
  CHECK(defaults.list("targets") == std::vector<std::string>{"qkv"});
  CHECK(defaults.all().size() == kDeclared.size());

  const Parameters given = make({{"rank", int64_t{64}},
                                 {"alpha", int64_t{3}},  // a whole number is a number
                                 {"stable", true},
                                 {"init", std::string("gaussian")},
                                 {"targets", std::vector<std::string>{"proj", "qkv"}}});
  CHECK(given.integer("rank") == 64);
  CHECK(given.number("alpha") == 3.0);
  CHECK(given.boolean("stable"));
  CHECK(given.string("init") == "gaussian");
  CHECK(given.list("targets").size() == 2);
  CHECK(make({{"targets", std::vector<std::string>{}}}).list("targets").empty());
}

TEST_CASE("a parameter that is wrong is an error of usage that says why", "[parameters]") {
  struct Wrong {
    const char* name;
    ParameterValue value;
    std::vector<const char*> says;
  };
  const Wrong wrongs[] = {
      {"rnak", int64_t{4}, {"unknown parameter 'rnak'", "rank, alpha", "did you mean 'rank'?"}},
      {"quite_another", true, {"unknown parameter 'quite_another'", "known: rank"}},
      {"rank", 4.5, {"rank is 4.5 (number); expected integer, as in 8"}},
      {"rank", std::string("4"), {"rank is \"4\" (string)"}},
      {"stable", int64_t{1}, {"stable is 1 (integer); expected boolean, as in false"}},
      {"targets", std::string("qkv"), {"(string); expected list, as in [\"qkv\"]"}},
      {"rank", int64_t{0}, {"rank is 0; expected 1 to 64"}},
      {"rank", int64_t{65}, {"rank is 65; expected 1 to 64"}},
      {"alpha", -0.1, {"alpha is -0.1; expected at least 0"}},
      {"limit", 2.5, {"limit is 2.5; expected at most 2"}},
      {"alpha", std::nan(""), {"alpha is nan"}},
      {"free", std::numeric_limits<double>::infinity(), {"free is inf; expected a finite number"}},
      {"init", std::string("gausian"), {"'gausian'", "(kaiming, gaussian)", "did you mean 'gaussian'?"}},
      {"targets", std::vector<std::string>{"qkv", "prj"}, {"'prj'", "did you mean 'proj'?"}},
  };
  for (const Wrong& wrong : wrongs) {
    CAPTURE(wrong.name, sdk::to_text(wrong.value));
    try {
      (void)make({{wrong.name, wrong.value}});
      FAIL("it was accepted");
    } catch (const Error& error) {
      CHECK(error.code() == ExitCode::usage);
      CHECK_THAT(error.what(), Catch::StartsWith("recipe vit.toml:12: [peft]: "));
      for (const char* part : wrong.says) CHECK_THAT(error.what(), Catch::Contains(part));
    }
  }
}

TEST_CASE("declarations that no recipe can serve are told", "[parameters]") {
  CHECK(sdk::check_declared("peft", kDeclared).empty());
  struct Wrong {
    sdk::Parameter parameter;
    const char* says;
  };
  const Wrong wrongs[] = {
      {{.name = "", .default_value = 1.0, .help = ""}, "its name"},
      {{.name = "a.b", .default_value = 1.0, .help = ""}, "'a.b': its name"},
      {{.name = "schedule", .default_value = 1.0, .help = ""}, "a key of this name"},
      {{.name = "rank", .default_value = 1.0, .help = ""}, "'rank' is declared twice"},
      {{.name = "x", .default_value = false, .help = "", .minimum = 0}, "bounds"},
      {{.name = "x", .default_value = 1.0, .help = "", .choices = {"a"}}, "choices"},
      {{.name = "x", .default_value = int64_t{9}, .help = "", .maximum = 8}, "'x''s default is 9; expected at most 8"},
      {{.name = "x", .default_value = std::string("c"), .help = "", .choices = {"a", "b"}}, "none of its choices"},
  };
  const sdk::Parameter fine[] = {{.name = "schedule", .default_value = 1.0, .help = ""},
                                 {.name = "keep-rate", .default_value = 1.0, .help = ""}};
  CHECK(sdk::check_declared("peft", fine).empty());
  for (const Wrong& wrong : wrongs) {
    auto declared = kDeclared;
    declared.push_back(wrong.parameter);
    CAPTURE(wrong.says);
    CHECK_THAT(sdk::check_declared("merge", declared), Catch::Contains(wrong.says));
  }
}

TEST_CASE("asking for a parameter by another type or name is a bug of the caller", "[parameters]") {
  const Parameters parameters = make({});
  const auto code_of = [](const auto& call) {
    try {
      call();
    } catch (const Error& error) {
      return error.code();
    }
    return ExitCode::ok;
  };
  CHECK(code_of([&] { (void)parameters.number("rank"); }) == ExitCode::internal);
  CHECK(code_of([&] { (void)parameters.integer("missing"); }) == ExitCode::internal);
}

TEST_CASE("values are shown as a recipe would write them", "[parameters]") {
  CHECK(sdk::to_text(true) == "true");
  CHECK(sdk::to_text(int64_t{-3}) == "-3");
  CHECK(sdk::to_text(1e-5) == "1e-05");
  CHECK(sdk::to_text(std::string("a \"b\"")) == R"("a \"b\"")");
  CHECK(sdk::to_text(std::vector<std::string>{"q", "v"}) == R"(["q", "v"])");
}
