#include "engine/cuda/cuda_trainer.h"

#include <ATen/Functions.h>

#include <cmath>
#include <cstring>
#include <numeric>

#include "base/error.h"
#include "engine/cuda/device.h"
#include "kernels/cuda/gather.h"
#include "nn/vit_parts.h"

namespace pyra::engine {

namespace cuda = kernels::cuda;

namespace {

constexpr int64_t kMaxTrainBatch = 4096;
constexpr double kSetShare = 0.5;  // of the free memory that the set of images may take
constexpr int64_t kUploadBytes = int64_t{32} << 20;

int checked_batch(const TrainerOptions& options) {
  if (options.precision == Precision::fp16)
    fail(ExitCode::usage, "dtype fp16: its gradients vanish without loss scaling; train in bf16");
  if (options.batch < 1 || options.batch > kMaxTrainBatch)
    fail(ExitCode::usage, "a step of ", options.batch, " images; a GPU takes 1 to ", kMaxTrainBatch);
  return int(options.batch);
}

size_t aligned(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

}  // namespace

CudaTrainer::CudaTrainer(nn::Vit& model, const TrainingImages& images, const nn::Preprocess& preprocess,
                         const TrainerOptions& options, int device)
    : Trainer(trained_tensors(model.train_mode())),
      device_(set_device(device)),
      vit_(model),
      images_(images),
      options_(options),
      batch_(checked_batch(options)),
      image_bytes_(images.image_bytes()) {
  const size_t b = size_t(batch_), depth = size_t(model.config().depth);
  layout_.order = aligned(sizeof(cuda::StepInputs));
  layout_.labels = layout_.order + aligned(b * sizeof(int32_t));
  layout_.scales = layout_.labels + aligned(b * sizeof(int32_t));
  layout_.total = layout_.scales + aligned(2 * depth * b * sizeof(float));
  inputs_ = DeviceMemory(layout_.total);
  PYRA_CUDA(cudaMemset(inputs_.get(), 0, inputs_.bytes()));
  status_ = DeviceMemory(sizeof(cuda::StepStatus));
  host_status_ = PinnedMemory(sizeof(cuda::StepStatus));
  model_ = std::make_unique<TrainModel>(model, tensors_, options_, &inputs_.get<cuda::StepInputs>()->step);
  check_room(
      cat("a step of ", batch_, " images"), batch_, [this](int n) { return TrainMemory::bytes_for(*model_, n); },
      "train.batch=");
  cache_ = gemm_cache(device_, options_.deterministic);
  runner_ = std::make_unique<TrainStepRunner>(*model_, preprocess, batch_, cache_);
  const std::vector<cuda::Segment>& segments = model_->segments;
  segments_ = DeviceMemory(segments.size() * sizeof(cuda::Segment));
  PYRA_CUDA(cudaMemcpy(segments_.get(), segments.data(), segments_.bytes(), cudaMemcpyHostToDevice));
  norms_ = DeviceMemory(size_t(cuda::adamw_blocks(model_->arena_size())) * sizeof(double));
  PYRA_CUDA(cudaStreamCreateWithFlags(&copy_, cudaStreamNonBlocking));
  for (Slot& slot : slots_) {
    slot.inputs = PinnedMemory(layout_.total);
    for (cudaEvent_t* event : {&slot.read, &slot.copied})
      PYRA_CUDA(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
  }
  *host_status_.get<cuda::StepStatus>() = {};
  reset_sums();
}

CudaTrainer::~CudaTrainer() {
  (void)cudaSetDevice(device_);
  (void)cudaDeviceSynchronize();
  for (Slot& slot : slots_)
    for (cudaEvent_t event : {slot.read, slot.copied})
      if (event) (void)cudaEventDestroy(event);
  if (copy_) (void)cudaStreamDestroy(copy_);
}

/// The set of images goes to the device once, where it takes no more than a share of what is free; else each batch goes
/// as it comes.
void CudaTrainer::place_images() {
  const size_t value = augmented_ ? sizeof(float) : 1;
  batch_images_ = DeviceMemory(size_t(batch_) * size_t(image_bytes_) * value);
  size_t free_bytes = 0, total = 0;
  PYRA_CUDA(cudaMemGetInfo(&free_bytes, &total));
  const double set_bytes = double(images_.count()) * double(image_bytes_);
  if (!augmented_ && set_bytes <= kSetShare * double(free_bytes)) return upload_set();
  for (Slot& slot : slots_) {
    slot.images = PinnedMemory(batch_images_.bytes());
    slot.device_images = DeviceMemory(batch_images_.bytes());
  }
}

/// A piece at a time: the host keeps no copy of the set.
void CudaTrainer::upload_set() {
  const int64_t count = images_.count(), piece = std::clamp<int64_t>(kUploadBytes / image_bytes_, 1, count);
  set_ = DeviceMemory(size_t(count * image_bytes_));
  const PinnedMemory buffer(size_t(piece * image_bytes_));
  std::vector<int64_t> indices;
  for (int64_t first = 0; first < count; first += piece) {
    indices.resize(size_t(std::min(piece, count - first)));
    std::iota(indices.begin(), indices.end(), first);
    images_.read(indices, buffer.get<uint8_t>());
    PYRA_CUDA(cudaMemcpy(set_.get<char>() + first * image_bytes_, buffer.get(), indices.size() * size_t(image_bytes_),
                         cudaMemcpyHostToDevice));
  }
}

TrainBatch CudaTrainer::batch() const {
  char* const inputs = inputs_.get<char>();
  return {.images = batch_images_.get(),
          .is_float = augmented_,
          .labels = reinterpret_cast<const int32_t*>(inputs + layout_.labels),
          .branch_scale = options_.drop_path > 0 ? reinterpret_cast<const float*>(inputs + layout_.scales) : nullptr,
          .status = status_.get<cuda::StepStatus>(),
          .teacher = teacher_.get<float>(),
          .distillation = options_.distillation};
}

void CudaTrainer::write_inputs(const TrainStep& step, char* to) const {
  const AdamWSettings& a = options_.adamw;
  *reinterpret_cast<cuda::StepInputs*>(to) =
      cuda::step_inputs(step.number, step.lr, step.merge_lr, {a.beta1, a.beta2, a.eps, a.weight_decay});
  auto* order = reinterpret_cast<int32_t*>(to + layout_.order);
  auto* labels = reinterpret_cast<int32_t*>(to + layout_.labels);
  const int64_t* const known = images_.labels.const_data_ptr<int64_t>();
  for (size_t i = 0; i < step.indices.size(); ++i) {
    order[i] = int32_t(step.indices[i]);
    labels[i] = int32_t(known[step.indices[i]]);
  }
  if (options_.drop_path <= 0) return;  // batch() says so, and nobody reads the factors
  const int64_t depth = vit_.config().depth;
  auto* scale = reinterpret_cast<float*>(to + layout_.scales);
  for (int64_t block = 0; block < depth; ++block) {
    const double p = nn::drop_path_rate(options_.drop_path, block, depth);
    for (int64_t branch = 0; branch < 2; ++branch, scale += batch_)
      nn::fill_branch_scale(p, {options_.seed, step.number}, block, branch, scale, batch_);
  }
}

/// The batch on its way over a stream of its own, while the steps before it compute.
void CudaTrainer::stage_images(const TrainStep& step, Slot& slot) {
  char* const to = slot.images.get<char>();
  if (augmented_) {
    const at::Tensor images = step.images.contiguous();
    std::memcpy(to, images.const_data_ptr(), slot.images.bytes());
  } else {
    images_.read(step.indices, slot.images.get<uint8_t>());
  }
  PYRA_CUDA(cudaMemcpyAsync(slot.device_images.get(), to, slot.images.bytes(), cudaMemcpyHostToDevice, copy_));
  PYRA_CUDA(cudaEventRecord(slot.copied, copy_));
  PYRA_CUDA(cudaStreamWaitEvent(stream(), slot.copied, 0));
  PYRA_CUDA(cudaMemcpyAsync(batch_images_.get(), slot.device_images.get(), slot.images.bytes(),
                            cudaMemcpyDeviceToDevice, stream()));
}

void CudaTrainer::make_room_for_teacher() {
  const size_t bytes = size_t(batch_) * size_t(vit_.config().num_classes) * sizeof(float);
  teacher_ = DeviceMemory(bytes);
  for (Slot& slot : slots_) slot.teacher = PinnedMemory(bytes);
}

void CudaTrainer::send_teacher(const TrainStep& step, Slot& slot) {
  const bool taught = step.teacher.defined();
  if (taught != (teacher_.bytes() > 0))
    fail(ExitCode::internal, "trainer: a teacher's logits come with every step or with none");
  if (!taught) return;
  const std::array<int64_t, 2> shape{batch_, vit_.config().num_classes};
  if (step.teacher.sizes() != at::IntArrayRef(shape) || step.teacher.scalar_type() != at::kFloat)
    fail(ExitCode::internal, "trainer: a teacher's logits are ", step.teacher.sizes(), " ", step.teacher.scalar_type(),
         ", expected fp32 ", at::IntArrayRef(shape));
  std::memcpy(slot.teacher.get(), step.teacher.contiguous().const_data_ptr(), teacher_.bytes());
  PYRA_CUDA(cudaMemcpyAsync(teacher_.get(), slot.teacher.get(), teacher_.bytes(), cudaMemcpyHostToDevice, stream()));
}

void CudaTrainer::enqueue_step() {
  if (set_.bytes() > 0)
    cuda::gather_rows(set_.get(), image_bytes_, reinterpret_cast<const int32_t*>(inputs_.get<char>() + layout_.order),
                      batch_, batch_images_.get(), stream());
  runner_->enqueue(batch());
}

void CudaTrainer::optimise() {
  cuda::adamw({.segments = segments_.get<cuda::Segment>(),
               .segment_count = int(model_->segments.size()),
               .values = model_->values(),
               .first = model_->first_moments(),
               .second = model_->second_moments(),
               .gradients = model_->gradients(),
               .total = model_->arena_size(),
               .inputs = inputs_.get<cuda::StepInputs>(),
               .status = status_.get<cuda::StepStatus>(),
               .norms = norms_.get<double>(),
               .images = batch_},
              stream());
}

/// Once without a graph and without the optimiser: matrix products choose their algorithms, and overwrite what they
/// read.
void CudaTrainer::capture() {
  enqueue_step();
  PYRA_CUDA(cudaStreamSynchronize(stream()));
  if (cache_) cache_->save();
  reset_sums();
  graph_ = Graph(stream(), [this] {
    enqueue_step();
    optimise();
  });
}

void CudaTrainer::step(const TrainStep& step) {
  if (int64_t(step.indices.size()) != batch_)
    fail(ExitCode::internal, "trainer: a step of ", step.indices.size(), " images, planned for ", batch_);
  PYRA_CUDA(cudaSetDevice(device_));
  Slot& slot = slots_[next_];
  next_ = (next_ + 1) % slots_.size();
  const bool first = !graph_;
  if (first) {
    augmented_ = step.images.defined();
    place_images();
    if (step.teacher.defined()) make_room_for_teacher();
  }
  PYRA_CUDA(cudaEventSynchronize(slot.read));
  write_inputs(step, slot.inputs.get<char>());
  PYRA_CUDA(cudaMemcpyAsync(inputs_.get(), slot.inputs.get(), layout_.total, cudaMemcpyHostToDevice, stream()));
  send_teacher(step, slot);
  if (set_.bytes() == 0) stage_images(step, slot);
  PYRA_CUDA(cudaEventRecord(slot.read, stream()));
  if (first) capture();
  graph_.launch(stream());
}

void CudaTrainer::reset_sums() {
  auto& status = *host_status_.get<cuda::StepStatus>();
  status.loss_sum = 0;
  status.correct = status.images = 0;
  PYRA_CUDA(cudaMemcpyAsync(status_.get(), &status, sizeof status, cudaMemcpyHostToDevice, stream()));
  PYRA_CUDA(cudaStreamSynchronize(stream()));
}

StepSums CudaTrainer::collect() {
  PYRA_CUDA(cudaSetDevice(device_));
  auto& status = *host_status_.get<cuda::StepStatus>();
  PYRA_CUDA(cudaMemcpyAsync(&status, status_.get(), sizeof status, cudaMemcpyDeviceToHost, stream()));
  PYRA_CUDA(cudaStreamSynchronize(stream()));
  const StepSums sums{.loss_sum = status.loss_sum,
                      .correct = status.correct,
                      .images = status.images,
                      .last_loss = status.last_loss,
                      .last_norm = status.last_norm,
                      .bad_step = status.stopped_at,
                      .bad_loss = status.stopped_loss,
                      .bad_norm = status.stopped_norm};
  reset_sums();
  return sums;
}

void CudaTrainer::publish() {
  PYRA_CUDA(cudaSetDevice(device_));
  PYRA_CUDA(cudaStreamSynchronize(stream()));
  model_->publish();
  vit_.weights_changed();
}

void CudaTrainer::take_over() {
  PYRA_CUDA(cudaSetDevice(device_));
  PYRA_CUDA(cudaStreamSynchronize(stream()));
  model_->take_over();
  vit_.weights_changed();
}

int64_t CudaTrainer::device_bytes() const {
  size_t total =
      model_->bytes() + runner_->bytes() + inputs_.bytes() + set_.bytes() + batch_images_.bytes() + teacher_.bytes();
  for (const Slot& slot : slots_) total += slot.device_images.bytes();
  return int64_t(total);
}

}  // namespace pyra::engine
