// From checkpoints to model files: the whole road, and what it refuses.
#include "tasks/convert.h"

#include <ATen/ATen.h>
#include <sys/resource.h>

#include <csignal>

#include "base/progress.h"
#include "goldens.h"
#include "io/io_support.h"
#include "io/model_file.h"
#include "io/pickle_writer.h"
#include "support.h"
#include "tasks/assemble.h"
#include "tasks/confined.h"

using namespace pyra;
using namespace pyra::tasks;
using test::check_error;
namespace fs = std::filesystem;

namespace {

const fs::path kPth = fs::path(PYRA_TEST_DATA) / "pth";

/// What lies in a folder, hidden files too.
std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

at::Tensor logits_of(const fs::path& path, const at::Tensor& images) {
  const at::NoGradGuard no_gradients;
  return load_model(path, test::built_plugins()).vit->forward(images);
}

/// The backbone of the PYRA fixture as timm would write it.
void write_base(const fs::path& path, const test::Golden& golden) {
  const nn::Vit vit = test::golden_model(golden);
  io::write_safetensors(path, vit.weights(), {{"num_heads", "4"}, {"accuracy", "0.9"}});
}

}  // namespace

TEST_CASE("a checkpoint becomes a model file with the same logits", "[convert]") {
  const test::TempDir dir;
  const io::SafetensorsFile expected(kPth / "expected.safetensors");
  const at::Tensor images = expected.tensor("images");
  for (const auto& [file, logits] : std::vector<std::pair<std::string, std::string>>{{"vit_legacy.pth", "vit"},
                                                                                     {"vit_wrapped.pth", "vit"},
                                                                                     {"deit_distilled.pth", "deit"},
                                                                                     {"mae_finetuned.pth", "mae"}}) {
    CAPTURE(file);
    const ConvertReport report =
        convert({.file = kPth / file, .out = dir / "m.safetensors", .num_heads = 2, .base = {}, .set = {}},
                test::built_plugins());
    CHECK(report.num_classes == 5);
    CHECK(report.merge == "dense");
    CHECK(report.file_bytes == fs::file_size(dir / "m.safetensors"));
    CHECK(test::max_difference(logits_of(dir / "m.safetensors", images), expected.tensor(logits)) < 1e-5);
    CHECK(io::read_model(dir / "m.safetensors").provenance.at("converted_from") == file);
    CHECK(names_in(dir.path()) == std::vector<std::string>{"m.safetensors"});
  }
  const ConvertReport npz = convert(
      {.file = kPth / "../npz/augreg.npz", .out = dir / "n.safetensors", .base = {}, .set = {}}, test::built_plugins());
  CHECK(npz.source == "npz");
  CHECK(npz.num_heads == 2);
}

TEST_CASE("a checkpoint of PYRA's authors gives the logits of their program", "[convert][parity]") {
  const test::TempDir dir;
  const test::Golden golden = test::read_golden("vit_pyra_lora");
  write_base(dir / "base.safetensors", golden);
  // The whole under the authors' names, as their program saves it; and from the fixture, what it trained alone.
  sdk::TensorMap whole, trained;
  for (const auto& [name, tensor] : golden.tensors) {
    if (name.starts_with("model.")) whole.emplace(name.substr(6), tensor);
    if (!name.starts_with("peft.")) continue;
    std::string own = name.substr(5);
    for (const auto& [from, to] :
         {std::pair{".lora_a", ".attn.LoRA_a.weight"}, std::pair{".lora_b", ".attn.LoRA_b.weight"}})
      if (own.ends_with(from)) own = own.substr(0, own.size() - std::string_view(from).size()) + to;
    trained.emplace(own, tensor);
  }
  for (const auto& item : trained) whole.insert(item);
  io::write_safetensors(dir / "whole.safetensors", whole);
  io::write_safetensors(dir / "trained.safetensors", trained);

  std::vector<ConvertOptions> cases{
      {.file = dir / "whole.safetensors", .out = dir / "a.out", .num_heads = 4, .base = {}, .set = {}},
      {.file = dir / "trained.safetensors", .out = dir / "b.out", .base = dir / "base.safetensors", .set = {}}};
  if (!std::getenv("PYRA_GOLDENS"))  // the .pth was made of the fixture that lies here
    cases.push_back(
        {.file = kPth / "pyra_trained.pth", .out = dir / "c.out", .base = dir / "base.safetensors", .set = {}});
  for (const ConvertOptions& options : cases) {
    CAPTURE(options.file.string());
    const ConvertReport report = convert(options, test::built_plugins());
    CHECK(report.merge.starts_with("pyra-"));
    CHECK(report.mean.at(0) == Approx(0.485));
    if (!options.base.empty()) {  // whose accuracy is not the new model's
      const auto said = io::read_model(options.out).provenance;
      CHECK(said.at("base") == "base.safetensors");
      CHECK(said.at("base_accuracy") == "0.9");
      CHECK_FALSE(said.contains("accuracy"));
    }
    const at::Tensor got = logits_of(options.out, golden.at("input"));
    CHECK(test::max_difference(got, golden.at("logits")) < 1e-5);
  }
  check_error(ExitCode::usage, {"trained.safetensors", "--base MODEL"}, [&] {
    (void)convert({.file = dir / "trained.safetensors", .out = dir / "x", .base = {}, .set = {}},
                  test::built_plugins());
  });
  check_error(ExitCode::usage, {"vit_zip.pth", "nothing to put on --base"}, [&] {
    (void)convert(
        {.file = kPth / "vit_zip.pth", .out = dir / "x", .num_heads = 2, .base = dir / "base.safetensors", .set = {}},
        test::built_plugins());
  });
  CHECK_FALSE(fs::exists(dir / "x"));
}

