// Full fine-tuning: every tensor of the model trains in place. The yardstick of the others; give it a lower rate.
#include "sdk/plugin.h"

namespace {

using namespace pyra::sdk;

class Full final : public PeftMethod {
 public:
  static std::vector<Parameter> parameters() { return {}; }
  explicit Full(const Parameters&) {}

  [[nodiscard]] bool trains(std::string_view) const override { return true; }

  [[nodiscard]] bool mergeable() const override { return true; }
};

}  // namespace

PYRA_PEFT_PLUGIN(Full, "full", "1.0", "Trains every tensor of the model in place")
