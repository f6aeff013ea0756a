// A model on disk: one safetensors file whose metadata entry "pyra" (JSON) is enough to run it anywhere.
// timm's files and folders (same tensor names, no such entry), Google's .npz and Hugging Face folders are read too.
#pragma once
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "nn/config.h"
#include "nn/preprocess.h"
#include "sdk/parameters.h"
#include "sdk/tensor_decl.h"

namespace pyra::io {

struct NamedTensors;

/// The merge strategy a model carries. Tensors stand in the file as "merge.<name>.<declared name>".
struct MergeSpec {
  std::string name;
  sdk::Schedule schedule;  ///< resolved
  std::map<std::string, sdk::ParameterValue> parameters;
  bool proportional_attention = true;
  sdk::TensorMap learned;
};

struct ModelFile {
  nn::VitConfig config;
  nn::Preprocess preprocess;
  std::vector<std::string> class_names;  ///< empty or num_classes long
  std::optional<MergeSpec> merge;
  sdk::TensorMap weights;                         ///< fp32, timm's names
  std::map<std::string, std::string> provenance;  ///< free text kept in the file: protocol, base, command
};

/// For a model made from another, whose file `origin` is: provenance becomes {how: its name} and base_KEY for each KEY
/// that stood there, so that nobody takes the one's accuracy for the other's. What was a base_KEY already goes.
void begin_provenance(ModelFile& model, const std::string& how, const std::filesystem::path& origin);

struct ReadModelOptions {
  /// Position embeddings are resized (bicubic, antialiased, as timm) when this differs from the file's.
  std::optional<int64_t> image_size{};
  std::optional<int64_t> num_heads{};  ///< for files whose names and shapes do not tell
};

/// Reads ours, timm's, Google's .npz (augreg_model.h), or a folder of the Hugging Face hub (hf_model.h,
/// timm_folder.h); Error(input) names file, tensor, got, expected. Half-precision weights become fp32. A config is
/// inferred from shapes where no metadata says it (heads: as the metadata say, or the architecture they name, or a
/// published model of that size; else of 64 channels). A pickle is never read here (torch_file.h).
[[nodiscard]] ModelFile read_model(const std::filesystem::path& path, const ReadModelOptions& options = {});

/// A model from tensors with timm's names, `options.image_size` left aside: the road of every file but ours and Hugging
/// Face's. Wrappers' prefixes (module., _orig_mod.) are taken off.
[[nodiscard]] ModelFile timm_model(const NamedTensors& named, const ReadModelOptions& options = {});

enum class ModelFormat { pyra, timm, hf };
/// Atomic, but for hf, which is a new folder (hf_model.h). timm and hf cannot carry a merge: Error(usage) when the
/// model has one (pass it without).
void write_model(const std::filesystem::path& path, const ModelFile& model, ModelFormat format = ModelFormat::pyra);

}  // namespace pyra::io
