#include "tasks/assemble.h"

#include <numeric>

#include "base/error.h"
#include "engine/cuda_library.h"
#include "kernels/linear.h"

namespace pyra::tasks {
namespace {

std::unique_ptr<nn::MergeSetup> make_setup(const io::MergeSpec& spec, const host::PluginRegistry& plugins,
                                           const std::string& where) {
  auto setup = std::make_unique<nn::MergeSetup>();
  setup->name = spec.name;
  setup->merger = plugins.merger(spec.name, spec.parameters, where);
  setup->schedule = spec.schedule;
  setup->learned = spec.learned;
  setup->proportional_attention = spec.proportional_attention;
  return setup;
}

}  // namespace

Model load_model(const std::filesystem::path& path, const host::PluginRegistry& plugins,
                 const io::ReadModelOptions& options) {
  try {
    return make_model(io::read_model(path, options), plugins, path.string());
  } catch (const Error& error) {
    if (error.code() != ExitCode::usage || options.image_size) throw;
    throw Error(ExitCode::input, error.what());  // nothing was asked for: the file is at fault
  }
}

Model make_model(io::ModelFile file, const host::PluginRegistry& plugins, const std::string& where) {
  Model model{.file = std::move(file), .vit = nullptr};
  try {
    model.vit = std::make_unique<nn::Vit>(model.file.config, model.file.weights);
    if (model.file.merge) {
      // Resolved when it was written; resolving again checks what a file claims.
      io::MergeSpec& spec = *model.file.merge;
      auto setup = make_setup(spec, plugins, where + ": merge");
      setup->schedule = spec.schedule = setup->merger->resolve(spec.schedule, model.file.config.shape());
      model.vit->set_merge(std::move(setup));
    }
  } catch (const Error& error) {
    const std::string text = error.what();
    if (text.starts_with(where)) throw;
    throw Error(error.code(), where + ": " + text);
  }
  return model;
}

Model arch_model(const std::string& arch, uint64_t seed) {
  Model model;
  model.file.config = nn::arch_config(arch);
  model.file.preprocess.size = model.file.config.image_size;
  model.file.weights = nn::random_weights(model.file.config, seed);
  model.vit = std::make_unique<nn::Vit>(model.file.config, model.file.weights);
  return model;
}

void attach_merge(Model& model, const host::PluginRegistry& plugins, const io::PluginChoice& merge,
                  const std::string& schedule, bool proportional_attention, std::optional<uint64_t> fresh_seed) {
  attach_merge(model, plugins, merge, nn::parse_schedule(schedule, model.file.config), proportional_attention,
               fresh_seed);
}

void attach_merge(Model& model, const host::PluginRegistry& plugins, const io::PluginChoice& merge,
                  const sdk::Schedule& schedule, bool proportional_attention, std::optional<uint64_t> fresh_seed) {
  io::MergeSpec spec{.name = merge.name,
                     .schedule = {},
                     .parameters = merge.parameters,
                     .proportional_attention = proportional_attention,
                     .learned = {}};
  const sdk::ModelShape shape = model.file.config.shape();
  auto setup = make_setup(spec, plugins, merge.where.empty() ? "merge '" + merge.name + "'" : merge.where);
  spec.schedule = setup->merger->resolve(schedule, shape);
  const auto declared = setup->merger->declare(shape, spec.schedule);
  if (!declared.empty() && !fresh_seed)
    fail(ExitCode::usage, "merger '", merge.name, "' works with tensors that are trained (", declared.size(),
         " of them), and this model has none: train it with 'pyractl finetune --set merge.name=", merge.name, "'");
  for (const sdk::TensorDecl& decl : declared) spec.learned.emplace(decl.name, nn::make_tensor(decl, *fresh_seed));
  setup->schedule = spec.schedule;
  setup->learned = spec.learned;
  model.vit->set_merge(std::move(setup));
  model.file.merge = std::move(spec);
}

void detach_merge(Model& model) {
  model.vit->set_merge(nullptr);
  model.file.merge.reset();
}

void check_finite(const Model& model, const std::filesystem::path& path) {
  const auto check = [&](const sdk::TensorMap& tensors) {
    for (const auto& [name, tensor] : tensors)
      if (!tensor.isfinite().all().item<bool>())
        fail(ExitCode::untrusted, path.string(), ": tensor '", name,
             "' holds values that are not finite; the file is damaged or its training diverged");
  };
  check(model.file.weights);
  if (model.file.merge) check(model.file.merge->learned);
}

void attach_peft(Model& model, const host::PluginRegistry& plugins, const io::PluginChoice& peft, uint64_t seed) {
  auto setup = std::make_unique<nn::PeftSetup>();
  setup->name = peft.name;
  setup->method =
      plugins.peft(peft.name, peft.parameters, peft.where.empty() ? "peft '" + peft.name + "'" : peft.where);
  for (const sdk::TensorDecl& decl : setup->method->declare(model.file.config.shape()))
    setup->learned.emplace(decl.name, nn::make_tensor(decl, seed));
  model.vit->set_peft(std::move(setup));
}

std::vector<int64_t> tokens_after(const Model& model) {
  return model.vit->tokens_after();
}

std::string merge_label(const Model& model) {
  if (!model.file.merge) return "dense";
  return model.file.merge->name + "-" + model.file.merge->schedule.text;
}

int64_t parameter_count(const Model& model) {
  int64_t count = 0;
  for (const auto& [name, tensor] : model.vit->weights()) count += tensor.numel();
  if (model.file.merge)
    for (const auto& [name, tensor] : model.file.merge->learned) count += tensor.numel();
  return count;
}

std::string resolve_device(const std::string& device) {
  if (device == "cpu") return device;
  const engine::CudaLibrary& cuda = engine::cuda_library();
  if (device == "auto") return cuda.first_is_usable() ? "cuda:0" : "cpu";
  const bool known = device == "cuda" || (device.starts_with("cuda:") && device.size() > 5 && device.size() < 9 &&
                                          device.find_first_not_of("0123456789", 5) == std::string::npos);
  if (!known) fail(ExitCode::usage, "--device ", device, ": expected auto, cpu, cuda or cuda:N");
  const std::string full = device == "cuda" ? "cuda:0" : device;
  cuda.check_device(full);
  return full;
}

engine::Precision resolve_precision(const std::string& dtype, const std::string& device) {
  if (device == "cpu") return compute_dtype(dtype) == at::kBFloat16 ? engine::Precision::bf16 : engine::Precision::fp32;
  using engine::Precision;
  if (dtype == "auto") return Precision::bf16;
  for (const Precision precision : {Precision::fp32, Precision::tf32, Precision::bf16, Precision::fp16})
    if (dtype == engine::precision_name(precision)) return precision;
  fail(ExitCode::usage, "--dtype ", dtype, ": expected auto, fp32, tf32, bf16 or fp16");
}

std::unique_ptr<engine::Engine> make_engine(const Model& model, const std::string& device, engine::Precision precision,
                                            bool exact_gelu, bool deterministic) {
  return engine::make_engine(
      *model.vit, model.file.preprocess,
      {.device = device, .precision = precision, .exact_gelu = exact_gelu, .deterministic = deterministic});
}

at::ScalarType compute_dtype(const std::string& dtype) {
  if (dtype == "fp32") return at::kFloat;
  if (dtype == "bf16") return at::kBFloat16;
  // Where the kernels do not multiply in bf16, the conversions cost more than the halved traffic saves.
  if (dtype == "auto")
    return std::string_view(kernels::cpu_micro_kernel()) == "avx512-bf16" ? at::kBFloat16 : at::kFloat;
  if (dtype == "tf32" || dtype == "fp16")
    fail(ExitCode::usage, "--dtype ", dtype, " is a GPU's; the CPU computes in fp32 or bf16");
  fail(ExitCode::usage, "--dtype ", dtype, ": expected auto, fp32, tf32, bf16 or fp16");
}

std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "fp32";
    case at::kBFloat16:
      return "bf16";
    default:
      return c10::toString(dtype);
  }
}

}  // namespace pyra::tasks
