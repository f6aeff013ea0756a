#include "tasks/predict.h"

#include "base/error.h"
#include "data/image.h"
#include "io/atomic_file.h"
#include "tasks/assemble.h"
#include "tasks/pipeline.h"

namespace pyra::tasks {
namespace {

data::ImageSet single_image(const PredictOptions& options, const nn::Preprocess& preprocess) {
  const std::string name = options.input.string();
  const std::string bytes = options.bytes ? *options.bytes : io::read_file(options.input, data::kMaxImageBytes);
  const data::Image image =
      data::prepare(data::decode({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}, name), preprocess);
  return {.images = at::tensor(at::ArrayRef<uint8_t>(image.pixels), at::kByte).view({1, image.height, image.width, 3}),
          .labels = at::zeros({1}, at::kLong),
          .paths = {name},
          .skipped = {}};
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

Predictions predict(const PredictOptions& options, const host::PluginRegistry& plugins, Progress& progress) {
  if (options.top < 1) fail(ExitCode::usage, "--top is ", options.top, ", expected at least 1");
  if (options.batch < 1) fail(ExitCode::usage, "--batch is ", options.batch, ", expected at least 1");
  if (std::error_code error; !options.bytes && !std::filesystem::exists(options.input, error))
    fail(ExitCode::input, options.input.string(),
         ": no such file or folder; expected an image, a folder or .tar of images, or -");
  const at::InferenceMode no_gradients;
  const Model model = load_for_running(options.run, plugins);
  const nn::Preprocess& preprocess = model.file.preprocess;
  const std::string device = resolve_device(options.run.device);
  const auto engine = make_engine(model, device, resolve_precision(options.run.dtype, device), options.run.exact_gelu);

  // Names from within a .tar are no paths here.
  std::error_code ignored;
  const bool is_folder = !options.bytes && std::filesystem::is_directory(options.input, ignored);
  const std::filesystem::path root = is_folder ? options.input : std::filesystem::path();
  Predictions predictions;
  Pipeline pipeline(*engine, [&](const data::ImageSet& set, const at::Tensor& logits) {
    const at::Tensor probabilities = logits.to(at::kDouble).softmax(1);
    for (int64_t i = 0; i < probabilities.size(0); ++i) {
      const std::string path = (root / set.paths[size_t(i)]).string();
      if (!at::isfinite(probabilities[i]).all().item<bool>())
        fail(ExitCode::untrusted, options.run.model.string(), ": the result for ", path,
             " is not finite; the model's weights are damaged or its training diverged");
      predictions.images.push_back({path, best_classes(probabilities[i], options.top, model.file.class_names)});
    }
  });
  const bool is_tar = !options.bytes && options.input.extension() == ".tar";
  if (!is_folder && !is_tar) {
    pipeline.submit(single_image(options, preprocess));
    pipeline.collect_all();
    return predictions;
  }
  const data::Dataset dataset = data::Dataset::unlabelled(options.input);
  if (const std::vector<std::string> others = dataset.left_out(); !others.empty())
    progress.note(cat(others.size(), " left out (links, folders too deep), the first: ", others[0]));
  data::SplitReader reader(dataset, data::Dataset::kUnlabelled, preprocess, options.bad_images);
  predictions.skipped = pipeline.run(reader, options.batch, "predict", progress);
  for (data::BadImage& bad : predictions.skipped) bad.path = (root / bad.path).string();
  return predictions;
}

}  // namespace pyra::tasks
