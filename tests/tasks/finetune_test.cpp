#include "tasks/finetune.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <thread>

#include "tasks/finetune_state.h"
#include "tasks/tiny_task.h"

using namespace pyra;
using test::check_error;
using test::TinyTask;

namespace {

std::vector<nlohmann::json> json_lines(const std::filesystem::path& path) {
  std::vector<nlohmann::json> lines;
  const std::string text = test::get(path);
  for (const std::string& line : split(text, '\n')) {
    if (!line.empty()) lines.push_back(nlohmann::json::parse(line));
  }
  return lines;
}

/// Starts the real program; the caller waits for it.
pid_t start(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), PYRACTL);
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    const int null = open("/dev/null", O_RDWR);
    dup2(null, 0), dup2(null, 1), dup2(null, 2);
    execv(argv[0], argv.data());
    _exit(127);
  }
  return child;
}

int exit_code(int status) {
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/// Sends `signal_number` once the run's metrics have grown by `bytes`; returns the exit code, 0 when the run was done
/// before that.
int run_until(const std::vector<std::string>& arguments, const std::filesystem::path& metrics, uint64_t bytes,
              int signal_number) {
  std::error_code none;
  const auto size = [&] {
    const auto now = std::filesystem::file_size(metrics, none);
    return none ? 0 : uint64_t(now);
  };
  const uint64_t before = size();
  const pid_t child = start(arguments);
  int status = 0;
  bool sent = false;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (!sent && size() >= before + bytes) sent = kill(child, signal_number) == 0;
    if (std::chrono::steady_clock::now() > deadline) kill(child, SIGKILL);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return exit_code(status);
}

}  // namespace

TEST_CASE("fine-tuning leaves a whole run folder and learns the task", "[finetune]") {
  const TinyTask task;
  const auto report = task.finetune("run");
  CHECK(report.accuracy > 0.8);
  CHECK(report.test_images == 15);
  CHECK(report.train_split == "train800val200");
  CHECK(report.test_split == "test");
  CHECK_FALSE(report.test_selected);
  CHECK(report.steps == 36);
  CHECK(report.epochs == 12);
  // LoRA 2 * (32*2 + 96*2), PYRA a 4 + 2, b and norm 3 * 32 a block, head 3 * 33.
  CHECK(report.trained_parameters == 2 * (32 * 2 + 96 * 2) + 4 + 2 + 2 * 3 * 32 + 3 * 33);

  const auto run = task.folder / "run";
  const auto json = nlohmann::json::parse(test::get(run / "report.json"));
  CHECK(json.at("accuracy") == report.accuracy);
  CHECK(json.at("protocol") == "vtab");
  CHECK(json.at("versions").contains("libtorch"));
  const auto resolved = io::read_recipe(run / "run.toml", {});
  CHECK(resolved.train.epochs == 12);
  const auto config = nlohmann::json::parse(test::get(run / "adapter/adapter_config.json"));
  CHECK(config.at("peft_type") == "LORA");
  CHECK(config.at("r") == 2);
  const io::SafetensorsFile adapter(run / "adapter/adapter_model.safetensors");
  CHECK(adapter.contains("base_model.model.blocks.1.attn.qkv.lora_A.weight"));
  CHECK(adapter.contains("base_model.model.head.weight"));
  CHECK(std::filesystem::exists(run / "checkpoint/last.safetensors"));
  CHECK(std::filesystem::exists(run / "checkpoint/previous.safetensors"));
  CHECK(std::filesystem::exists(run / "checkpoint/best.safetensors"));

  const auto lines = json_lines(run / "metrics.jsonl");
  REQUIRE(lines.size() == 13);
  for (size_t i = 0; i < 12; ++i) {
    CHECK(lines[i].at("kind") == "train");
    CHECK(lines[i].at("epoch") == i + 1);
    CHECK(lines[i].at("step") == 3 * (i + 1));
    CHECK(std::isfinite(lines[i].at("loss").get<double>()));
  }
  CHECK(lines[12].at("kind") == "eval");
  CHECK(lines[12].at("accuracy") == report.accuracy);
}

