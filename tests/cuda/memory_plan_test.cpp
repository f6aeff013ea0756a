#include "engine/cuda/memory_plan.h"

#include <algorithm>
#include <random>

#include "catch.h"

using pyra::engine::MemoryPlan;

namespace {

struct Buffer {
  size_t bytes;
  int first, last;
};

MemoryPlan planned(const std::vector<Buffer>& buffers) {
  MemoryPlan plan;
  for (const Buffer& b : buffers) plan.add(b.bytes, b.first, b.last);
  plan.place();
  return plan;
}

/// Every two that are needed at once lie apart, all inside, at aligned places.
void check_places(const MemoryPlan& plan, const std::vector<Buffer>& buffers) {
  for (size_t i = 0; i < buffers.size(); ++i) {
    const Buffer& a = buffers[i];
    CAPTURE(i, a.bytes, a.first, a.last, plan.offset(i));
    REQUIRE(plan.offset(i) % MemoryPlan::kAlignment == 0);
    REQUIRE(plan.offset(i) + a.bytes <= plan.bytes());
    for (size_t k = 0; k < i; ++k) {
      const Buffer& b = buffers[k];
      const bool at_once = a.first <= b.last && b.first <= a.last && a.bytes > 0 && b.bytes > 0;
      const bool apart = plan.offset(i) + a.bytes <= plan.offset(k) || plan.offset(k) + b.bytes <= plan.offset(i);
      REQUIRE((!at_once || apart));
    }
  }
}

}  // namespace

TEST_CASE("buffers that are needed at once lie apart, whatever they are", "[memory_plan]") {
  std::mt19937 random(GENERATE(range(0u, 40u)));
  const auto upto = [&](int n) { return int(random() % unsigned(n)); };
  std::vector<Buffer> buffers;
  for (int i = upto(120); i >= 0; --i) {
    const int first = upto(60);
    buffers.push_back({size_t(upto(5) == 0 ? upto(3) : upto(100000)), first, first + upto(30)});
  }
  const MemoryPlan plan = planned(buffers);
  check_places(plan, buffers);
  CHECK(plan.bytes() >= plan.least_bytes());
}

TEST_CASE("a place is used again as soon as it is free, and not before", "[memory_plan]") {
  CHECK(planned({{1000, 0, 1}, {1024, 2, 3}, {512, 4, 4}}).bytes() == 1024);
  CHECK(planned({{1024, 0, 2}, {1024, 2, 3}}).bytes() == 2048);
  CHECK(planned({}).bytes() == 0);
  CHECK(planned({{0, 0, 5}}).bytes() == 0);
}

TEST_CASE("memory of a pass forward and back is within a twentieth of what no plan can go below", "[memory_plan]") {
  // As a network of 12 blocks leaves and takes them: what is saved, and what passes from a block to the next.
  std::vector<Buffer> buffers;
  for (int i = 0; i < 12; ++i) {
    const int forward = 4 * i, back = 100 - 4 * i;
    const size_t row = size_t(197 - 12 * i) * 1000;
    for (const size_t saved : {row, 3 * row, row, 4 * row}) buffers.push_back({saved, forward + 1, back - 1});
    for (const size_t passing : {row, 4 * row}) {
      buffers.push_back({passing, forward + 2, forward + 4});
      buffers.push_back({passing, back - 4, back - 2});
    }
  }
  const MemoryPlan plan = planned(buffers);
  check_places(plan, buffers);
  CHECK(double(plan.bytes()) <= 1.05 * double(plan.least_bytes()));
}
