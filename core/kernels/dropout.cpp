// Dropout masks and the dropout operation.
#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/philox.h"
#include "kernels/linear_path.h"

namespace pyra::kernels {
namespace {

struct DropoutFunction : torch::autograd::Function<DropoutFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, double p, int64_t seed,
                            int64_t domain) {
    context->saved_data["p"] = p;
    context->saved_data["seed"] = seed;
    context->saved_data["domain"] = domain;
    return masked(x, {p, uint64_t(seed), uint64_t(domain)});
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list dys) {
    const Dropout options{context->saved_data["p"].toDouble(), uint64_t(context->saved_data["seed"].toInt()),
                          uint64_t(context->saved_data["domain"].toInt())};
    return {masked(dys[0], options), {}, {}, {}};
  }

  static at::Tensor masked(const at::Tensor& x, const Dropout& options) {
    return x * dropout_multipliers(options, x.numel()).view(x.sizes()).to(x.scalar_type());
  }
};

}  // namespace

uint32_t dropout_threshold(const Dropout& options) {
  return std::min<uint32_t>(65535, uint32_t(std::lround(options.p * 65536)));
}

float dropout_scale(const Dropout& options) {
  return 65536.0f / float(65536 - dropout_threshold(options));
}

at::Tensor dropout_multipliers(const Dropout& options, int64_t count) {
  const uint32_t threshold = dropout_threshold(options);
  const float kept = dropout_scale(options);
  const Philox random(options.seed, RandomStream::dropout, options.domain);
  at::Tensor result = at::empty({count}, at::kFloat);
  float* multipliers = result.data_ptr<float>();
  constexpr int64_t kBlocksPerTask = 1024;
  at::parallel_for(0, (count + 7) / 8, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const auto words = random.block(uint64_t(block));
      const int64_t first = block * 8;
      for (int64_t i = 0; i < std::min<int64_t>(8, count - first); ++i) {
        const uint32_t half = (words[size_t(i / 2)] >> (16 * (i % 2))) & 0xFFFF;
        multipliers[first + i] = half >= threshold ? kept : 0.0f;
      }
    }
  });
  return result;
}

at::Tensor dropout(const at::Tensor& x, const Dropout& options) {
  if (!(options.p >= 0 && options.p < 1)) {
    fail(ExitCode::internal, "dropout: p is ", options.p, ", expected 0 <= p < 1");
  }
  if (options.p == 0) return x;
  return DropoutFunction::apply(x, options.p, int64_t(options.seed), int64_t(options.domain));
}

}  // namespace pyra::kernels
