#include "sdk/bipartite.h"

#include "kernels/match.h"

namespace pyra::sdk {

std::vector<Parameter> partition_parameters() {
  return {
      {.name = "partition",
       .default_value = std::string("alternating"),
       .help = "which tokens may leave: every other one, or a random half (fixed by partition_seed)",
       .choices = {"alternating", "random"}},
      {.name = "partition_seed", .default_value = int64_t{0}, .help = "seed of the random partition", .minimum = 0}};
}

Partition partition_from(const Parameters& parameters) {
  return {.random = parameters.string("partition") == "random", .seed = uint64_t(parameters.integer("partition_seed"))};
}

MergePlan bipartite_plan(const at::Tensor& metric, int64_t r, int64_t protected_tokens, const Partition& partition) {
  const std::vector<int64_t> side = side_a(partition, metric.size(1), protected_tokens);
  auto matching = kernels::match_bipartite(metric, r, protected_tokens, side);
  return {.keep = std::move(matching.keep), .src = std::move(matching.src), .dst = std::move(matching.dst)};
}

}  // namespace pyra::sdk
