#include "fixtures.h"

using namespace pyra;
using namespace pyra::test;

TEST_CASE("doctor says what the machine and the installation offer") {
  const Workshop shop;
  const auto document = json_of(shop, "doctor");
  CHECK(document["usable"] == true);
  CHECK(document["physical_cores"] >= 1);
  CHECK(document["physical_cores"] <= document["logical_cpus"]);
  CHECK(document["memory_bytes"] >= document["memory_available_bytes"]);
  CHECK(document["memory_available_bytes"] > 0);
  CHECK_FALSE(document["micro_kernel"].get<std::string>().empty());
  CHECK(document["plugins"].size() >= 5);
  const RunResult human = in(shop, "doctor");
  CHECK(human.exit_code == 0);
  CHECK(human.out.find("All is well.") != std::string::npos);
}

TEST_CASE("doctor finds a plugin that does not load and a folder that cannot be written") {
  const Workshop shop;
  write_bytes(shop / "plugins/libpyra_merge_text.so", "not a library\n");
  const RunResult plugin = in(shop, "doctor --plugin-path plugins");
  CHECK(plugin.exit_code == 4);
  CHECK(plugin.out.find("PROBLEM") != std::string::npos);
  CHECK(plugin.out.find("libpyra_merge_text.so") != std::string::npos);
  const RunResult folder = run({"/usr/bin/env", "TMPDIR=/nowhere", PYRACTL, "doctor"}, shop.path());
  CHECK(folder.exit_code == 9);
  CHECK(folder.out.find("/nowhere") != std::string::npos);
}
