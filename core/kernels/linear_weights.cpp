// Packed layouts of a linear layer's weights.
#include <array>
#include <mutex>
#include <type_traits>
#include <utility>

#include "base/error.h"
#include "kernels/cpu_kernel.h"
#include "kernels/linear.h"
#include "kernels/linear_packed.h"
#include "kernels/simd/simd.h"

namespace pyra::kernels {

struct LinearWeights::State {
  at::Tensor weight, bias;
  std::mutex mutex;
  std::array<std::shared_ptr<const Packed>, 4> packed;  // [bf16?][transposed?]
};

LinearWeights::LinearWeights(at::Tensor weight, at::Tensor bias) : state_(std::make_shared<State>()) {
  if (!weight.defined() || weight.dim() != 2) {
    fail(ExitCode::internal, "LinearWeights: weight is not a matrix [out,in]");
  }
  state_->weight = std::move(weight);
  state_->bias = std::move(bias);
}

const at::Tensor& LinearWeights::weight() const {
  return state_->weight;
}
const at::Tensor& LinearWeights::bias() const {
  return state_->bias;
}

void LinearWeights::invalidate() {
  const std::lock_guard lock(state_->mutex);
  state_->packed = {};
}

namespace {

/// Writes M [k,n], whose element (i,j) is source[i * row + j * column], as panels; see LinearWeights::Packed.
template <class T>
void write_panels(const float* source, int64_t row, int64_t column, int64_t k, int64_t n, int64_t panel, T* panels) {
  constexpr int64_t kGroup = std::is_same_v<T, float> ? 1 : 2;
  const int64_t groups = (k + kGroup - 1) / kGroup;
  for (int64_t j = 0; j < n; ++j) {
    T* target = panels + j / panel * groups * panel * kGroup + j % panel * kGroup;
    for (int64_t i = 0; i < k; ++i) {
      target[i / kGroup * panel * kGroup + i % kGroup] = T(source[i * row + j * column]);
    }
  }
}

int64_t panel_columns() {
#if defined(PYRA_SIMD_X86)
  return simd::micro().panel;
#else
  return 1;  // there are no micro-kernels to read panels
#endif
}

}  // namespace

std::shared_ptr<const LinearWeights::Packed> pack(const at::Tensor& weight, at::ScalarType compute, bool transposed) {
  at::Tensor master = weight.detach().contiguous();
  if (compute == at::kBFloat16 && cpu_kernel() != CpuKernel::avx512_bf16) {
    master = master.to(at::kBFloat16).to(at::kFloat);
    compute = at::kFloat;
  }
  const int64_t out = master.size(0), in = master.size(1);
  auto packed = std::make_shared<LinearWeights::Packed>();
  packed->k = transposed ? out : in;
  packed->n = transposed ? in : out;
  const int64_t row = transposed ? in : 1, column = transposed ? 1 : in;
  const int64_t panel = panel_columns(), columns = (packed->n + panel - 1) / panel * panel;
  const int64_t depth = compute == at::kBFloat16 ? packed->k + packed->k % 2 : packed->k;
  packed->panels = at::zeros({columns * depth}, compute);
  const float* source = master.const_data_ptr<float>();
  if (compute == at::kBFloat16) {
    write_panels(source, row, column, packed->k, packed->n, panel, packed->panels.data_ptr<at::BFloat16>());
  } else {
    write_panels(source, row, column, packed->k, packed->n, panel, packed->panels.data_ptr<float>());
  }
  return packed;
}

std::shared_ptr<const LinearWeights::Packed> LinearWeights::packed(at::ScalarType compute, bool transposed) const {
  if (state_->weight.requires_grad()) return pack(state_->weight, compute, transposed);
  const std::lock_guard lock(state_->mutex);
  auto& slot = state_->packed[(compute == at::kBFloat16 ? 2 : 0) + (transposed ? 1 : 0)];
  if (!slot) slot = pack(state_->weight, compute, transposed);
  return slot;
}

}  // namespace pyra::kernels
