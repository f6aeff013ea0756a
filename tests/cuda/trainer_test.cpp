// Training on a GPU against the fixtures and against the CPU's loop: the same images, masks and rates.
#include "engine/trainer.h"

#include "base/philox.h"
#include "cuda/device.h"
#include "goldens.h"
#include "io/io_support.h"
#include "kernels/tensors.h"
#include "support.h"
#include "tensor_maps.h"
#include "train/loop.h"

using namespace pyra;
using namespace pyra::test;
using train::Loop;
using train::LoopSettings;

namespace {

constexpr int64_t kClasses = 3, kSide = 16;

struct Method {
  std::string name, peft;
  std::map<std::string, sdk::ParameterValue> parameters;
  std::string merge;
  nn::Pool pool = nn::Pool::token;
  int64_t hidden = 96;
};

std::ostream& operator<<(std::ostream& out, const Method& method) {
  return out << method.name;
}

using List = std::vector<std::string>;
const std::vector<Method> kMethods = {
    {"LoRA, PYRA", "lora", {{"rank", int64_t{2}}, {"dropout", 0.2}}, "pyra"},
    {"LoRA on every layer, ToMe", "lora", {{"targets", List{"qkv", "proj", "fc1", "fc2"}}, {"alpha", 5.0}}, "tome"},
    {"LoRA on q and v", "lora", {{"rank", int64_t{17}}, {"targets", List{"q", "v"}}}, ""},
    // Hidden rows that hold q, k and v: gradients put aside.
    {"LoRA of rank 8, wide, PYRA", "lora", {{"rank", int64_t{8}}, {"dropout", 0.2}}, "pyra", nn::Pool::token, 192},
    {"LoRA of rank 8, wide", "lora", {{"rank", int64_t{8}}, {"dropout", 0.2}}, "", nn::Pool::token, 192},
    {"LoRA of rank 3, wide, mean of tokens", "lora", {{"rank", int64_t{3}}}, "", nn::Pool::avg, 192},
    {"BitFit", "bitfit", {}, ""},
    {"LoRA on fc1, PYRA", "lora", {{"rank", int64_t{3}}, {"targets", List{"fc1"}}}, "pyra"},
    {"BitFit, DiffRate", "bitfit", {}, "diffrate"},
    {"BitFit, PYRA, mean of tokens", "bitfit", {}, "pyra", nn::Pool::avg},
    {"head alone", "", {}, ""},
    {"PYRA and head", "", {}, "pyra"}};

nn::VitConfig config_of(const Method& method) {
  return {.arch = "tiny",
          .image_size = kSide,
          .patch_size = 4,
          .embed_dim = 48,
          .depth = 3,
          .num_heads = 3,
          .mlp_dim = method.hidden,
          .num_classes = kClasses,
          .pool = method.pool};
}

nn::Vit make_model(const Method& method) {
  const nn::VitConfig config = config_of(method);
  nn::Vit vit(config, nn::random_weights(config, 3));
  const sdk::ModelShape shape = config.shape();
  if (!method.peft.empty()) {
    auto peft = std::make_unique<nn::PeftSetup>();
    peft->name = method.peft;
    peft->method = built_plugins().peft(method.peft, method.parameters, "test");
    for (const auto& decl : peft->method->declare(shape)) peft->learned.emplace(decl.name, nn::make_tensor(decl, 1));
    // B begins at zero, where A's gradient is zero too: another start shows more.
    for (auto& [name, tensor] : peft->learned)
      if (name.ends_with("lora_B.weight") && method.name != "LoRA on q and v") tensor.add_(0.02);
    vit.set_peft(std::move(peft));
  }
  if (!method.merge.empty()) {
    auto merge = std::make_unique<nn::MergeSetup>();
    merge->name = method.merge;
    merge->merger = built_plugins().merger(method.merge, {}, "test");
    sdk::Schedule schedule{.text = "test", .remove = {4, 0, 3}, .prune = {}, .merge = {}};
    if (method.merge == "diffrate")
      schedule = {.text = "test", .remove = {}, .prune = {17, 13, 9}, .merge = {17, 11, 8}};
    merge->schedule = merge->merger->resolve(schedule, shape);
    for (const auto& decl : merge->merger->declare(shape, merge->schedule)) {
      at::Tensor tensor = nn::make_tensor(decl, 1);
      if (decl.name.ends_with(".b")) tensor.add_(0.05);
      merge->learned.emplace(decl.name, tensor);
    }
    vit.set_merge(std::move(merge));
  }
  return vit;
}

data::StoredSet make_images(int64_t count) {
  data::ImageSet set{.images = at::empty({count, kSide, kSide, 3}, at::kByte),
                     .labels = at::empty({count}, at::kLong),
                     .paths = std::vector<std::string>(size_t(count), "made"),
                     .skipped = {}};
  const Philox random(4, RandomStream::init);
  uint8_t* pixels = set.images.data_ptr<uint8_t>();
  for (int64_t i = 0; i < set.images.numel(); ++i) pixels[i] = uint8_t(random.below(uint64_t(i), 256));
  for (int64_t i = 0; i < count; ++i) set.labels[i] = i % kClasses;
  return data::stored(std::move(set));
}

LoopSettings settings_on(const std::string& device, engine::Precision precision = engine::Precision::fp32) {
  LoopSettings settings;
  settings.schedule = {.peak = 5e-3, .warmup_epochs = 1, .epochs = 3};
  settings.batch = 8;
  settings.drop_path = 0.3;
  settings.seed = 7;
  settings.device = device;
  settings.precision = precision;
  return settings;
}

struct Run {
  sdk::TensorMap state;
  std::vector<train::EpochReport> epochs;
};

Run run(const Method& method, const data::StoredSet& images, const LoopSettings& settings) {
  nn::Vit model = make_model(method);
  Loop loop(model, images, {.size = kSide}, settings);
  Run result;
  while (!loop.finished())
    if (const auto epoch = loop.step()) result.epochs.push_back(*epoch);
  loop.settle();
  result.state = copies(loop.state());
  return result;
}

/// Without what is nothing but rounding: softmax does not see a key's bias, so its gradient is noise, which Adam
/// divides by its own size.
at::Tensor without_key_bias(const std::string& name, const at::Tensor& tensor) {
  if (!name.ends_with(".attn.qkv.bias")) return tensor;
  const auto thirds = tensor.chunk(3);
  return at::cat({thirds[0], thirds[2]});
}

/// The largest difference of tensors whose name begins so, beside the largest way they have gone.
double relative_difference(const sdk::TensorMap& a, const sdk::TensorMap& b, const std::string& prefix,
                           std::string& worst) {
  double difference = 0, largest = 1e-30;
  for (const auto& [name, tensor] : b) {
    if (!name.starts_with(prefix)) continue;
    const at::Tensor mine = without_key_bias(name, a.at(name)), other = without_key_bias(name, tensor);
    largest = std::max(largest, other.abs().max().item<double>());
    const double here = max_difference(mine, other);
    if (here > difference) difference = here, worst = name;
  }
  return difference / largest;
}

}  // namespace

