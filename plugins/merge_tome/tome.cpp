// Token merging (ToMe, arXiv 2210.09461): in every block the r tokens of one side that are most like their partner
// on the other side merge into it, weighted by how many patches each stands for. Nothing is trained.
#include "sdk/bipartite.h"
#include "sdk/plugin.h"

namespace {

using namespace pyra::sdk;

class Tome final : public TokenMerger {
 public:
  static std::vector<Parameter> parameters() { return partition_parameters(); }
  explicit Tome(const Parameters& parameters) : partition_(partition_from(parameters)) {}

  [[nodiscard]] Needs needs() const override { return {.key_mean = true}; }

  [[nodiscard]] MergePlan plan(const MergeInputs& in, const Schedule& schedule) const override {
    return bipartite_plan(in.key_mean, schedule.remove[size_t(in.block)], in.protected_tokens, partition_);
  }

 private:
  Partition partition_;
};

}  // namespace

PYRA_MERGE_PLUGIN(Tome, "tome", "1.0", "Bipartite soft matching of the keys, without training (ToMe, arXiv 2210.09461)")
