// The readers of files from others, on files that are damaged and forged. A short run of the same files each time;
//   PYRA_FUZZ="COUNT SEED [TARGET…]" test_fuzz
// reads COUNT files of every target, those of SEED. A finding's file is kept in the working folder. Most is seen in a
// build with sanitizers (cmake --preset asan).
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iostream>

#include "base/error.h"
#include "catch.h"
#include "fuzz/targets.h"
#include "support.h"

namespace pyra::fuzz {
namespace {

constexpr size_t kMostMessage = 4096;
constexpr long kMostKilobytes = 700 << 10;  // an image of the largest size that is read, and its copy
constexpr unsigned kMostSeconds = 10;

struct Run {
  size_t count = 100;
  uint64_t seed = 1;
  std::vector<std::string> targets;  ///< empty: all
  bool by_hand = false;              ///< someone looks on, so that the clock may be read
};

Run wanted_run() {
  const char* text = std::getenv("PYRA_FUZZ");
  if (!text) return {};
  const std::vector<std::string> words = split(text, ' ');
  REQUIRE(words.size() >= 2);
  return {.count = std::stoul(words[0]),
          .seed = std::stoul(words[1]),
          .targets = {words.begin() + 2, words.end()},
          .by_hand = true};
}

std::string current_file;  // what the signal handler has to name

extern "C" void on_alarm(int) {
  static constexpr char kText[] = "\ntakes too long: ";
  (void)!write(STDERR_FILENO, kText, sizeof kText - 1);
  (void)!write(STDERR_FILENO, current_file.data(), current_file.size());
  _exit(1);
}

/// What is wrong with a message; "" for a good one.
std::string fault(const Error& error, const std::string& named) {
  const std::string text = error.what();
  if (error.code() != ExitCode::input && error.code() != ExitCode::usage)
    return cat("exit code ", int(error.code()), ": ", text);
  if (printable(text, text.size()) != text) return cat("a control character in: ", text);
  if (text.size() > kMostMessage) return cat("a message of ", text.size(), " bytes: ", text);
  if (text.find(named) == text.npos) return cat("no file's name in: ", text);
  return "";
}

/// What is wrong with how the bytes are read; `refusals` counts those that are refused.
std::string try_read(const Target& target, const std::string& bytes, size_t& refusals) {
  try {
    target.read(bytes);
  } catch (const Error& error) {
    ++refusals;
    return fault(error, target.named);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

long peak_kilobytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

void fuzz(const Target& target, const Run& run) {
  size_t refusals = 0;
  for (size_t i = 0; i < run.count; ++i) {
    Random random((run.seed << 32) + i);
    const std::string bytes = target.forge(random, random.choose(target.seeds), target.words);
    current_file = cat("fuzz-", target.name, "-", run.seed, "-", i);
    const long before = peak_kilobytes();
    if (run.by_hand) alarm(kMostSeconds);
    std::string wrong = try_read(target, bytes, refusals);
    alarm(0);
    if (wrong.empty() && peak_kilobytes() > before + kMostKilobytes)
      wrong = cat("took ", (peak_kilobytes() - before) >> 10, " MiB for a file of ", bytes.size(), " bytes");
    if (wrong.empty()) continue;
    std::ofstream(current_file, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
    FAIL_CHECK(current_file << ": " << printable(wrong, 700));
  }
  if (run.by_hand) std::cout << target.name << ": " << run.count << " files, " << refusals << " refused" << std::endl;
}

TEST_CASE("files that are damaged or forged are refused in one clear line, or read as what they say") {
  const Run run = wanted_run();
  std::signal(SIGALRM, on_alarm);
  const test::TempDir folder;
  for (const Target& target : all_targets(folder.path())) {
    if (!run.targets.empty() && std::ranges::find(run.targets, target.name) == run.targets.end()) continue;
    INFO(target.name);
    // A target that refuses what it starts from would test little.
    size_t refusals = 0;
    for (const std::string& sound : target.seeds)
      if (!sound.empty()) CHECK(try_read(target, sound, refusals).empty());
    CHECK(refusals <= 1);
    fuzz(target, run);
  }
}

}  // namespace
}  // namespace pyra::fuzz
