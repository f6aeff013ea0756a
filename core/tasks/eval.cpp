#include "tasks/eval.h"

#include <chrono>
#include <cstdio>

#include "base/error.h"
#include "data/dataset.h"
#include "data/loader.h"
#include "engine/cpu_engine.h"
#include "io/atomic_file.h"
#include "tasks/assemble.h"

namespace pyra::tasks {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// List files without names give "0", "1", …: those say nothing about what the classes are.
bool are_numbers(const std::vector<std::string>& names) {
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i] != std::to_string(i)) return false;
  return true;
}

void check_classes(const io::ModelFile& model, const std::string& model_path, const data::Dataset& dataset) {
  const std::string data_path = dataset.path().string();
  if (model.config.num_classes != dataset.num_classes())
    fail(ExitCode::input, model_path, " tells ", model.config.num_classes, " classes apart and ", data_path, " has ",
         dataset.num_classes(), ": they do not belong together; fine-tune a head for this data (`pyractl finetune`)");
  const auto &known = model.class_names, &given = dataset.class_names();
  if (known.empty() || are_numbers(known) || are_numbers(given)) return;
  for (size_t i = 0; i < known.size(); ++i)
    if (known[i] != given[i])
      fail(ExitCode::input, "class ", i, " is '", known[i], "' in ", model_path, " and '", given[i], "' in ", data_path,
           ": the model was trained for other classes or another order");
}

/// A field as RFC 4180 wants it.
std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

class PredictionsFile {
 public:
  /// Opened before the work begins: a folder that cannot be written is better known now.
  explicit PredictionsFile(const std::filesystem::path& path) {
    if (path.empty()) return;
    file_.emplace(path);
    file_->write("path,label,predicted,probability\n");
  }

  void add(const data::ImageSet& set, int64_t first, const at::Tensor& predicted, const at::Tensor& probability) {
    if (!file_) return;
    std::string rows;
    for (int64_t i = 0; i < predicted.size(0); ++i) {
      char number[32];
      std::snprintf(number, sizeof number, "%.6f", probability[i].item<float>());
      rows += cat(csv_field(set.paths[size_t(first + i)]), ",", set.labels[first + i].item<int64_t>(), ",",
                  predicted[i].item<int64_t>(), ",", number, "\n");
    }
    file_->write(rows);
  }

  void commit() {
    if (file_) file_->commit();
  }

 private:
  std::optional<io::AtomicFile> file_;
};

/// Of the rows of `logits`, how many have their label among the `k` largest.
int64_t count_correct(const at::Tensor& logits, const at::Tensor& labels, int64_t k) {
  return std::get<1>(logits.topk(k, 1)).eq(labels.unsqueeze(1)).any(1).sum().item<int64_t>();
}

}  // namespace

EvalResult evaluate(const EvalOptions& options, const host::PluginRegistry& plugins, Progress& progress) {
  if (options.batch < 1) fail(ExitCode::usage, "--batch is ", options.batch, ", expected at least 1");
  const at::InferenceMode no_gradients;
  const Model model = load_for_running(options.run, plugins);
  const at::ScalarType compute = compute_dtype(options.run.dtype);
  const data::Dataset dataset = data::Dataset::open(options.data);
  check_classes(model.file, options.run.model.string(), dataset);
  PredictionsFile predictions(options.predictions);

  const auto start = Clock::now();
  const data::ImageSet set =
      data::load_split(dataset, options.split, model.file.preprocess,
                       options.skip_bad_images ? data::BadImages::skip : data::BadImages::fail, progress);
  const int64_t images = set.images.size(0);
  if (images == 0)
    fail(ExitCode::input, options.data.string(), ": split '", options.split, "' has no image to evaluate");

  EvalResult result;
  result.arch = model.file.config.arch;
  result.merge = merge_label(model);
  result.dtype = dtype_name(compute);
  result.images = images;
  result.macs = nn::count_macs(model.file.config, tokens_after(model));
  result.parameters = parameter_count(model);
  result.provenance = model.file.provenance;
  for (const data::BadImage& bad : set.skipped) result.skipped.emplace_back(bad.path, bad.reason);
  if (model.file.config.num_classes > 5) result.correct_top5 = 0;

  const engine::CpuEngine engine(*model.vit, compute);
  double loss = 0, forward_seconds = 0;
  int64_t timed_images = 0;
  progress.begin("eval", images, "images");
  for (int64_t first = 0; first < images; first += options.batch) {
    stop_if_asked("eval");
    const int64_t count = std::min(options.batch, images - first);
    const at::Tensor input = data::normalise(set.images.narrow(0, first, count), model.file.preprocess);
    const at::Tensor labels = set.labels.narrow(0, first, count);
    const auto forward_start = Clock::now();
    const at::Tensor logits = engine.run(input);
    if (first > 0 || images <= options.batch) {
      forward_seconds += seconds_since(forward_start);
      timed_images += count;
    }
    const at::Tensor log_probabilities = logits.log_softmax(1);
    const auto [probability, predicted] = log_probabilities.max(1);
    const at::Tensor finite = at::isfinite(logits).all(1);
    if (!finite.all().item<bool>())
      fail(ExitCode::untrusted, options.run.model.string(), ": a logit of ",
           set.paths[size_t(first + finite.logical_not().nonzero()[0].item<int64_t>())],
           " is not finite; the model's weights are damaged or its training diverged");
    loss -= log_probabilities.gather(1, labels.unsqueeze(1)).to(at::kDouble).sum().item<double>();
    result.correct += predicted.eq(labels).sum().item<int64_t>();
    if (result.correct_top5) *result.correct_top5 += count_correct(logits, labels, 5);
    predictions.add(set, first, predicted, probability.exp());
    char note[48];
    std::snprintf(note, sizeof note, "top-1 %.2f%%", 100.0 * double(result.correct) / double(first + count));
    progress.update(first + count, note);
  }
  progress.end();
  result.images_per_second = double(images) / seconds_since(start);
  result.forward_images_per_second = double(timed_images) / forward_seconds;
  result.loss = loss / double(images);
  predictions.commit();
  return result;
}

}  // namespace pyra::tasks
