#include "tasks/merge_lora.h"

#include <unistd.h>

#include "base/error.h"
#include "base/philox.h"
#include "io/atomic_file.h"
#include "io/hf_model.h"
#include "io/json.h"
#include "io/output_path.h"
#include "io/peft_adapter.h"
#include "tasks/peft_adapter.h"
#include "tasks/plan_recorder.h"
#include "tasks/run_folder.h"

namespace pyra::tasks {
namespace fs = std::filesystem;
namespace {

constexpr int64_t kVerifyImages = 8;
constexpr size_t kMaxProvenanceReport = size_t{1} << 20;

at::Tensor noise(int64_t size) {
  at::Tensor images = at::empty({kVerifyImages, 3, size, size}, at::kFloat);
  const Philox random(0, RandomStream::verify);
  float* data = images.data_ptr<float>();
  at::parallel_for(0, images.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) data[i] = random.normal(uint64_t(i));
  });
  return images;
}

/// What --format names.
struct Format {
  const char* name;
  std::optional<io::ModelFormat> model{};  ///< a merged model, …
  std::optional<io::PeftNames> adapter{};  ///< … or an adapter
  [[nodiscard]] bool is_folder() const { return adapter || *model == io::ModelFormat::hf; }
  [[nodiscard]] bool for_transformers() const {
    return adapter ? *adapter != io::PeftNames::timm : *model == io::ModelFormat::hf;
  }
};
constexpr Format kFormats[] = {{"pyra", io::ModelFormat::pyra},    {"timm", io::ModelFormat::timm},
                               {"hf", io::ModelFormat::hf},        {"peft", {}, io::PeftNames::timm},
                               {"peft-hf", {}, io::PeftNames::hf}, {"peft-hf4", {}, io::PeftNames::hf4}};

const Format& parse_format(const std::string& name) {
  for (const Format& format : kFormats)
    if (name == format.name) return format;
  fail(ExitCode::usage, "--format ", name, ": expected pyra, timm or hf, or peft, peft-hf or peft-hf4 for an adapter");
}

/// What cannot be looked at is not there either: whoever opens it says why.
bool is_there(const fs::path& path) {
  std::error_code error;
  return fs::exists(path, error);
}

/// The tuned model before merging, and what is to be known of the run it comes from.
struct Tuned {
  Model model;
  std::string peft;
  io::Recipe recipe{};  ///< of a run
  std::optional<AdapterInfo> info{};
};

/// The tuned model as the run left it.
Tuned open_run(const RunFolder& run, const host::PluginRegistry& plugins) {
  if (std::error_code error; !fs::is_directory(run.path, error))
    fail(ExitCode::input, run.path.string(), ": is no run folder");
  // Not in the braces of its own: GCC 12 frees members twice when a later one's initialiser throws.
  Tuned tuned;
  tuned.info = read_adapter_info(run);
  tuned.recipe = io::read_recipe(run.recipe(), {});
  tuned.peft = tuned.recipe.peft.name.empty() ? "none" : tuned.recipe.peft.name;
  tuned.model = make_tuned_model(tuned.recipe, tuned.info->classes, plugins);
  load_adapter(run, tuned.model, *tuned.info);
  io::begin_provenance(tuned.model.file, "base", tuned.recipe.model);
  tuned.model.file.provenance["peft"] = tuned.peft;
  return tuned;
}

Tuned open_adapter(const MergeLoraOptions& options, const host::PluginRegistry& plugins, Progress& progress) {
  const std::string folder = options.run.string();
  if (options.model.empty())
    fail(ExitCode::usage, folder, ": is an adapter folder: give the model it was trained on with --model");
  if (parse_format(options.format).adapter)
    fail(ExitCode::usage, folder, ": is an adapter folder already; --format ", options.format,
         " writes the adapter of a run");
  if (is_there(options.run / kMergeTensors) && !options.drop_merge)
    fail(ExitCode::usage, folder, ": its model merges tokens (", kMergeTensors,
         "), and an adapter alone does not say how: give the run folder, or --drop-merge to leave the merger out");
  if (const fs::path run = fs::absolute(options.run / "").parent_path().parent_path();
      is_there(RunFolder{run}.recipe()))
    progress.note(cat("image size, normalisation and merger are those of ", options.model.string(),
                      "; `pyractl merge-lora ", run.string(), "` takes the run's own"));
  Tuned tuned;
  tuned.model = open_peft_adapter(options.run, options.model, plugins, progress);
  tuned.peft = "lora";
  return tuned;
}