TEST_CASE("the same recipe gives the same bytes, another seed others", "[finetune]") {
  const TinyTask task;
  (void)task.finetune("a", {"train.epochs=2"});
  (void)task.finetune("b", {"train.epochs=2"});
  (void)task.finetune("c", {"train.epochs=2", "seed=6"});
  CHECK(task.adapter_bytes("a") == task.adapter_bytes("b"));
  CHECK(task.adapter_bytes("a") != task.adapter_bytes("c"));
}

TEST_CASE("several learning rates are judged on val200, then the best trains on all", "[finetune]") {
  const TinyTask task;
  const auto report = task.finetune("run", {"train.lr=[1e-6, 0.01]", "train.epochs=8"});
  REQUIRE(report.choices.size() == 2);
  CHECK(report.choices[1].accuracy > report.choices[0].accuracy);
  CHECK(report.lr == 0.01);
  CHECK(report.train_split == "train800val200");
  std::vector<std::string> evaluated;
  for (const auto& line : json_lines(task.folder / "run/metrics.jsonl")) {
    if (line.at("kind") == "eval") evaluated.push_back(line.at("split"));
  }
  CHECK(evaluated == std::vector<std::string>{"val200", "val200", "test"});
  // The training that counts starts from the same tensors as if it were alone.
  (void)task.finetune("alone", {"train.epochs=8"});
  CHECK(task.adapter_bytes("run") == task.adapter_bytes("alone"));
}

TEST_CASE("protocol paper looks at the test split on the way and says so", "[finetune]") {
  const TinyTask task;
  const auto report = task.finetune("run", {"protocol=paper", "train.eval_every=3", "train.epochs=7"});
  CHECK(report.test_selected);
  std::vector<double> accuracies;
  for (const auto& line : json_lines(task.folder / "run/metrics.jsonl")) {
    if (line.at("kind") == "eval") accuracies.push_back(line.at("accuracy"));
  }
  REQUIRE(accuracies.size() == 3);  // epochs 3, 6 and 7
  CHECK(report.accuracy == *std::max_element(accuracies.begin(), accuracies.end()));
  CHECK_THROWS_AS(task.finetune("two", {"protocol=paper", "train.lr=[0.1,0.2]"}), Error);
}

TEST_CASE("a head is kept where it fits and made anew where it does not", "[finetune]") {
  const TinyTask task;
  const auto first_lr = std::vector<std::string>{"train.epochs=1", "train.lr=[1e-12]", "train.warmup_lr=1e-12",
                                                 "train.min_lr=0", "train.weight_decay=0"};
  const auto head = [&](const std::string& run) {
    return io::SafetensorsFile(task.folder / (run + "/adapter/adapter_model.safetensors"))
        .tensor("base_model.model.head.weight");
  };
  const at::Tensor original = nn::random_weights(test::tiny_config(), 3).at("head.weight");
  (void)task.finetune("kept", first_lr);
  CHECK(test::max_difference(head("kept"), original) < 1e-9);
  auto fresh = first_lr;
  fresh.push_back("new_head=true");
  (void)task.finetune("fresh", fresh);
  CHECK(test::max_difference(head("fresh"), original) > 1e-3);

  // Class names that contradict the data's.
  test::put(task.folder / "data/classes.txt", "red\ngreen\nblue\n");
  io::ModelFile file = io::read_model(task.folder / "model.safetensors");
  file.class_names = {"blue", "green", "red"};
  io::write_model(task.folder / "model.safetensors", file);
  (void)task.finetune("named", first_lr);
  CHECK(test::max_difference(head("named"), original) > 1e-3);
  file.class_names = {"red", "green", "blue"};
  io::write_model(task.folder / "model.safetensors", file);
  (void)task.finetune("equal", first_lr);
  CHECK(test::max_difference(head("equal"), original) < 1e-9);
}

