#include "tasks/merge_lora.h"

#include <unistd.h>

#include "base/error.h"
#include "base/philox.h"
#include "io/atomic_file.h"
#include "io/hf_model.h"
#include "io/json.h"
#include "tasks/run_folder.h"

namespace pyra::tasks {
namespace fs = std::filesystem;
namespace {

constexpr int64_t kVerifyImages = 8;
constexpr size_t kMaxReport = size_t{1} << 20;

/// Stands before a merger and remembers its plans, or makes it follow remembered ones.
class PlanRecorder final : public sdk::TokenMerger {
 public:
  using Plans = std::map<int64_t, sdk::MergePlan>;
  PlanRecorder(std::shared_ptr<const sdk::TokenMerger> merger, Plans& plans, int64_t* moved)
      : merger_(std::move(merger)), plans_(plans), moved_(moved) {}

  sdk::Needs needs() const override { return merger_->needs(); }
  sdk::Schedule resolve(const sdk::Schedule& s, const sdk::ModelShape& m) const override {
    return merger_->resolve(s, m);
  }
  std::vector<int64_t> tokens_after(const sdk::Schedule& s, const sdk::ModelShape& m) const override {
    return merger_->tokens_after(s, m);
  }
  std::vector<sdk::TensorDecl> declare(const sdk::ModelShape& m, const sdk::Schedule& s) const override {
    return merger_->declare(m, s);
  }
  bool conserves_size() const override { return merger_->conserves_size(); }

  sdk::MergePlan plan(const sdk::MergeInputs& in, const sdk::Schedule& schedule) const override {
    sdk::MergePlan plan = merger_->plan(in, schedule);
    if (!moved_) {
      plans_[in.block] = plan;
      return plan;
    }
    const auto found = plans_.find(in.block);
    if (found == plans_.end()) return plan;
    const sdk::MergePlan& before = found->second;
    if (at::equal(plan.keep, before.keep) && at::equal(plan.src, before.src) && at::equal(plan.dst, before.dst)) {
      return plan;
    }
    ++*moved_;
    sdk::MergePlan followed = before;
    followed.gate = plan.gate;  // its tensors are the file's, and have to be compared
    return followed;
  }

 private:
  std::shared_ptr<const sdk::TokenMerger> merger_;
  Plans& plans_;
  int64_t* moved_;  // null while recording
};

/// A model that shares everything with `model` but looks through a PlanRecorder.
nn::Vit observed(const nn::Vit& model, PlanRecorder::Plans& plans, int64_t* moved) {
  nn::Vit copy(model.config(), model.weights());
  if (const nn::PeftSetup* peft = model.peft()) copy.set_peft(std::make_unique<nn::PeftSetup>(*peft));
  if (const nn::MergeSetup* merge = model.merge()) {
    auto setup = std::make_unique<nn::MergeSetup>(*merge);
    setup->merger = std::make_shared<PlanRecorder>(merge->merger, plans, moved);
    copy.set_merge(std::move(setup));
  }
  return copy;
}

at::Tensor noise(int64_t size) {
  at::Tensor images = at::empty({kVerifyImages, 3, size, size}, at::kFloat);
  const Philox random(0, RandomStream::verify);
  float* data = images.data_ptr<float>();
  at::parallel_for(0, images.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) data[i] = random.normal(uint64_t(i));
  });
  return images;
}

io::ModelFormat parse_format(const std::string& format) {
  if (format == "pyra") return io::ModelFormat::pyra;
  if (format == "timm") return io::ModelFormat::timm;
  if (format == "hf") return io::ModelFormat::hf;
  fail(ExitCode::usage, "--format ", format, ": expected pyra, timm or hf");
}

/// The tuned model as the run left it.
Model open_run(const RunFolder& run, const host::PluginRegistry& plugins, std::string& peft_name) {
  if (!fs::is_directory(run.path)) fail(ExitCode::input, run.path.string(), ": is no run folder");
  const AdapterInfo info = read_adapter_info(run);
  const io::Recipe recipe = io::read_recipe(run.recipe(), {});
  peft_name = recipe.peft.name.empty() ? "none" : recipe.peft.name;
  Model model = make_tuned_model(recipe, info.classes, plugins);
  load_adapter(run, model, info);
  model.file.provenance["base"] = recipe.model.filename().string();
  model.file.provenance["peft"] = peft_name;
  return model;
}

/// What the run's report says of the result goes with the model.
void add_provenance(const RunFolder& run, io::ModelFile& file) {
  file.provenance["pyractl"] = PYRA_VERSION;
  if (!fs::exists(run.report())) return;
  const nlohmann::json report = io::read_json(run.report(), kMaxReport);
  if (!report.is_object()) return;
  for (const char* key : {"protocol", "test_selected", "accuracy", "test_split", "train_split", "seed", "lr"}) {
    const auto found = report.find(key);
    if (found != report.end()) file.provenance[key] = found->is_string() ? found->get<std::string>() : found->dump();
  }
}

/// A file, or a Hugging Face folder, that goes away unless it was given its final name.
class Unverified {
 public:
  Unverified(const fs::path& target, io::ModelFormat format)
      : target_(target),
        path_(target.parent_path() / cat(".", target.stem().string(), ".", getpid(), ".unverified",
                                         format == io::ModelFormat::hf ? "" : ".safetensors")) {}
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

}  // namespace

Verification verify_model(const fs::path& path, const nn::Vit& reference, const host::PluginRegistry& plugins) {
  const at::NoGradGuard no_gradients;
  // A timm file does not tell the number of heads.
  const Model written = load_model(path, plugins, {.image_size = {}, .num_heads = reference.config().num_heads});
  const at::Tensor images = noise(reference.config().image_size);
  Verification result{.images = kVerifyImages};
  PlanRecorder::Plans plans;
  const at::Tensor expected = observed(reference, plans, nullptr).forward(images);
  const at::Tensor got = observed(*written.vit, plans, &result.moved_plans).forward(images);
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
  const io::ModelFormat format = parse_format(options.format);
  if (options.out.empty()) fail(ExitCode::usage, "no file to write: give --out MODEL");
  if (format == io::ModelFormat::hf && fs::exists(options.out))
    fail(ExitCode::usage, options.out.string(),
         ": is there already; a Hugging Face folder is written anew: give another --out");
  const at::NoGradGuard no_gradients;
  const RunFolder run{options.run};
  MergeLoraReport report{.out = options.out, .format = options.format};
  Model model = open_run(run, plugins, report.peft);
  if (options.drop_merge) detach_merge(model);
  if (format != io::ModelFormat::pyra && model.file.merge) {
    fail(ExitCode::usage, run.path.string(), ": its model merges tokens (", merge_label(model), ") and --format ",
         options.format, " cannot say so; --drop-merge writes it without, --format pyra with");
  }
  io::ModelFile file = model.file;
  file.weights = nn::merged_weights(*model.vit);
  add_provenance(run, file);
  progress.note(cat("merging ", report.peft, " into ", file.config.arch));
  Unverified written(options.out, format);
  io::write_model(written.path(), file, format);
  report.verification = verify_model(written.path(), *model.vit, plugins);
  report.file_bytes = fs::file_size(format == io::ModelFormat::hf ? written.path() / io::kHfWeights : written.path());
  written.take_name();
  report.arch = file.config.arch;
  report.merge = merge_label(model);
  report.parameters = parameter_count(model);
  report.macs = nn::count_macs(file.config, tokens_after(model));
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
      .dump(2);
}

}  // namespace pyra::tasks
