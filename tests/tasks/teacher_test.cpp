// A model that teaches another: the loss, what it changes, and what cannot teach.
#include "tasks/teacher.h"

#include <cstdio>

#include "engine/cuda_library.h"
#include "tasks/merge_lora.h"
#include "tiny_task.h"
#include "train/cpu_trainer.h"

using namespace pyra;
using namespace pyra::test;

namespace {

/// The task's model after a training of its own: what teaches.
std::string trained_teacher(const TinyTask& task, const std::string& name = "teacher.safetensors",
                            int64_t classes = 3) {
  nn::VitConfig config = tiny_config();
  config.num_classes = classes;
  sdk::TensorMap weights = nn::random_weights(config, 11);
  weights["head.weight"] = weights.at("head.weight") * 40;
  io::write_model(task.folder / name, {.config = config,
                                       .preprocess = {.size = 16},
                                       .class_names = {},
                                       .merge = {},
                                       .weights = std::move(weights),
                                       .provenance = {}});
  return (task.folder / name).string();
}

std::vector<std::string> taught_by(const std::string& teacher, std::vector<std::string> more = {}) {
  more.push_back(io::recipe_override("train.teacher", teacher));
  more.push_back("train.hflip=false");
  return more;
}

}  // namespace

TEST_CASE("a step's loss with a teacher is Hinton's, and its gradient that of the student's logits", "[teacher]") {
  const TinyTask task;
  const at::Tensor images = (at::arange(4 * 16 * 16 * 3) % 251).to(at::kByte).view({4, 16, 16, 3});
  const at::Tensor labels = at::tensor({0, 2, 1, 0}, at::kLong), teacher = at::randn({4, 3}) * 3;
  const data::ImageStore store(images);
  const engine::TrainingImages set{
      .size = 16, .labels = labels, .read = [&](std::span<const int64_t> some, uint8_t* to) { store.read(some, to); }};
  for (const double weight : {0.3, 1.0}) {
    nn::Vit model(tiny_config(), nn::random_weights(tiny_config(), 3));
    const at::Tensor logits = model.forward(nn::normalise(images, {.size = 16})).detach();
    const double t = 3;
    const at::Tensor q = (teacher / t).softmax(1), p = (logits / t).softmax(1);
    const double divergence = (q * (q.log() - p.log())).sum().item<double>() / 4 * t * t;
    const double entropy = -logits.log_softmax(1).gather(1, labels.unsqueeze(1)).mean().item<double>();
    train::CpuTrainer trainer(model, set, {.size = 16},
                              {.batch = 4, .distillation = {.weight = weight, .temperature = t}});
    {
      const at::AutoGradMode gradients(true);
      trainer.step({.number = 0, .lr = 0, .merge_lr = 0, .indices = {0, 1, 2, 3}, .images = {}, .teacher = teacher});
    }
    const engine::StepSums sums = trainer.collect();
    CHECK(sums.last_loss == Approx((1 - weight) * entropy + weight * divergence).epsilon(1e-5));
    CHECK(sums.last_norm > 0);
  }
}

TEST_CASE("a taught student comes nearer to its teacher than one that learns from labels", "[teacher]") {
  const TinyTask task;
  const std::string teacher = trained_teacher(task);
  const auto taught = task.finetune("taught", taught_by(teacher, {"train.teacher_weight=1.0", "train.epochs=30"}));
  (void)task.finetune("alone", {"train.hflip=false", "train.epochs=30"});
  CHECK(taught.accuracy >= 0);
  const auto agreement = [&](const std::string& run) {
    const data::Dataset dataset = data::Dataset::open(task.folder / "data");
    const data::StoredSet set = data::load_split(dataset, "test", {.size = 16});
    const auto logits = [&](const std::filesystem::path& path) {
      const tasks::Model model = tasks::load_model(path, built_plugins());
      return tasks::make_engine(model, "cpu", engine::Precision::fp32)->run(set.images.range(0, set.images.count()));
    };
    const auto merged = task.folder / (run + ".safetensors");
    (void)tasks::merge_lora({.run = task.folder / run, .out = merged}, built_plugins());
    const at::Tensor q = logits(teacher).softmax(1);
    return (q * (q.log() - logits(merged).log_softmax(1))).sum(1).mean().item<double>();
  };
  CHECK(agreement("taught") < 0.5 * agreement("alone"));
}

