// What every subcommand shares: help, version, the common options, errors as text and as JSON, stdout that fails.
#include <pty.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fixtures.h"

using namespace pyra;
using namespace pyra::test;

namespace {

/// A shell line, for redirections; its status as the shell saw it.
RunResult shell(const std::string& line, const std::filesystem::path& folder) {
  return run({"/bin/bash", "-c", line}, folder);
}

/// The program on a terminal of `columns`: everything it wrote there, and its exit code.
std::pair<std::string, int> on_terminal(const std::string& line, const std::filesystem::path& folder,
                                        unsigned short columns) {
  const std::vector<std::string> arguments = words(line);
  winsize size{.ws_row = 24, .ws_col = columns, .ws_xpixel = 0, .ws_ypixel = 0};
  int terminal = -1;
  const pid_t child = forkpty(&terminal, nullptr, nullptr, &size);
  REQUIRE(child >= 0);
  if (child == 0) {
    setenv("TERM", "xterm", 1);
    std::vector<char*> argv{const_cast<char*>(PYRACTL)};
    for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
    argv.push_back(nullptr);
    if (chdir(folder.c_str()) == 0) execv(argv[0], argv.data());
    _exit(127);
  }
  std::string seen;
  char buffer[4096];
  for (ssize_t count = 0; (count = read(terminal, buffer, sizeof buffer)) > 0;) seen.append(buffer, size_t(count));
  int status = 0;
  waitpid(child, &status, 0);
  close(terminal);
  return {seen, WIFEXITED(status) ? WEXITSTATUS(status) : -1};
}

}  // namespace

TEST_CASE("help and version go to stdout and exit with 0") {
  const RunResult help = pyractl({"--help"});
  CHECK(help.exit_code == 0);
  CHECK(help.err.empty());
  for (const std::string command :
       {"compress", "convert", "doctor", "eval", "inspect", "plugins", "predict", "report"}) {
    const RunResult own = pyractl({command, "--help"});
    CAPTURE(command, own.out);
    CHECK(help.out.find("\n  " + command + " ") != std::string::npos);
    CHECK(own.exit_code == 0);
    CHECK(own.out.find("--plugin-path") != std::string::npos);
    CHECK(own.out.find("--json") != std::string::npos);
  }
  const RunResult version = pyractl({"--version"});
  CHECK(version.exit_code == 0);
  CHECK(version.out.find("pyra-sdk ") != std::string::npos);
  CHECK(version.out.find("LibTorch 2.") != std::string::npos);
}

TEST_CASE("a wrong command line is exit 2, one line, and the nearest name") {
  const Workshop shop;
  for (const Refusal& refusal : std::vector<Refusal>{
           {"evla model.safetensors --data task", 2, {"unknown command 'evla'", "did you mean 'eval'"}},
           {"eval model.safetensors --dta task", 2, {"pyractl eval:", "unknown option '--dta'", "'--data'"}},
           {"eval model.safetensors --data=task --jsn", 2, {"'--jsn'", "did you mean '--json'"}},
           {"eval --data task", 2, {"MODEL is required"}},
           {"eval model.safetensors", 2, {"--data is required"}},
           {"eval model.safetensors task2 --data task", 2, {"unexpected argument 'task2'"}},
           {"eval model.safetensors --data task --batch none", 2, {"--batch"}},
           {"eval model.safetensors --data task --batch 0", 2, {"--batch"}},
           {"eval model.safetensors --data task --bad-images ignore", 2, {"--bad-images", "skip"}},
           {"eval model.safetensors --data task --dtype fp31", 2, {"--dtype", "bf16"}},
           {"eval model.safetensors --data task --dtype fp16", 2, {"fp16", "fp32"}},
           {"eval model.safetensors --data task --device gpu", 2, {"--device gpu", "cuda"}},
           {"eval model.safetensors --data task --device cuda:99", 6, {"--device cuda:99"}},
           {"eval model.safetensors --data task --threads 0", 2, {"--threads"}},
           {"predict model.safetensors", 2, {"IMAGE is required"}},
           {"predict model.safetensors task/images/0.ppm --top 0", 2, {"--top"}},
           {"predict model.safetensors task/images/0.ppm --topp 3", 2, {"'--topp'", "'--top'"}},
           {"compress model.safetensors --schedule high --out x.safetensors", 2, {"--merge is required"}},
           {"compress model.safetensors --merge tome --schedule high", 2, {"--out is required"}},
           {"compress model.safetensors --merge tome --out x.safetensors", 2, {"--schedule", "--target-macs"}},
           {"compress model.safetensors --merge tome --shedule 1 --out x", 2, {"did you mean '--schedule'"}},
           {"inspect", 2, {"a file or --arch NAME"}},
           {"inspect model.safetensors --all", 2, {"unknown option '--all'"}},
           {"plugins lst", 2, {"'lst'", "did you mean 'list'"}},
           {"plugins info", 2, {"NAME is required"}},
           {"plugins new merge", 2, {"NAME is required"}},
           {"doctor --fast", 2, {"unknown option '--fast'"}},
       })
    check_refusal(shop, refusal);
  check_json_refusal(shop, "eval model.safetensors --dta task", 2);
}

TEST_CASE("without a word there is help on stderr, and exit 2") {
  const RunResult result = pyractl({});
  CHECK(result.exit_code == 2);
  CHECK(result.out.empty());
  CHECK(result.err.find("compress") != std::string::npos);
}

