// Includes follow the arrows of docs/architecture.md:
//   {cli, api} → tasks → {train → engine, data, io, host} → nn → sdk → kernels → base,  plugins → sdk, kernels.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "catch.h"
#include "support.h"

namespace fs = std::filesystem;

namespace {

using Names = std::set<std::string>;

const Names kRooms = {"base", "kernels", "sdk", "nn", "io", "data", "engine", "host", "train", "tasks", "api"};

/// What a room may include besides itself; of a room not named here, nothing.
const std::map<std::string, Names> kMayInclude = {
    {"base", {}},
    {"kernels", {"base"}},
    {"sdk", {"base", "kernels"}},
    {"nn", {"base", "kernels", "sdk"}},
    {"io", {"base", "kernels", "sdk", "nn"}},
    {"data", {"base", "kernels", "sdk", "nn"}},
    {"engine", {"base", "kernels", "sdk", "nn"}},
    {"host", {"base", "kernels", "sdk", "nn"}},
    {"train", {"base", "kernels", "sdk", "nn", "data", "io", "engine"}},
    {"tasks", {"base", "kernels", "sdk", "nn", "io", "data", "engine", "host", "train"}},
    {"api", {"base", "data", "engine", "host", "tasks"}},
    {"cli", {"base", "kernels", "sdk", "nn", "io", "data", "engine", "host", "train", "tasks"}},
    {"plugins", {"kernels", "sdk"}},
};
/// Single headers beyond that: what plugins throw and how they word it.
const std::map<std::string, Names> kMayIncludeHeader = {{"plugins", {"base/error.h", "base/text.h"}}};

bool is_source(const fs::path& path) {
  static const Names kinds = {".h", ".cpp", ".cu", ".cuh", ".inl"};
  return kinds.contains(path.extension().string());
}

/// "cli", "plugins", or the folder under core/; the precompiled header, which lies in none, is "".
std::string room_of(const fs::path& relative) {
  auto part = relative.begin();
  if (*part != "core") return part->string();
  const auto room = std::next(part);
  return std::next(room) == relative.end() ? "" : room->string();
}

/// The file that a quoted include names: beside the including file, else from core/ (as the compiler looks).
std::string target_of(const fs::path& root, const fs::path& file, const std::string& include) {
  const auto beside = (file.parent_path() / include).lexically_normal();
  if (!fs::exists(root / beside)) return include;
  const auto text = beside.generic_string();
  return text.starts_with("core/") ? text.substr(5) : text;
}

std::string fault(const fs::path& root, const fs::path& file, const std::string& include) {
  const auto room = room_of(file);
  const auto target = target_of(root, file, include);
  const auto to = target.substr(0, target.find('/'));
  if (room.empty() || to == room || target.find('/') == std::string::npos) return {};
  const auto allowed = kMayInclude.find(room);
  if (allowed == kMayInclude.end()) return "is in a room that the arrows do not name";
  if (allowed->second.contains(to)) return {};
  const auto single = kMayIncludeHeader.find(room);
  if (single != kMayIncludeHeader.end() && single->second.contains(target)) return {};
  if (kRooms.contains(to) || to == "cli" || to == "plugins") return "includes " + target + " against the arrows";
  return {};
}

/// Every include under `root` that points against an arrow: "file:line: what".
std::vector<std::string> faults(const fs::path& root, size_t& files_seen) {
  static const std::regex pattern(R"re(^\s*#\s*include\s*["<]([^">]+)[">].*)re");
  std::vector<std::string> found;
  for (const char* top : {"core", "cli", "plugins"}) {
    if (!fs::exists(root / top)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(root / top)) {
      if (!entry.is_regular_file() || !is_source(entry.path())) continue;
      ++files_seen;
      const auto file = fs::relative(entry.path(), root);
      std::ifstream in(entry.path());
      std::string line;
      std::smatch match;
      for (int number = 1; std::getline(in, line); ++number) {
        if (!std::regex_match(line, match, pattern)) continue;
        const auto text = fault(root, file, match[1]);
        if (!text.empty()) found.push_back(file.generic_string() + ":" + std::to_string(number) + ": " + text);
      }
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

void write(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  std::ofstream(path) << text;
}

}  // namespace

TEST_CASE("no include points against the arrows", "[arrows]") {
  size_t files_seen = 0;
  const auto found = faults(PYRA_SOURCE_DIR, files_seen);
  for (const auto& line : found) UNSCOPED_INFO(line);
  CHECK(found.empty());
  CHECK(files_seen > 50);  // it looked at the project, not at an empty folder
}

TEST_CASE("every room of core is named by the arrows", "[arrows]") {
  for (const auto& entry : fs::directory_iterator(fs::path(PYRA_SOURCE_DIR) / "core")) {
    const auto name = entry.path().filename().string();
    CAPTURE(name);
    if (entry.is_directory() && name != "cmake") CHECK(kRooms.contains(name));
  }
}

TEST_CASE("an include against the arrows is found", "[arrows]") {
  const pyra::test::TempDir root;
  write(root / "core" / "nn" / "vit.h", "#pragma once\n#include \"sdk/plugin.h\"\n#include \"vit_parts.h\"\n");
  write(root / "core" / "train" / "loop.cpp", "#include \"data/loader.h\"\n#include \"io/recipe.h\"\n");
  write(root / "plugins" / "merge_tome" / "tome.cpp", "#include \"base/error.h\"\n#include <torch/torch.h>\n");
  size_t files_seen = 0;
  CHECK(faults(root.path(), files_seen).empty());
  CHECK(files_seen == 3);

  struct Wrong {
    const char *file, *text, *expected;
  };
  const auto wrong = GENERATE(values<Wrong>({
      {"core/kernels/merge.cpp", "#include \"nn/vit.h\"\n", "core/kernels/merge.cpp:1: includes nn/vit.h"},
      {"core/sdk/plan.h", "\n#include <nn/vit.h>\n", "core/sdk/plan.h:2: includes nn/vit.h"},
      {"core/base/text.cpp", "  #  include \"io/recipe.h\"\n", "core/base/text.cpp:1: includes io/recipe.h"},
      {"core/engine/run.cpp", "#include \"data/loader.h\"\n", "core/engine/run.cpp:1: includes data/loader.h"},
      {"core/io/report.cpp", "#include \"train/loop.h\"\n", "core/io/report.cpp:1: includes train/loop.h"},
      {"core/nn/side.cpp", "#include \"../train/loop.cpp\"\n", "core/nn/side.cpp:1: includes train/loop.cpp"},
      {"core/tasks/eval.cpp", "#include \"cli/command.h\"\n", "core/tasks/eval.cpp:1: includes cli/command.h"},
      {"core/extra/x.cpp", "#include \"nn/vit.h\"\n", "core/extra/x.cpp:1: is in a room"},
      {"plugins/merge_tome/x.cpp", "#include \"nn/vit.h\"\n", "plugins/merge_tome/x.cpp:1: includes nn/vit.h"},
      {"plugins/merge_tome/x.cpp", "#include \"base/philox.h\"\n", "x.cpp:1: includes base/philox.h"},
  }));
  CAPTURE(wrong.file, wrong.text);
  write(root.path() / wrong.file, wrong.text);
  const auto found = faults(root.path(), files_seen);
  REQUIRE(found.size() == 1);
  CHECK(found[0].find(wrong.expected) != std::string::npos);
}
