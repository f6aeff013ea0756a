#include "tasks/convert.h"

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "base/descriptor.h"
#include "base/error.h"
#include "io/hf_model.h"
#include "io/npz.h"
#include "io/output_path.h"
#include "io/pyra_checkpoint.h"
#include "io/recipe.h"
#include "io/safetensors.h"
#include "io/timm_folder.h"
#include "io/timm_model.h"
#include "io/torch_file.h"
#include "tasks/assemble.h"
#include "tasks/confined.h"
#include "tasks/run_model.h"

namespace pyra::tasks {
namespace fs = std::filesystem;
namespace {

// Beyond three times the file (storages, their copies, what is written) for names and values of its pickle.
constexpr uint64_t kMemoryMargin = uint64_t{1} << 30, kFileMargin = uint64_t{64} << 20;
constexpr uint64_t kCpuSeconds = 60, kBytesPerSecond = uint64_t{20} << 20;
constexpr const char *kKeyEntry = "key", *kArchEntry = "arch", *kContainerEntry = "container";

/// A folder beside the output that goes away with all that is in it.
class Scratch {
 public:
  explicit Scratch(const fs::path& out) {
    const fs::path folder = out.parent_path().empty() ? fs::path(".") : out.parent_path();
    std::string name = (folder / ".pyra-convert-XXXXXX").string();
    if (!mkdtemp(name.data()))
      fail(ExitCode::output, out.string(), ": no folder can be made beside it: ", system_reason(errno));
    path_ = name;
  }
  ~Scratch() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  [[nodiscard]] const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

/// The tensors of a file of torch.save, as the confined process wrote them to `to`.
void unpack_torch_file(const fs::path& file, const fs::path& to) {
  const uint64_t bytes = regular_size(open_for_reading(file), file);
  const Confinement limits{.memory_bytes = 3 * bytes + kMemoryMargin,
                           .file_bytes = 2 * bytes + kFileMargin,
                           .cpu_seconds = kCpuSeconds + bytes / kBytesPerSecond};
  run_confined(limits, file.string(), [&] {
    const io::TorchCheckpoint checkpoint = io::read_torch_file(file);
    io::write_safetensors(
        to, checkpoint.tensors,
        {{kKeyEntry, checkpoint.key}, {kArchEntry, checkpoint.arch}, {kContainerEntry, checkpoint.container}});
  });
}

/// Shapes do not tell a DeiT from a ViT, nor what either was trained with: names do. `said` is the file's own word;
/// `stated`: the file has its mean in its metadata.
void name_model(io::ModelFile& model, const std::string& said, const fs::path& file, bool stated) {
  nn::VitConfig& config = model.config;
  std::string stem = file.stem().string();
  stem = stem.substr(0, stem.find_first_of("-."));
  for (const std::string& name : {said, stem}) {
    const auto known = io::named_arch(name);
    const bool fits = known && known->embed_dim == config.embed_dim && known->depth == config.depth &&
                      known->patch_size == config.patch_size;
    // MAE's published files are called mae_pretrain_vit_base and the like.
    if (!stated && (fits ? io::has_imagenet_statistics(name) : !known && name.starts_with("mae_"))) {
      model.preprocess.mean = io::kImageNetMean;
      model.preprocess.std = io::kImageNetStd;
    }
    if (fits && config.arch.empty() && known->distilled == config.distilled && known->pool == config.pool)
      config.arch = name;
  }
  if (config.arch.empty()) config.arch = nn::arch_name(config);
}

class Converter {
 public:
  Converter(const ConvertOptions& options, const host::PluginRegistry& plugins) : options_(options) {
    if (!options.base.empty()) base_ = load_model(options.base, plugins).file;
  }

  io::ModelFile read() {
    if (io::is_torch_file(options_.file)) return from_torch();
    if (io::is_hf_folder(options_.file) || io::is_npz(options_.file)) return whole();
    const io::SafetensorsFile file(options_.file);
    const io::NamedTensors named = io::named_tensors(file);
    return file.metadata().contains("pyra") ? whole() : from_names(named, "");
  }

  [[nodiscard]] const std::string& source() const { return source_; }

 private:
  io::ModelFile whole() {
    refuse_base();
    source_ = io::is_timm_folder(options_.file) ? "timm's folder"
              : io::is_hf_folder(options_.file) ? "Hugging Face folder"
              : io::is_npz(options_.file)       ? "npz"
                                                : "safetensors";
    return io::read_model(options_.file, {.image_size = {}, .num_heads = options_.num_heads});
  }

