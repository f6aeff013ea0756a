#include "kernels/cuda/adamw.h"

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/tensors.h"
#include "train/adamw.h"

using namespace pyra;
using namespace pyra::test;
using kernels::cuda::DType;
using kernels::cuda::Segment;
using kernels::cuda::StepStatus;

namespace {

constexpr engine::AdamWSettings kSettings{.weight_decay = 0.05};

struct Piece {
  int64_t rows, columns;
  int chunks;
  bool merge_group;
  DType copy;
  int64_t behind;  ///< columns of the copy that are not this tensor's; -1: there is no copy
  float copy_scale;
};
const std::vector<Piece> kPieces = {
    {8, 768, 57, false, DType::bf16, -1, 1},   {2304, 8, 44, false, DType::bf16, 776, 2},
    {10, 192, 1, false, DType::fp32, -1, 1},   {1, 10, 1, false, DType::fp32, -1, 1},
    {1, 1, 3, true, DType::fp32, -1, 1},       {1, 197, 2, true, DType::fp32, 0, 1},
    {768, 777, 1, false, DType::fp16, 3, 0.5}, {33, 5, 20, false, DType::fp32, 7, 0.25}};

/// All tensors in the arena, as the trainer lays them out: each begins at 16 bytes.
class Arena {
 public:
  explicit Arena(const std::vector<Piece>& pieces) : pieces_(pieces) {
    for (const Piece& p : pieces) {
      Segment segment;
      segment.offset = total_;
      segment.count = p.rows * p.columns;
      segment.chunks = p.chunks;
      segment.chunk_stride = (segment.count + 7) / 4 * 4;
      segment.copy_dtype = p.copy;
      segment.columns = int(p.columns);
      segment.copy_stride = p.columns + p.behind;
      segment.copy_scale = p.copy_scale;
      segment.merge_group = p.merge_group;
      segments_.push_back(segment);
      total_ += (segment.count + 3) / 4 * 4;
    }
    values_ = at::zeros({total_}, at::kFloat);
    for (size_t i = 0; i < pieces.size(); ++i) place(values_, i).copy_(seeded({segments_[i].count}, 10 + i));
  }
  [[nodiscard]] at::Tensor place(const at::Tensor& arena, size_t i) const {
    return arena.slice(0, segments_[i].offset, segments_[i].offset + segments_[i].count);
  }
  [[nodiscard]] size_t count() const { return pieces_.size(); }
  [[nodiscard]] int64_t total() const { return total_; }
  [[nodiscard]] const at::Tensor& values() const { return values_; }

  std::vector<Piece> pieces_;
  std::vector<Segment> segments_;
  int64_t total_ = 0;
  at::Tensor values_;
};

struct State {
  at::Tensor values, first, second;
  std::vector<at::Tensor> copies;
  [[nodiscard]] bool equals(const State& o) const {
    bool same = at::equal(values, o.values) && at::equal(first, o.first) && at::equal(second, o.second);
    // Bytes: what nobody writes is NaN.
    for (size_t i = 0; i < copies.size(); ++i)
      same = same && std::memcmp(copies[i].const_data_ptr(), o.copies[i].const_data_ptr(), copies[i].nbytes()) == 0;
    return same;
  }
};

at::Tensor bytes_of(const void* data, size_t bytes) {
  at::Tensor tensor = at::empty({int64_t(bytes)}, at::kByte);
  std::memcpy(tensor.data_ptr(), data, bytes);
  return tensor;
}

/// The optimiser on the device.
class Device {
 public:
  explicit Device(const Arena& arena)
      : arena_(arena),
        values_(arena.values()),
        first_(at::zeros({arena.total()}, at::kFloat)),
        second_(at::zeros({arena.total()}, at::kFloat)),
        gradients_(at::zeros({arena.total()}, at::kFloat)),
        norms_({kernels::cuda::adamw_blocks(arena.total())}, at::kDouble) {
    segments_ = arena.segments_;
    for (size_t i = 0; i < segments_.size(); ++i) {
      const Piece& p = arena.pieces_[i];
      partials_.push_back(std::make_unique<OnDevice>(at::IntArrayRef{p.chunks, segments_[i].chunk_stride}, at::kFloat));
      segments_[i].partial = partials_.back()->get<float>();
      if (p.behind < 0) continue;
      copies_.push_back(std::make_unique<OnDevice>(at::IntArrayRef{p.rows, p.columns + p.behind}, scalar_type(p.copy)));
      segments_[i].copy = copies_.back()->get();
    }
    const StepStatus status;
    status_ = std::make_unique<OnDevice>(bytes_of(&status, sizeof status));
    table_ = std::make_unique<OnDevice>(bytes_of(segments_.data(), segments_.size() * sizeof(Segment)));
  }