TEST_CASE("a GPU's steps give the fixture's gradients, losses and tensors", "[gpu][parity]") {
  PYRA_NEEDS_GPU();
  const Golden golden = read_golden("train_adamw"), source = read_golden("vit_pyra_lora");
  nn::Vit vit = golden_model(source);
  attach_golden_lora(vit, source);
  attach_golden_pyra(vit, source);
  const at::Tensor input = source.at("input"), labels = source.at("labels").to(at::kLong);
  const int64_t batch = input.size(0), side = input.size(2);
  const engine::TrainingImages unread{.size = side, .labels = labels, .read = {}};  // the step brings its own
  const auto trainer = engine::make_cuda_trainer(vit, unread, {.size = side},
                                                 {.device = "cuda:0", .adamw = {.weight_decay = 1e-4}, .batch = batch});
  engine::TrainStep step;
  step.images = input;
  for (int64_t i = 0; i < batch; ++i) step.indices.push_back(i);

  // A first moment is (1 - beta1) times the gradient after one step.
  trainer->step(step);
  const engine::StepSums first = trainer->collect();
  CHECK(first.last_loss == Approx(source.at("loss").item<double>()).epsilon(1e-5));
  trainer->publish();
  double largest = 0;
  for (const auto& [name, tensor] : source.tensors)
    if (name.starts_with("grad.")) largest = std::max(largest, tensor.abs().max().item<double>());
  std::map<std::string, engine::TrainedTensor> trained;
  for (const engine::TrainedTensor& tensor : trainer->tensors()) trained[tensor.name] = tensor;
  size_t compared = 0;
  for (const auto& [name, tensor] : source.tensors) {
    if (!name.starts_with("grad.")) continue;
    CAPTURE(name);
    CHECK(max_difference(trained.at(trained_name(name.substr(5))).first / 0.1, tensor) <= 1e-4 * largest);
    ++compared;
  }
  CHECK(compared == trained.size());

  for (const auto& [name, tensor] : golden.tensors)
    if (name.starts_with("start.")) trained.at(trained_name(name.substr(6))).value.detach().copy_(tensor);
  for (auto& [name, tensor] : trained) tensor.first.zero_(), tensor.second.zero_();
  trainer->take_over();
  const at::Tensor rates = golden.at("learning_rates"), losses = golden.at("losses");
  for (int64_t i = 0; i < rates.numel(); ++i) {
    step.number = uint64_t(i);
    step.lr = step.merge_lr = rates[i].item<double>();
    trainer->step(step);
    CAPTURE(i);
    CHECK(trainer->collect().last_loss == Approx(losses[i].item<double>()).epsilon(1e-4));
  }
  trainer->publish();
  for (const auto& [name, tensor] : golden.tensors) {
    if (!name.starts_with("end.")) continue;
    CAPTURE(name);
    CHECK(max_difference(trained.at(trained_name(name.substr(4))).value, tensor) <= 1e-4);
  }
}