TEST_CASE("names say what shapes do not: DeiT's and MAE's statistics, the architecture", "[convert]") {
  const test::TempDir dir;
  nn::VitConfig config = nn::arch_config("deit_tiny_patch16_224");
  config.image_size = 32;
  config.num_classes = 0;
  io::write_safetensors(dir / "w.safetensors", nn::random_weights(config, 1));
  const auto mean_of = [&](const std::string& name, const std::vector<std::string>& set, std::string* arch) {
    fs::copy_file(dir / "w.safetensors", dir / name, fs::copy_options::overwrite_existing);
    const ConvertReport report =
        convert({.file = dir / name, .out = dir / "out", .base = {}, .set = set}, test::built_plugins());
    *arch = report.arch;
    return report.mean.at(0);
  };
  std::string arch;
  CHECK(mean_of("deit_tiny_patch16_224-a1311bcf.pth", {}, &arch) == Approx(0.485));
  CHECK(arch == "deit_tiny_patch16_224");
  CHECK(mean_of("vit_tiny_patch16_224.augreg.pth", {}, &arch) == Approx(0.5));
  CHECK(arch == "vit_tiny_patch16_224");
  CHECK(mean_of("deit_base_patch16_224.pth", {}, &arch) == Approx(0.5));  // a base it is not
  CHECK(arch == "vit_tiny_patch16_32");
  CHECK(mean_of("mae_pretrain_vit_tiny.pth", {}, &arch) == Approx(0.485));
  CHECK(mean_of("deit_tiny_patch16_224.pth", {"preprocess.mean=[0.1,0.2,0.3]"}, &arch) == Approx(0.1));
  CHECK(io::read_model(dir / "out").preprocess.mean[2] == 0.3f);
  check_error(ExitCode::usage, {"preprocess.men", "preprocess.mean"},
              [&] { (void)mean_of("m.pth", {"preprocess.men=1"}, &arch); });
}

TEST_CASE("a hostile checkpoint is an input error, runs nothing and leaves nothing", "[convert]") {
  using namespace test::pickled;
  const test::TempDir dir;
  const std::string marker = (dir / "pwned").string();
  const auto refused = [&](const std::string& bytes, const std::vector<std::string>& words) {
    test::put(dir / "m.pth", bytes);
    check_error(ExitCode::input, words, [&] {
      (void)convert({.file = dir / "m.pth", .out = dir / "out", .base = {}, .set = {}}, test::built_plugins());
    });
    CHECK(names_in(dir.path()) == std::vector<std::string>{"m.pth"});
  };
  refused(archive(proto(global("os", "system") + "(" + text("touch " + marker) + "tR")), {"m.pth", "'os.system'"});
  refused(archive(proto(global("posix", "system") + "(" + text("touch " + marker) + "tR")), {"'posix.system'"});
  refused(archive(proto(dict("w", tensor({})))), {"m.pth", "patch_embed.proj.weight"});
  refused(archive(proto(dict("w", tensor({.elements = 99})))), {"m/data/0"});
  refused("PK\x03\x04 and no more", {"m.pth", "zip"});
  test::put(dir / "m.pth", archive(proto("N")));
  check_error(ExitCode::usage, {"is the file to read"}, [&] {
    (void)convert({.file = dir / "m.pth", .out = dir / "m.pth", .base = {}, .set = {}}, test::built_plugins());
  });
  check_error(ExitCode::output, {"none/out"}, [&] {
    (void)convert({.file = dir / "m.pth", .out = dir / "none/out", .base = {}, .set = {}}, test::built_plugins());
  });
}

TEST_CASE("the confined process has its limits, and its errors are the caller's", "[convert]") {
  const test::TempDir dir;
  const Confinement limits{.memory_bytes = uint64_t{256} << 20, .file_bytes = 1 << 20, .cpu_seconds = 5};
  const auto confined = [&](const std::function<void()>& work) { run_confined(limits, "m.pth", work); };
  confined([&] { test::put(dir / "left", "by the child"); });
  CHECK(test::get(dir / "left") == "by the child");
  check_error(ExitCode::output, {"no room"}, [&] { confined([] { fail(ExitCode::output, "no room"); }); });
  check_error(ExitCode::input, {"m.pth", "more memory"}, [&] { confined([] { (void)at::ones({int64_t{1} << 28}); }); });
  check_error(ExitCode::input, {"m.pth", "more memory"},
              [&] { confined([&] { test::put(dir / "x", std::string(size_t{1} << 30, 'x')); }); });
  check_error(ExitCode::input, {"unpacks to more than"},
              [&] { confined([&] { test::put(dir / "big", std::string(2 << 20, 'x')); }); });
  check_error(ExitCode::internal, {"signal 11"}, [&] {
    confined([] {
      // Sanitizers have a handler of their own, which ends otherwise.
      std::signal(SIGSEGV, SIG_DFL);
      raise(SIGSEGV);
    });
  });
  check_error(ExitCode::internal, {"odd"}, [&] { confined([] { throw std::runtime_error("odd"); }); });
  confined([] {
    rlimit cores{};
    getrlimit(RLIMIT_CORE, &cores);
    std::ifstream status("/proc/self/status");
    const std::string text{std::istreambuf_iterator<char>(status), {}};
    if (cores.rlim_max != 0 || text.find("NoNewPrivs:\t1") == text.npos) fail(ExitCode::input, "not confined");
  });
}
