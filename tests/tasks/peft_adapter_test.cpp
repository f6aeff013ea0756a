// Adapters both ways: what peft wrote merged, a run's LoRA written for peft.
#include "tasks/peft_adapter.h"

#include "io/json.h"
#include "io/peft_adapter.h"
#include "tasks/merge_lora.h"
#include "tasks/tiny_task.h"

using namespace pyra;
using test::check_error;
using test::TinyTask;
namespace fs = std::filesystem;

namespace {

const fs::path kData = PYRA_TEST_DATA;

struct Fixture {
  const char* adapter;
  const char* base;
  int64_t classes;
};
constexpr Fixture kFixtures[] = {{"timm_qkv", "peft/timm_base.safetensors", 3},
                                 {"timm_bias_all", "peft/timm_base.safetensors", 3},
                                 {"timm_patterns", "peft/timm_base.safetensors", 5},
                                 {"timm_lora_only", "peft/timm_base.safetensors", 5},
                                 {"hf_qv", "hf/vit", 4},
                                 {"hf_all_linear", "hf/vit", 3},
                                 {"hf_layers", "hf/vit", 3},
                                 {"hf4_qv", "hf/vit", 4},
                                 {"hf4_dense", "hf/vit", 3},
                                 {"deit_qv", "hf/deit", 3}};

tasks::MergeLoraReport merge(const fs::path& run, const fs::path& model, const fs::path& out,
                             const std::string& format = "pyra", bool drop_merge = false) {
  return tasks::merge_lora({.run = run, .model = model, .out = out, .format = format, .drop_merge = drop_merge},
                           test::built_plugins());
}

at::Tensor logits_of(const nn::Vit& vit, const at::Tensor& images) {
  const at::NoGradGuard no_gradients;
  return vit.forward(images);
}

void check_same_weights(const fs::path& a, const fs::path& b) {
  const auto first = io::read_model(a), second = io::read_model(b);
  CHECK(first.config == second.config);
  CHECK(first.class_names == second.class_names);
  REQUIRE(first.weights.size() == second.weights.size());
  for (const auto& [name, tensor] : first.weights) {
    CAPTURE(name);
    CHECK(test::max_difference(tensor, second.weights.at(name)) < 1e-6);
  }
}

std::vector<std::string> names_in(const fs::path& folder, const std::string& key) {
  return io::read_json(folder / io::kPeftConfig).at(key).get<std::vector<std::string>>();
}

}  // namespace

TEST_CASE("adapters that peft wrote give its logits, beside the layers and merged", "[peft]") {
  const at::Tensor images = io::SafetensorsFile(kData / "hf/expected.safetensors").tensor("images");
  for (const Fixture& fixture : kFixtures) {
    CAPTURE(fixture.adapter);
    const test::TempDir dir;
    const fs::path adapter = kData / "peft" / fixture.adapter, base = kData / fixture.base;
    const at::Tensor expected = io::SafetensorsFile(adapter / "expected.safetensors").tensor("logits");
    const tasks::Model beside = tasks::open_peft_adapter(adapter, base, test::built_plugins());
    CHECK(test::max_difference(logits_of(*beside.vit, images), expected) < 1e-5);
    const auto report = merge(adapter, base, dir / "merged.safetensors");
    CHECK(report.peft == "lora");
    CHECK(report.verification.relative() < 1e-5);
    const tasks::Model merged = tasks::load_model(dir / "merged.safetensors", test::built_plugins());
    CHECK(merged.file.config.num_classes == fixture.classes);
    CHECK(test::max_difference(logits_of(*merged.vit, images), expected) < 1e-5);
    (void)merge(adapter, base, dir / "hf", "hf");
    CHECK(test::max_difference(logits_of(*tasks::load_model(dir / "hf", test::built_plugins()).vit, images), expected) <
          1e-5);
  }
}