TEST_CASE("a run with a teacher is repeated and resumed bit for bit, by the same teacher only", "[teacher]") {
  const TinyTask task;
  const std::string teacher = trained_teacher(task);
  (void)task.finetune("a", taught_by(teacher, {"train.epochs=4"}));
  (void)task.finetune("b", taught_by(teacher, {"train.epochs=4"}));
  CHECK(task.adapter_bytes("a") == task.adapter_bytes("b"));
  // An augmented image is shown to the teacher as the student sees it.
  (void)task.finetune("flipped", {"train.epochs=4", io::recipe_override("train.teacher", teacher)});
  CHECK(task.adapter_bytes("flipped") != task.adapter_bytes("a"));
  tasks::Model merging = tasks::load_model(teacher, built_plugins());
  tasks::attach_merge(merging, built_plugins(), {.name = "tome", .parameters = {}}, "4,2", true, std::nullopt);
  io::write_model(teacher, merging.file);  // the same weights, another model
  check_error(ExitCode::usage, {"taught by"},
              [&] { (void)task.finetune("a", taught_by(teacher, {"train.epochs=4"}), true); });
  std::filesystem::copy_file(task.folder / "model.safetensors", teacher,
                             std::filesystem::copy_options::overwrite_existing);
  check_error(ExitCode::usage, {"model"},
              [&] { (void)task.finetune("a", taught_by(teacher, {"train.epochs=4"}), true); });
}

TEST_CASE("what cannot teach is refused before anything is written", "[teacher]") {
  const TinyTask task;
  const std::string other = trained_teacher(task, "other.safetensors", 5);
  const auto before = task.listing();
  check_error(ExitCode::usage, {"other.safetensors", "5 classes", "3"},
              [&] { (void)task.finetune("run", taught_by(other)); });
  check_error(ExitCode::input, {"none.safetensors"},
              [&] { (void)task.finetune("run", taught_by("none.safetensors")); });
  check_error(ExitCode::usage, {"px"}, [&] {
    (void)task.finetune("run", taught_by((task.folder / "model.safetensors").string(), {"preprocess.size=24"}));
  });
  check_error(ExitCode::usage, {"teacher_weight", "at most 1"},
              [&] { (void)task.recipe({"train.teacher_weight=1.5"}); });
  check_error(ExitCode::usage, {"teacher_temperature"}, [&] { (void)task.recipe({"train.teacher_temperature=0"}); });
  CHECK(task.listing() == before);
}

TEST_CASE("on a GPU a teacher teaches as on the CPU, what it shows augmented included", "[teacher][gpu]") {
  if (!engine::cuda_library().first_is_usable()) {
    std::puts("skipped: no CUDA device on this machine");
    return;
  }
  const TinyTask task;
  const std::string teacher = trained_teacher(task);
  const auto accuracy_on = [&](const std::string& device, const std::string& run, std::vector<std::string> set) {
    tasks::FinetuneOptions options{.recipe = task.recipe(std::move(set)), .device = device};
    options.recipe.out = task.folder / run;
    options.recipe.dtype = "fp32";
    return tasks::finetune(options, built_plugins()).accuracy;
  };
  for (const std::string flip : {"false", "true"}) {
    CAPTURE(flip);
    const std::vector<std::string> set{"train.epochs=6", io::recipe_override("train.teacher", teacher),
                                       "train.hflip=" + flip};
    CHECK(accuracy_on("cuda:0", "gpu" + flip, set) == Approx(accuracy_on("cpu", "cpu" + flip, set)).margin(0.1));
    (void)accuracy_on("cuda:0", "again" + flip, set);
    CHECK(task.adapter_bytes("again" + flip) == task.adapter_bytes("gpu" + flip));
  }
}
