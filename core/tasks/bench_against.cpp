#include "tasks/bench_against.h"

#include <ATen/Parallel.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/text.h"
#include "io/json.h"
#include "tasks/assemble.h"
#include "tasks/bench.h"
#include "tasks/run_model.h"

extern char** environ;

namespace pyra::tasks {
namespace {

constexpr int64_t kRepetitionsOfARun = 3;
constexpr size_t kMaxOutput = size_t{16} << 20;

// What a program writes, kept in memory.
class Capture {
 public:
  Capture() : descriptor_(memfd_create("pyractl", MFD_CLOEXEC)) {
    if (descriptor_ < 0) fail(ExitCode::internal, "memfd_create: ", std::strerror(errno));
  }
  ~Capture() { close(descriptor_); }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  [[nodiscard]] int descriptor() const { return descriptor_; }
  [[nodiscard]] std::string text() const {
    struct stat info {};
    fstat(descriptor_, &info);
    std::string bytes(std::min(size_t(info.st_size), kMaxOutput), '\0');
    const ssize_t got = pread(descriptor_, bytes.data(), bytes.size(), 0);
    bytes.resize(size_t(std::max<ssize_t>(got, 0)));
    return bytes;
  }

 private:
  int descriptor_;
};

std::string program_output(const std::filesystem::path& program, std::vector<std::string> arguments) {
  const Capture out, err;
  arguments.insert(arguments.begin(), program.string());
  std::vector<char*> argv;
  argv.reserve(arguments.size() + 1);
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);

  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&files, out.descriptor(), 1);
  posix_spawn_file_actions_adddup2(&files, err.descriptor(), 2);
  pid_t child = 0;
  const int error = posix_spawn(&child, program.c_str(), &files, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&files);
  if (error != 0) fail(ExitCode::usage, "--against: ", program.string(), " cannot be started: ", std::strerror(error));

  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  // Ctrl-C reaches both: that the program ended early is then no failure of it.
  stop_if_asked("bench --against");
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
    fail(ExitCode::usage, "--against: ", program.string(), " ended with ",
         WIFEXITED(status) ? cat("exit code ", WEXITSTATUS(status)) : cat("signal ", WTERMSIG(status)), ": ",
         err.text().substr(0, 2000));
  return out.text();
}

std::vector<std::string> bench_arguments(const BenchSettings& settings,
                                         const std::vector<std::filesystem::path>& plugin_path) {
  std::vector<std::string> batches;
  for (const int64_t batch : settings.batches) batches.push_back(std::to_string(batch));
  const int64_t repetitions = settings.repetitions > 0 ? settings.repetitions : kRepetitionsOfARun;
  std::vector<std::string> arguments{"bench", "--json", "--quiet"};
  const auto add = [&](const char* option, const std::string& value) {
    if (!value.empty()) arguments.insert(arguments.end(), {option, value});
  };
  if (!settings.model.empty()) arguments.push_back(settings.model);
  add("--arch", settings.arch);
  add("--merge", settings.merge);
  add("--schedule", settings.schedule);
  add("--peft", settings.peft);
  if (settings.data.empty()) {
    add("--mode", join(settings.modes, ","));
  } else {
    arguments.emplace_back("--end-to-end");
    add("--data", settings.data);
    add("--split", settings.split);
  }
  add("--batch", join(batches, ","));
  add("--device", settings.device);
  add("--dtype", settings.dtype);
  add("--threads", settings.threads > 0 ? std::to_string(settings.threads) : "");
  add("--repetitions", std::to_string(repetitions));
  add("--min-time", cat(settings.min_time));
  add("--warmup", settings.warmup > 0 ? std::to_string(settings.warmup) : "");
  for (const std::string& assignment : settings.set) add("--set", assignment);
  for (const std::filesystem::path& folder : plugin_path) add("--plugin-path", folder.string());
  return arguments;
}

}  // namespace

Comparison compare_against(const AgainstOptions& against, const BenchSettings& settings, const CompareOptions& options,
                           Progress& progress) {
  // Resolved here, so that both programs measure the same rows whatever their defaults are.
  BenchSettings resolved = settings;
  resolved.device = resolve_bench_device(settings);
  resolved.dtype = engine::precision_name(resolve_precision(settings.dtype, resolved.device));
  if (resolved.threads == 0) resolved.threads = at::get_num_threads();
  const std::vector<std::string> arguments = bench_arguments(resolved, against.plugin_path);
  const auto measure = [&](const std::filesystem::path& program) {
    const std::string where = program.string() + " bench --json";
    return report_from_json(io::parse_json(program_output(program, arguments), where), where);
  };
  std::vector<std::pair<BenchReport, BenchReport>> pairs;
  const auto take_pairs = [&] {
    progress.begin("pairs of runs", against.pairs, "pair");
    for (int64_t i = 0; i < against.pairs; ++i) {
      // Whoever runs second finds a warmer machine: each is second as often as the other.
      auto& [other, self] = pairs.emplace_back();
      if (i % 2 == 0) other = measure(against.other);
      self = measure(against.self);
      if (i % 2 != 0) other = measure(against.other);
      progress.update(i + 1);
    }
    progress.end();
    return compare_pairs(pairs, options);
  };
  const Comparison first = take_pairs();
  if (first.exit_code() == ExitCode::ok) return first;
  progress.note("not settled at the first look: as many pairs again");
  return take_pairs();
}

}  // namespace pyra::tasks
