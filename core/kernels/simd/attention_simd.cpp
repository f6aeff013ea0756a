// Attention by the micro-kernels: a thread takes one head of one image at a time.
//
// The micro-kernels read q, k and v where they stand in qkv and write where the result belongs, if the head's width is
// a multiple of 16 and the type is theirs. Other heads (odd widths; bf16 without VDPBF16PS; bf16 backward) are first
// gathered into a thread's buffer, widened to fp32 and padded with zeros, which change neither logits nor sums.
#include <cmath>

#include "kernels/attention_path.h"
#include "kernels/cpu_kernel.h"
#include "kernels/parallel.h"
#include "kernels/simd/simd.h"

namespace pyra::kernels {
namespace {

struct Shape {
  int64_t batch, tokens, heads, channels, head_dim, padded_dim;
  bool bf16;
};

Shape shape_of(const at::Tensor& qkv, int64_t heads) {
  const int64_t channels = qkv.size(2) / 3, head_dim = channels / heads;
  return {qkv.size(0),
          qkv.size(1),
          heads,
          channels,
          head_dim,
          (head_dim + 15) / 16 * 16,
          qkv.scalar_type() == at::kBFloat16};
}

unsigned char* bytes(at::Tensor& tensor) {
  return static_cast<unsigned char*>(tensor.data_ptr());
}

/// [tokens, head_dim] of fp32 or bf16, rows `stride` apart from element `first` on -> fp32 [tokens, padded_dim].
void gather(const at::Tensor& source, int64_t first, int64_t stride, const Shape& shape, float* target) {
  const bool bf16 = source.scalar_type() == at::kBFloat16;
  for (int64_t t = 0; t < shape.tokens; ++t, first += stride, target += shape.padded_dim) {
    if (bf16) {
      simd::micro().widen(static_cast<const uint16_t*>(source.const_data_ptr()) + first, shape.head_dim, target);
    } else {
      std::copy_n(source.const_data_ptr<float>() + first, shape.head_dim, target);
    }
    std::fill(target + shape.head_dim, target + shape.padded_dim, 0.0f);
  }
}

void scatter(const float* source, const Shape& shape, at::Tensor& target, int64_t first, int64_t stride) {
  const bool bf16 = target.scalar_type() == at::kBFloat16;
  for (int64_t t = 0; t < shape.tokens; ++t, first += stride, source += shape.padded_dim) {
    if (bf16) {
      simd::micro().narrow(source, shape.head_dim, static_cast<uint16_t*>(target.data_ptr()) + first);
    } else {
      std::copy_n(source, shape.head_dim, target.data_ptr<float>() + first);
    }
  }
}

/// log2(size) of an image's keys, and the padding's.
void fill_bias(const at::Tensor& sizes, int64_t image, int64_t tokens, float* bias) {
  const float* size = sizes.defined() ? sizes.const_data_ptr<float>() + image * tokens : nullptr;
  for (int64_t i = 0; i < tokens; ++i)
    bias[i] = size && size[i] != 1.0f ? std::max(std::log2(size[i]), simd::kPaddingBias) : 0.0f;
  std::fill(bias + tokens, bias + simd::padded_tokens(tokens), simd::kPaddingBias);
}

/// key_mean of one image: mean over heads of the keys.
void mean_keys(const at::Tensor& qkv, int64_t image, const Shape& shape, float* wide, float* mean) {
  const float share = 1.0f / float(shape.heads);
  for (int64_t t = 0; t < shape.tokens; ++t) {
    const int64_t first = (image * shape.tokens + t) * 3 * shape.channels + shape.channels;
    const float* keys = wide;
    if (shape.bf16) {
      simd::micro().widen(static_cast<const uint16_t*>(qkv.const_data_ptr()) + first, shape.channels, wide);
    } else {
      keys = qkv.const_data_ptr<float>() + first;
    }
    float* target = mean + (image * shape.tokens + t) * shape.head_dim;
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      float sum = 0;
      for (int64_t h = 0; h < shape.heads; ++h) sum += keys[h * shape.head_dim + d];
      target[d] = sum * share;
    }
  }
}

/// A forward pass: what its tasks share.
struct Forward {
  const at::Tensor& qkv;
  const AttentionOptions& options;
  Shape shape;
  bool native;    // bf16 by VDPBF16PS
  bool in_place;  // no gathering
  AttentionForward result;
  at::Tensor class_rows;  // [B,H,N]

