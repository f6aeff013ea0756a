// What a plugin may know of the model it works in: numbers, no tensors.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace pyra::sdk {

struct ModelShape {
  int64_t depth = 0;             ///< blocks
  int64_t embed_dim = 0;         ///< C
  int64_t num_heads = 0;         ///< H; head dimension is C / H
  int64_t mlp_dim = 0;           ///< width of the hidden layer of the MLP
  int64_t tokens = 0;            ///< N at the entrance of block 0, protected tokens included
  int64_t protected_tokens = 1;  ///< leading tokens that never merge: class, and distillation if there is one
  int64_t num_classes = 0;
};

/// How many tokens leave in each block. `remove` is what merging strategies use; `prune` and `merge`
/// (kept counts, class token included) are DiffRate's. Vectors are empty or `depth` long.
struct Schedule {
  std::string text;  ///< as the user wrote it: "high", "13", "16,8,4", "file.toml"
  std::vector<int64_t> remove;
  std::vector<int64_t> prune;
  std::vector<int64_t> merge;
  bool operator==(const Schedule&) const = default;
};

}  // namespace pyra::sdk
