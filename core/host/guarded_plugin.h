// Objects of plugins whose methods run under guard() (base/guard.h): what they throw is Error(plugin) with the plugin,
// the method and the place, and what they answer is checked where the core would only run into it later.
#pragma once
#include <memory>
#include <string>

#include "sdk/peft_method.h"
#include "sdk/token_merger.h"

namespace pyra::host {

/// Checked besides: resolve() leaves its own result as it is (a model file keeps the resolved schedule, which is
/// resolved again when it is read), acts() holds wherever tokens leave, declared tensors have names and extents.
[[nodiscard]] std::shared_ptr<const sdk::TokenMerger> guarded(std::shared_ptr<const sdk::TokenMerger> merger,
                                                              const std::string& name);
/// Checked besides: declared tensors, as above, and that a low-rank term fits its layer.
[[nodiscard]] std::shared_ptr<const sdk::PeftMethod> guarded(std::shared_ptr<const sdk::PeftMethod> method,
                                                             const std::string& name);

}  // namespace pyra::host
