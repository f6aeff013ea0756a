// Any file that a model can be read from, as one of our model files: the only way in for pickles.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/progress.h"
#include "host/plugin_registry.h"

namespace pyra::tasks {

struct ConvertOptions {
  std::filesystem::path file;          ///< of torch.save, or whatever read_model reads
  std::filesystem::path out;           ///< the model file to write
  std::optional<int64_t> num_heads{};  ///< where neither names nor shapes tell
  std::filesystem::path base;          ///< the backbone of a PYRA checkpoint without one; "" for none
  std::vector<std::string> set;        ///< preprocess.resize, .mean, .std
};

struct ConvertReport {
  std::filesystem::path out;
  std::string source;  ///< "torch.save (zip), 'model'"
  std::string arch, merge, pool, resize;
  int64_t image_size = 0, depth = 0, embed_dim = 0, num_heads = 0, num_classes = 0;
  std::vector<double> mean{}, std{};
  int64_t parameters = 0, macs = 0;
  uint64_t file_bytes = 0;
};

/// Files of torch.save are read in a confined process (confined.h), which leaves their tensors as safetensors in a
/// folder beside `out`; from there timm's names, or those of PYRA's authors, become a model. Without word from the file
/// the architecture is taken from the file's name where it fits ("deit_small_patch16_224-cd65a155.pth"), and with it
/// ImageNet's mean and std for DeiT and MAE. The model is put together once, merger and all, before it is written.
/// Errors: input for what the file is or lacks; usage for --base without need, output over the input, keys of `set`.
[[nodiscard]] ConvertReport convert(const ConvertOptions& options, const host::PluginRegistry& plugins,
                                    Progress& progress = silent_progress());

[[nodiscard]] std::string to_json(const ConvertReport& report);

}  // namespace pyra::tasks
