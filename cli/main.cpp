// pyractl: reads the command line, runs one subcommand, and turns whatever it throws into one line and an exit code.
#include <c10/util/Exception.h>
#include <malloc.h>
#include <unistd.h>

#include <csignal>
#include <exception>
#include <iostream>
#include <new>

#include "base/error.h"
#include "base/no_memory.h"
#include "command.h"
#include "tasks/machine.h"

namespace pyra::cli {
namespace {

constexpr const char* kFooter = R"(
A first round, with the small model and task that `make demo` uses:
  pyractl doctor                                          what this machine offers
  pyractl inspect MODEL.safetensors                       what a file is
  pyractl data check TASK.tar                             whether the images are sound
  pyractl eval MODEL.safetensors --data TASK.tar          accuracy and speed
  pyractl compress MODEL.safetensors --merge tome --schedule high --out FAST.safetensors
  pyractl finetune --recipe R.toml --model MODEL.safetensors --data TASK.tar --out runs/first
  pyractl merge-lora runs/first --out TUNED.safetensors

`pyractl COMMAND --help` shows a command's options and examples.
Exit codes: 0 ok, 1 internal error, 2 usage or recipe, 3 input file, 4 plugin, 5 regression found, 6 device or memory,
7 result not trusted, 8 inconclusive, 9 output cannot be written, 130 and 143 interrupted and terminated.
With --json a failure prints {"error": {"code": N, "message": "..."}} on stdout besides the line on stderr.)";

extern "C" void on_signal(int number) {
  // The first asks for a tidy end, which long loops look for; whoever sends a second does not want to wait.
  if (pyra::pending_signal() != 0) _exit(128 + number);
  pyra::raise_pending_signal(number);
}

void install_signal_handlers() {
  struct sigaction ask {};
  ask.sa_handler = on_signal;  // no SA_RESTART: a read of a terminal or a pipe has to notice
  sigaction(SIGINT, &ask, nullptr);
  sigaction(SIGTERM, &ask, nullptr);
  // A reader that leaves early (`| head`) shows as EPIPE, so files being written are still cleaned up.
  std::signal(SIGPIPE, SIG_IGN);
}

void keep_memory() {
  // Activations of some megabytes come and go at every step. By default glibc maps each afresh and gives it back,
  // and the kernel then zeroes every page again: up to a fifth of a forward's time. Keep them in the heap instead.
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);
}

/// What main has to know to report an error; kept outside of what the error unwinds.
struct Invocation {
  std::string command = "pyractl";
  bool json = false;
};

int run(int argc, char** argv, Invocation& invocation) {
  Session session;
  CLI::App root("Adapt, shrink and run vision transformers: parameter-efficient fine-tuning with token merging.",
                "pyractl");
  root.set_version_flag(
      "--version", [] { return tasks::version_text(); }, "Versions of pyractl, its SDK and LibTorch");
  root.footer(kFooter);
  root.require_subcommand(1);
  add_common_options(root, session);
  add_finetune(root, session);
  add_merge_lora(root, session);
  add_convert(root, session);
  add_compress(root, session);
  add_eval(root, session);
  add_predict(root, session);
  add_report(root, session);
  add_bench(root, session);
  add_inspect(root, session);
  add_data(root, session);
  add_plugins(root, session);
  add_doctor(root, session);

  if (argc == 1) {
    std::cerr << root.help();
    return int(ExitCode::usage);
  }
  const auto name_command = [&] {
    const auto chosen = root.get_subcommands();
    if (!chosen.empty()) invocation.command = "pyractl " + chosen.front()->get_name();
  };
  try {
    root.parse(argc, argv);
    name_command();
  } catch (const CLI::CallForHelp&) {
    write_stdout(root.help());
    return 0;
  } catch (const CLI::CallForVersion& version) {
    write_stdout(cat(version.what(), "\n"));
    return 0;
  } catch (const CLI::ParseError& error) {
    // Turned into our own error here, where the app that can name what it does know still lives.
    name_command();
    fail(ExitCode::usage, explain(error, root), " (see ", invocation.command, " --help)");
  }
  tasks::set_threads(session.globals.threads);
  return session.action();
}

int report(const Invocation& invocation, int code, const std::string& text) {
  std::cerr << invocation.command << ": " << printable(text) << std::endl;
  if (invocation.json) {
    try {
      write_stdout(dump({{"error", {{"code", code}, {"message", text}}}}) + "\n");
    } catch (...) {
      // stdout is what failed; stderr has said it.
    }
  }
  return code;
}

int main(int argc, char** argv) {
  keep_memory();
  install_signal_handlers();
  Invocation invocation;
  for (int i = 1; i < argc; ++i) invocation.json |= std::string_view(argv[i]) == "--json";
  constexpr const char* kNoMemory = "out of memory; a smaller --batch or image size needs less";
  try {
    return run(argc, argv, invocation);
  } catch (const BrokenPipe&) {
    return 128 + SIGPIPE;
  } catch (const Error& error) {
    return report(invocation, int(error.code()), error.what());
  } catch (const c10::Error& error) {
    if (means_no_memory(error)) return report(invocation, int(ExitCode::device), kNoMemory);
    return report(invocation, int(ExitCode::internal),
                  cat("internal error, please report it: ", error.what_without_backtrace()));
  } catch (const std::bad_alloc&) {
    return report(invocation, int(ExitCode::device), kNoMemory);
  } catch (const std::exception& error) {
    return report(invocation, int(ExitCode::internal), cat("internal error, please report it: ", error.what()));
  } catch (...) {
    return report(invocation, int(ExitCode::internal), "internal error of unknown type, please report it");
  }
}

}  // namespace
}  // namespace pyra::cli

int main(int argc, char** argv) {
  return pyra::cli::main(argc, argv);
}
