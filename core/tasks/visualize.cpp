#include "tasks/visualize.h"

#include "base/error.h"
#include "data/loader.h"
#include "io/atomic_file.h"
#include "io/markup.h"
#include "tasks/assemble.h"
#include "tasks/eval.h"

namespace pyra::tasks {
namespace fs = std::filesystem;
namespace {

constexpr int64_t kVisualizeBatch = 16;

std::string page_name(size_t number) {
  const std::string digits = std::to_string(number);
  return "image-" + std::string(digits.size() < 4 ? 4 - digits.size() : 0, '0') + digits + ".html";
}

data::Image image_of(const at::Tensor& pixels) {
  const at::Tensor dense = pixels.contiguous();
  const uint8_t* first = dense.const_data_ptr<uint8_t>();
  return {dense.size(0), dense.size(1), {first, first + dense.numel()}};
}

/// Writes a page an image, and at the end the index.
class Gallery {
 public:
  Gallery(const VisualizeOptions& options, const Model& model, const data::Dataset& dataset)
      : options_(options), model_(model), names_(model.file.class_names) {
    if (names_.empty()) names_ = dataset.class_names();
    std::error_code error;
    fs::create_directories(options.out, error);
    if (error) fail(ExitCode::output, options.out.string(), ": cannot be created: ", error.message());
  }

  /// The images of `set`, up to the number that was asked for.
  void add(const data::ImageSet& set) {
    const TokenTrace trace = trace_tokens(*model_.vit, nn::normalise(set.images, model_.file.preprocess));
    const at::Tensor probabilities = trace.logits.to(at::kDouble).softmax(1);
    for (int64_t i = 0; i < set.labels.size(0); ++i) {
      if (!probabilities[i].isfinite().all().item<bool>())
        fail(ExitCode::untrusted, options_.run.model.string(), ": the result for ", set.paths[size_t(i)],
             " is not finite; the model's weights are damaged or its training diverged");
      const int64_t best = probabilities[i].argmax().item<int64_t>();
      write({.path = set.paths[size_t(i)],
             .label = names_[size_t(set.labels[i].item<int64_t>())],
             .prediction = names_[size_t(best)],
             .model = model_name(),
             .probability = probabilities[i][best].item<double>(),
             .image = image_of(set.images[i]),
             .patch_size = model_.file.config.patch_size,
             .protected_tokens = model_.file.config.protected_tokens(),
             .blocks = trace.images[size_t(i)]});
    }
  }

  [[nodiscard]] int64_t size() const { return int64_t(report_.pages.size()); }

  VisualizeReport finish() && {
    io::Markup page = io::open_page("Tokens of " + model_name());
    page.element("h1", "Tokens of " + model_name());
    page.element("p", {{"class", "dim"}}, "Data " + options_.data.string() + ", split " + options_.split);
    page.open("ol");
    for (const auto& [name, text] : entries_) {
      page.open("li");
      page.element("a", {{"href", name}}, text);
      page.close();
    }
    report_.index = options_.out / "index.html";
    io::write_file(report_.index, std::move(page).take());
    return std::move(report_);
  }

 private:
  [[nodiscard]] std::string model_name() const {
    return options_.run.model.filename().string() + " (" + merge_label(model_) + ")";
  }

  void write(const TokenPicture& picture) {
    const std::string name = page_name(report_.pages.size() + 1);
    io::write_file(options_.out / name, to_html(picture));
    report_.pages.push_back(options_.out / name);
    const bool correct = picture.label == picture.prediction;
    entries_.emplace_back(name,
                          picture.path + ": " + picture.label + (correct ? "" : ", taken for " + picture.prediction));
  }

  const VisualizeOptions& options_;
  const Model& model_;
  std::vector<std::string> names_;
  VisualizeReport report_;
  std::vector<std::pair<std::string, std::string>> entries_;  ///< page and link text
};

}  // namespace

VisualizeReport visualize(const VisualizeOptions& options, const host::PluginRegistry& plugins, Progress& progress) {
  if (options.images < 1 || options.images > kMaxVisualized)
    fail(ExitCode::usage, "--visualize is ", options.images, ", expected 1 to ", kMaxVisualized);
  const at::InferenceMode no_gradients;
  const Model model = load_for_running(options.run, plugins);
  if (!model.vit->merge())
    fail(ExitCode::usage, options.run.model.string(),
         " merges no tokens, so there is nothing to visualize: compress it, or name a merger as in --set "
         "merge.name=tome --set merge.schedule=high");
  const data::Dataset dataset = data::Dataset::open(options.data);
  check_classes(model.file, options.run.model.string(), dataset);
  data::SplitReader reader(dataset, options.split, model.file.preprocess, options.bad_images);
  Gallery gallery(options, model, dataset);
  const int64_t wanted = std::min(options.images, reader.total());
  progress.begin("visualize", wanted, "images");
  while (gallery.size() < wanted) {
    stop_if_asked("visualize");
    const std::optional<data::ImageSet> set = reader.next(std::min(kVisualizeBatch, wanted - gallery.size()));
    if (!set) break;
    if (set->labels.size(0) > 0) gallery.add(*set);
    progress.update(gallery.size());
  }
  progress.end();
  return std::move(gallery).finish();
}

}  // namespace pyra::tasks