TEST_CASE("a run folder that holds something is refused before anything is computed", "[finetune]") {
  const TinyTask task;
  std::filesystem::create_directories(task.folder / "run");
  test::put(task.folder / "run/notes.txt", "mine");
  const auto before = task.listing();
  check_error(ExitCode::usage, {"run", "--resume", "--out"}, [&] { (void)task.finetune("run"); });
  CHECK(task.listing() == before);
}

TEST_CASE("a dry run tells what would be done and writes nothing", "[finetune]") {
  const TinyTask task;
  const auto before = task.listing();
  tasks::FinetuneOptions options{.recipe = task.recipe({"train.lr=[0.1,0.2]"})};
  options.recipe.out = task.folder / "run";
  const auto report = tasks::finetune_dry_run(options, test::built_plugins());
  CHECK(report.tokens == std::vector<int64_t>{17, 13, 11});
  CHECK(report.train_images == 27);
  CHECK(report.test_images == 15);
  CHECK(report.steps == 12 * (2 + 2 + 3));
  CHECK(report.step_seconds > 0);
  CHECK(report.peak_memory_bytes > 1 << 20);
  int64_t trained = 0;
  for (const auto& [group, count] : report.trained) trained += count;
  CHECK(trained == 2 * (32 * 2 + 96 * 2) + 4 + 2 + 2 * 3 * 32 + 3 * 33);
  CHECK(task.listing() == before);
}

TEST_CASE("images that cannot be read are known before training, and are counted once", "[finetune]") {
  const TinyTask task;
  const auto before = [&] {
    test::put(task.folder / "data/images/30.ppm", "no image");
    return task.listing();
  }();
  check_error(ExitCode::input, {"30.ppm", "--bad-images skip"}, [&] { (void)task.finetune("run"); });
  tasks::FinetuneOptions options{.recipe = task.recipe({"train.lr=[0.1,0.2]", "train.epochs=1"})};
  options.recipe.out = task.folder / "run";
  check_error(ExitCode::input, {"30.ppm"}, [&] { (void)tasks::finetune_dry_run(options, test::built_plugins()); });
  CHECK(task.listing() == before);
  // One of the 1000, which trials and the last training both load, and one of the test images.
  test::put(task.folder / "data/images/20.ppm", "no image");
  options.bad_images = data::BadImages::skip;
  const auto report = tasks::finetune(options, test::built_plugins());
  CHECK(report.skipped_images == 2);
  CHECK(report.test_images == 14);
  CHECK(report.peak_memory_bytes > 1 << 20);
}

TEST_CASE("a diverging run stops with exit 7 and keeps its last good checkpoint", "[finetune]") {
  const TinyTask task;
  const auto diverge = [&] { (void)task.finetune("run", {"train.lr=[1e30]", "train.warmup_epochs=0"}); };
  check_error(ExitCode::untrusted, {"step", "learning rate 1e+30", "checkpoint", "run"}, diverge);
  const io::SafetensorsFile last(task.folder / "run/checkpoint/last.safetensors");
  for (const auto& [name, tensor] : last.tensors()) {
    CAPTURE(name);
    CHECK(tensor.isfinite().all().item<bool>());
  }
  CHECK_FALSE(std::filesystem::exists(task.folder / "run/adapter"));
  CHECK_FALSE(std::filesystem::exists(task.folder / "run/report.json"));
}

TEST_CASE("a recipe that makes no sense is refused by its key", "[finetune]") {
  const TinyTask task;
  const auto refused = [&](const std::string& set, const std::string& word) {
    CAPTURE(set);
    check_error(ExitCode::usage, {word}, [&] { (void)task.finetune("run", {set}); });
    CHECK_FALSE(std::filesystem::exists(task.folder / "run"));
  };
  refused("train.batch=0", "train.batch");
  refused("train.epochs=0", "train.epochs");
  refused("train.lr=[]", "train.lr");
  refused("train.lr=[-1.0]", "train.lr");
  refused("protocol=guess", "protocol");
  refused("merge.schedule=\"\"", "schedule");
  refused("peft.rank=-1", "rank");
}

