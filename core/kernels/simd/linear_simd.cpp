// Linear layers by the micro-kernels.
//
// Rows are cut into chunks of kChunkRows; a thread takes a chunk through everything the layer does to it (mask,
// low-rank term, product, bias, GELU, residual) while the chunk lies in its second-level cache. Backward does the same
// with dL/d(pre-activation), which reaches memory only for a weight that learns. Sums over rows (bias, A, B) run over
// kGroups fixed groups of chunks and are then added in order, so gradients do not depend on the number of threads.
#include <vector>

#include "base/philox.h"
#include "kernels/cpu_kernel.h"
#include "kernels/linear_packed.h"
#include "kernels/linear_path.h"
#include "kernels/parallel.h"
#include "kernels/simd/simd.h"

namespace pyra::kernels {
namespace {

constexpr int64_t kChunkRows = 48;
constexpr int64_t kGroups = 16;

const float* floats(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

const uint16_t* halves(const at::Tensor& tensor) {
  return static_cast<const uint16_t*>(tensor.const_data_ptr());
}

/// Address of element `index` of fp32 or bf16 data.
const void* at_index(const at::Tensor& tensor, int64_t index) {
  return static_cast<const char*>(tensor.const_data_ptr()) + index * tensor.element_size();
}
void* at_index(at::Tensor& tensor, int64_t index) {
  return static_cast<char*>(tensor.data_ptr()) + index * tensor.element_size();
}

at::Tensor buffer(int64_t count, bool wanted) {
  return wanted ? at::empty({count}, at::kFloat) : at::Tensor();
}

bool native_bf16(at::ScalarType compute) {
  return compute == at::kBFloat16 && cpu_kernel() == CpuKernel::avx512_bf16;
}

void run_gemm(bool native, const simd::GemmCall& call, int64_t rows) {
  native ? simd::gemm_avx512_bf16(call, rows) : simd::micro().gemm(call, rows);
}

simd::GemmCall gemm_call(const void* x, const LinearWeights::Packed& weights, void* y, bool y_bf16) {
  simd::GemmCall call;
  call.x = x;
  call.x_stride = call.k = weights.k;
  call.panels = weights.panels.const_data_ptr();
  call.n = weights.n;
  call.y = y;
  call.y_bf16 = y_bf16;
  return call;
}

/// The dropout mask of a low-rank term's input, a chunk of rows at a time.
class Mask {
 public:
  Mask(const Dropout& options, int64_t columns)
      : active_(options.p > 0), columns_(columns), threshold_(dropout_threshold(options)) {
    const Philox random(options.seed, RandomStream::dropout, options.domain);
    state_ = {{random.key()[0], random.key()[1]}, {random.high()[0], random.high()[1]}};
    scale_ = dropout_scale(options);
  }

  [[nodiscard]] bool active() const { return active_; }
  [[nodiscard]] float scale() const { return scale_; }
  [[nodiscard]] int64_t stride() const { return columns_ / 8; }
  /// One byte more than the rows' bits: masks of 16 lanes are read at every eighth.
  [[nodiscard]] std::vector<uint8_t> bits(int64_t rows) const {
    return std::vector<uint8_t>(size_t(rows * stride() + 1));
  }
  void fill(int64_t first, int64_t rows, std::vector<uint8_t>& bits) const {
    simd::micro().dropout_bits(state_, uint64_t(first * stride()), rows * stride(), threshold_, bits.data());
  }

 private:
  bool active_;
  int64_t columns_;
  uint32_t threshold_;
  simd::PhiloxState state_{};
  float scale_ = 1.0f;
};

/// A chunk of x as fp32, masked: x itself where it is that already.
const float* chunk_input(const at::Tensor& x, int64_t first, int64_t rows, const Mask& mask,
                         const std::vector<uint8_t>& bits, at::Tensor& wide) {
  const int64_t in = x.size(1);
  const bool bf16 = x.scalar_type() == at::kBFloat16;
  if (mask.active()) {
    simd::micro().mask(at_index(x, first * in), bf16, bits.data(), mask.scale(), rows * in, wide.data_ptr<float>());
  } else if (bf16) {
    simd::micro().widen(halves(x) + first * in, rows * in, wide.data_ptr<float>());
  } else {
    return floats(x) + first * in;
  }
  return floats(wide);
}

}  // namespace

LinearForward linear_forward_simd(const at::Tensor& x, const LinearWeights& layer, const LinearOptions& options,
                                  bool keep) {
  const int64_t rows = x.size(0), in = x.size(1), out = layer.weight().size(0);
  const at::ScalarType compute = x.scalar_type();
  const bool bf16 = compute == at::kBFloat16, native = native_bf16(compute),
             gelu = options.activation == Activation::gelu;
  const auto weights = layer.packed(compute, /*transposed=*/false);
  LinearForward result;
  result.y = at::empty({rows, out}, options.residual.defined() ? at::kFloat : compute);
  if (gelu && keep) result.slope = at::empty({rows, out}, at::kFloat);
  const at::Tensor row_scale =
      options.branch_scale.defined() ? scale_of_rows(options.branch_scale, rows) : at::Tensor();

  const bool low_rank = options.low_rank.has_value();
  const int64_t rank = low_rank ? options.low_rank->a.size(0) : 0;
  std::shared_ptr<const LinearWeights::Packed> a, b;
  if (low_rank) {
    a = pack(options.low_rank->a, at::kFloat, false);
    b = pack(options.low_rank->b.detach() * options.low_rank->scale, at::kFloat, false);
    if (keep) result.hidden = at::empty({rows, rank}, at::kFloat);
  }
  const Mask mask(low_rank ? options.low_rank->dropout : Dropout{}, in);
  const bool wide_main = bf16 && !native;

  const int64_t chunk_rows = std::min(rows, kChunkRows), chunks = (rows + kChunkRows - 1) / kChunkRows;
  parallel_tasks(chunks, [&](const auto& next) {
    at::Tensor wide = buffer(chunk_rows * in, mask.active() || (bf16 && low_rank)), widened;
    if (wide_main) widened = buffer(chunk_rows * in, true);
    at::Tensor hidden_chunk = buffer(chunk_rows * rank, low_rank && !keep);
    std::vector<uint8_t> bits = mask.active() ? mask.bits(chunk_rows) : std::vector<uint8_t>();
    for (int64_t chunk = next(); chunk < chunks; chunk = next()) {
      const int64_t first = chunk * kChunkRows, count = std::min(kChunkRows, rows - first);
      const void* input = at_index(x, first * in);
      if (wide_main) {
        simd::micro().widen(halves(x) + first * in, count * in, widened.data_ptr<float>());
        input = floats(widened);
      }
      simd::GemmCall call =
          gemm_call(input, *weights, at_index(result.y, first * out), result.y.scalar_type() == at::kBFloat16);
      if (low_rank) {
        float* hidden = keep ? result.hidden.data_ptr<float>() + first * rank : hidden_chunk.data_ptr<float>();
        if (mask.active()) mask.fill(first, count, bits);
        simd::micro().gemm(gemm_call(chunk_input(x, first, count, mask, bits, wide), *a, hidden, false), count);
        call.hidden = hidden;
        call.rank = rank;
        call.low_panels = floats(b->panels);
      }
      call.bias = floats(layer.bias());
      call.gelu = gelu;
      if (result.slope.defined()) call.slope = result.slope.data_ptr<float>() + first * out;
      if (row_scale.defined()) call.row_scale = floats(row_scale) + first;
      if (options.residual.defined()) call.residual = floats(options.residual) + first * out;
      run_gemm(native, call, count);
    }
  });
  return result;
}

namespace {

/// One backward pass: what its chunks share.
class Backward {
 public:
  Backward(const LinearBackward& saved, const LinearWeights& layer, const LinearOptions& options,
           const LinearWanted& wanted);
  LinearGradients run();

