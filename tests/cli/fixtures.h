// What the command-line tests share: a tiny model and a tiny task in a folder of their own, and a table of runs.
#pragma once
#include <ATen/ATen.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/philox.h"
#include "base/text.h"
#include "catch.h"
#include "io/model_file.h"
#include "nn/vit.h"
#include "support.h"

namespace pyra::test {

inline void write_bytes(const std::filesystem::path& path, std::string_view bytes) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << bytes;
}

inline std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// A PNM image of one colour with some noise, so that no two are equal.
inline std::string ppm(int side, uint64_t seed) {
  std::string bytes = cat("P6\n", side, " ", side, "\n255\n");
  const Philox random(seed, RandomStream::bench);
  for (int i = 0; i < side * side * 3; ++i)
    bytes += char((seed * 40 + uint64_t(i % 3) * 70 + random.below(uint64_t(i), 30)) % 256);
  return bytes;
}

/// A folder with `model.safetensors` (6 classes, 17 tokens, 3 blocks, random weights) and `task/` (list files, six
/// images a list).
class Workshop {
 public:
  static constexpr int kClasses = 6;

  Workshop() {
    io::write_model(folder_ / "model.safetensors", model_file());
    std::string classes, list;
    for (int label = 0; label < kClasses; ++label) {
      classes += cat("class-", label, "\n");
      list += cat("images/", label, ".ppm ", label, "\n");
      write_bytes(folder_ / cat("task/images/", label, ".ppm"), ppm(20 + label, uint64_t(label)));
    }
    write_bytes(folder_ / "task/classes.txt", classes);
    for (const char* name : {"train800.txt", "val200.txt", "train800val200.txt", "test.txt"})
      write_bytes(folder_ / cat("task/", name), list);
  }

  [[nodiscard]] static io::ModelFile model_file() {
    io::ModelFile file;
    file.config = {.arch = "vit_test_patch4_16",
                   .image_size = 16,
                   .patch_size = 4,
                   .embed_dim = 32,
                   .depth = 3,
                   .num_heads = 2,
                   .mlp_dim = 64,
                   .num_classes = kClasses};
    file.preprocess.size = file.config.image_size;
    for (int label = 0; label < kClasses; ++label) file.class_names.push_back(cat("class-", label));
    file.weights = nn::random_weights(file.config, 7);
    // As initialised, the head would give every class nearly the same probability.
    file.weights["head.weight"] = file.weights.at("head.weight") * 50;
    file.provenance["protocol"] = "vtab";
    return file;
  }

  [[nodiscard]] const std::filesystem::path& path() const { return folder_.path(); }
  [[nodiscard]] std::filesystem::path operator/(const std::string& name) const { return folder_ / name; }

  /// A copy of the task under another name, to be spoilt.
  void copy_task(const std::string& name) const {
    std::filesystem::copy(folder_ / "task", folder_ / name, std::filesystem::copy_options::recursive);
  }

  /// Every file in the folder, its size and the time of its last change.
  [[nodiscard]] std::map<std::string, std::string> listing() const {
    std::map<std::string, std::string> files;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(path()))
      files[std::filesystem::relative(entry.path(), path()).string()] =
          entry.is_regular_file() ? cat(entry.file_size(), " ", entry.last_write_time().time_since_epoch().count())
                                  : "";
    return files;
  }

 private:
  TempDir folder_;
};

/// "eval model.safetensors --data task" as an argument list; no quoting.
inline std::vector<std::string> words(std::string_view line) {
  std::vector<std::string> list;
  for (const std::string& word : split(line, ' '))
    if (!word.empty()) list.push_back(word);
  return list;
}

/// Runs a line in the workshop's folder.
inline RunResult in(const Workshop& shop, std::string_view line) {
  return pyractl(words(line), shop.path());
}

/// A run that has to fail: its line, its exit code, and what its one line on stderr says.
struct Refusal {
  std::string line;
  int code = 0;
  std::vector<std::string> says;
};

/// Exit code; one line on stderr with all of `says`; stdout empty; no file made, changed or removed.
inline void check_refusal(const Workshop& shop, const Refusal& refusal) {
  const auto before = shop.listing();
  const RunResult result = in(shop, refusal.line + " --quiet");
  CAPTURE(refusal.line, result.out, result.err);
  CHECK(result.exit_code == refusal.code);
  CHECK(result.out.empty());
  CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  CHECK(result.err.starts_with("pyractl"));
  for (const std::string& part : refusal.says) {
    CAPTURE(part);
    CHECK(result.err.find(part) != std::string::npos);
  }
  CHECK(shop.listing() == before);
}

/// The same with --json: the error is a document on stdout too.
inline void check_json_refusal(const Workshop& shop, const std::string& line, int code) {
  const RunResult result = in(shop, line + " --quiet --json");
  CAPTURE(line, result.out, result.err);
  CHECK(result.exit_code == code);
  const auto document = nlohmann::json::parse(result.out, nullptr, false);
  REQUIRE(document.is_object());
  CHECK(document["error"]["code"] == code);
  CHECK(result.err.find(document["error"]["message"].get<std::string>()) != std::string::npos);
}

/// A good run with --json, parsed.
inline nlohmann::json json_of(const Workshop& shop, const std::string& line) {
  const RunResult result = in(shop, line + " --json --quiet");
  CAPTURE(line, result.out, result.err, result.exit_code);
  REQUIRE(result.exit_code == 0);
  CHECK(result.err.empty());
  return nlohmann::json::parse(result.out);
}

}  // namespace pyra::test
