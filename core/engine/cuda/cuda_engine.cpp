#include "engine/cuda/cuda_engine.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "base/error.h"
#include "engine/cuda/device.h"

namespace pyra::engine {
namespace {

/// A large copy by a few threads: one alone does not keep up with the GPU. Not by LibTorch's, each of which spins for
/// milliseconds after its part: with one copy a batch they take all cores from the threads that decode the next.
void parallel_copy(void* to, const void* from, size_t bytes) {
  constexpr size_t kPiece = size_t{4} << 20, kMostThreads = 4;
  const size_t most = std::min(kMostThreads, size_t(at::get_num_threads()));
  const size_t threads = std::clamp<size_t>(bytes / kPiece, 1, most), share = bytes / threads;
  const auto copy = [&](size_t begin, size_t end) {
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin, end - begin);
  };
  std::vector<std::jthread> others;
  for (size_t i = 1; i < threads; ++i) others.emplace_back(copy, i * share, i + 1 == threads ? bytes : (i + 1) * share);
  copy(0, share);
}

size_t bytes_of(const at::Tensor& images) {
  return size_t(images.numel()) * images.element_size();
}

}  // namespace

CudaEngine::CudaEngine(const nn::Vit& model, const nn::Preprocess& preprocess, const EngineOptions& options, int device)
    : device_(set_device(device)),
      device_model_(model, types_of(options.precision)),
      cache_(gemm_cache(device, options.deterministic)) {
  // One half before the other, not both in step: the kernels of one that wait for memory then run beside the other's
  // matrix products. A graph's kernels keep the priority of the stream that they were captured from.
  int least = 0, priority = 0;
  PYRA_CUDA(cudaDeviceGetStreamPriorityRange(&least, &priority));
  for (Branch& branch : branches_) {
    branch.forward = std::make_unique<Forward>(model, device_model_, preprocess, options.exact_gelu, cache_, priority);
    priority = std::min(priority + 1, least);
  }
  PYRA_CUDA(cudaStreamCreateWithFlags(&copy_, cudaStreamNonBlocking));
  for (cudaEvent_t* event : {&fork_, &join_}) PYRA_CUDA(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
  for (Slot& slot : slots_) {
    for (cudaEvent_t* event : {&slot.copied, &slot.read, &slot.returned})
      PYRA_CUDA(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    for (cudaEvent_t* event : {&slot.begun, &slot.done}) PYRA_CUDA(cudaEventCreate(event));
  }
}

CudaEngine::~CudaEngine() {
  (void)cudaSetDevice(device_);
  (void)cudaDeviceSynchronize();
  drop_graphs();
  for (Slot& slot : slots_)
    for (cudaEvent_t event : {slot.copied, slot.begun, slot.read, slot.done, slot.returned})
      if (event) (void)cudaEventDestroy(event);
  for (cudaEvent_t event : {fork_, join_})
    if (event) (void)cudaEventDestroy(event);
  if (copy_) (void)cudaStreamDestroy(copy_);
}

void CudaEngine::drop_graphs() {
  for (const auto& [batch, graph] : graphs_) (void)cudaGraphExecDestroy(graph);
  graphs_.clear();
}

void CudaEngine::check(const at::Tensor& images) const {
  const int64_t side = device_model_.config.image_size;
  const bool bytes = images.scalar_type() == at::kByte;
  const bool right = images.dim() == 4 && images.size(0) >= 1 && images.is_cpu() &&
                     (bytes ? images.size(1) == side && images.size(2) == side && images.size(3) == 3
                            : images.scalar_type() == at::kFloat && images.size(1) == 3 && images.size(2) == side &&
                                  images.size(3) == side);
  if (!right)
    fail(ExitCode::usage, "engine: images are ", images.sizes(), " ", images.scalar_type(), ", expected uint8 [B,",
         side, ",", side, ",3] or normalised fp32 [B,3,", side, ",", side, "] on the CPU");
}

int CudaEngine::branches_of(int batch) {
  // Two halves fill the SMs that the last wave of each other's kernels leaves idle. On an H100 (2026-11-25) that is
  // worth 2 % dense and 5 % merged at 256 images, and costs 2 to 10 % at 64 and below, where a half no longer fills the
  // GPU. Four quarters lose 1 % dense and 9 % merged (H200); that one half comes first is worth 1 %.
  constexpr int kWorthCutting = 256;
  return batch >= kWorthCutting && batch % 2 == 0 ? 2 : 1;
}

/// Memory for a batch of this size; a larger one than before throws away what points into the old.
void CudaEngine::plan_for(int batch) {
  const int count = branches_of(batch), share = batch / count;
  bool enough = true;
  for (int i = 0; i < count; ++i) enough = enough && share <= branches_[size_t(i)].activations.batch;
  if (enough) return;
  PYRA_CUDA(cudaStreamSynchronize(stream()));  // what is in flight uses the old
  drop_graphs();
  size_t wanted = 0;
  for (int i = 0; i < count; ++i) {
    branches_[size_t(i)].activations = {};
    wanted += Activations::bytes_for(device_model_, share);
  }
  size_t free_bytes = 0, total = 0;
  PYRA_CUDA(cudaMemGetInfo(&free_bytes, &total));
  if (wanted > free_bytes) {
    const size_t each = Activations::bytes_for(device_model_, 1);
    fail(ExitCode::device, "the GPU has ", free_bytes >> 20, " MB free of ", total >> 20, "; a batch of ", batch,
         " needs ", wanted >> 20, " MB beside the weights; a batch of ",
         std::max<size_t>(1, free_bytes * 9 / 10 / each), " would fit");
  }
  for (int i = 0; i < count; ++i) branches_[size_t(i)].activations = Activations(device_model_, share);
}

/// All of a pass but the reading of images, on every branch, joined in the first one's stream.
void CudaEngine::enqueue(int batch) {
  const int count = branches_of(batch);
  if (count == 2) {
    PYRA_CUDA(cudaEventRecord(fork_, stream()));
    PYRA_CUDA(cudaStreamWaitEvent(branches_[1].forward->stream(), fork_, 0));
  }
  for (int i = 0; i < count; ++i)
    branches_[size_t(i)].forward->enqueue(batch / count, branches_[size_t(i)].activations);
  if (count == 2) {
    PYRA_CUDA(cudaEventRecord(join_, branches_[1].forward->stream()));
    PYRA_CUDA(cudaStreamWaitEvent(stream(), join_, 0));
  }
}

void CudaEngine::check_host_plans() {
  for (Branch& branch : branches_) branch.forward->check_host_plans();
}

cudaGraphExec_t CudaEngine::graph_for(int batch) {
  plan_for(batch);
  if (const auto found = graphs_.find(batch); found != graphs_.end()) return found->second;
  // Once without a graph: matrix products choose their algorithms, kernels set their attributes.
  enqueue(batch);
  PYRA_CUDA(cudaStreamSynchronize(stream()));
  check_host_plans();
  if (cache_) cache_->save();

  cudaGraph_t graph = nullptr;
  PYRA_CUDA(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal));
  try {
    enqueue(batch);
  } catch (...) {
    (void)cudaStreamEndCapture(stream(), &graph);
    if (graph) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();
    throw;
  }
  PYRA_CUDA(cudaStreamEndCapture(stream(), &graph));
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  (void)cudaGraphDestroy(graph);
  PYRA_CUDA(status);
  graphs_.emplace(batch, executable);
  PYRA_CUDA(cudaGraphUpload(executable, stream()));
  return executable;
}

/// Copies into the slot's pinned memory and sends it on its way, once its last batch was read.
void CudaEngine::stage(Slot& slot, const at::Tensor& images) {
  const size_t bytes = bytes_of(images);
  if (slot.device_images.bytes() < bytes) {
    PYRA_CUDA(cudaStreamSynchronize(copy_));
    PYRA_CUDA(cudaStreamSynchronize(stream()));
    slot.host_images = PinnedMemory(bytes);
    slot.device_images = DeviceMemory(bytes);
  }
  const size_t logits = size_t(images.size(0)) * size_t(device_model_.config.num_classes) * sizeof(float);
  if (slot.host_logits.bytes() < logits) slot.host_logits = PinnedMemory(logits);
  const at::Tensor dense = images.contiguous();
  PYRA_CUDA(cudaEventSynchronize(slot.copied));
  parallel_copy(slot.host_images.get(), dense.const_data_ptr(), bytes);
  PYRA_CUDA(cudaStreamWaitEvent(copy_, slot.read, 0));
  PYRA_CUDA(cudaMemcpyAsync(slot.device_images.get(), slot.host_images.get(), bytes, cudaMemcpyHostToDevice, copy_));
  PYRA_CUDA(cudaEventRecord(slot.copied, copy_));
  slot.batch = int(images.size(0));
}

void CudaEngine::read_images(const Slot& slot, const at::Tensor& images) {
  const int count = branches_of(slot.batch), share = slot.batch / count;
  const size_t bytes = bytes_of(images) / size_t(count);
  for (int i = 0; i < count; ++i) {
    const Branch& branch = branches_[size_t(i)];
    branch.forward->read_images(
        {.data = slot.device_images.get<char>() + size_t(i) * bytes, .is_float = images.scalar_type() == at::kFloat},
        share, branch.activations, stream());
  }
}

void CudaEngine::return_logits(const Slot& slot) {
  const int count = branches_of(slot.batch);
  const size_t bytes = size_t(slot.batch / count) * size_t(device_model_.config.num_classes) * sizeof(float);
  for (int i = 0; i < count; ++i)
    PYRA_CUDA(cudaMemcpyAsync(slot.host_logits.get<char>() + size_t(i) * bytes,
                              branches_[size_t(i)].activations.logits.get(), bytes, cudaMemcpyDeviceToHost, stream()));
}

void CudaEngine::submit(const at::Tensor& images) {
  check(images);
  if (queue_.size() == slots_.size())
    fail(ExitCode::internal, "engine: ", queue_.size(), " batches are in flight already; collect() one first");
  PYRA_CUDA(cudaSetDevice(device_));
  Slot& slot = slots_[next_];
  stage(slot, images);
  const cudaGraphExec_t graph = graph_for(slot.batch);
  PYRA_CUDA(cudaStreamWaitEvent(stream(), slot.copied, 0));
  PYRA_CUDA(cudaEventRecord(slot.begun, stream()));
  read_images(slot, images);
  PYRA_CUDA(cudaEventRecord(slot.read, stream()));
  PYRA_CUDA(cudaGraphLaunch(graph, stream()));
  PYRA_CUDA(cudaEventRecord(slot.done, stream()));
  return_logits(slot);
  PYRA_CUDA(cudaEventRecord(slot.returned, stream()));
  queue_.push_back(next_);
  next_ = (next_ + 1) % slots_.size();
}

at::Tensor CudaEngine::collect() {
  if (queue_.empty()) fail(ExitCode::internal, "engine: collect() without a batch submitted");
  PYRA_CUDA(cudaSetDevice(device_));
  Slot& slot = slots_[queue_.front()];
  queue_.pop_front();
  PYRA_CUDA(cudaEventSynchronize(slot.returned));
  float ms = 0;
  PYRA_CUDA(cudaEventElapsedTime(&ms, slot.begun, slot.done));
  last_seconds_ = double(ms) * 1e-3;
  check_host_plans();
  at::Tensor logits = at::empty({slot.batch, device_model_.config.num_classes}, at::kFloat);
  std::memcpy(logits.data_ptr(), slot.host_logits.get(), bytes_of(logits));
  return logits;
}

at::Tensor CudaEngine::run(const at::Tensor& images) {
  if (!queue_.empty()) fail(ExitCode::internal, "engine: run() while ", queue_.size(), " batches are in flight");
  submit(images);
  return collect();
}

std::vector<double> CudaEngine::time_ms(const at::Tensor& images, int64_t runs) {
  (void)run(images);  // plans, captures, and leaves the images in a slot on the device
  const Slot& slot = slots_[(next_ + slots_.size() - 1) % slots_.size()];
  const cudaGraphExec_t graph = graph_for(slot.batch);
  std::vector<cudaEvent_t> marks(size_t(runs) + 1);
  for (cudaEvent_t& mark : marks) PYRA_CUDA(cudaEventCreate(&mark));
  PYRA_CUDA(cudaEventRecord(marks[0], stream()));
  for (size_t i = 1; i < marks.size(); ++i) {
    read_images(slot, images);
    PYRA_CUDA(cudaGraphLaunch(graph, stream()));
    PYRA_CUDA(cudaEventRecord(marks[i], stream()));
  }
  PYRA_CUDA(cudaStreamSynchronize(stream()));
  std::vector<double> times;
  for (size_t i = 1; i < marks.size(); ++i) {
    float ms = 0;
    PYRA_CUDA(cudaEventElapsedTime(&ms, marks[i - 1], marks[i]));
    times.push_back(double(ms));
  }
  for (cudaEvent_t mark : marks) (void)cudaEventDestroy(mark);
  check_host_plans();
  return times;
}

std::vector<Stage> CudaEngine::profile(const at::Tensor& images) {
  (void)run(images);
  const int batch = int(images.size(0)), count = branches_of(batch);
  std::vector<Stage> stages;
  for (int i = 0; i < count; ++i) {
    const Branch& branch = branches_[size_t(i)];
    StageTimer timer;
    branch.forward->enqueue(batch / count, branch.activations, &timer);
    for (const Stage& stage : timer.read()) {
      const auto same = std::ranges::find(stages, stage.name, &Stage::name);
      if (same == stages.end()) {
        stages.push_back(stage);
        continue;
      }
      same->calls += stage.calls;
      same->ms += stage.ms;
      same->bytes += stage.bytes;
      same->operations += stage.operations;
    }
  }
  return stages;
}

int64_t CudaEngine::device_bytes(int64_t batch) const {
  const int count = branches_of(int(batch));
  return int64_t(device_model_.bytes() + size_t(count) * Activations::bytes_for(device_model_, int(batch) / count));
}

}  // namespace pyra::engine
