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

  [[nodiscard]] std::optional<PlanRecipe> recipe(int64_t block, const Schedule& schedule,
                                                 const TensorMap&) const override {
    return PlanRecipe{.remove = schedule.remove[size_t(block)], .partition = partition_};
  }

 private:
  Partition partition_;
};

}  // namespace

PYRA_MERGE_PLUGIN(Tome, "tome", "1.0", "Bipartite soft matching of the keys, without training (ToMe, arXiv 2210.09461)")