  /// `partials` of every tensor, [chunks, count]; `loss` as cross_entropy leaves it.
  StepStatus step(uint64_t number, double lr, double merge_lr, const std::vector<at::Tensor>& partials, double loss) {
    for (size_t i = 0; i < partials.size(); ++i) {
      // Rows lie further apart than they are long; what is between must not be read.
      at::Tensor rows = at::full({partials[i].size(0), segments_[i].chunk_stride},
                                 std::numeric_limits<float>::quiet_NaN(), at::kFloat);
      rows.slice(1, 0, segments_[i].count).copy_(partials[i]);
      PYRA_CUDA(cudaMemcpy(partials_[i]->get(), rows.const_data_ptr(), rows.nbytes(), cudaMemcpyHostToDevice));
    }
    const auto inputs = kernels::cuda::step_inputs(
        number, lr, merge_lr, {kSettings.beta1, kSettings.beta2, kSettings.eps, kSettings.weight_decay});
    const OnDevice device_inputs(bytes_of(&inputs, sizeof inputs));
    StepStatus status = read();
    status.pending_loss = loss;
    status.pending_correct = 3;
    PYRA_CUDA(cudaMemcpy(status_->get(), &status, sizeof status, cudaMemcpyHostToDevice));
    kernels::cuda::AdamWCall call;
    call.segments = table_->get<Segment>();
    call.segment_count = int(segments_.size());
    call.values = values_.get<float>();
    call.first = first_.get<float>();
    call.second = second_.get<float>();
    call.gradients = gradients_.get<float>();
    call.total = arena_.total();
    call.inputs = device_inputs.get<kernels::cuda::StepInputs>();
    call.status = status_->get<StepStatus>();
    call.norms = norms_.get<double>();
    call.images = 4;
    kernels::cuda::adamw(call, nullptr);
    return read();
  }

  [[nodiscard]] StepStatus read() const {
    StepStatus status;
    const at::Tensor bytes = status_->cpu();
    std::memcpy(&status, bytes.const_data_ptr(), sizeof status);
    return status;
  }
  [[nodiscard]] State state() const {
    State state{values_.cpu(), first_.cpu(), second_.cpu(), {}};
    for (const auto& copy : copies_) state.copies.push_back(copy->cpu());
    return state;
  }

 private:
  const Arena& arena_;
  OnDevice values_, first_, second_, gradients_, norms_;
  std::vector<Segment> segments_;
  std::vector<std::unique_ptr<OnDevice>> partials_, copies_;
  std::unique_ptr<OnDevice> status_, table_;
};

std::vector<at::Tensor> partials_of(const Arena& arena, uint64_t seed) {
  std::vector<at::Tensor> partials;
  for (size_t i = 0; i < arena.count(); ++i)
    partials.push_back(seeded({arena.pieces_[i].chunks, arena.segments_[i].count}, 1000 * seed + i, 0.01));
  return partials;
}

at::Tensor add_up(const at::Tensor& partial) {
  at::Tensor sum = at::zeros({partial.size(1)}, at::kFloat);
  for (int64_t k = 0; k < partial.size(0); ++k) sum += partial[k];
  return sum;
}

std::vector<engine::TrainedTensor> cpu_tensors(const Arena& arena) {
  std::vector<engine::TrainedTensor> tensors;
  for (size_t i = 0; i < arena.count(); ++i) {
    engine::TrainedTensor t;
    t.name = "t" + std::to_string(i);
    t.value = arena.place(arena.values(), i).clone();
    t.first = at::zeros_like(t.value);
    t.second = at::zeros_like(t.value);
    t.merge_group = arena.pieces_[i].merge_group;
    tensors.push_back(t);
  }
  return tensors;
}

}  // namespace

