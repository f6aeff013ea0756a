// A `tome` that plans every block many times over and keeps the last plan: equal results, several times the work.
// What `bench --compare` has to notice. Built for the tests into a folder of its own, never installed.
#include "sdk/bipartite.h"
#include "sdk/plugin.h"

namespace {

using namespace pyra::sdk;

class OverworkedTome final : public TokenMerger {
 public:
  static std::vector<Parameter> parameters() { return partition_parameters(); }
  explicit OverworkedTome(const Parameters& parameters) : partition_(partition_from(parameters)) {}

  [[nodiscard]] Needs needs() const override { return {.key_mean = true}; }

  [[nodiscard]] MergePlan plan(const MergeInputs& in, const Schedule& schedule) const override {
    constexpr int kTimes = 1000;
    MergePlan plan;
    for (int time = 0; time < kTimes; ++time)
      plan = bipartite_plan(in.key_mean, schedule.remove[size_t(in.block)], in.protected_tokens, partition_);
    return plan;
  }

 private:
  Partition partition_;
};

}  // namespace

PYRA_MERGE_PLUGIN(OverworkedTome, "tome", "1.0", "ToMe with its matching done again and again: for the tests of bench")
