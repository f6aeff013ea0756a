// Linear probe: the head trains and nothing else, so the features are the pretrained ones. The lower yardstick.
#include "sdk/plugin.h"

namespace {

using namespace pyra::sdk;

class LinearProbe final : public PeftMethod {
 public:
  static std::vector<Parameter> parameters() { return {}; }
  explicit LinearProbe(const Parameters&) {}

  // Declares no tensor and trains none of the model's: the head trains anyway.
  [[nodiscard]] bool mergeable() const override { return true; }
};

}  // namespace

PYRA_PEFT_PLUGIN(LinearProbe, "linear_probe", "1.0", "Trains the head alone: the features stay the pretrained ones")
