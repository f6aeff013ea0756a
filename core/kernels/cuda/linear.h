// Linear layers on the device: y = act(x Wᵀ + b), or residual + x Wᵀ + b; and their way back, x W. By cuBLASLt but for
// few rows on Hopper (linear_paths.h).
//
// Of the algorithms that cuBLASLt proposes for a shape, each is timed as a pass meets it, with the weights in memory,
// and the fastest kept, in a file too (gemm_cache.h), so that later processes run the same one: a result is then
// bit-equal from run to run.
#pragma once
#include <cublasLt.h>

#include <array>
#include <map>
#include <memory>

#include "kernels/cuda/cuda_call.h"
#include "kernels/cuda/gemm_cache.h"

namespace pyra::kernels::cuda {

enum class MatrixMath {
  exact,  ///< fp32 inputs: true fp32. bf16 and fp16 inputs: products summed in fp32
  tf32,   ///< fp32 inputs rounded to tf32 on the way into the tensor cores
};

enum class Epilogue {
  none,
  gelu_tanh,       ///< GELU's tanh form, inside the matrix product. Up to 4.7e-4 from the exact one
  gelu_tanh_keep,  ///< likewise, and what it was applied to is kept in `activation` for the way back
  gelu_tanh_back,  ///< y = (x W) gelu'(activation)
};

/// Rows of a matrix may lie further apart than they are long: LoRA's thin product stands in the columns behind.
struct LinearCall {
  const void* x = nullptr;         ///< [rows,in] of `compute`
  const void* weight = nullptr;    ///< [out,in] of `compute`; [in,out] if `transposed`
  const void* bias = nullptr;      ///< [out] of y's type, or null
  const void* residual = nullptr;  ///< [rows,out] of `result`, or null; may be y
  void* y = nullptr;               ///< [rows,out] of `result`
  void* activation = nullptr;      ///< [rows,out] of `compute`, y's stride: see Epilogue
  int rows = 0, in = 0, out = 0;
  int x_stride = 0, weight_stride = 0, y_stride = 0;  ///< elements from row to row; 0: none is left out
  bool transposed = false;  ///< y = x W of the layer whose weight this is: the gradient of its input
  DType compute = DType::bf16, result = DType::bf16;
  MatrixMath math = MatrixMath::exact;
  Epilogue epilogue = Epilogue::none;
  /// Where awaits_tally(): x is written once this is whole, and what was written before x is there when the launch is
  /// admitted. Other ways wait for all that is in front in the stream.
  Tally x_there = {};
};

/// Whether LinearRunner::run() goes a way that heeds x_there.
[[nodiscard]] bool awaits_tally(const LinearCall& call);

/// One per stream: two matrix products at the same time would share the workspace.
class LinearRunner {
 public:
  /// Allocates the workspace. Without a cache no algorithm is timed: a shape takes cuBLASLt's first. Throws
  /// Error(device) where cuBLASLt does not start.
  explicit LinearRunner(std::shared_ptr<GemmCache> cache);
  ~LinearRunner();
  LinearRunner(const LinearRunner&) = delete;
  LinearRunner& operator=(const LinearRunner&) = delete;

  /// Enqueues the layer. The first call with a shape chooses its algorithm: it synchronises, overwrites y and takes
  /// twice the L2 cache's size of memory meanwhile, where there is as much. Later ones neither allocate nor synchronise
  /// and may be captured into a graph. Throws Error(device) for a shape that cuBLASLt has no algorithm for.
  void run(const LinearCall& call, cudaStream_t stream);

 private:
  struct Plan;
  Plan& plan_of(const LinearCall& call, cudaStream_t stream);
  void choose(Plan& plan, const LinearCall& call, const std::string& key, cudaStream_t stream);
  cublasStatus_t launch(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const LinearCall& call,
                        cudaStream_t stream) const;

  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  std::shared_ptr<GemmCache> cache_;
  std::map<std::array<int64_t, 12>, std::unique_ptr<Plan>> plans_;
};

}  // namespace pyra::kernels::cuda