  void head(int64_t image, int64_t head, const float* bias, float* gathered, unsigned char* scratch) {
    const int64_t first = image * shape.tokens * 3 * shape.channels + head * shape.head_dim;
    const int64_t out_first = image * shape.tokens * shape.channels + head * shape.head_dim;
    const int64_t size = qkv.element_size(), count = shape.tokens * shape.padded_dim;
    simd::AttentionCall call;
    call.tokens = shape.tokens;
    call.scale = float(1.0 / std::sqrt(double(shape.head_dim)));
    call.bias = bias;
    call.scratch = scratch;
    const int64_t row = (image * shape.heads + head) * shape.tokens;
    if (result.log_sum.defined()) call.log_sum = result.log_sum.data_ptr<float>() + row;
    if (class_rows.defined()) call.class_row = class_rows.data_ptr<float>() + row;
    call.head_dim = shape.padded_dim;
    if (in_place) {
      const auto* base = static_cast<const char*>(qkv.const_data_ptr()) + first * size;
      call.q = base, call.k = base + shape.channels * size, call.v = base + 2 * shape.channels * size;
      call.stride = 3 * shape.channels;
      call.out = bytes(result.output.out) + out_first * size;
      call.out_stride = shape.channels;
      native ? simd::attention_avx512_bf16(call) : simd::micro().attention(call);
      return;
    }
    for (int64_t i = 0; i < 3; ++i) {
      gather(qkv, first + i * shape.channels, 3 * shape.channels, shape, gathered + i * count);
    }
    call.q = gathered, call.k = gathered + count, call.v = gathered + 2 * count;
    call.out = gathered + 3 * count;
    call.stride = call.out_stride = shape.padded_dim;
    simd::micro().attention(call);
    scatter(gathered + 3 * count, shape, result.output.out, out_first, shape.channels);
  }
};

/// Mean over heads of the class rows [B,H,N], heads in order.
at::Tensor mean_rows(const at::Tensor& rows) {
  at::Tensor sum = rows.select(1, 0).clone();
  for (int64_t h = 1; h < rows.size(1); ++h) sum.add_(rows.select(1, h));
  return sum.div_(double(rows.size(1)));
}

}  // namespace

AttentionForward attention_forward_simd(const at::Tensor& qkv, int64_t num_heads, const AttentionOptions& options,
                                        bool keep) {
  const Shape shape = shape_of(qkv, num_heads);
  const bool native = shape.bf16 && shape.padded_dim == shape.head_dim && cpu_kernel() == CpuKernel::avx512_bf16;
  Forward pass{qkv, options, shape, native, native || (!shape.bf16 && shape.padded_dim == shape.head_dim), {}, {}};
  const int64_t batch = shape.batch, tokens = shape.tokens, padded = simd::padded_tokens(tokens);
  pass.result.output.out = at::empty({batch, tokens, shape.channels}, qkv.scalar_type());
  if (keep) pass.result.log_sum = at::empty({batch, num_heads, tokens}, at::kFloat);
  if (options.class_attention) pass.class_rows = at::empty({batch, num_heads, tokens}, at::kFloat);
  at::Tensor& key_mean = pass.result.output.key_mean;
  if (options.key_mean) key_mean = at::empty({batch, tokens, shape.head_dim}, at::kFloat);
  parallel_tasks(batch * num_heads, [&](const auto& next) {
    at::Tensor scratch = at::empty({simd::attention_scratch(tokens, shape.padded_dim)}, at::kByte);
    at::Tensor bias = at::empty({padded}, at::kFloat), wide = at::empty({shape.channels}, at::kFloat);
    at::Tensor gathered = at::empty({pass.in_place ? 0 : 4 * tokens * shape.padded_dim}, at::kFloat);
    int64_t bias_of = -1;
    for (int64_t task = next(); task < batch * num_heads; task = next()) {
      const int64_t image = task / num_heads, head = task % num_heads;
      if (image != bias_of) fill_bias(options.sizes, image, tokens, bias.data_ptr<float>());
      bias_of = image;
      pass.head(image, head, bias.const_data_ptr<float>(), gathered.data_ptr<float>(), bytes(scratch));
      if (options.key_mean && head == 0) {
        mean_keys(qkv, image, shape, wide.data_ptr<float>(), key_mean.data_ptr<float>());
      }
    }
  });
  if (options.class_attention) pass.result.output.class_attention = mean_rows(pass.class_rows);
  return std::move(pass.result);
}