TEST_CASE("a continuation with another recipe, model or data set is refused", "[finetune]") {
  const TinyTask task;
  (void)task.finetune("run", {"train.epochs=2"});
  const auto resume = [&](std::vector<std::string> set) {
    set.push_back("train.epochs=2");
    return [&task, set] { (void)task.finetune("run", set, true); };
  };
  const std::string adapter = task.adapter_bytes("run");
  check_error(ExitCode::usage, {"train.batch", "was 8", "now it is 4"}, resume({"train.batch=4"}));
  check_error(ExitCode::usage, {"peft.rank"}, resume({"peft.rank=3"}));
  check_error(ExitCode::usage, {"seed"}, resume({"seed=1"}));
  resume({"train.checkpoint_every=1"})();  // how often a run is saved changes nothing
  CHECK(task.adapter_bytes("run") == adapter);

  test::put(task.folder / "data/images/3.ppm", test::tiny_image(999, 0));
  check_error(ExitCode::usage, {"training images or labels"}, resume({}));
  test::put(task.folder / "data/images/3.ppm", test::tiny_image(3, 0));
  resume({})();
  auto weights = nn::random_weights(test::tiny_config(), 4);
  io::ModelFile other = io::read_model(task.folder / "model.safetensors");
  other.weights = weights;
  io::write_model(task.folder / "model.safetensors", other);
  check_error(ExitCode::usage, {"base model"}, resume({}));
  other = io::read_model(task.folder / "model.safetensors");
  other.weights = nn::random_weights(test::tiny_config(), 3);
  other.preprocess.mean = {0.1f, 0.2f, 0.3f};
  io::write_model(task.folder / "model.safetensors", other);
  check_error(ExitCode::usage, {"base model", "mean 0.1"}, resume({}));
}

TEST_CASE("a finished run that is resumed gives the same result again", "[finetune]") {
  const TinyTask task;
  const auto first = task.finetune("run", {"train.epochs=2", "protocol=paper", "train.eval_every=1"});
  const std::string bytes = task.adapter_bytes("run");
  const auto lines = json_lines(task.folder / "run/metrics.jsonl").size();
  const auto again = task.finetune("run", {"train.epochs=2", "protocol=paper", "train.eval_every=1"}, true);
  CHECK(again.accuracy == first.accuracy);
  CHECK(again.resumed);
  CHECK(task.adapter_bytes("run") == bytes);
  CHECK(json_lines(task.folder / "run/metrics.jsonl").size() == lines);
}

TEST_CASE("recipes are compared key by key", "[finetune]") {
  const auto keys = tasks::flatten_toml("a = 1\n[train]\nlr = [0.1, 2]\n[peft]\nname = 'x'\n");
  CHECK(keys.size() == 3);
  CHECK(keys.at("a") == "1");
  CHECK(keys.contains("train.lr"));
  CHECK(keys.contains("peft.name"));
}