TEST_CASE("class names stay where the classes stay", "[peft]") {
  const auto names = [](const char* adapter) {
    return tasks::open_peft_adapter(kData / "peft" / adapter, kData / "hf/vit", test::built_plugins())
        .file.class_names.size();
  };
  CHECK(names("hf_layers") == 3);  // its head has the base's number of classes
  CHECK(names("hf4_dense") == 3);  // it brings no head
  CHECK(names("hf_qv") == 0);      // four classes that no one named
}

TEST_CASE("the adapter of a run merges as the run does", "[peft]") {
  const TinyTask task;
  test::put(task.folder / "data/classes.txt", "red\ngreen\nblue\n");
  const fs::path base = task.folder / "model.safetensors";
  SECTION("dense") {
    (void)task.finetune("run", {"merge.name=none", "peft.alpha=3", "peft.targets=[\"q\", \"v\", \"fc1\"]"});
    (void)merge(task.folder / "run", {}, task.folder / "a.safetensors");
    (void)merge(task.folder / "run/adapter", base, task.folder / "b.safetensors");
  }
  SECTION("PYRA, left out") {
    (void)task.finetune("run");
    check_error(ExitCode::usage, {"merge.safetensors", "run folder", "--drop-merge"},
                [&] { (void)merge(task.folder / "run/adapter", base, task.folder / "b.safetensors"); });
    (void)merge(task.folder / "run", {}, task.folder / "a.safetensors", "pyra", true);
    (void)merge(task.folder / "run/adapter", base, task.folder / "b.safetensors", "pyra", true);
  }
  check_same_weights(task.folder / "a.safetensors", task.folder / "b.safetensors");
  // Another base model is no base of it.
  io::ModelFile other = io::read_model(base);
  other.weights["cls_token"] = other.weights.at("cls_token") + 1;
  io::write_model(task.folder / "other.safetensors", other);
  check_error(ExitCode::input, {"adapter", "another base model", "other.safetensors"}, [&] {
    (void)merge(task.folder / "run/adapter", task.folder / "other.safetensors", task.folder / "c.safetensors", "pyra",
                true);
  });
  CHECK_FALSE(fs::exists(task.folder / "c.safetensors"));
}

TEST_CASE("a run's LoRA is written for peft and read back the same", "[peft]") {
  const TinyTask task;
  const fs::path base = task.folder / "model.safetensors";
  struct Row {
    const char* targets;
    std::vector<std::string> timm, hf, hf4;
  };
  const Row row = GENERATE(
      Row{R"(["qkv"])", {"qkv"}, {"k_proj", "q_proj", "v_proj"}, {"key", "query", "value"}},
      Row{R"(["q", "v"])", {"qkv"}, {"q_proj", "v_proj"}, {"query", "value"}},
      Row{R"(["proj", "k"])",
          {"attn.proj", "attn.qkv"},
          {"k_proj", "o_proj"},
          {"vit.encoder.layer.0.attention.attention.key", "vit.encoder.layer.0.attention.output.dense",
           "vit.encoder.layer.1.attention.attention.key", "vit.encoder.layer.1.attention.output.dense"}},
      Row{R"(["fc2"])", {"fc2"}, {"fc2"}, {"vit.encoder.layer.0.output.dense", "vit.encoder.layer.1.output.dense"}});
  CAPTURE(row.targets);
  (void)task.finetune("run", {"merge.name=none", "train.epochs=3", "peft.alpha=3", "peft.rslora=true",
                              std::string("peft.targets=") + row.targets});
  (void)merge(task.folder / "run", {}, task.folder / "direct.safetensors");
  for (const char* format : {"peft", "peft-hf", "peft-hf4"}) {
    CAPTURE(format);
    const fs::path folder = task.folder / format, merged = task.folder / (std::string(format) + ".safetensors");
    const auto report = merge(task.folder / "run", {}, folder, format);
    CHECK(report.verification.largest_logit > 0);
    CHECK(report.verification.relative() < 1e-5);
    (void)merge(folder, base, merged);
    check_same_weights(task.folder / "direct.safetensors", merged);
    check_error(ExitCode::usage, {format, "already"}, [&] { (void)merge(task.folder / "run", {}, folder, format); });
  }
  CHECK(names_in(task.folder / "peft", "target_modules") == row.timm);
  CHECK(names_in(task.folder / "peft-hf", "target_modules") == row.hf);
  CHECK(names_in(task.folder / "peft-hf", "modules_to_save") == std::vector<std::string>{"classifier"});
  CHECK(names_in(task.folder / "peft-hf4", "target_modules") == row.hf4);
  for (const auto& name : task.listing()) CHECK(name.find("unverified") == std::string::npos);
}

