#include "tasks/eval.h"
#include "io/output_path.h"

#include <chrono>
#include <cstdio>

#include "base/clock.h"
#include "base/error.h"
#include "data/dataset.h"
#include "data/loader.h"
#include "io/atomic_file.h"
#include "tasks/assemble.h"
#include "tasks/pipeline.h"
#include "tasks/predictions.h"
#include "tasks/tuned_model.h"

namespace pyra::tasks {
namespace {

using Clock = std::chrono::steady_clock;

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
    file_->write(cat(kPredictionsHeader, "\n"));
  }

  void add(const data::ImageSet& set, const at::Tensor& predicted, const at::Tensor& probability) {
    if (!file_) return;
    std::string rows;
    for (int64_t i = 0; i < predicted.size(0); ++i) {
      char number[32];
      std::snprintf(number, sizeof number, "%.6f", probability[i].item<float>());
      rows += cat(csv_field(set.paths[size_t(i)]), ",", set.labels[i].item<int64_t>(), ",",
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

/// Adds up what the batches' logits say.
class Score {
 public:
  Score(EvalResult& result, const EvalOptions& options) : result_(result), options_(options) {}

  void add(const data::ImageSet& set, const at::Tensor& logits, PredictionsFile& predictions) {
    const at::Tensor finite = at::isfinite(logits).all(1);
    if (!finite.all().item<bool>())
      fail(ExitCode::untrusted, options_.run.model.string(), ": a logit of ",
           set.paths[size_t(finite.logical_not().nonzero()[0].item<int64_t>())],
           " is not finite; the model's weights are damaged or its training diverged");
    const at::Tensor log_probabilities = logits.log_softmax(1);
    const auto [probability, predicted] = log_probabilities.max(1);
    loss_ -= log_probabilities.gather(1, set.labels.unsqueeze(1)).to(at::kDouble).sum().item<double>();
    result_.images += set.labels.size(0);
    result_.correct += predicted.eq(set.labels).sum().item<int64_t>();
    if (result_.correct_top5) *result_.correct_top5 += count_correct(logits, set.labels, 5);
    predictions.add(set, predicted, probability.exp());
  }
  [[nodiscard]] double loss() const { return loss_ / double(result_.images); }
  [[nodiscard]] std::string note() const {
    char text[48];
    std::snprintf(text, sizeof text, "top-1 %.2f%%", 100.0 * double(result_.correct) / double(result_.images));
    return text;
  }

 private:
  EvalResult& result_;
  const EvalOptions& options_;
  double loss_ = 0;
};

}  // namespace

void check_classes(const io::ModelFile& model, const std::string& model_path, const data::Dataset& dataset) {
  const std::string data_path = dataset.path().string();
  if (model.config.num_classes != dataset.num_classes())
    fail(ExitCode::input, model_path, " tells ", model.config.num_classes, " classes apart and ", data_path, " has ",
         dataset.num_classes(), ": they do not belong together; fine-tune a head for this data (`pyractl finetune`)");
  const auto &known = model.class_names, &given = dataset.class_names();
  if (known.empty() || are_numbered(known) || are_numbered(given)) return;
  for (size_t i = 0; i < known.size(); ++i)
    if (known[i] != given[i])
      fail(ExitCode::input, "class ", i, " is '", known[i], "' in ", model_path, " and '", given[i], "' in ", data_path,
           ": the model was trained for other classes or another order");
}

EvalResult evaluate(const EvalOptions& options, const host::PluginRegistry& plugins, Progress& progress) {
  if (options.batch < 1) fail(ExitCode::usage, "--batch is ", options.batch, ", expected at least 1");
  const at::InferenceMode no_gradients;
  const Model model = load_for_running(options.run, plugins);
  const std::string device = resolve_device(options.run.device);
  const engine::Precision precision = resolve_precision(options.run.dtype, device);
  const data::Dataset dataset = data::Dataset::open(options.data);
  check_classes(model.file, options.run.model.string(), dataset);
  io::keep_inputs(options.predictions, {options.run.model, options.data});
  PredictionsFile predictions(options.predictions);

  EvalResult result;
  result.arch = model.file.config.arch;
  result.merge = merge_label(model);
  result.device = device;
  result.dtype = engine::precision_name(precision);
  result.macs = nn::count_macs(model.file.config, tokens_after(model));
  result.parameters = parameter_count(model);
  result.provenance = model.file.provenance;
  if (model.file.config.num_classes > 5) result.correct_top5 = 0;

  data::SplitReader reader(dataset, options.split, model.file.preprocess, options.bad_images);
  const auto engine = make_engine(model, device, precision, options.run.exact_gelu);
  Score score(result, options);
  Pipeline pipeline(*engine,
                    [&](const data::ImageSet& set, const at::Tensor& logits) { score.add(set, logits, predictions); });
  const auto start = Clock::now();
  result.skipped = pipeline.run(reader, options.batch, "eval", progress, [&] { return score.note(); });
  result.images_per_second = double(result.images) / seconds_since(start);
  result.forward_images_per_second = pipeline.images_per_second();
  result.loss = score.loss();
  predictions.commit();
  return result;
}

}  // namespace pyra::tasks
