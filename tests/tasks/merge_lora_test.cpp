#include "tasks/merge_lora.h"

#include "io/safetensors.h"
#include "tasks/assemble.h"
#include "tasks/tiny_task.h"

using namespace pyra;
using test::check_error;
using test::TinyTask;

namespace {

tasks::MergeLoraReport merge(const TinyTask& task, const std::string& run, const std::string& out,
                             const std::string& format = "pyra", bool drop_merge = false) {
  return tasks::merge_lora(
      {.run = task.folder / run, .out = task.folder / out, .format = format, .drop_merge = drop_merge},
      test::built_plugins());
}

/// What eval of a model file gives on the task's test images.
int64_t correct(const TinyTask& task, const std::string& model_file) {
  const at::NoGradGuard no_gradients;
  const auto model = tasks::load_model(task.folder / model_file, test::built_plugins());
  const auto data = data::Dataset::open(task.folder / "data");
  const auto set = data::load_split(data, "test", model.file.preprocess);
  const at::Tensor logits =
      model.vit->forward(nn::normalise(set.images.range(0, set.images.count()), model.file.preprocess));
  return (logits.argmax(1) == set.labels).sum().item<int64_t>();
}

/// Another value for one weight of a model file, as a fault of memory or disk would leave it.
void corrupt(const std::filesystem::path& path, const std::string& tensor) {
  const io::SafetensorsFile file(path);
  sdk::TensorMap tensors = file.tensors();
  at::Tensor& weight = tensors.at(tensor);
  weight.view({-1})[weight.numel() / 2] += 0.5;
  io::write_safetensors(path, tensors, file.metadata());
}

}  // namespace

TEST_CASE("a tuned model merged into one file gives the same answers", "[merge-lora]") {
  const TinyTask task;
  test::put(task.folder / "data/classes.txt", "red\ngreen\nblue\n");
  const auto trained = task.finetune("run");
  const auto report = merge(task, "run", "merged.safetensors");
  CHECK(report.verification.relative() <= tasks::kVerifyTolerance);
  CHECK(report.verification.largest_logit > 0);
  CHECK(report.merge == "pyra-4,2");
  CHECK(correct(task, "merged.safetensors") == trained.correct);
  const io::ModelFile file = io::read_model(task.folder / "merged.safetensors");
  CHECK(file.class_names == std::vector<std::string>{"red", "green", "blue"});
  REQUIRE(file.merge.has_value());
  CHECK(file.merge->learned.size() == 8);
  CHECK(file.provenance.at("protocol") == "vtab");
  CHECK(file.provenance.at("base") == "model.safetensors");
  const auto json = nlohmann::json::parse(to_json(report));
  CHECK(json.at("verification").at("relative") == report.verification.relative());
  // Only the named file is left.
  for (const auto& name : task.listing()) CHECK(name.find("unverified") == std::string::npos);
}

TEST_CASE("a file with one wrong weight is not trusted", "[merge-lora]") {
  const TinyTask task;
  (void)task.finetune("run", {"train.epochs=2"});
  (void)merge(task, "run", "merged.safetensors");
  const auto reference = tasks::load_model(task.folder / "merged.safetensors", test::built_plugins());
  (void)tasks::verify_model(task.folder / "merged.safetensors", *reference.vit, test::built_plugins());
  const std::string tensor =
      GENERATE("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias", "pos_embed", "merge.pyra.blocks.0.b");
  CAPTURE(tensor);
  corrupt(task.folder / "merged.safetensors", tensor);
  check_error(ExitCode::untrusted, {"merged.safetensors", "differ"}, [&] {
    (void)tasks::verify_model(task.folder / "merged.safetensors", *reference.vit, test::built_plugins());
  });
}

TEST_CASE("a run whose tensors were damaged leaves no file and an old one untouched", "[merge-lora]") {
  const TinyTask task;
  (void)task.finetune("run", {"train.epochs=2"});
  (void)merge(task, "run", "merged.safetensors");
  const std::string before = test::get(task.folder / "merged.safetensors");
  const auto adapter = task.folder / "run/adapter/adapter_model.safetensors";
  std::filesystem::resize_file(adapter, std::filesystem::file_size(adapter) - 1);
  const auto listing = task.listing();
  check_error(ExitCode::input, {"adapter_model.safetensors"}, [&] { (void)merge(task, "run", "merged.safetensors"); });
  CHECK(test::get(task.folder / "merged.safetensors") == before);
  CHECK(task.listing() == listing);
}

TEST_CASE("a run whose adapter says half of what it should is refused", "[merge-lora]") {
  const TinyTask task;
  (void)task.finetune("run", {"train.epochs=1"});
  const auto adapter = task.folder / "run/adapter/adapter_model.safetensors";
  const sdk::TensorMap tensors = io::SafetensorsFile(adapter).tensors();
  for (const char* about :
       {R"({"classes": ["a class with a name of some length", "b", "c"]})", R"({"base": "0"})", "{"}) {
    CAPTURE(about);
    io::write_safetensors(adapter, tensors, {{"pyra", about}});
    check_error(ExitCode::input, {"adapter_model.safetensors", "'pyra'"},
                [&] { (void)merge(task, "run", "merged.safetensors"); });
  }
}

TEST_CASE("a base model that has changed since is refused", "[merge-lora]") {
  const TinyTask task;
  (void)task.finetune("run", {"train.epochs=1"});
  corrupt(task.folder / "model.safetensors", "blocks.0.mlp.fc1.weight");
  check_error(ExitCode::input, {"another base model"}, [&] { (void)merge(task, "run", "merged.safetensors"); });
  CHECK_FALSE(std::filesystem::exists(task.folder / "merged.safetensors"));
}