TEST_CASE("an unknown --set key names the key that was meant") {
  const Workshop shop;
  const std::string eval = "eval model.safetensors --data task --set ";
  for (const Refusal& refusal : std::vector<Refusal>{
           {eval + "preproces.size=32", 2, {"'preproces.size'", "'preprocess.size'"}},
           {eval + "preprocess.size", 2, {"preprocess.size", "key=value"}},
           {eval + "train.lr=1", 2, {"'train.lr'"}},
           {"predict model.safetensors task/images --set preprocess.sized=16", 2, {"'preprocess.size'"}},
           {eval + "merge.schedule=high", 2, {"merge.name"}},
           {eval + "merge.name=tome", 2, {"merge.schedule"}},
           {eval + "merge.name=tom --set merge.schedule=high", 4, {"tome"}},
           {eval + "merge.name=tome --set merge.schedule=hihg", 2, {"'hihg'"}},
           {eval + "merge.name=tome --set merge.schedule=1 --set merge.colour=red", 2, {"colour"}},
           {eval + "merge.name=pyra --set merge.schedule=high", 2, {"pyra", "finetune"}},
       })
    check_refusal(shop, refusal);
}

TEST_CASE("the common options may stand before the command and may be repeated") {
  const Workshop shop;
  const auto first = json_of(shop, "--threads 1 eval model.safetensors --data task --dtype fp32");
  const auto last = json_of(shop, "eval model.safetensors --dtype fp32 --data task --threads 2");
  CHECK(first["loss"] == last["loss"]);
  const auto merged = json_of(shop,
                              "--set merge.name=tome eval --set merge.schedule=2 model.safetensors --data task "
                              "--set merge.proportional_attention=false");
  CHECK(merged["merge"] == "tome-2");
  CHECK(merged["macs"] < first["macs"]);
}

TEST_CASE("the number of threads comes from --threads, PYRA_THREADS, or the machine") {
  const Workshop shop;
  CHECK(json_of(shop, "doctor --threads 3")["threads"] == 3);
  const auto threads = [&](const std::string& variables) {
    const RunResult result = shell(variables + " " PYRACTL " doctor --json", shop.path());
    CAPTURE(result.err);
    REQUIRE(result.exit_code == 0);
    return nlohmann::json::parse(result.out)["threads"].get<int>();
  };
  CHECK(threads("PYRA_THREADS=3 OMP_NUM_THREADS=2") == 3);
  CHECK(threads("OMP_NUM_THREADS=2") == 2);
  const RunResult bad = shell("PYRA_THREADS=many " PYRACTL " doctor", shop.path());
  CHECK(bad.exit_code == 2);
  CHECK(bad.err.find("PYRA_THREADS is 'many'") != std::string::npos);
}

TEST_CASE("a stdout that cannot be written is exit 9, a reader that left is not worth a word") {
  const Workshop shop;
  const RunResult full = shell(PYRACTL " inspect model.safetensors >/dev/full", shop.path());
  CHECK(full.exit_code == 9);
  CHECK(full.err.find("stdout cannot be written") != std::string::npos);
  CHECK(std::count(full.err.begin(), full.err.end(), '\n') == 1);
  CHECK(shell(PYRACTL " --help >/dev/full", shop.path()).exit_code == 9);
  // The reading end is closed before the program is started, so nobody can be quicker.
  const RunResult gone = shell("mkfifo p; exec 3<>p 4>p 3<&-; " PYRACTL " inspect model.safetensors >&4", shop.path());
  CHECK(gone.exit_code == 141);
  CHECK(gone.err.empty());
}

TEST_CASE("names from outside cannot steer the terminal") {
  const Workshop shop;
  const RunResult result = pyractl({"inspect", "no\x1b[31msuch file"}, shop.path());
  CHECK(result.exit_code == 3);
  CHECK(result.err.find("such file") != std::string::npos);
  CHECK(result.err.find('\x1b') == std::string::npos);
  const RunResult one = pyractl({"inspect",
                                 "no\xc2\x9b"
                                 "31msuch file\xc3\xa9"},
                                shop.path());
  CHECK(one.err.find("no\\xc2\\x9b31msuch file\xc3\xa9") != std::string::npos);
}

TEST_CASE("progress: a bar on a terminal, lines elsewhere, nothing with --quiet") {
  const Workshop shop;
  const std::string line = "eval model.safetensors --data task --batch 1 --dtype fp32";
  const auto [wide, wide_code] = on_terminal(line, shop.path(), 120);
  CAPTURE(wide);
  CHECK(wide_code == 0);
  CHECK(wide.find("\r\x1b[K") != std::string::npos);
  CHECK(wide.find("6/6 images") != std::string::npos);
  CHECK(wide.find("top-1") != std::string::npos);

  const auto [narrow, narrow_code] = on_terminal(line, shop.path(), 24);
  CAPTURE(narrow);
  CHECK(narrow_code == 0);
  size_t drawn = 0;
  for (size_t at = 0; (at = narrow.find("\r\x1b[K", at)) != std::string::npos; ++at, ++drawn) {
    const size_t begin = at + 4, end = narrow.find_first_of("\r\n", begin);
    CHECK(end - begin < 24);
  }
  CHECK(drawn > 0);
  CHECK(on_terminal(line + " --quiet", shop.path(), 80).first.find('\x1b') == std::string::npos);

  const RunResult piped = in(shop, line);
  CHECK(piped.err.find('\r') == std::string::npos);
  CHECK(piped.err.find("eval  6/6 images") != std::string::npos);
}
