// Seeded tensors and comparisons that the kernels' tests share.
#pragma once
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>

#include <filesystem>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cpu_kernel.h"
#include "support.h"

namespace pyra::test {

/// Standard normal values times `scale`, the same for the same seed.
[[nodiscard]] inline at::Tensor seeded(at::IntArrayRef shape, uint64_t seed, double scale = 1.0) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn(shape, generator, at::kFloat) * scale;
}

/// max |a - b| / max |b|, in double; infinity when shapes differ or either has a NaN.
[[nodiscard]] inline double relative_difference(const at::Tensor& a, const at::Tensor& b) {
  const double largest = b.numel() == 0 ? 0.0 : b.to(at::kDouble).abs().max().item<double>();
  return max_difference(a, b) / std::max(largest, 1e-30);
}

/// What relative_difference may be: fp32 sums in another order, bf16 rounded to 8 bits.
[[nodiscard]] inline double tolerance(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? 1e-2 : 1e-5;
}

/// Runs `body` with `threads` threads.
inline void with_threads(int threads, const std::function<void()>& body) {
  const int before = at::get_num_threads();
  at::set_num_threads(threads);
  body();
  at::set_num_threads(before);
}

/// Gradients of sum(output * cotangent) with respect to `inputs`.
[[nodiscard]] inline std::vector<at::Tensor> gradients_of(const at::Tensor& output, const at::Tensor& cotangent,
                                                          const std::vector<at::Tensor>& inputs) {
  return torch::autograd::grad({output}, inputs, {cotangent});
}

/// The paths that this CPU has beside the one that this process takes, as PYRA_CPU_KERNEL names them.
[[nodiscard]] inline std::vector<std::string> other_kernels() {
  const std::vector<std::string> rising{"aten", "avx2", "avx512", "avx512-bf16"};
  std::vector<std::string> others;
  for (size_t i = 0; i <= size_t(kernels::most_capable_cpu_kernel()); ++i)
    if (i != size_t(kernels::cpu_kernel())) others.push_back(rising[i]);
  return others;
}

/// Runs this test program's cases of `tag` again with PYRA_CPU_KERNEL=`kernel`; what it did.
[[nodiscard]] inline RunResult rerun_with_kernel(const std::string& kernel, const std::string& tag) {
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  return run({"/usr/bin/env", "PYRA_CPU_KERNEL=" + kernel, self, tag + "~[rerun]"});
}

}  // namespace pyra::test
