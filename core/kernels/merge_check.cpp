// What a plan from a plugin must satisfy before the merge kernel may trust its indices.
#include "base/text.h"
#include "kernels/merge.h"

namespace pyra::kernels {
namespace {

std::string shape_text(const at::Tensor& tensor) {
  if (!tensor.defined()) return "undefined";
  return cat(toString(tensor.scalar_type()), " [", join(std::span<const int64_t>(tensor.sizes())), "]",
             tensor.is_cpu() ? "" : " not on the CPU");
}

std::string check_tensor(const char* name, const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape) {
  if (tensor.defined() && tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.sizes() == shape) return {};
  return cat(name, " is ", shape_text(tensor), "; expected ", toString(dtype), " [",
             join(std::span<const int64_t>(shape)), "]");
}

std::string check_gate(const MergeGate& gate, int64_t merged) {
  std::string wrong = check_tensor("gate.a", gate.a, at::kFloat, {merged, 1});
  if (!wrong.empty()) return wrong;
  const int64_t width = gate.b.defined() && gate.b.dim() == 2 ? gate.b.size(1) : -1;
  if (width < 0) return cat("gate.b is ", shape_text(gate.b), "; expected Float [1,C]");
  wrong = check_tensor("gate.b", gate.b, at::kFloat, {1, width});
  if (wrong.empty()) wrong = check_tensor("gate.weight", gate.weight, at::kFloat, {width});
  if (wrong.empty()) wrong = check_tensor("gate.bias", gate.bias, at::kFloat, {width});
  if (wrong.empty() && !(gate.eps > 0)) wrong = cat("gate.eps is ", gate.eps, "; expected a positive number");
  return wrong;
}

std::string check_shapes(const MergeArguments& arguments, int64_t batch, int64_t expected_kept) {
  std::string wrong = check_tensor("keep", arguments.keep, at::kLong, {batch, expected_kept});
  if (!wrong.empty()) return wrong;
  const int64_t merged = arguments.src.defined() && arguments.src.dim() == 2 ? arguments.src.size(1) : 0;
  wrong = check_tensor("src", arguments.src, at::kLong, {batch, merged});
  if (wrong.empty()) wrong = check_tensor("dst", arguments.dst, at::kLong, {batch, merged});
  if (wrong.empty() && arguments.src_weight.defined()) {
    wrong = check_tensor("src_weight", arguments.src_weight, at::kFloat, {batch, merged});
  }
  if (wrong.empty() && arguments.src_size_scale.defined()) {
    wrong = check_tensor("src_size_scale", arguments.src_size_scale, at::kFloat, {batch, merged});
  }
  if (wrong.empty() && arguments.gate) wrong = check_gate(*arguments.gate, merged);
  return wrong;
}

/// Which tokens of an image were named, without clearing anything between images.
class Named {
 public:
  explicit Named(int64_t tokens) : last_image_(size_t(tokens), -1) {}
  /// "" when `token` exists and was not named before in this image.
  std::string add(const char* list, int64_t image, int64_t position, int64_t token) {
    if (token < 0 || token >= int64_t(last_image_.size())) {
      return cat("image ", image, ": ", list, "[", position, "] is ", token, "; the block has ", last_image_.size(),
                 " tokens");
    }
    if (last_image_[size_t(token)] == image) {
      return cat("image ", image, ": ", list, "[", position, "] names token ", token, " a second time");
    }
    last_image_[size_t(token)] = image;
    return {};
  }

 private:
  std::vector<int64_t> last_image_;
};

}  // namespace

std::string check_merge(const MergeArguments& arguments, int64_t batch, int64_t tokens, int64_t expected_kept,
                        int64_t protected_tokens) {
  std::string wrong = check_shapes(arguments, batch, expected_kept);
  if (!wrong.empty()) return wrong;
  const at::Tensor keep = arguments.keep.contiguous(), src = arguments.src.contiguous(),
                   dst = arguments.dst.contiguous();
  const int64_t merged = src.size(1);
  const int64_t* kept = keep.const_data_ptr<int64_t>();
  const int64_t* from = src.const_data_ptr<int64_t>();
  const int64_t* to = dst.const_data_ptr<int64_t>();
  Named named(tokens);
  for (int64_t image = 0; image < batch; ++image) {
    for (int64_t k = 0; k < expected_kept; ++k, ++kept) {
      if (k < protected_tokens && *kept != k) {
        return cat("image ", image, ": keep[", k, "] is ", *kept, "; protected token ", k, " must stay in place");
      }
      wrong = named.add("keep", image, k, *kept);
      if (!wrong.empty()) return wrong;
    }
    for (int64_t i = 0; i < merged; ++i, ++from, ++to) {
      wrong = named.add("src", image, i, *from);
      if (!wrong.empty()) return wrong;
      if (*to < 0 || *to >= expected_kept) {
        return cat("image ", image, ": dst[", i, "] is ", *to, "; ", expected_kept, " tokens are kept");
      }
    }
  }
  return {};
}

}  // namespace pyra::kernels
