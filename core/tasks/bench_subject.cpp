#include "tasks/bench_subject.h"

#include <ATen/Parallel.h>

#include <chrono>
#include <numeric>

#include "base/error.h"
#include "base/philox.h"
#include "tasks/assemble.h"
#include "tasks/bench_end_to_end.h"
#include "tasks/run_model.h"
#include "train/loop.h"

namespace pyra::tasks {
namespace {

constexpr uint64_t kSeed = 0;
constexpr int64_t kEpochSteps = 8;

// Uniform bytes; the same whatever the number of threads.
at::Tensor random_bytes(at::IntArrayRef shape) {
  at::Tensor bytes = at::zeros(shape, at::kByte);
  const Philox random(kSeed, RandomStream::bench);
  uint8_t* data = bytes.data_ptr<uint8_t>();
  at::parallel_for(0, bytes.numel() / 16, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto words = random.block(uint64_t(i));
      std::memcpy(data + 16 * i, words.data(), 16);
    }
  });
  return bytes;
}

data::ImageSet random_images(int64_t count, const nn::VitConfig& config) {
  const Philox random(kSeed, RandomStream::bench, 1);
  data::ImageSet set;
  set.images = random_bytes({count, config.image_size, config.image_size, 3});
  set.labels = at::empty({count}, at::kLong);
  for (int64_t i = 0; i < count; ++i)
    set.labels.data_ptr<int64_t>()[i] = int64_t(random.below(uint64_t(i), uint64_t(config.num_classes)));
  set.paths.assign(size_t(count), "random");
  return set;
}

io::Recipe asked_for(const BenchSettings& settings) {
  for (const std::string& assignment : settings.set)
    for (const char* key : {"merge.name=", "merge.schedule=", "peft.name="})
      if (assignment.starts_with(key))
        fail(ExitCode::usage, "--set ", assignment, ": bench takes this as --merge, --schedule and --peft");
  check_keys(settings.set, {"merge.proportional_attention", "merge.*", "peft.*", "preprocess.size"});
  return io::read_recipe({}, settings.set);
}

Model bare_model(const BenchSettings& settings, const io::Recipe& asked, const host::PluginRegistry& plugins) {
  if (!settings.model.empty()) return load_model(settings.model, plugins, {.image_size = asked.image_size});
  if (asked.image_size)
    fail(ExitCode::usage, "--set preprocess.size=", *asked.image_size,
         ": with --arch the name says the resolution: vit_base_patch16_160");
  return arch_model(settings.arch, kSeed);
}

// Dense, and merged where there is a merge: the one asked for, else the one the file carries. Weights of a merger that
// would have to be trained are fresh ones: they cost the same time.
std::vector<std::shared_ptr<Model>> make_models(const BenchSettings& settings, const io::Recipe& asked,
                                                const host::PluginRegistry& plugins) {
  const auto merged = std::make_shared<Model>(bare_model(settings, asked, plugins));
  if (!settings.merge.empty()) {
    io::PluginChoice choice = asked.merge;
    choice.name = settings.merge;
    attach_merge(*merged, plugins, choice, settings.schedule, asked.proportional_attention, kSeed);
  }
  if (!merged->file.merge) return {merged};
  const auto dense = std::make_shared<Model>(bare_model(settings, asked, plugins));
  detach_merge(*dense);
  return {dense, merged};
}

BenchRow describe(const Model& model, const std::string& mode, const BenchSettings& settings, int64_t batch) {
  const nn::VitConfig& config = model.file.config;
  BenchRow row;
  row.name = row_name({.mode = mode,
                       .arch = config.arch,
                       .image_size = config.image_size,
                       .merge = merge_label(model),
                       .peft = settings.peft,
                       .device = settings.device.substr(0, settings.device.find(':')),
                       .dtype = settings.dtype,
                       .batch = batch});
  row.batch = batch;
  row.macs = nn::count_macs(config, tokens_after(model));
  row.params = parameter_count(model);
  return row;
}

/// A model with its engine, which the rows of all its batch sizes share.
struct InferenceScene {
  std::shared_ptr<Model> model;
  std::unique_ptr<engine::Engine> engine;
};

using Scenes = std::vector<std::shared_ptr<InferenceScene>>;

Scenes inference_scenes(const BenchSettings& settings, const io::Recipe& asked, const host::PluginRegistry& plugins) {
  Scenes scenes;
  for (const auto& model : make_models(settings, asked, plugins))
    scenes.push_back(std::make_shared<InferenceScene>(InferenceScene{
        model, make_engine(*model, settings.device, resolve_precision(settings.dtype, settings.device))}));
  return scenes;
}