TEST_CASE("cuda AdamW takes the CPU's steps", "[cuda][adamw][gpu]") {
  PYRA_NEEDS_GPU();
  const Arena arena(kPieces);
  Device device(arena), twin(arena);
  train::AdamW reference(cpu_tensors(arena), kSettings);
  for (uint64_t step = 0; step < 5; ++step) {
    const double lr = 1e-3 / double(1 + step), merge_lr = 0.5 * lr;
    const auto partials = partials_of(arena, step + 1);
    for (size_t i = 0; i < arena.count(); ++i) {
      at::Tensor value = reference.tensors()[i].value;
      value.mutable_grad() = add_up(partials[i]);
    }
    const double norm = reference.gradient_norm();
    reference.step(lr, merge_lr);
    const StepStatus status = device.step(step, lr, merge_lr, partials, 0.5 + double(step));
    (void)twin.step(step, lr, merge_lr, partials, 0.5 + double(step));
    CAPTURE(step);
    CHECK(std::abs(status.last_norm - norm) < 1e-5 * norm);
    CHECK(status.last_loss == 0.5 + double(step));
    CHECK(status.stopped_at == -1);
    CHECK(status.images == 4 * int64_t(step + 1));
    CHECK(status.correct == 3 * int64_t(step + 1));
  }
  CHECK(device.read().loss_sum == 4 * (0.5 + 1.5 + 2.5 + 3.5 + 4.5));
  const State got = device.state();
  CHECK(got.equals(twin.state()));
  size_t copy = 0;
  for (size_t i = 0; i < arena.count(); ++i) {
    CAPTURE(i);
    const engine::TrainedTensor& t = reference.tensors()[i];
    const Piece& p = arena.pieces_[i];
    CHECK(relative_difference(arena.place(got.values, i), t.value.detach()) < 1e-6);
    CHECK(relative_difference(arena.place(got.first, i), t.first) < 1e-6);
    CHECK(relative_difference(arena.place(got.second, i), t.second) < 1e-6);
    if (p.behind < 0) continue;
    const at::Tensor own =
        (arena.place(got.values, i) * p.copy_scale).view({p.rows, p.columns}).to(scalar_type(p.copy));
    const at::Tensor& copied = got.copies[copy++];
    CHECK(at::equal(copied.slice(1, 0, p.columns), own));
    CHECK(at::isnan(copied.slice(1, p.columns, p.columns + p.behind)).all().item<bool>());
  }
  // Between tensors nothing is touched.
  at::Tensor rest = got.values.clone();
  for (size_t i = 0; i < arena.count(); ++i) arena.place(rest, i).zero_();
  CHECK(at::equal(rest, at::zeros_like(rest)));
}

TEST_CASE("a cuda step that is not finite changes nothing, nor does a later one", "[cuda][adamw][gpu]") {
  PYRA_NEEDS_GPU();
  const Arena arena(kPieces);
  Device device(arena);
  (void)device.step(0, 1e-3, 1e-3, partials_of(arena, 1), 1.0);
  const State good = device.state();
  const StepStatus before = device.read();
  auto bad = partials_of(arena, 2);
  double loss = 2.0;
  const int kind = GENERATE(0, 1, 2, 3);
  CAPTURE(kind);
  if (kind == 0) bad[1][43][17] = std::numeric_limits<float>::quiet_NaN();
  if (kind == 1) bad.back()[0][164] = std::numeric_limits<float>::infinity();
  if (kind == 2) loss = std::numeric_limits<double>::quiet_NaN();
  if (kind == 3) loss = std::numeric_limits<double>::infinity();
  StepStatus status = device.step(1, 1e-3, 1e-3, bad, loss);
  CHECK(status.stopped_at == 1);
  CHECK(std::isfinite(status.stopped_norm) == (kind >= 2));
  CHECK(std::isfinite(status.stopped_loss) == (kind < 2));
  CHECK(device.state().equals(good));
  status = device.step(2, 1e-3, 1e-3, partials_of(arena, 3), 1.0);
  CHECK(status.stopped_at == 1);
  CHECK(std::isfinite(status.stopped_loss) == (kind < 2));
  CHECK(status.loss_sum == before.loss_sum);
  CHECK(status.images == before.images);
  CHECK(status.correct == before.correct);
  CHECK(device.state().equals(good));
}

TEST_CASE("cuda AdamW steps an arena of many millions", "[cuda][adamw][gpu]") {
  PYRA_NEEDS_GPU();
  const Arena arena({{4096, 1024, 1, false, DType::bf16, 0, 1}, {1, 3, 1, true, DType::fp32, -1, 1}});
  Device device(arena);
  train::AdamW reference(cpu_tensors(arena), kSettings);
  const auto partials = partials_of(arena, 1);
  for (size_t i = 0; i < arena.count(); ++i) {
    at::Tensor value = reference.tensors()[i].value;
    value.mutable_grad() = add_up(partials[i]);
  }
  double squares = 0;  // the CPU's norm of millions of values is an fp32 sum, and worse than the device's
  for (const at::Tensor& partial : partials) squares += add_up(partial).to(at::kDouble).square().sum().item<double>();
  const double norm = std::sqrt(squares);
  reference.step(1e-3, 1e-4);
  CHECK(std::abs(device.step(0, 1e-3, 1e-4, partials, 1.0).last_norm - norm) < 1e-5 * norm);
  const State got = device.state();
  for (size_t i = 0; i < arena.count(); ++i)
    CHECK(relative_difference(arena.place(got.values, i), reference.tensors()[i].value.detach()) < 1e-6);
}

TEST_CASE("cuda AdamW refuses calls it cannot serve", "[cuda][adamw][gpu]") {
  PYRA_NEEDS_GPU();
  CHECK_THROWS_WITH(kernels::cuda::adamw({}, nullptr), Catch::Contains("adamw"));
}
