// LayerNorm by the micro-kernels: a thread takes a block of rows; sums over rows run over fixed groups of blocks.
#include "kernels/layer_norm_path.h"
#include "kernels/parallel.h"
#include "kernels/simd/simd.h"

namespace pyra::kernels {
namespace {

constexpr int64_t kBlockRows = 256;
constexpr int64_t kGroups = 16;

}  // namespace

LayerNormForward layer_norm_forward_simd(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                         double eps, at::ScalarType out_dtype, bool keep) {
  const int64_t rows = x.size(0), c = x.size(1), blocks = (rows + kBlockRows - 1) / kBlockRows;
  LayerNormForward result;
  result.y = at::empty({rows, c}, out_dtype);
  if (keep) result.mean = at::empty({rows}, at::kFloat), result.rstd = at::empty({rows}, at::kFloat);
  parallel_tasks(blocks, [&](const auto& next) {
    for (int64_t block = next(); block < blocks; block = next()) {
      const int64_t first = block * kBlockRows;
      simd::LayerNormCall call;
      call.x = x.const_data_ptr<float>() + first * c;
      call.weight = weight.const_data_ptr<float>();
      call.bias = bias.const_data_ptr<float>();
      call.c = c;
      call.eps = float(eps);
      call.y_bf16 = out_dtype == at::kBFloat16;
      call.y = static_cast<char*>(result.y.data_ptr()) + first * c * result.y.element_size();
      if (keep) {
        call.mean = result.mean.data_ptr<float>() + first;
        call.rstd = result.rstd.data_ptr<float>() + first;
      }
      simd::micro().layer_norm(call, std::min(kBlockRows, rows - first));
    }
  });
  return result;
}

LayerNormGradients layer_norm_backward_simd(const LayerNormBackward& saved, const LayerNormWanted& wanted) {
  const int64_t rows = saved.x.size(0), c = saved.x.size(1), blocks = (rows + kBlockRows - 1) / kBlockRows;
  const bool sums_wanted = wanted.weight || wanted.bias;
  const int64_t groups = sums_wanted ? std::min(kGroups, blocks) : blocks;
  at::Tensor sums = sums_wanted ? at::zeros({groups, 2, c}, at::kFloat) : at::Tensor();
  LayerNormGradients result;
  if (wanted.x) result.x = at::empty({rows, c}, at::kFloat);
  parallel_tasks(groups, [&](const auto& next) {
    for (int64_t group = next(); group < groups; group = next()) {
      const int64_t first = group * blocks / groups * kBlockRows;
      const int64_t end = std::min(rows, (group + 1) * blocks / groups * kBlockRows);
      simd::LayerNormBackwardCall call;
      call.dy = static_cast<const char*>(saved.dy.const_data_ptr()) + first * c * saved.dy.element_size();
      call.dy_bf16 = saved.dy.scalar_type() == at::kBFloat16;
      call.x = saved.x.const_data_ptr<float>() + first * c;
      call.weight = saved.weight.const_data_ptr<float>();
      call.mean = saved.mean.const_data_ptr<float>() + first;
      call.rstd = saved.rstd.const_data_ptr<float>() + first;
      call.c = c;
      if (wanted.x) call.dx = result.x.data_ptr<float>() + first * c;
      if (wanted.weight) call.dweight = sums.data_ptr<float>() + group * 2 * c;
      if (wanted.bias) call.dbias = sums.data_ptr<float>() + (group * 2 + 1) * c;
      simd::micro().layer_norm_backward(call, end - first);
    }
  });
  if (sums_wanted) {
    const at::Tensor total = sums.sum(0);
    if (wanted.weight) result.weight = total[0];
    if (wanted.bias) result.bias = total[1];
  }
  return result;
}

}  // namespace pyra::kernels
