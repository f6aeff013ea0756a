#include "tasks/predict.h"

#include "base/error.h"
#include "data/image.h"
#include "data/loader.h"
#include "io/atomic_file.h"
#include "tasks/assemble.h"

namespace pyra::tasks {
namespace {

constexpr size_t kMaxImageBytes = 256 << 20;
constexpr int64_t kBatch = 32;

bool is_image_name(const std::filesystem::path& path) {
  std::string extension = path.extension().string();
  std::transform(extension.begin(), extension.end(), extension.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  for (const char* known : {".jpg", ".jpeg", ".png", ".bmp", ".pnm", ".ppm", ".pgm", ".pbm"})
    if (extension == known) return true;
  return false;
}

std::vector<std::filesystem::path> images_of(const std::filesystem::path& input) {
  std::error_code error;
  if (!std::filesystem::is_directory(input, error)) return {input};
  std::vector<std::filesystem::path> images;
  for (auto entry = std::filesystem::recursive_directory_iterator(input, error); !error && entry != end(entry);
       entry.increment(error))
    if (entry->is_regular_file(error) && is_image_name(entry->path())) images.push_back(entry->path());
  if (error) fail(ExitCode::input, input.string(), ": the folder cannot be read: ", error.message());
  if (images.empty())
    fail(ExitCode::input, input.string(),
         ": no image in this folder (.jpg, .jpeg, .png, .bmp, .pnm, .ppm, .pgm, .pbm)");
  std::sort(images.begin(), images.end());
  return images;
}

at::Tensor prepared(std::string_view bytes, const std::string& name, const nn::Preprocess& preprocess) {
  const data::Image image =
      data::prepare(data::decode({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}, name), preprocess);
  return at::tensor(at::ArrayRef<uint8_t>(image.pixels), at::kByte).view({1, image.height, image.width, 3});
}

std::vector<ClassProbability> best_classes(const at::Tensor& probabilities, int64_t count,
                                           const std::vector<std::string>& names) {
  const auto [values, labels] = probabilities.sort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
  std::vector<ClassProbability> best;
  for (int64_t i = 0; i < std::min(count, probabilities.size(0)); ++i) {
    const int64_t label = labels[i].item<int64_t>();
    best.push_back({label, names.empty() ? std::to_string(label) : names[size_t(label)], values[i].item<double>()});
  }
  return best;
}

}  // namespace

std::vector<Prediction> predict(const PredictOptions& options, const host::PluginRegistry& plugins,
                                Progress& progress) {
  if (options.top < 1) fail(ExitCode::usage, "--top is ", options.top, ", expected at least 1");
  const at::InferenceMode no_gradients;
  const Model model = load_for_running(options.run, plugins);
  const nn::Preprocess& preprocess = model.file.preprocess;
  const std::string device = resolve_device(options.run.device);
  const auto engine = make_engine(model, device, resolve_precision(options.run.dtype, device), options.run.exact_gelu);
  const std::vector<std::filesystem::path> paths =
      options.bytes ? std::vector{options.input} : images_of(options.input);
  const auto total = int64_t(paths.size());

  std::vector<Prediction> predictions;
  progress.begin("predict", total, "images");
  for (int64_t first = 0; first < total; first += kBatch) {
    stop_if_asked("predict");
    const int64_t count = std::min(kBatch, total - first);
    std::vector<at::Tensor> batch;
    for (int64_t i = first; i < first + count; ++i) {
      const std::string name = paths[size_t(i)].string();
      batch.push_back(prepared(options.bytes ? *options.bytes : io::read_file(name, kMaxImageBytes), name, preprocess));
    }
    const at::Tensor probabilities = engine->run(at::cat(batch)).to(at::kDouble).softmax(1);
    for (int64_t i = 0; i < count; ++i) {
      const std::string name = paths[size_t(first + i)].string();
      if (!at::isfinite(probabilities[i]).all().item<bool>())
        fail(ExitCode::untrusted, options.run.model.string(), ": the result for ", name,
             " is not finite; the model's weights are damaged or its training diverged");
      predictions.push_back({name, best_classes(probabilities[i], options.top, model.file.class_names)});
    }
    progress.update(first + count);
  }
  progress.end();
  return predictions;
}

}  // namespace pyra::tasks
