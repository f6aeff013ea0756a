// Checkpoints of the PYRA authors' program (arXiv 2403.09192): timm's names with LoRA's and PYRA's tensors among them.
#pragma once
#include "io/model_file.h"
#include "io/named_tensors.h"

namespace pyra::io {

/// Whether tensors of the authors' names are among these: "blocks.0.attn.LoRA_a.weight", "blocks.0.pyra_a".
[[nodiscard]] bool is_pyra_checkpoint(const NamedTensors& named);

/// One of our models: LoRA merged into qkv in fp32 (W += B·A, scale 1, as the authors' program computes it), PYRA's
/// tensors as the merger "pyra" with the schedule that the rows of `pyra_a` are (0 where a block has none), mean and
/// std of ImageNet as in their scripts. The backbone is the checkpoint's own, or `base`'s (its head gives way to the
/// checkpoint's). Error(usage) when neither has one, or `base` merges tokens itself; Error(input) naming file and
/// tensor: one that is missing beside its like, is of another shape, belongs to no block, has more rows than tokens can
/// merge there.
[[nodiscard]] ModelFile pyra_checkpoint_model(const NamedTensors& named, const ModelFile* base,
                                              const ReadModelOptions& options = {});

}  // namespace pyra::io
