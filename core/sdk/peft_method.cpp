#include "sdk/peft_method.h"

#include "base/error.h"

namespace pyra::sdk {

std::string LinearSite::name() const {
  const char* layer = "";
  switch (kind) {
    case LinearKind::qkv:
      layer = "attn.qkv";
      break;
    case LinearKind::proj:
      layer = "attn.proj";
      break;
    case LinearKind::fc1:
      layer = "mlp.fc1";
      break;
    case LinearKind::fc2:
      layer = "mlp.fc2";
      break;
  }
  return cat("blocks.", block, ".", layer);
}

// Out of line, so that one vtable and one typeinfo, the core's, serve every plugin.
PeftMethod::~PeftMethod() = default;

std::vector<TensorDecl> PeftMethod::declare(const ModelShape&) const {
  return {};
}

bool PeftMethod::trains(std::string_view) const {
  return false;
}

std::optional<LowRank> PeftMethod::low_rank(const LinearSite&, const TensorMap&) const {
  return std::nullopt;
}

bool PeftMethod::adapts(const LinearSite&) const {
  return false;
}

at::Tensor PeftMethod::adapt(const LinearSite& site, const at::Tensor&, const at::Tensor&, const TensorMap&) const {
  fail(ExitCode::plugin, "the PEFT method says that it adapts ", site.name(), " but has no adapt()");
}

LinearDelta PeftMethod::delta(const LinearSite& site, const TensorMap& learned) const {
  const auto term = low_rank(site, learned);
  if (!term) return {};
  return {.weight = at::matmul(term->b, term->a) * term->scale, .bias = {}};
}

std::string PeftMethod::adapter_config(const ModelShape&) const {
  return "{}";
}

}  // namespace pyra::sdk
