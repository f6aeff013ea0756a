// How a subcommand stands in pyractl: one file declares its options, and leaves behind what to run.
#pragma once
#include <CLI/CLI.hpp>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "base/progress.h"
#include "host/plugin_registry.h"

namespace pyra::data {
enum class BadImages;
struct BadImage;
}  // namespace pyra::data

namespace pyra::cli {

/// The options every subcommand takes.
struct Globals {
  std::string device = "auto";   ///< auto, cpu, cuda[:i]
  std::string dtype = "auto";    ///< auto, fp32, tf32, bf16, fp16
  std::vector<std::string> set;  ///< key=value
  bool json = false;
  bool quiet = false;
  int threads = 0;  ///< 0: $PYRA_THREADS, else as many as the machine has cores
  std::vector<std::filesystem::path> plugin_path;
};

/// One run of the program.
class Session {
 public:
  Session();
  ~Session();
  Globals globals;
  /// What the chosen subcommand does; returns the exit code.
  std::function<int()> action;

  /// Made on first use, from --plugin-path.
  [[nodiscard]] host::PluginRegistry& plugins();
  /// Bars on a terminal, plain lines elsewhere, nothing with --quiet; always stderr.
  [[nodiscard]] Progress& progress();
  /// The result, on stdout: `document` with --json, else what `human` writes. Error(output) when stdout is full.
  void print(const nlohmann::json& document, const std::function<void(std::ostream&)>& human) const;

 private:
  std::unique_ptr<host::PluginRegistry> plugins_;
  std::unique_ptr<Progress> progress_;
};

/// A subcommand that also takes the options common to all (--device, --dtype, --set, --json …).
CLI::App* add_command(CLI::App& root, Session& session, const std::string& name, const std::string& description);

/// The options common to all, on an app that is no subcommand of its own: the root, so they may come first too.
void add_common_options(CLI::App& app, Session& session);

/// --bad-images fail|skip; sets `bad`, which has to live as long as `command`.
void add_bad_images_option(CLI::App& command, data::BadImages& bad);

/// The images that --bad-images skip left out.
[[nodiscard]] nlohmann::json to_json(const std::vector<data::BadImage>& skipped);
/// "skipped 2 images`remark`:" and a line each; nothing where there are none.
void print_skipped(std::ostream& out, const std::vector<data::BadImage>& skipped, std::string_view remark);

/// Whoever read our output has gone: nothing is wrong, nothing is left to say.
struct BrokenPipe {};

/// Every byte to stdout, now; throws Error(output) with the system's reason, or BrokenPipe.
void write_stdout(std::string_view text);

/// What went wrong with a command line, in one line, with the nearest name of an option or a subcommand.
[[nodiscard]] std::string explain(const CLI::ParseError& error, const CLI::App& root);

/// Text from files and file names, safe on a terminal: control characters but newline and tab as \xNN.
[[nodiscard]] std::string printable(std::string_view text);

/// A document made of `text`; bytes that are no UTF-8 (file names may hold any) become U+FFFD.
[[nodiscard]] std::string dump(const nlohmann::json& document);

// Each in its own file, <name>.cpp.
void add_finetune(CLI::App& root, Session& session);
void add_merge_lora(CLI::App& root, Session& session);
void add_convert(CLI::App& root, Session& session);
void add_compress(CLI::App& root, Session& session);
void add_eval(CLI::App& root, Session& session);
void add_predict(CLI::App& root, Session& session);
void add_report(CLI::App& root, Session& session);
void add_bench(CLI::App& root, Session& session);
void add_inspect(CLI::App& root, Session& session);
void add_data(CLI::App& root, Session& session);
void add_plugins(CLI::App& root, Session& session);
void add_doctor(CLI::App& root, Session& session);

}  // namespace pyra::cli
