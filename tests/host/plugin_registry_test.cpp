#include "host/plugin_registry.h"

#include <fstream>
#include <functional>

#include "base/error.h"
#include "support.h"

using namespace pyra;
namespace fs = std::filesystem;
using host::PluginRegistry;
using test::TempDir;

namespace {

const fs::path kBad = PYRA_BAD_PLUGINS;

/// A folder with one plugin file, copied from `original`.
fs::path place(const TempDir& folder, const std::string& name, const fs::path& original) {
  const fs::path file = folder / ("libpyra_merge_" + name + ".so");
  fs::copy_file(original, file, fs::copy_options::overwrite_existing);
  return file;
}

template <class Call>
void check_error(ExitCode code, const std::vector<std::string>& says, const Call& call) {
  try {
    (void)call();
    FAIL("no error");
  } catch (const Error& error) {
    CHECK(int(error.code()) == int(code));
    for (const std::string& part : says) CHECK_THAT(error.what(), Catch::Contains(part));
  }
}

void write(const fs::path& file, const std::string& content) {
  std::ofstream(file, std::ios::binary) << content;
}

}  // namespace

TEST_CASE("the built plugins are found beside the program and describe themselves", "[plugins]") {
  const PluginRegistry registry;
  const auto merge = registry.names("merge"), peft = registry.names("peft");
  for (const char* name : {"diffrate", "pyra", "tome"}) CHECK(std::count(merge.begin(), merge.end(), name) == 1);
  for (const char* name : {"bitfit", "consolidator", "full", "linear_probe", "lora"})
    CHECK(std::count(peft.begin(), peft.end(), name) == 1);
  CHECK(std::is_sorted(merge.begin(), merge.end()));
  CHECK(registry.names("other").empty());

  const auto info = registry.info("peft", "lora");
  CHECK(info.kind == "peft");
  CHECK(info.name == "lora");
  CHECK_FALSE(info.version.empty());
  CHECK_FALSE(info.description.empty());
  CHECK(info.path.filename() == "libpyra_peft_lora.so");
  CHECK(info.parameters.front().name == "rank");
  CHECK(registry.merger("tome", {}, "test")->needs().key_mean);
  CHECK(registry.peft("bitfit", {}, "test")->trains("blocks.0.norm1.bias"));
}

TEST_CASE("an object outlives the registry that made it", "[plugins]") {
  std::shared_ptr<const sdk::PeftMethod> method;
  {
    const PluginRegistry registry;
    method = registry.peft("lora", {{"rank", int64_t{2}}}, "test");
  }
  CHECK(method->declare({.depth = 1, .embed_dim = 8, .num_heads = 1, .mlp_dim = 32, .tokens = 5}).size() == 2);
}

TEST_CASE("a plugin's parameters are checked where they were given", "[plugins]") {
  const PluginRegistry registry;
  check_error(ExitCode::usage, {"recipe a.toml:3: [peft]: unknown parameter 'rnak'", "did you mean 'rank'?"}, [&] {
    return registry.peft("lora", {{"rnak", int64_t{4}}}, "recipe a.toml:3: [peft]");
  });
  check_error(ExitCode::usage, {"targets is empty"}, [&] {
    return registry.peft("lora", {{"targets", std::vector<std::string>{}}}, "test");
  });
}

TEST_CASE("a plugin that is not there is an error with the names that are", "[plugins]") {
  const PluginRegistry registry;
  check_error(ExitCode::plugin, {"no merge plugin 'tomee'", "diffrate, pyra, tome", "did you mean 'tome'?"},
              [&] { return registry.merger("tomee", {}, "test"); });
  check_error(ExitCode::plugin, {"no merge plugin 'lora'"}, [&] { return registry.merger("lora", {}, "test"); });
  check_error(ExitCode::plugin, {"no merge plugin '../tome'"}, [&] { return registry.merger("../tome", {}, "test"); });
}