// "infer": one batch after another; "throughput": as many in flight as the engine takes.
BenchSubject infer_subject(const std::shared_ptr<InferenceScene>& scene, const std::string& mode,
                           const BenchSettings& settings, int64_t batch) {
  const BenchRow row = describe(*scene->model, mode, settings, batch);
  const int64_t in_flight = mode == "throughput" ? scene->engine->in_flight() : 1;
  // As an engine takes them: bytes where the way to the device is not measured, normalised values on the CPU.
  at::Tensor images = random_images(batch, scene->model->file.config).images;
  if (settings.device == "cpu") images = nn::normalise(images, scene->model->file.preprocess);
  // What computes nonsense need not be timed.
  if (!scene->engine->run(images).isfinite().all().item<bool>())
    fail(ExitCode::untrusted, row.name, ": the logits of random images are not finite");
  BenchSubject subject{.row = row, .time_ms = [scene, images, in_flight](int64_t iterations) {
                         const std::vector<double> times = scene->engine->time_ms(images, iterations, in_flight);
                         return std::accumulate(times.begin(), times.end(), 0.0);
                       }};
  if (settings.device == "cpu") return subject;
  subject.device_bytes = [scene, batch, in_flight] { return scene->engine->device_bytes(batch, in_flight); };
  if (settings.profile) subject.profile = [scene, images] { return scene->engine->profile(images); };
  return subject;
}

// What the steps of a loop refer to.
struct TrainingScene {
  std::shared_ptr<Model> model;
  data::StoredSet images;
  std::unique_ptr<train::Loop> loop;
};

BenchSubject train_subject(const std::shared_ptr<Model>& model, const BenchSettings& settings, int64_t batch) {
  BenchRow row = describe(*model, "train", settings, batch);
  // On a GPU the loop waits at the end of an epoch: one of several steps, as real ones have.
  const int64_t images = settings.device == "cpu" ? batch : kEpochSteps * batch;
  const auto scene = std::make_shared<TrainingScene>(
      TrainingScene{model, data::stored(random_images(images, model->file.config)), {}});
  train::LoopSettings loop;
  // A rate that hardly changes the weights: random labels must not lead training astray while it is timed.
  loop.schedule = {.peak = 1e-7, .warmup_lr = 1e-7, .min_lr = 1e-7, .warmup_epochs = 0, .epochs = 1 << 30};
  loop.batch = batch;
  loop.device = settings.device;
  loop.precision = resolve_precision(settings.dtype, settings.device);
  scene->loop = std::make_unique<train::Loop>(*model->vit, scene->images, model->file.preprocess, loop);
  row.trained_params = 0;
  for (const engine::TrainedTensor& tensor : scene->loop->trained()) *row.trained_params += tensor.value.numel();
  BenchSubject subject{
      .row = row, .time_ms = [scene](int64_t iterations) {
        const auto start = std::chrono::steady_clock::now();
        for (int64_t i = 0; i < iterations; ++i) (void)scene->loop->step();
        scene->loop->wait();
        return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
      }};
  // Of a step: how many images the set has is this benchmark's choice.
  if (settings.device != "cpu")
    subject.device_bytes = [scene] { return scene->loop->device_bytes() - scene->loop->set_bytes(); };
  return subject;
}

void attach_asked_peft(Model& model, const BenchSettings& settings, const io::Recipe& asked,
                       const host::PluginRegistry& plugins) {
  io::PluginChoice choice = asked.peft;
  choice.name = settings.peft;
  attach_peft(model, plugins, choice, kSeed);
}

// The resolution in "vit_base_patch16_224.augreg_in21k"; a name that says nothing means 224.
int64_t named_resolution(const std::string& arch) {
  const std::string name = arch.substr(0, arch.find('.'));
  const std::string last = name.substr(name.rfind('_') + 1);
  const bool digits = !last.empty() && last.size() < 6 && last.find_first_not_of("0123456789") == std::string::npos;
  return digits ? std::stoll(last) : 224;
}

}  // namespace

std::string row_name(const RowName& parts) {
  // '/' separates the parts of a name.
  std::string arch = parts.arch;
  std::replace(arch.begin(), arch.end(), '/', '_');
  if (named_resolution(parts.arch) != parts.image_size) arch += cat("@", parts.image_size);
  std::string merge = parts.merge;
  if (const size_t slash = merge.rfind('/'); slash != std::string::npos)
    merge = merge.substr(0, merge.find('-') + 1) + merge.substr(slash + 1);
  if (parts.mode == "train" && parts.peft != "lora") merge += "+" + parts.peft;
  return cat(parts.mode, "/", arch, "/", merge, "/", parts.device, "/", parts.dtype, "/b", parts.batch);
}

std::vector<BenchSubject> make_subjects(const BenchSettings& settings, const host::PluginRegistry& plugins) {
  const io::Recipe asked = asked_for(settings);
  std::vector<BenchSubject> subjects;
  Scenes inference;  // of both modes that run a model alone
  for (const std::string& mode : settings.modes) {
    if (mode == "infer" || mode == "throughput") {
      if (inference.empty()) inference = inference_scenes(settings, asked, plugins);
      for (const int64_t batch : settings.batches)
        for (const auto& scene : inference) subjects.push_back(infer_subject(scene, mode, settings, batch));
      continue;
    }
    const auto models = make_models(settings, asked, plugins);  // training has its own: it changes them
    const bool training = mode == "train";
    if (training)
      for (const auto& model : models) attach_asked_peft(*model, settings, asked, plugins);
    const auto dataset = training ? nullptr : std::make_shared<data::Dataset>(data::Dataset::open(settings.data));
    for (const int64_t batch : settings.batches)
      for (const auto& model : models)
        subjects.push_back(training
                               ? train_subject(model, settings, batch)
                               : end_to_end_subject(model, dataset, settings, describe(*model, mode, settings, batch)));
  }
  return subjects;
}

}  // namespace pyra::tasks
