#include "command.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <sstream>

#include "base/error.h"
#include "data/dataset.h"
#include "progress_bar.h"

namespace pyra::cli {
namespace {

/// An option that may be given several times, one value each: a greedy list would swallow the operand after it.
template <class T>
void add_repeatable(CLI::App& app, const std::string& name, std::vector<T>& values, const std::string& help,
                    const std::string& type) {
  app.add_option_function<std::vector<std::string>>(
         name,
         [&values](const std::vector<std::string>& given) { values.insert(values.end(), given.begin(), given.end()); },
         help)
      ->type_name(type)
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->group("Common options");
}

/// The subcommand that was reached last: the one whose options were being read.
const CLI::App& innermost(const CLI::App& root) {
  const CLI::App* app = &root;
  while (!app->get_subcommands().empty()) app = app->get_subcommands().back();
  return *app;
}

/// Options that `app` or those above it take.
std::vector<std::string> option_names(const CLI::App* app) {
  std::vector<std::string> names;
  for (; app; app = app->get_parent())
    for (const CLI::Option* option : app->get_options())
      for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  return names;
}

std::vector<std::string> subcommand_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; }))
    names.push_back(sub->get_name());
  return names;
}

}  // namespace

Session::Session() = default;
Session::~Session() = default;

host::PluginRegistry& Session::plugins() {
  if (!plugins_) plugins_ = std::make_unique<host::PluginRegistry>(globals.plugin_path);
  return *plugins_;
}

Progress& Session::progress() {
  if (globals.quiet) return silent_progress();
  if (!progress_) progress_ = std::make_unique<ProgressBar>(STDERR_FILENO);
  return *progress_;
}

void Session::print(const nlohmann::json& document, const std::function<void(std::ostream&)>& human) const {
  if (globals.json) return write_stdout(dump(document) + "\n");
  std::ostringstream text;
  human(text);
  write_stdout(printable(text.str()));
}

void add_bad_images_option(CLI::App& command, data::BadImages& bad) {
  command
      .add_option_function<std::string>(
          "--bad-images",
          [&bad](const std::string& what) { bad = what == "skip" ? data::BadImages::skip : data::BadImages::fail; },
          "At an image that does not decode: fail, or skip it and say so")
      ->check(CLI::IsMember({"fail", "skip"}).description(""))
      ->type_name("fail|skip")
      ->default_str("fail");
}

nlohmann::json to_json(const std::vector<data::BadImage>& skipped) {
  nlohmann::json list = nlohmann::json::array();
  for (const data::BadImage& bad : skipped) list.push_back({{"path", bad.path}, {"reason", bad.reason}});
  return list;
}

void print_skipped(std::ostream& out, const std::vector<data::BadImage>& skipped, std::string_view remark) {
  if (skipped.empty()) return;
  out << "skipped " << skipped.size() << " images" << remark << ":\n";
  for (const data::BadImage& bad : skipped) out << "        " << bad.path << ": " << bad.reason << "\n";
}

void add_common_options(CLI::App& app, Session& session) {
  Globals& globals = session.globals;
  const char* group = "Common options";
  app.add_option("--device", globals.device, "auto, cpu, cuda or cuda:INDEX")->type_name("DEVICE")->group(group);
  app.add_option("--dtype", globals.dtype, "auto is bf16 where that is faster, else fp32")
      ->type_name("auto|fp32|tf32|bf16|fp16")
      ->check(CLI::IsMember({"auto", "fp32", "tf32", "bf16", "fp16"}).description(""))
      ->group(group);
  add_repeatable(app, "--set", globals.set, "Override a key of the recipe or the model; may be repeated", "KEY=VALUE");
  add_repeatable(app, "--plugin-path", globals.plugin_path, "Look for plugins here first; may be repeated", "DIR");
  app.add_option("--threads", globals.threads, "Default: $PYRA_THREADS, else $OMP_NUM_THREADS, else the physical cores")
      ->type_name("N")
      ->check(CLI::Range(1, 4096).description(""))
      ->group(group);
  app.add_flag("--json", globals.json, "One JSON document on stdout and nothing else")->group(group);
  app.add_flag("--quiet", globals.quiet, "No progress on stderr")->group(group);
}

CLI::App* add_command(CLI::App& root, Session& session, const std::string& name, const std::string& description) {
  CLI::App* command = root.add_subcommand(name, description);
  add_common_options(*command, session);
  return command;
}

void write_stdout(std::string_view text) {
  // Not through std::cout: its buffer would lose the reason, and a full disk would only show after main.
  while (!text.empty()) {
    const ssize_t written = ::write(STDOUT_FILENO, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(size_t(written));
    } else if (errno == EPIPE) {
      throw BrokenPipe{};
    } else if (errno != EINTR) {
      fail(ExitCode::output, "stdout cannot be written: ", std::strerror(errno));
    }
  }
}

std::string explain(const CLI::ParseError& error, const CLI::App& root) {
  // A word no one knows is the likelier cause than an operand missing in its place, so it is named first.
  const std::vector<std::string> unknown = root.remaining(true);
  if (unknown.empty()) {
    const std::string text = error.what();
    return text.substr(0, text.find('\n'));
  }
  const CLI::App& app = innermost(root);
  const std::string& word = unknown.front();
  if (word.starts_with("-")) {
    const std::string name = word.substr(0, word.find('='));
    return cat("unknown option '", name, "'", did_you_mean(name, option_names(&app)));
  }
  const std::vector<std::string> commands = subcommand_names(app);
  if (commands.empty()) return cat("unexpected argument '", word, "'");
  return cat("unknown command '", word, "'", did_you_mean(word, commands), " (there are: ", join(commands), ")");
}

std::string printable(std::string_view text) {
  std::string safe;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find_first_of("\n\t", at), text.size());
    safe += pyra::printable(text.substr(at, end - at), end - at);
    if (end < text.size()) safe += text[end];
    at = end + 1;
  }
  return safe;
}

std::string dump(const nlohmann::json& document) {
  return document.dump(1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace pyra::cli