TEST_CASE("a GPU trains as the CPU does, dropout and drop-path included", "[gpu]") {
  PYRA_NEEDS_GPU();
  const data::StoredSet images = make_images(27);  // 3 batches of 8 an epoch, 3 images dropped
  for (const Method& method : kMethods) {
    CAPTURE(method);
    const Run cpu = run(method, images, settings_on("cpu")), gpu = run(method, images, settings_on("cuda:0"));
    REQUIRE(cpu.epochs.size() == gpu.epochs.size());
    for (size_t i = 0; i < cpu.epochs.size(); ++i) {
      CAPTURE(i);
      CHECK(gpu.epochs[i].loss == Approx(cpu.epochs[i].loss).epsilon(1e-4));
      CHECK(gpu.epochs[i].accuracy == Approx(cpu.epochs[i].accuracy));
      CHECK(gpu.epochs[i].gradient_norm == Approx(cpu.epochs[i].gradient_norm).epsilon(1e-3));
    }
    for (const char* part : {"value.", "first."}) {
      std::string worst;
      const double difference = relative_difference(gpu.state, cpu.state, part, worst);
      CAPTURE(part, worst, difference);
      // Adam divides a gradient by its own size: where it is little more than rounding, the two go different ways.
      CHECK(difference < 3e-3);
    }
  }
}

