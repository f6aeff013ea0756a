// BitFit (arXiv 2106.10199): only the biases train, in place, so there is nothing to merge and nothing to add.
#include "sdk/plugin.h"

namespace {

using namespace pyra::sdk;

class BitFit final : public PeftMethod {
 public:
  static std::vector<Parameter> parameters() { return {}; }
  explicit BitFit(const Parameters&) {}

  /// Every bias of the backbone; the head trains anyway.
  [[nodiscard]] bool trains(std::string_view parameter) const override { return parameter.ends_with(".bias"); }

  [[nodiscard]] bool mergeable() const override { return true; }
};

}  // namespace

PYRA_PEFT_PLUGIN(BitFit, "bitfit", "1.0", "Trains the biases in place (BitFit, arXiv 2106.10199)")
