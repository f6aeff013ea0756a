#include "sdk/bipartite.h"

#include "base/philox.h"
#include "kernels/match.h"

namespace pyra::sdk {
namespace {

/// As many tokens as the alternating split puts in A, protected tokens where it puts them, the others drawn.
std::vector<int64_t> random_side_a(int64_t tokens, int64_t protected_tokens, uint64_t seed) {
  const Philox random(seed, RandomStream::partition, uint64_t(tokens));
  const int64_t protected_in_a = (protected_tokens + 1) / 2;
  const int64_t drawn = (tokens + 1) / 2 - protected_in_a;
  std::vector<int64_t> order = random.permutation(tokens - protected_tokens);
  std::vector<int64_t> side;
  for (int64_t i = 0; i < protected_in_a; ++i) side.push_back(2 * i);
  for (int64_t i = 0; i < drawn; ++i) side.push_back(protected_tokens + order[size_t(i)]);
  std::sort(side.begin(), side.end());
  return side;
}

}  // namespace

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
  std::vector<int64_t> side_a;
  if (partition.random) side_a = random_side_a(metric.size(1), protected_tokens, partition.seed);
  auto matching = kernels::match_bipartite(metric, r, protected_tokens, side_a);
  return {.keep = std::move(matching.keep), .src = std::move(matching.src), .dst = std::move(matching.dst)};
}

}  // namespace pyra::sdk