TEST_CASE("a tuned model leaves for transformers as a folder", "[merge-lora]") {
  const TinyTask task;
  const auto trained = task.finetune("run", {"merge.name=none"});
  const auto report = merge(task, "run", "hf", "hf");
  CHECK(report.verification.relative() < 1e-4);
  CHECK(correct(task, "hf") == trained.correct);
  for (const char* file : {"config.json", "preprocessor_config.json", "model.safetensors"})
    CHECK(std::filesystem::exists(task.folder / "hf" / file));
  (void)merge(task, "run", "slash/", "hf");
  CHECK(std::filesystem::exists(task.folder / "slash/config.json"));
  check_error(ExitCode::usage, {"hf", "already"}, [&] { (void)merge(task, "run", "hf", "hf"); });
  // Nothing but what was asked for: the unverified folder got its name.
  for (const auto& name : task.listing()) CHECK(name.find("unverified") == std::string::npos);
}

TEST_CASE("a link stays a link and what it points to is replaced", "[merge-lora]") {
  const TinyTask task;
  (void)task.finetune("run", {"train.epochs=1"});
  std::filesystem::create_directory(task.folder / "elsewhere");
  test::put(task.folder / "elsewhere/m.safetensors", "old");
  std::filesystem::create_symlink("elsewhere/m.safetensors", task.folder / "m.safetensors");
  (void)merge(task, "run", "m.safetensors");
  CHECK(std::filesystem::is_symlink(task.folder / "m.safetensors"));
  CHECK(tasks::load_model(task.folder / "elsewhere/m.safetensors", test::built_plugins()).file.merge.has_value());
}

TEST_CASE("a model file whose merger is damaged is an input at fault", "[merge-lora]") {
  const TinyTask task;
  (void)task.finetune("run", {"train.epochs=1"});
  (void)merge(task, "run", "m.safetensors");
  const io::SafetensorsFile file(task.folder / "m.safetensors");
  sdk::TensorMap tensors = file.tensors();
  tensors.erase("merge.pyra.blocks.0.a");
  io::write_safetensors(task.folder / "less.safetensors", tensors, file.metadata());
  check_error(ExitCode::input, {"less.safetensors", "blocks.0.a"},
              [&] { (void)tasks::load_model(task.folder / "less.safetensors", test::built_plugins()); });
}

TEST_CASE("a timm file cannot carry a merger", "[merge-lora]") {
  const TinyTask task;
  (void)task.finetune("run", {"train.epochs=1"});
  check_error(ExitCode::usage, {"pyra-4,2", "--drop-merge"},
              [&] { (void)merge(task, "run", "m.safetensors", "timm"); });
  CHECK_FALSE(std::filesystem::exists(task.folder / "m.safetensors"));
  CHECK(merge(task, "run", "m.safetensors", "timm", true).merge == "dense");
  const io::SafetensorsFile file(task.folder / "m.safetensors");
  CHECK(file.contains("blocks.0.attn.qkv.weight"));
  CHECK_FALSE(file.contains("merge.pyra.blocks.0.a"));
  check_error(ExitCode::usage, {"pyra-4,2", "hf", "--drop-merge"}, [&] { (void)merge(task, "run", "h", "hf"); });
  check_error(ExitCode::usage, {"onnx", "pyra, timm or hf", "peft-hf"}, [&] { (void)merge(task, "run", "h", "onnx"); });
}

TEST_CASE("BitFit trains the model's own biases, and they stand in the merged file", "[merge-lora]") {
  const TinyTask task;
  test::put(task.recipe_file(), "model = \"" + (task.folder / "model.safetensors").string() + "\"\ndata = \"" +
                                    (task.folder / "data").string() +
                                    "\"\n[train]\nepochs = 4\nbatch = 8\nlr = [0.01]\nwarmup_epochs = 0\n"
                                    "[peft]\nname = \"bitfit\"\n");
  const auto trained = task.finetune("run");
  CHECK(trained.merge == "dense");
  (void)merge(task, "run", "merged.safetensors");
  CHECK(correct(task, "merged.safetensors") == trained.correct);
  const auto base = io::read_model(task.folder / "model.safetensors").weights;
  const auto merged = io::read_model(task.folder / "merged.safetensors").weights;
  CHECK(test::max_difference(base.at("blocks.0.mlp.fc1.bias"), merged.at("blocks.0.mlp.fc1.bias")) > 1e-4);
  CHECK(test::max_difference(base.at("blocks.0.mlp.fc1.weight"), merged.at("blocks.0.mlp.fc1.weight")) == 0);
}

TEST_CASE("a linear probe changes the head and nothing else", "[merge-lora]") {
  const TinyTask task;
  const auto trained = task.finetune("run", {"train.epochs=4", "merge.name=none", "peft.name=linear_probe"});
  CHECK(trained.trained_parameters == test::kTinyClasses * (32 + 1));
  (void)merge(task, "run", "merged.safetensors");
  CHECK(correct(task, "merged.safetensors") == trained.correct);
  const auto base = io::read_model(task.folder / "model.safetensors").weights;
  for (const auto& [name, tensor] : io::read_model(task.folder / "merged.safetensors").weights) {
    CAPTURE(name);
    CHECK(at::equal(tensor, base.at(name)) == !name.starts_with("head."));
  }
}

TEST_CASE("merge-lora of something that is no finished run", "[merge-lora]") {
  const TinyTask task;
  check_error(ExitCode::input, {"nowhere"}, [&] { (void)merge(task, "nowhere", "m.safetensors"); });
  check_error(ExitCode::input, {"data", "adapter"}, [&] { (void)merge(task, "data", "m.safetensors"); });
}