TEST_CASE("every bad plugin is refused by its path and the reason", "[plugins]") {
  struct Bad {
    const char* name;
    fs::path original;
    std::vector<std::string> says;
  };
  const fs::path misbehaving = kBad / "misbehaving.so";
  const Bad bads[] = {
      {"no_symbol", kBad / "no_symbol.so", {"no symbol pyra_plugin_entry"}},
      {"unresolved", kBad / "unresolved.so", {"pyra_test_function_that_nobody_has"}},
      {"wrong_tag", misbehaving, {"its tag is 'pyra-sdk 0 libtorch 1.13.0'", PYRA_ABI_TAG}},
      {"no_tag", misbehaving, {"its tag is '(none)'"}},
      {"wrong_name", misbehaving, {"the merge plugin 'another'", "file name says merge 'wrong_name'"}},
      {"wrong_kind", misbehaving, {"the peft plugin 'wrong_kind'"}},
      {"no_factory", misbehaving, {"lacks a factory"}},
      {"returns_nothing", misbehaving, {"its entry returned nothing"}},
      {"throws_in_entry", misbehaving, {"loading failed: not even that"}},
      {"throws_in_parameters", misbehaving, {"parameters() failed: no list today"}},
      {"asks_twice", misbehaving, {"parameter 'strength' is declared twice"}},
      {"throws", misbehaving, {"its factory failed: my tables are gone"}},
      {"throws_int", misbehaving, {"no std::exception"}},
      {"throws_error", misbehaving, {"its factory failed: tables.bin is missing"}},
      {"creates_nothing", misbehaving, {"its factory returned nothing"}},
  };
  const TempDir folder;
  const PluginRegistry registry({folder.path()});
  for (const Bad& bad : bads) {
    CAPTURE(bad.name);
    const fs::path file = place(folder, bad.name, bad.original);
    std::vector<std::string> says = bad.says;
    says.push_back(file.string());
    check_error(ExitCode::plugin, says, [&] { return registry.merger(bad.name, {}, "test"); });
    check_error(ExitCode::plugin, says, [&] { return PluginRegistry::check(file); });
  }
}

TEST_CASE("a good copy of the misbehaving plugin works, so the cases above fail for their own reasons", "[plugins]") {
  const TempDir folder;
  const fs::path file = place(folder, "polite", kBad / "misbehaving.so");
  const PluginRegistry registry({folder.path()});
  CHECK(PluginRegistry::check(file).name == "polite");
  CHECK(registry.merger("polite", {{"strength", 2.0}}, "test") != nullptr);
  place(folder, "refuses", kBad / "misbehaving.so");
  check_error(ExitCode::usage, {"strength 3 is odd"}, [&] {
    return registry.merger("refuses", {{"strength", 3.0}}, "test");
  });
}

TEST_CASE("files that are no whole shared objects never reach the loader", "[plugins]") {
  const TempDir folder;
  const PluginRegistry registry({folder.path()});
  const fs::path real = fs::path(PYRA_PLUGIN_DIR) / "libpyra_merge_tome.so";
  const auto refused = [&](const std::string& reason) {
    check_error(ExitCode::plugin, {(folder / "libpyra_merge_cut.so").string(), reason},
                [&] { return registry.merger("cut", {}, "test"); });
  };
  SECTION("cut at any length") {
    const auto size = fs::file_size(real);
    for (const auto length :
         {uintmax_t{1}, uintmax_t{63}, uintmax_t{64}, uintmax_t{200}, size / 4, size / 2, size - 1}) {
      CAPTURE(length);
      fs::resize_file(place(folder, "cut", real), length);
      refused("truncated");
    }
  }
  SECTION("empty") {
    write(folder / "libpyra_merge_cut.so", "");
    refused("truncated");
  }
  SECTION("text") {
    write(folder / "libpyra_merge_cut.so", std::string(4096, 'x'));
    refused("not an ELF shared object");
  }
  SECTION("another machine's, or a program") {
    std::ifstream in(real, std::ios::binary);
    std::string content((std::istreambuf_iterator<char>(in)), {});
    std::string other = content;
    other[18] = 8;  // e_machine: MIPS
    write(folder / "libpyra_merge_cut.so", other);
    refused("another machine");
    content[16] = 2;  // e_type: ET_EXEC
    write(folder / "libpyra_merge_cut.so", content);
    refused("not a shared object");
  }
  SECTION("a folder") {
    fs::create_directory(folder / "libpyra_merge_cut.so");
    refused("not a file");
  }
  SECTION("missing") {
    check_error(ExitCode::plugin, {"no such file"},
                [&] { return PluginRegistry::check(folder / "libpyra_merge_cut.so"); });
  }
  SECTION("a name that is no plugin's") {
    check_error(ExitCode::plugin, {"libpyra_merge_<name>.so"},
                [&] { return PluginRegistry::check(folder / "tome.so"); });
  }
}

TEST_CASE("the first folder in search order wins, and a broken plugin there is not passed over", "[plugins]") {
  const TempDir first, second;
  place(first, "tome", kBad / "no_symbol.so");
  const fs::path good = fs::path(PYRA_PLUGIN_DIR) / "libpyra_merge_tome.so";
  const test::EnvironmentVariable path("PYRA_PLUGIN_PATH", "::" + second.path().string() + ":/no/such/folder");
  fs::copy_file(good, second / "libpyra_merge_tome.so");
  CHECK(PluginRegistry().info("merge", "tome").path == fs::canonical(second / "libpyra_merge_tome.so"));
  const PluginRegistry registry({first.path()});
  CHECK(registry.search_path().front() == fs::canonical(first.path()));
  const auto names = registry.names("merge");
  CHECK(std::count(names.begin(), names.end(), "tome") == 1);
  check_error(ExitCode::plugin, {first.path().string(), "no symbol"}, [&] { return registry.info("merge", "tome"); });
}