TEST_CASE("a GPU learns from a teacher as the CPU does", "[gpu]") {
  PYRA_NEEDS_GPU();
  const data::StoredSet images = make_images(27);
  const at::Tensor table = seeded({27, kClasses}, 9, 3.0);
  const auto taught_on = [&](const std::string& device) {
    LoopSettings settings = settings_on(device);
    settings.distillation = {.weight = 0.7, .temperature = 3};
    settings.teacher = [&](const engine::TrainStep& step) {
      return table.index_select(0, at::tensor(step.indices, at::kLong));
    };
    return run(kMethods[0], images, settings);
  };
  const Run cpu = taught_on("cpu"), gpu = taught_on("cuda:0");
  REQUIRE(cpu.epochs.size() == gpu.epochs.size());
  for (size_t i = 0; i < cpu.epochs.size(); ++i) {
    CAPTURE(i);
    CHECK(gpu.epochs[i].loss == Approx(cpu.epochs[i].loss).epsilon(1e-4));
    CHECK(gpu.epochs[i].gradient_norm == Approx(cpu.epochs[i].gradient_norm).epsilon(1e-3));
  }
  std::string worst;
  CHECK(relative_difference(gpu.state, cpu.state, "value.", worst) < 3e-3);
}

TEST_CASE("bf16 on a GPU stays near fp32", "[gpu]") {
  PYRA_NEEDS_GPU();
  const data::StoredSet images = make_images(24);
  for (const Method& method : kMethods) {
    CAPTURE(method);
    const Run exact = run(method, images, settings_on("cuda:0")),
              bf16 = run(method, images, settings_on("cuda:0", engine::Precision::bf16));
    for (size_t i = 0; i < exact.epochs.size(); ++i)
      CHECK(bf16.epochs[i].loss == Approx(exact.epochs[i].loss).epsilon(0.05));
  }
}

TEST_CASE("a GPU's run is bit-equal when repeated and when resumed", "[gpu]") {
  PYRA_NEEDS_GPU();
  const data::StoredSet images = make_images(27);
  for (const Method& method : {kMethods[0], kMethods[3], kMethods[4]})
    for (const auto precision : {engine::Precision::fp32, engine::Precision::bf16}) {
      CAPTURE(method);
      LoopSettings settings = settings_on("cuda:0", precision);
      settings.deterministic = precision == engine::Precision::bf16;
      const Run whole = run(method, images, settings), again = run(method, images, settings);
      check_equal(whole.state, again.state);
      nn::Vit model = make_model(method);
      Loop begun(model, images, {.size = kSide}, settings);
      for (int i = 0; i < 4; ++i) (void)begun.step();
      begun.settle();
      nn::Vit other = make_model(method);
      Loop rest(other, images, {.size = kSide}, settings);
      rest.restore(begun.position(), copies(begun.state()), "test");
      while (!rest.finished()) (void)rest.step();
      rest.settle();
      check_equal(rest.state(), whole.state);
    }
}

TEST_CASE("on a GPU what is not finite stops training and changes nothing", "[gpu]") {
  PYRA_NEEDS_GPU();
  const data::StoredSet images = make_images(16);
  LoopSettings settings = settings_on("cuda:0");
  settings.schedule = {.peak = 1e30, .warmup_lr = 1e30, .warmup_epochs = 0, .epochs = 1000};
  nn::Vit model = make_model(kMethods[0]);
  Loop loop(model, images, {.size = kSide}, settings);
  std::string message;
  try {
    while (!loop.finished()) (void)loop.step();
  } catch (const train::Diverged& error) {
    message = error.what();
  }
  CHECK(message.find("diverged at step") != std::string::npos);
  CHECK(message.find("learning rate 1e+30") != std::string::npos);
}

TEST_CASE("what only the CPU trains is refused by name", "[gpu]") {
  PYRA_NEEDS_GPU();
  const data::StoredSet images = make_images(8);
  nn::VitConfig config = config_of(kMethods[0]);
  config.distilled = true;
  nn::Vit model(config, nn::random_weights(config, 3));
  check_error(ExitCode::usage, {"--device cpu"}, [&] { Loop(model, images, {.size = kSide}, settings_on("cuda:0")); });
  nn::Vit half = make_model(kMethods[0]);
  check_error(ExitCode::usage, {"fp16", "bf16"},
              [&] { Loop(half, images, {.size = kSide}, settings_on("cuda:0", engine::Precision::fp16)); });
}
