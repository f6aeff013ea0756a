#include "fixtures.h"

using namespace pyra;
using namespace pyra::test;

TEST_CASE("plugins lists, describes and checks") {
  const Workshop shop;
  const auto document = json_of(shop, "plugins");
  std::vector<std::string> names;
  for (const auto& plugin : document["plugins"]) {
    CHECK_FALSE(plugin.contains("problem"));
    names.push_back(plugin["kind"].get<std::string>() + " " + plugin["name"].get<std::string>());
  }
  for (const char* name : {"merge tome", "merge pyra", "merge diffrate", "peft lora", "peft bitfit"})
    CHECK(std::find(names.begin(), names.end(), name) != names.end());
  CHECK(json_of(shop, "plugins list") == document);

  const auto lora = json_of(shop, "plugins info lora");
  CHECK(lora["kind"] == "peft");
  bool has_rank = false;
  for (const auto& parameter : lora["parameters"])
    has_rank |= parameter["name"] == "rank" && parameter["type"] == "integer";
  CHECK(has_rank);
  const RunResult human = in(shop, "plugins info lora");
  CHECK(human.out.find("peft.rank") != std::string::npos);

  const std::string file = PYRA_PLUGIN_DIR "/libpyra_merge_tome.so";
  CHECK(json_of(shop, "plugins check " + file)["name"] == "tome");
  CHECK(json_of(shop, "inspect " + file)["kind"] == "plugin");
}

TEST_CASE("a file that is no plugin is exit 4 naming it") {
  const Workshop shop;
  const std::string whole = read_bytes(PYRA_PLUGIN_DIR "/libpyra_merge_tome.so");
  write_bytes(shop / "libpyra_merge_cut.so", whole.substr(0, whole.size() / 2));
  write_bytes(shop / "libpyra_merge_text.so", "not a library\n");
  for (const Refusal& refusal : std::vector<Refusal>{
           {"plugins info tom", 4, {"'tom'", "did you mean 'tome'"}},
           {"plugins check none.so", 4, {"none.so"}},
           {"plugins check libpyra_merge_cut.so", 4, {"libpyra_merge_cut.so"}},
           {"plugins check libpyra_merge_text.so", 4, {"libpyra_merge_text.so"}},
           {"eval model.safetensors --data task --plugin-path . --set merge.name=text --set merge.schedule=1",
            4,
            {"libpyra_merge_text.so"}},
       })
    check_refusal(shop, refusal);
  // A broken neighbour does not hide the others from the list.
  const auto document = json_of(shop, "plugins --plugin-path .");
  int broken = 0;
  for (const auto& plugin : document["plugins"]) broken += plugin.contains("problem");
  CHECK(broken == 2);
  CHECK(document["plugins"].size() >= 7);
}

TEST_CASE("plugins new writes a project and overwrites nothing") {
  const Workshop shop;
  for (const std::string kind : {"merge", "peft"}) {
    const auto document = json_of(shop, "plugins new " + kind + " my_" + kind + " --out " + kind + "_project");
    CHECK(document["written"].size() == 3);
    for (const auto& path : document["written"]) {
      const std::string text = read_bytes(shop.path() / path.get<std::string>());
      CHECK_FALSE(text.empty());
      CHECK(text.find('@') == std::string::npos);
    }
  }
  const std::string merger = read_bytes(shop / "merge_project/my_merge.cpp");
  CHECK(merger.find("class Merger final") != std::string::npos);
  CHECK(merger.find("PYRA_MERGE_PLUGIN(Merger, \"my_merge\"") != std::string::npos);
  for (const Refusal& refusal : std::vector<Refusal>{
           {"plugins new merge my_merge --out merge_project", 2, {"merge_project/CMakeLists.txt", "not overwritten"}},
           {"plugins new merger mine", 2, {"'merger'", "did you mean 'merge'"}},
           {"plugins new merge ../evil", 2, {"'../evil'", "lower-case"}},
           {"plugins new merge Mine", 2, {"'Mine'", "lower-case"}},
       })
    check_refusal(shop, refusal);
}

TEST_CASE("the project of plugins new builds as its README says, and works", "[slow]") {
  const Workshop shop;
  const auto shell = [&](const std::string& line) {
    const RunResult result = run({"/bin/bash", "-c", line}, shop.path());
    CAPTURE(line, result.out, result.err);
    REQUIRE(result.exit_code == 0);
  };
  const auto build = std::filesystem::path(PYRACTL).parent_path().parent_path();
  shell(cat("cmake --install ", build.string(), " --prefix installed"));
  std::string folders;
  for (const std::string kind : {"merge", "peft"}) {
    const std::string name = "my_" + kind;
    json_of(shop, "plugins new " + kind + " " + name);
    shell(cat("cmake -S ", name, " -B ", name, "/build -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH=",
              shop.path().string(), "/installed && cmake --build ", name, "/build"));
    const std::string folder = name + "/build/lib/pyra/plugins";
    CHECK(json_of(shop, cat("plugins check ", folder, "/libpyra_", kind, "_", name, ".so"))["name"] == name);
    folders += " --plugin-path " + folder;
  }
  CHECK(json_of(shop, "plugins info my_peft" + folders)["parameters"][0]["name"] == "scale");
  const auto merged = json_of(
      shop, "compress model.safetensors --merge my_merge --schedule 3 --out m.safetensors --no-measure" + folders);
  CHECK(merged["compressed"]["tokens"] == std::vector<int>{14, 11, 8});
  CHECK(json_of(shop, "eval m.safetensors --data task --dtype fp32" + folders)["merge"] == "my_merge-3");
  // Without the plugin the model cannot run, and says what is missing; what it is can still be told.
  check_refusal(shop, {"eval m.safetensors --data task", 4, {"m.safetensors", "my_merge"}});
  CHECK(json_of(shop, "inspect m.safetensors")["merge"].contains("problem"));
}