TEST_CASE("a run killed twenty times ends with the bytes of an unbroken one", "[finetune]") {
  const TinyTask task;
  // One thread: two runs side by side would wait for each other's at every step.
  const std::vector<std::string> set{
      "--threads",           "1", "--set", "train.epochs=400", "--set", "train.checkpoint_every=2", "--set",
      "train.lr=[1e-4,1e-3]"};
  const auto arguments = [&](const std::string& run, bool resume) {
    std::vector<std::string> all{"finetune", "--recipe", task.recipe_file().string(), "--out",
                                 (task.folder / run).string()};
    all.insert(all.end(), set.begin(), set.end());
    if (resume) all.emplace_back("--resume");
    return all;
  };
  const auto unbroken = test::pyractl(arguments("unbroken", false));
  INFO(unbroken.err);
  REQUIRE(unbroken.exit_code == 0);

  const auto metrics = task.folder / "broken/metrics.jsonl";
  const Philox random(uint64_t(std::chrono::steady_clock::now().time_since_epoch().count()), RandomStream::verify);
  int kills = 0, code = -1;
  for (uint64_t attempt = 0; code != 0 && attempt < 40; ++attempt) {
    // An epoch's line is about 200 bytes; twenty pieces of at most 60 epochs fit in 1200 of them.
    const uint64_t bytes = kills < 20 ? 1 + random.below(attempt, 60 * 200) : UINT64_MAX / 2;
    code = run_until(arguments("broken", attempt > 0), metrics, bytes, SIGKILL);
    REQUIRE((code == 0 || code == 128 + SIGKILL));
    kills += code != 0;
  }
  CHECK(kills == 20);
  CHECK(task.adapter_bytes("broken") == task.adapter_bytes("unbroken"));
  const auto whole = json_lines(task.folder / "unbroken/metrics.jsonl"), pieces = json_lines(metrics);
  REQUIRE(pieces.size() == whole.size());
  for (size_t i = 0; i < whole.size(); ++i) {
    CHECK(pieces[i].at("step") == whole[i].at("step"));
    CHECK(pieces[i].at("accuracy") == whole[i].at("accuracy"));
    if (whole[i].contains("loss")) CHECK(pieces[i].at("loss") == whole[i].at("loss"));
  }
}

TEST_CASE("ctrl-C and SIGTERM save within a step and name the command that goes on", "[finetune]") {
  const TinyTask task;
  const auto run = (task.folder / "run").string();
  const std::vector<std::string> first{"finetune", "--recipe", task.recipe_file().string(), "--out", run, "--threads",
                                       "1",        "--set",    "train.epochs=400"};
  const auto metrics = task.folder / "run/metrics.jsonl";
  CHECK(run_until(first, metrics, 200, SIGINT) == 130);
  const auto stopped = json_lines(metrics).size();
  CHECK(stopped < 400);
  const std::vector<std::string> again{"finetune", "--out", run, "--resume", "--threads", "1", "--json"};
  CHECK(run_until(again, metrics, 200, SIGTERM) == 143);
  CHECK(json_lines(metrics).size() > stopped);
  const auto rest = test::pyractl(again);
  INFO(rest.err);
  REQUIRE(rest.exit_code == 0);
  CHECK(nlohmann::json::parse(rest.out).at("steps") == 1200);

  auto unbroken = first;
  unbroken[4] = (task.folder / "unbroken").string();
  REQUIRE(test::pyractl(unbroken).exit_code == 0);
  CHECK(task.adapter_bytes("run") == task.adapter_bytes("unbroken"));
}

TEST_CASE("a schedule that names its goal becomes counts before training, and stays what it became", "[finetune]") {
  const TinyTask task;
  const auto report = task.finetune("run", {"merge.schedule=macs:0.8", "train.epochs=2"});
  const io::Recipe resolved = io::read_recipe(task.folder / "run/run.toml", {});
  CHECK(resolved.schedule.find(',') != std::string::npos);
  const double dense = double(nn::count_macs(test::tiny_config()));
  CHECK(double(report.macs) <= 0.8 * dense);
  CHECK(double(report.macs) > 0.65 * dense);  // 17 tokens, two blocks: one is worth a lot
  // Asked for the goal again, a resumed run keeps its counts.
  CHECK(task.finetune("run", {"merge.schedule=macs:0.8", "train.epochs=2"}, true).merge == report.merge);
  check_error(ExitCode::usage, {"macs:"}, [&] { (void)task.finetune("no", {"merge.schedule=macs:none"}); });
  check_error(ExitCode::usage, {"merge.name"}, [&] {
    (void)task.finetune("no", {"merge.name=none", "merge.schedule=macs:0.8"});
  });
}