TEST_CASE("names come from file names alone", "[plugins]") {
  const TempDir folder;
  for (const char* name :
       {"libpyra_merge_two_words.so", "libpyra_merge_.so", "libpyra_merge_a b.so", "libpyra_other_x.so",
        "libpyra_merge_x.so.1", "pyra_merge_x.so", "libpyra_peft_mine.so", "libpyra_merge.so"}) {
    write(folder / name, "not even ELF");
  }
  const PluginRegistry registry({folder.path()});
  const auto merge = registry.names("merge"), peft = registry.names("peft");
  CHECK(std::count(merge.begin(), merge.end(), "two_words") == 1);
  CHECK(std::count(peft.begin(), peft.end(), "mine") == 1);
  for (const std::string& name : merge) CHECK((name != "" && name != "a b" && name != "x"));
}

TEST_CASE("plugins are never taken from the working folder", "[plugins]") {
  const TempDir folder;
  const fs::path old = fs::current_path();
  fs::create_directory(folder / "mine");
  fs::copy_file(kBad / "misbehaving.so", folder / "libpyra_merge_local.so");
  fs::copy_file(kBad / "misbehaving.so", folder / "mine/libpyra_merge_named.so");
  fs::current_path(folder.path());
  const PluginRegistry plain;
  const PluginRegistry named({"mine"});
  const auto in_environment = [] {
    const test::EnvironmentVariable path("PYRA_PLUGIN_PATH", "mine");
    return PluginRegistry();
  };
  check_error(ExitCode::usage, {"PYRA_PLUGIN_PATH", "'mine' is relative"}, in_environment);
  fs::current_path(old);
  check_error(ExitCode::plugin, {"no merge plugin 'local'"}, [&] { return plain.merger("local", {}, "test"); });
  // A folder named on the command line was made absolute then; the working folder has moved since.
  CHECK(named.merger("named", {}, "test") != nullptr);
}

TEST_CASE("a --plugin-path that is no folder is refused", "[plugins]") {
  const TempDir folder;
  write(folder / "file", "x");
  check_error(ExitCode::usage, {"--plugin-path", "not a folder"}, [&] { return PluginRegistry({folder / "missing"}); });
  check_error(ExitCode::usage, {"--plugin-path", "not a folder"}, [&] { return PluginRegistry({folder / "file"}); });
}

TEST_CASE("what a plugin's methods do wrong is told as the plugin's fault", "[plugins]") {
  const sdk::ModelShape shape{.depth = 1, .embed_dim = 8, .num_heads = 1, .mlp_dim = 32, .tokens = 9};
  const sdk::Schedule schedule{.text = "3", .remove = {3}, .prune = {}, .merge = {}};
  const sdk::TensorMap nothing;
  const sdk::MergeInputs inputs{
      .block = 4, .tokens = {}, .sizes = {}, .key_mean = {}, .class_attention = {}, .learned = nothing};
  using Merger = const sdk::TokenMerger&;
  struct Bad {
    const char* name;
    ExitCode code;
    std::vector<std::string> says;
    std::function<void(Merger)> call;
  };
  const auto resolve = [&](Merger merger) { (void)merger.resolve(schedule, shape); };
  const auto declare = [&](Merger merger) { (void)merger.declare(shape, schedule); };
  const auto plan = [&](Merger merger) { (void)merger.plan(inputs, schedule); };
  const Bad bads[] = {
      {"needs_int", ExitCode::plugin, {"needs() failed", "no std::exception"}, [](Merger m) { (void)m.needs(); }},
      {"resolve_throws", ExitCode::plugin, {"resolve() failed: no block 13"}, resolve},
      {"resolve_refuses", ExitCode::usage, {"'high' is too much"}, resolve},
      {"resolve_halves", ExitCode::plugin, {"resolve() of what it has resolved, '3'"}, resolve},
      {"never_acts",
       ExitCode::plugin,
       {"acts() says no where 9 tokens become 6"},
       [](Merger m) { (void)m.acts(9, 6); }},
      {"declares_twice", ExitCode::plugin, {"declare() names a tensor 'scale' twice"}, declare},
      {"declares_much", ExitCode::plugin, {"declare() gives tensor 'scale' the shape"}, declare},
      {"plan_says_ok", ExitCode::plugin, {"plan() of block 4 failed: all fine"}, plan},
      {"plan_throws", ExitCode::plugin, {"plan() of block 4 failed: no plan for block 4"}, plan},
  };
  const TempDir folder;
  const PluginRegistry registry({folder.path()});
  for (const Bad& bad : bads) {
    CAPTURE(bad.name);
    place(folder, bad.name, kBad / "misbehaving.so");
    const auto merger = registry.merger(bad.name, {}, "test");
    std::vector<std::string> says = bad.says;
    if (bad.code == ExitCode::plugin) says.push_back(std::string("merger '") + bad.name + "'");
    check_error(bad.code, says, [&] {
      bad.call(*merger);
      return 0;
    });
  }
}