 private:
  /// A thread's buffers.
  struct Scratch {
    at::Tensor dz, narrow, input, dhidden;
    std::vector<uint8_t> bits;
  };

  void chunk(int64_t first, int64_t count, float* sums, Scratch& scratch);
  void low_rank_sums(int64_t first, int64_t count, const float* dz, float* sums, Scratch& scratch);
  void input_gradient(int64_t first, int64_t count, const float* dz, Scratch& scratch);
  [[nodiscard]] Scratch scratch() const;

  const LinearBackward& saved_;
  const LinearOptions& options_;
  LinearWanted wanted_;
  int64_t rows_, in_, out_, rank_;
  bool dy_bf16_, native_, scaled_, low_rank_, wide_;
  Mask mask_;
  at::Tensor row_scale_, dz_;  // dz_: whole, where W learns
  LinearGradients gradients_;
  std::shared_ptr<const LinearWeights::Packed> weights_, a_, b_;
};

Backward::Backward(const LinearBackward& saved, const LinearWeights& layer, const LinearOptions& options,
                   const LinearWanted& wanted)
    : saved_(saved),
      options_(options),
      wanted_(wanted),
      rows_(saved.dy.size(0)),
      in_(layer.weight().size(1)),
      out_(layer.weight().size(0)),
      rank_(options.low_rank ? options.low_rank->a.size(0) : 0),
      dy_bf16_(saved.dy.scalar_type() == at::kBFloat16),
      native_(native_bf16(saved.compute)),
      scaled_(saved.slope.defined() || options.branch_scale.defined()),
      low_rank_(options.low_rank.has_value() && (wanted.x || wanted.a || wanted.b)),
      mask_(options.low_rank ? options.low_rank->dropout : Dropout{}, in_) {
  // fp32 dz is needed by everything but VDPBF16PS on an untouched dy.
  wide_ = low_rank_ || wanted.weight || wanted.bias || !native_ || scaled_ || !dy_bf16_;
  if (options.branch_scale.defined()) row_scale_ = scale_of_rows(options.branch_scale, rows_);
  if (wanted.x) {
    weights_ = layer.packed(saved.compute, /*transposed=*/true);
    gradients_.x = at::empty({rows_, in_}, saved.compute);
  }
  if (low_rank_) {
    b_ = pack(options.low_rank->b.detach() * options.low_rank->scale, at::kFloat, true);
    if (wanted.x) a_ = pack(options.low_rank->a, at::kFloat, true);
  }
  if (wanted.weight && (scaled_ || dy_bf16_)) dz_ = at::empty({rows_, out_}, at::kFloat);
}

Backward::Scratch Backward::scratch() const {
  const int64_t rows = std::min(rows_, kChunkRows);
  Scratch scratch;
  scratch.dz = buffer(rows * out_, wide_ && (scaled_ || dy_bf16_));
  if (wanted_.x && native_ && (scaled_ || !dy_bf16_)) scratch.narrow = at::empty({rows * out_}, at::kBFloat16);
  scratch.input = buffer(rows * in_, low_rank_ && wanted_.a);
  scratch.dhidden = buffer(rows * rank_, low_rank_);
  if (mask_.active()) scratch.bits = mask_.bits(rows);
  return scratch;
}

void Backward::chunk(int64_t first, int64_t count, float* sums, Scratch& scratch) {
  const float* dz = nullptr;
  if (wide_ && (scaled_ || dy_bf16_)) {
    float* target = dz_.defined() ? dz_.data_ptr<float>() + first * out_ : scratch.dz.data_ptr<float>();
    simd::micro().scale_rows(at_index(saved_.dy, first * out_), dy_bf16_,
                             saved_.slope.defined() ? floats(saved_.slope) + first * out_ : nullptr,
                             row_scale_.defined() ? floats(row_scale_) + first : nullptr, count, out_, target);
    dz = target;
  } else if (!dy_bf16_) {
    dz = floats(saved_.dy) + first * out_;
  }
  if (mask_.active() && low_rank_) mask_.fill(first, count, scratch.bits);
  if (low_rank_) low_rank_sums(first, count, dz, sums, scratch);
  if (wanted_.bias) simd::micro().add_columns(dz, count, out_, sums + rank_ * (in_ + out_));
  if (wanted_.x) input_gradient(first, count, dz, scratch);
}

void Backward::low_rank_sums(int64_t first, int64_t count, const float* dz, float* sums, Scratch& scratch) {
  if (wanted_.x || wanted_.a) {
    simd::micro().gemm(gemm_call(dz, *b_, scratch.dhidden.data_ptr<float>(), false), count);
  }
  if (wanted_.a) {
    const float* input = chunk_input(saved_.x, first, count, mask_, scratch.bits, scratch.input);
    simd::micro().add_outer(floats(scratch.dhidden), input, count, rank_, in_, sums);
  }
  if (wanted_.b) {
    simd::micro().add_outer(floats(saved_.hidden) + first * rank_, dz, count, rank_, out_, sums + rank_ * in_);
  }
}

void Backward::input_gradient(int64_t first, int64_t count, const float* dz, Scratch& scratch) {
  const void* input = dz;
  if (native_ && scratch.narrow.defined()) {
    auto* narrow = static_cast<uint16_t*>(scratch.narrow.data_ptr());
    simd::micro().narrow(dz, count * out_, narrow);
    input = narrow;
  } else if (native_) {
    input = at_index(saved_.dy, first * out_);
  }
  simd::GemmCall call =
      gemm_call(input, *weights_, at_index(gradients_.x, first * in_), gradients_.x.scalar_type() == at::kBFloat16);
  if (low_rank_) {
    call.hidden = floats(scratch.dhidden);
    call.rank = rank_;
    call.low_panels = floats(a_->panels);
    if (mask_.active()) {
      call.keep = scratch.bits.data();
      call.keep_stride = mask_.stride();
      call.keep_scale = mask_.scale();
    }
  }
  run_gemm(native_, call, count);
}

LinearGradients Backward::run() {
  const bool sums_wanted = wanted_.bias || (low_rank_ && (wanted_.a || wanted_.b));
  const int64_t chunks = (rows_ + kChunkRows - 1) / kChunkRows;
  const int64_t groups = sums_wanted ? std::min(kGroups, chunks) : chunks;
  const int64_t length = rank_ * (in_ + out_) + out_;
  at::Tensor sums = sums_wanted ? at::zeros({groups, length}, at::kFloat) : at::Tensor();
  parallel_tasks(groups, [&](const auto& next) {
    Scratch own = scratch();
    for (int64_t group = next(); group < groups; group = next()) {
      float* group_sums = sums_wanted ? sums.data_ptr<float>() + group * length : nullptr;
      for (int64_t i = group * chunks / groups; i < (group + 1) * chunks / groups; ++i) {
        chunk(i * kChunkRows, std::min(kChunkRows, rows_ - i * kChunkRows), group_sums, own);
      }
    }
  });
  if (sums_wanted) {
    const at::Tensor total = sums.sum(0);
    if (wanted_.a) gradients_.a = total.narrow(0, 0, rank_ * in_).view({rank_, in_});
    if (wanted_.b) {
      gradients_.b =
          total.narrow(0, rank_ * in_, rank_ * out_).view({rank_, out_}).t().contiguous() * options_.low_rank->scale;
    }
    if (wanted_.bias) gradients_.bias = total.narrow(0, rank_ * (in_ + out_), out_);
  }
  if (wanted_.weight) {
    gradients_.weight = at::matmul((dz_.defined() ? dz_ : saved_.dy).t(), saved_.x.to(at::kFloat));
  }
  return gradients_;
}

}  // namespace

LinearGradients linear_backward_simd(const LinearBackward& saved, const LinearWeights& layer,
                                     const LinearOptions& options, const LinearWanted& wanted) {
  return Backward(saved, layer, options, wanted).run();
}

}  // namespace pyra::kernels