TEST_CASE("LoRA beside register tokens or LayerScale leaves as far as peft can say it", "[peft]") {
  const TinyTask task;
  nn::VitConfig config = test::tiny_config();
  config.registers = 2;
  config.layer_scale = true;
  io::write_model(task.folder / "model.safetensors", {.config = config,
                                                      .preprocess = {.size = 16},
                                                      .class_names = {},
                                                      .merge = {},
                                                      .weights = nn::random_weights(config, 3),
                                                      .provenance = {}});
  (void)task.finetune("qkv", {"train.epochs=1", "merge.name=none"});
  (void)task.finetune("fc2", {"train.epochs=1", "merge.name=none", R"(peft.targets=["fc2"])"});
  CHECK(merge(task.folder / "qkv", {}, task.folder / "peft", "peft").verification.relative() < 1e-5);
  for (const char* run : {"qkv", "fc2"})
    check_error(ExitCode::usage, {"register tokens", "--format peft"},
                [&] { (void)merge(task.folder / run, {}, task.folder / "out", "peft-hf"); });
  check_error(ExitCode::usage, {"LayerScale", "fc2"},
              [&] { (void)merge(task.folder / "fc2", {}, task.folder / "out", "peft"); });
}

TEST_CASE("what an adapter cannot say is refused before anything is written", "[peft]") {
  const TinyTask task;
  const fs::path run = task.folder / "run", adapter = run / "adapter", base = task.folder / "model.safetensors";
  (void)task.finetune("run", {"train.epochs=1"});
  (void)task.finetune("biases", {"train.epochs=1", "merge.name=none", "peft.name=bitfit"});
  const auto listing = task.listing();
  const auto refuses = [&](ExitCode code, const tasks::MergeLoraOptions& options,
                           const std::vector<std::string>& words) {
    check_error(code, words, [&] { (void)tasks::merge_lora(options, test::built_plugins()); });
    CHECK(task.listing() == listing);
  };
  const fs::path out = task.folder / "out";
  for (const char* format : {"peft", "peft-hf", "peft-hf4"})
    refuses(ExitCode::usage, {.run = run, .model = {}, .out = out, .format = format},
            {"pyra-4,2", format, "--drop-merge"});
  for (const char* format : {"peft", "peft-hf"})
    refuses(ExitCode::usage, {.run = task.folder / "biases", .model = {}, .out = out, .format = format},
            {"bitfit", "no LoRA"});
  refuses(ExitCode::usage, {.run = run, .model = {}, .out = out, .format = "lora"}, {"lora", "peft-hf"});
  refuses(ExitCode::usage, {.run = adapter, .model = {}, .out = out}, {"adapter", "--model"});
  refuses(ExitCode::usage, {.run = run, .model = base, .out = out}, {"run folder", "--model"});
  refuses(ExitCode::usage, {.run = adapter, .model = base, .out = out, .format = "peft"}, {"already", "peft"});
  refuses(ExitCode::input, {.run = task.folder / "data", .model = base, .out = out}, {"data", "adapter_config.json"});
  refuses(ExitCode::input, {.run = task.folder / "biases/adapter", .model = base, .out = out}, {"BITFIT", "LORA"});
}