  io::ModelFile from_torch() {
    const Scratch scratch(options_.out);
    const fs::path unpacked = scratch.path() / "tensors.safetensors";
    unpack_torch_file(options_.file, unpacked);
    try {
      return from_unpacked(unpacked);
    } catch (const Error& error) {  // of a file that the user has never seen
      std::string text = error.what();
      if (text.starts_with(unpacked.string())) text.replace(0, unpacked.string().size(), options_.file.string());
      throw Error(error.code(), text);
    }
  }

  io::ModelFile from_unpacked(const fs::path& unpacked) {
    const io::SafetensorsFile file(unpacked);
    io::NamedTensors named = io::named_tensors(file);
    named.where = options_.file.string();
    named.metadata.clear();
    const std::string& key = file.metadata().at(kKeyEntry);
    source_ = cat("torch.save (", file.metadata().at(kContainerEntry), ")", key.empty() ? "" : ", '" + key + "'");
    return from_names(named, file.metadata().at(kArchEntry));
  }

  io::ModelFile from_names(const io::NamedTensors& named, const std::string& said) {
    const io::ReadModelOptions read{.image_size = {}, .num_heads = options_.num_heads};
    const bool trained = io::is_pyra_checkpoint(named);
    if (!trained) refuse_base();
    if (source_.empty()) source_ = "safetensors";
    io::ModelFile model =
        trained ? io::pyra_checkpoint_model(named, base_ ? &*base_ : nullptr, read) : io::timm_model(named, read);
    if (trained && base_) io::begin_provenance(model, "base", options_.base);
    name_model(model, said, options_.file, named.metadata.contains("mean"));
    if (trained) source_ += ", PYRA's authors' names";
    return model;
  }

  void refuse_base() const {
    if (base_)
      fail(ExitCode::usage, options_.file.string(),
           ": holds no LoRA or PYRA tensors of the authors' names, so there is nothing to put on --base ",
           options_.base.string());
  }

  const ConvertOptions& options_;
  std::optional<io::ModelFile> base_;
  std::string source_;
};

void check_out(const ConvertOptions& options) {
  if (options.out.empty()) fail(ExitCode::usage, "no file to write: give --out MODEL");
  io::keep_inputs(options.out, {options.file, options.base});
}

ConvertReport report_on(const Model& model, const ConvertOptions& options, const std::string& source) {
  const nn::VitConfig& config = model.file.config;
  const nn::Preprocess& preprocess = model.file.preprocess;
  return {.out = options.out,
          .source = source,
          .arch = config.arch,
          .merge = merge_label(model),
          .pool = config.pool == nn::Pool::avg ? "avg" : "token",
          .resize = preprocess.mode == nn::ResizeMode::crop ? "crop" : "squash",
          .image_size = config.image_size,
          .depth = config.depth,
          .embed_dim = config.embed_dim,
          .num_heads = config.num_heads,
          .num_classes = config.num_classes,
          .mean = {preprocess.mean.begin(), preprocess.mean.end()},
          .std = {preprocess.std.begin(), preprocess.std.end()},
          .parameters = parameter_count(model),
          .macs = nn::count_macs(config, tokens_after(model)),
          .file_bytes = fs::file_size(options.out)};
}

}  // namespace

ConvertReport convert(const ConvertOptions& options, const host::PluginRegistry& plugins, Progress& progress) {
  check_out(options);
  check_keys(options.set, {"preprocess.resize", "preprocess.mean", "preprocess.std"});
  const io::Recipe asked = io::read_recipe({}, options.set);
  const at::NoGradGuard no_gradients;
  progress.note(cat("reading ", options.file.string()));
  Converter converter(options, plugins);
  io::ModelFile file = converter.read();
  change_preprocess(file.preprocess, asked);
  file.provenance["converted_from"] = options.file.filename().string();
  file.provenance["pyractl"] = PYRA_VERSION;
  const Model model = make_model(std::move(file), plugins, options.file.string());
  check_finite(model, options.file);
  io::write_model(options.out, model.file);
  return report_on(model, options, converter.source());
}

std::string to_json(const ConvertReport& r) {
  return nlohmann::json{{"out", r.out.string()},
                        {"source", r.source},
                        {"arch", r.arch},
                        {"merge", r.merge},
                        {"pool", r.pool},
                        {"image_size", r.image_size},
                        {"depth", r.depth},
                        {"embed_dim", r.embed_dim},
                        {"num_heads", r.num_heads},
                        {"num_classes", r.num_classes},
                        {"preprocess", {{"resize", r.resize}, {"mean", r.mean}, {"std", r.std}}},
                        {"params", r.parameters},
                        {"macs", r.macs},
                        {"file_bytes", r.file_bytes}}
      .dump(2, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace pyra::tasks