Tuned open_tuned(const MergeLoraOptions& options, const host::PluginRegistry& plugins, Progress& progress) {
  // A run folder has its adapter in a folder of its own.
  if (io::is_peft_folder(options.run)) return open_adapter(options, plugins, progress);
  if (!options.model.empty() && is_there(RunFolder{options.run}.recipe()))
    fail(ExitCode::usage, options.run.string(), ": a run folder, which names its base model itself: leave --model out");
  if (!options.model.empty()) io::check_peft_folder(options.run);
  return open_run({options.run}, plugins);
}

/// What the run's report says of the result goes with the model.
void add_provenance(const RunFolder& run, io::ModelFile& file) {
  file.provenance["pyractl"] = PYRA_VERSION;
  if (!is_there(run.report())) return;
  const nlohmann::json report = io::read_json(run.report(), kMaxProvenanceReport);
  if (!report.is_object()) return;
  for (const char* key : {"protocol", "test_selected", "accuracy", "test_split", "train_split", "seed", "lr"}) {
    const auto found = report.find(key);
    if (found != report.end()) file.provenance[key] = found->is_string() ? found->get<std::string>() : found->dump();
  }
}

/// A link is followed and a last slash taken off, so that the rename stays within one folder.
fs::path final_place(const fs::path& target) {
  const fs::path named = target.has_filename() ? target : target.parent_path();
  std::error_code error;
  const fs::path real = fs::is_symlink(named, error) ? fs::weakly_canonical(named, error) : named;
  return error ? named : real;
}

/// A file or folder that goes away unless it was given its final name.
class Unverified {
 public:
  Unverified(const fs::path& target, bool folder)
      : target_(final_place(target)),
        path_(target_.parent_path() /
              cat(".", target_.stem().string(), ".", getpid(), ".unverified", folder ? "" : ".safetensors")) {}
  ~Unverified() {
    std::error_code ignored;
    if (!named_) fs::remove_all(path_, ignored);
  }
  Unverified(const Unverified&) = delete;
  Unverified& operator=(const Unverified&) = delete;
  [[nodiscard]] const fs::path& path() const { return path_; }
  void take_name() {
    io::move_file(path_, target_);
    named_ = true;
  }

 private:
  fs::path target_, path_;
  bool named_ = false;
};

void check_format(const Format& format, const MergeLoraOptions& options, const Model& model) {
  if (model.file.merge && (format.adapter || *format.model != io::ModelFormat::pyra))
    fail(ExitCode::usage, options.run.string(), ": its model merges tokens (", merge_label(model), ") and --format ",
         format.name, " cannot say so; --drop-merge writes it without, --format pyra with");
  if (format.adapter && format.for_transformers() && model.file.config.pool == nn::Pool::avg)
    fail(ExitCode::usage, options.run.string(),
         ": transformers' ViT has no average pooling; use --format peft, pyra or timm");
  if (format.adapter && format.for_transformers() && model.file.config.registers > 0)
    fail(ExitCode::usage, options.run.string(),
         ": transformers' ViT has no register tokens; use --format peft, pyra or timm");
}

/// Writes a run's LoRA, reads it back onto the base model and compares; the size of its tensor file.
uint64_t write_adapter_folder(const fs::path& path, const Format& format, const Tuned& tuned,
                              const host::PluginRegistry& plugins, Verification& verification) {
  const io::Recipe& recipe = tuned.recipe;
  const nn::VitConfig& config = tuned.model.file.config;
  const io::PeftNaming naming{.names = *format.adapter,
                              .model = format.for_transformers() ? hf_model_type(recipe.model, config) : ""};
  write_peft_adapter(path, tuned.model, {.naming = naming, .base = recipe.model}, *tuned.info);
  Model again = open_peft_adapter(path, recipe.model, plugins, silent_progress(), {.image_size = recipe.image_size});
  detach_merge(again);
  verification = verify_model(path, *again.vit, *tuned.model.vit);
  return fs::file_size(path / io::kPeftWeights);
}

