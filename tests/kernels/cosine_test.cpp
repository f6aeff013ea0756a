#include "kernels/cosine.h"

#include <cmath>
#include <numeric>

#include "support.h"

using namespace pyra;
using kernels::Isa;
using kernels::Partner;

namespace {

std::vector<int32_t> range(int32_t begin, int32_t count) {
  std::vector<int32_t> all(static_cast<size_t>(count));
  std::iota(all.begin(), all.end(), begin);
  return all;
}

/// The instruction sets this CPU has.
std::vector<Isa> sets() {
  std::vector<Isa> all{Isa::baseline};
  if (kernels::widest_isa() >= Isa::avx2) all.push_back(Isa::avx2);
  if (kernels::widest_isa() >= Isa::avx512) all.push_back(Isa::avx512);
  return all;
}

std::vector<Partner> search(const at::Tensor& tokens, const std::vector<int32_t>& rows,
                            const std::vector<int32_t>& candidates, Isa isa) {
  std::vector<Partner> out(rows.size());
  kernels::CosineSearch().run(tokens.const_data_ptr<float>(), tokens.size(1), rows, candidates, out, isa);
  return out;
}

}  // namespace

TEST_CASE("every instruction set finds the same partners", "[cosine]") {
  const auto rows = GENERATE(1, 3, 4, 5, 31);
  const auto candidates = GENERATE(1, 15, 16, 17, 32, 33, 70);
  const auto width = GENERATE(1, 16, 37);
  auto generator = at::detail::createCPUGenerator(uint64_t(rows * 1000 + candidates));
  const auto tokens = at::randn({rows + candidates, width}, generator, at::TensorOptions());
  const auto unit = (tokens / tokens.norm(2, {-1}, true)).to(at::kDouble);
  const auto scores = at::matmul(unit.narrow(0, 0, rows), unit.narrow(0, rows, candidates).t());
  for (const Isa isa : sets()) {
    CAPTURE(rows, candidates, width, int(isa));
    const auto found = search(tokens, range(0, rows), range(rows, candidates), isa);
    for (int64_t i = 0; i < rows; ++i) {
      const double best = scores[i].max().item<double>();
      CHECK(std::abs(found[size_t(i)].cosine - best) < 1e-6);
      CHECK(std::abs(scores[i][found[size_t(i)].column].item<double>() - best) < 1e-6);
    }
  }
}

TEST_CASE("the first of equal candidates is the partner, wherever it stands", "[cosine]") {
  const auto first = GENERATE(0, 1, 15, 16, 31, 32, 47, 60);
  auto generator = at::detail::createCPUGenerator(3);
  auto tokens = at::randn({65, 24}, generator, at::TensorOptions());
  // The row's own direction stands among the candidates at `first` and at every later place but some.
  for (int64_t i = first; i < 64; i += 3) tokens[1 + i] = tokens[0] * 2;
  for (const Isa isa : sets()) {
    CAPTURE(first, int(isa));
    const auto found = search(tokens, {0, 0, 0, 0, 0}, range(1, 64), isa);
    for (const Partner& partner : found) {
      CHECK(partner.column == first);
      CHECK(partner.cosine == found[0].cosine);
    }
  }
}