at::Tensor attention_backward_simd(const AttentionBackward& saved) {
  const Shape shape = shape_of(saved.qkv, saved.num_heads);
  const bool in_place = !shape.bf16 && shape.padded_dim == shape.head_dim;
  const int64_t tokens = shape.tokens, heads = shape.heads, count = tokens * shape.padded_dim;
  at::Tensor dqkv = at::empty_like(saved.qkv);
  parallel_tasks(shape.batch * heads, [&](const auto& next) {
    at::Tensor scratch = at::empty({simd::attention_backward_scratch(tokens, shape.padded_dim)}, at::kByte);
    at::Tensor bias = at::empty({simd::padded_tokens(tokens)}, at::kFloat);
    at::Tensor gathered = at::empty({in_place ? 0 : 7 * count}, at::kFloat);
    for (int64_t task = next(); task < shape.batch * heads; task = next()) {
      const int64_t image = task / heads, head = task % heads;
      const int64_t first = image * tokens * 3 * shape.channels + head * shape.head_dim;
      const int64_t out_first = image * tokens * shape.channels + head * shape.head_dim;
      fill_bias(saved.sizes, image, tokens, bias.data_ptr<float>());
      simd::AttentionBackwardCall call;
      call.tokens = tokens;
      call.head_dim = shape.padded_dim;
      call.scale = float(1.0 / std::sqrt(double(shape.head_dim)));
      call.bias = bias.const_data_ptr<float>();
      call.log_sum = saved.log_sum.const_data_ptr<float>() + task * tokens;
      call.scratch = bytes(scratch);
      if (in_place) {
        const float* source = saved.qkv.const_data_ptr<float>() + first;
        float* target = dqkv.data_ptr<float>() + first;
        call.q = source, call.k = source + shape.channels, call.v = source + 2 * shape.channels;
        call.dq = target, call.dk = target + shape.channels, call.dv = target + 2 * shape.channels;
        call.dout = saved.dout.const_data_ptr<float>() + out_first;
        call.stride = 3 * shape.channels;
        call.out_stride = shape.channels;
        simd::micro().attention_backward(call);
        continue;
      }
      float* wide = gathered.data_ptr<float>();
      for (int64_t i = 0; i < 3; ++i) {
        gather(saved.qkv, first + i * shape.channels, 3 * shape.channels, shape, wide + i * count);
      }
      gather(saved.dout, out_first, shape.channels, shape, wide + 3 * count);
      call.q = wide, call.k = wide + count, call.v = wide + 2 * count, call.dout = wide + 3 * count;
      call.dq = wide + 4 * count, call.dk = wide + 5 * count, call.dv = wide + 6 * count;
      call.stride = call.out_stride = shape.padded_dim;
      simd::micro().attention_backward(call);
      for (int64_t i = 0; i < 3; ++i) {
        scatter(wide + (4 + i) * count, shape, dqkv, first + i * shape.channels, 3 * shape.channels);
      }
    }
  });
  return dqkv;
}

}  // namespace pyra::kernels