/// The same for the merged model.
uint64_t write_merged(const fs::path& path, const Format& format, const MergeLoraOptions& options, const Tuned& tuned,
                      const host::PluginRegistry& plugins, Verification& verification) {
  io::ModelFile file = tuned.model.file;
  file.weights = nn::merged_weights(*tuned.model.vit);
  add_provenance({options.run}, file);
  io::write_model(path, file, *format.model);
  verification = verify_model(path, *tuned.model.vit, plugins);
  return fs::file_size(format.is_folder() ? path / io::kHfWeights : path);
}

}  // namespace

Verification verify_model(const fs::path& path, const nn::Vit& reference, const host::PluginRegistry& plugins) {
  // A timm file does not tell the number of heads.
  const Model written = load_model(path, plugins, {.image_size = {}, .num_heads = reference.config().num_heads});
  return verify_model(path, *written.vit, reference);
}

Verification verify_model(const fs::path& path, const nn::Vit& written, const nn::Vit& reference) {
  const at::NoGradGuard no_gradients;
  const at::Tensor images = noise(reference.config().image_size);
  Verification result{.images = kVerifyImages};
  Plans plans;
  const at::Tensor expected = observed(reference, plans).forward(images);
  const at::Tensor got = observed(written, plans, &result.moved_plans).forward(images);
  if (got.sizes() != expected.sizes()) {
    fail(ExitCode::untrusted, path.string(), ": gives logits ", got.sizes(), ", the tuned model ", expected.sizes());
  }
  result.max_difference = (got - expected).abs().max().item<double>();
  result.largest_logit = expected.abs().max().item<double>();
  if (!(result.relative() <= kVerifyTolerance)) {
    fail(ExitCode::untrusted, path.string(), ": the merged model is not the tuned one: logits differ by ",
         result.max_difference, " of at most ", result.largest_logit, ", relative ", result.relative(), ", allowed ",
         kVerifyTolerance, "; nothing was written under the name asked for");
  }
  return result;
}

MergeLoraReport merge_lora(const MergeLoraOptions& options, const host::PluginRegistry& plugins, Progress& progress) {
  const Format& format = parse_format(options.format);
  if (options.out.empty()) fail(ExitCode::usage, "no file to write: give --out MODEL");
  if (format.is_folder() && is_there(options.out))
    fail(ExitCode::usage, options.out.string(), ": is there already; a folder is written anew: give another --out");
  io::keep_inputs(options.out, {options.model});
  io::keep_inputs(options.out, RunFolder{options.run}.contents());
  const at::NoGradGuard no_gradients;
  Tuned tuned = open_tuned(options, plugins, progress);
  Model& model = tuned.model;
  if (options.drop_merge) detach_merge(model);
  check_format(format, options, model);
  progress.note(cat(format.adapter ? "writing " : "merging ", tuned.peft, format.adapter ? " of " : " into ",
                    model.file.config.arch));
  MergeLoraReport report{.out = options.out, .format = options.format};
  Unverified written(options.out, format.is_folder());
  report.file_bytes = format.adapter
                          ? write_adapter_folder(written.path(), format, tuned, plugins, report.verification)
                          : write_merged(written.path(), format, options, tuned, plugins, report.verification);
  written.take_name();
  report.arch = model.file.config.arch;
  report.merge = merge_label(model);
  report.peft = tuned.peft;
  report.parameters = parameter_count(model);
  report.macs = nn::count_macs(model.file.config, tokens_after(model));
  return report;
}

std::string to_json(const MergeLoraReport& r) {
  return nlohmann::json{{"out", r.out.string()},
                        {"format", r.format},
                        {"arch", r.arch},
                        {"merge", r.merge},
                        {"peft", r.peft},
                        {"params", r.parameters},
                        {"macs", r.macs},
                        {"file_bytes", r.file_bytes},
                        {"verification",
                         {{"images", r.verification.images},
                          {"max_difference", r.verification.max_difference},
                          {"largest_logit", r.verification.largest_logit},
                          {"relative", r.verification.relative()},
                          {"allowed", kVerifyTolerance},
                          {"moved_plans", r.verification.moved_plans}}}}
      .dump(2, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace pyra::tasks
