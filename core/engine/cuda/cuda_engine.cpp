#include "engine/cuda/cuda_engine.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "base/error.h"
#include "engine/cuda/device.h"
#include "nn/config.h"

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

/// The most images of a pass that goes side by side with another. Two fill the multiprocessors that the last wave of
/// each other's kernels leaves idle, and the time in which either waits for weights; long ones only take each other's
/// place in L2. Measured on an H200 (2026-11-28; ViT-B; multiply-adds that each multiprocessor has to do): PYRA high
/// gains 74 % at one image, 16 % at 32 (1.2e9), 9 % at 64 (2.5e9), 2 to 6 % at 128 (4.9e9), 4 % at 256 (9.8e9), dense
/// 3 % at 64 (8.5e9); at 1.7e10 low loses 1.5 % (256 images) and dense 0.4 % (128), at 3.4e10 dense 3 % and more.
/// None where a plan is made on the host, which takes memory for each lane there as well. $PYRA_CUDA_BESIDE overrules.
int most_images_beside(const nn::Vit& model, const DeviceModel& device_model, int device) {
  constexpr double kMacsEach = 1.2e10;
  if (const char* given = std::getenv("PYRA_CUDA_BESIDE"); given && *given) return std::atoi(given);
  const auto by_host = [](const DeviceBlock& block) {
    return block.merge && block.merge->kind == DeviceMerge::Kind::by_host;
  };
  if (std::ranges::any_of(device_model.blocks, by_host)) return 0;
  int multiprocessors = 0;
  PYRA_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return int(kMacsEach * multiprocessors / double(nn::count_macs(model.config(), model.tokens_after())));
}

/// Bytes that are left when a second lane is taken: for images on their way, cuBLASLt's kernels, other programs.
constexpr size_t kCompanyLeaves = size_t{512} << 20;

class Marks {
 public:
  explicit Marks(size_t count) : events_(count) {
    for (cudaEvent_t& event : events_) PYRA_CUDA(cudaEventCreate(&event));
  }
  ~Marks() {
    for (cudaEvent_t event : events_)
      if (event) (void)cudaEventDestroy(event);
  }
  Marks(const Marks&) = delete;
  Marks& operator=(const Marks&) = delete;
  [[nodiscard]] size_t size() const { return events_.size(); }
  void record(size_t i, cudaStream_t stream) { PYRA_CUDA(cudaEventRecord(events_[i], stream)); }
  [[nodiscard]] double ms(size_t from, size_t to) const {
    float ms = 0;
    PYRA_CUDA(cudaEventElapsedTime(&ms, events_[from], events_[to]));
    return double(ms);
  }

 private:
  std::vector<cudaEvent_t> events_;
};

}  // namespace

CudaEngine::CudaEngine(const nn::Vit& model, const nn::Preprocess& preprocess, const EngineOptions& options, int device)
    : device_(set_device(device)),
      device_model_(model, types_of(options.precision)),
      cache_(gemm_cache(device, options.deterministic)),
      most_beside_(most_images_beside(model, device_model_, device)) {
  for (auto& lane : lanes_) lane = std::make_unique<Lane>(model, device_model_, preprocess, options.exact_gelu, cache_);
  PYRA_CUDA(cudaStreamCreateWithFlags(&copy_, cudaStreamNonBlocking));
  for (Slot& slot : slots_)
    for (cudaEvent_t* event : {&slot.copied, &slot.returned})
      PYRA_CUDA(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
  for (Pass& pass : passes_)
    for (cudaEvent_t* event : {&pass.begun, &pass.done}) PYRA_CUDA(cudaEventCreate(event));
}

CudaEngine::~CudaEngine() {
  (void)cudaSetDevice(device_);
  (void)cudaDeviceSynchronize();
  for (const Slot& slot : slots_)
    for (cudaEvent_t event : {slot.copied, slot.returned})
      if (event) (void)cudaEventDestroy(event);
  for (const Pass& pass : passes_)
    for (cudaEvent_t event : {pass.begun, pass.done})
      if (event) (void)cudaEventDestroy(event);
  if (copy_) (void)cudaStreamDestroy(copy_);
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

void CudaEngine::check_idle(const char* call) const {
  if (collected_ < submitted_)
    fail(ExitCode::internal, "engine: ", call, "() while ", submitted_ - collected_, " batches are in flight");
}

/// By batches of that size, so many in flight.
size_t CudaEngine::lanes_taken(int64_t batch, int64_t in_flight) const {
  return in_flight > 1 && batch <= most_beside_ ? lanes_.size() : 1;
}

/// Whether a batch that comes now goes side by side with the last one.
bool CudaEngine::has_company(int batch) {
  return collected_ < submitted_ && std::max(batch, slot(submitted_ - 1).batch) <= most_beside_;
}

/// Whether the device has memory for such a batch once the lane gives back its own, and `leaves` bytes beside.
bool CudaEngine::fits(const Lane& lane, int batch, size_t leaves) const {
  if (lane.room() >= batch) return true;
  size_t free_bytes = 0, total = 0;
  PYRA_CUDA(cudaMemGetInfo(&free_bytes, &total));
  return Activations::bytes_for(device_model_, batch) + leaves <= free_bytes + lane.bytes();
}

/// The other lane for company, if there is memory for it; else the first, for which the other gives up its own.
size_t CudaEngine::choose_lane(int batch, bool beside) {
  if (beside) {
    const size_t other = 1 - slot(submitted_ - 1).lane;
    if (fits(*lanes_[other], batch, kCompanyLeaves)) return other;
  }
  Lane& lane = *lanes_[0];
  if (!fits(lane, batch, 0)) lanes_[1]->clear();
  if (fits(lane, batch, 0)) return 0;
  lane.clear();
  check_room(
      cat("a batch of ", batch), batch, [this](int n) { return Activations::bytes_for(device_model_, n); },
      "a batch of ");
  return 0;
}

void CudaEngine::prepare(Lane& lane, int batch, bool beside) {
  lane.make_room(batch);
  if (lane.captured(batch, beside)) return;
  wait_for_lanes();
  lane.capture(batch, beside);
}

void CudaEngine::wait_for_lanes() {
  for (const auto& lane : lanes_) PYRA_CUDA(cudaStreamSynchronize(lane->stream()));
}

/// Copies into the slot's pinned memory and sends it on its way.
void CudaEngine::stage(Slot& slot, const at::Tensor& images) {
  const size_t bytes = bytes_of(images);
  PYRA_CUDA(cudaEventSynchronize(slot.copied));  // of a batch that was abandoned
  if (slot.device_images.bytes() < bytes) {
    slot.host_images = PinnedMemory(bytes);
    slot.device_images = DeviceMemory(bytes);
  }
  const size_t logits = size_t(images.size(0)) * size_t(device_model_.config.num_classes) * sizeof(float);
  if (slot.host_logits.bytes() < logits) slot.host_logits = PinnedMemory(logits);
  const at::Tensor dense = images.contiguous();
  parallel_copy(slot.host_images.get(), dense.const_data_ptr(), bytes);
  PYRA_CUDA(cudaMemcpyAsync(slot.device_images.get(), slot.host_images.get(), bytes, cudaMemcpyHostToDevice, copy_));
  PYRA_CUDA(cudaEventRecord(slot.copied, copy_));
  slot.batch = int(images.size(0));
}

void CudaEngine::read_images(const Slot& slot, const at::Tensor& images) {
  lanes_[slot.lane]->read_images({.data = slot.device_images.get(), .is_float = images.scalar_type() == at::kFloat},
                                 slot.batch);
}

/// What of the two passes before may be under way on the other lane is waited for, on the lane.
void CudaEngine::await_turn(size_t lane, bool beside) {
  for (int64_t before = beside ? 2 : 1; before <= std::min<int64_t>(2, submitted_); ++before)
    if (slot(submitted_ - before).lane != lane)
      PYRA_CUDA(cudaStreamWaitEvent(lanes_[lane]->stream(), pass(submitted_ - before).done, 0));
}

void CudaEngine::launch(const at::Tensor& images) {
  Slot& slot = this->slot(submitted_);
  const Pass& pass = this->pass(submitted_);
  stage(slot, images);
  const bool beside = has_company(slot.batch);
  slot.lane = choose_lane(slot.batch, beside);
  Lane& lane = *lanes_[slot.lane];
  prepare(lane, slot.batch, beside);
  const cudaStream_t stream = lane.stream();
  await_turn(slot.lane, beside);
  PYRA_CUDA(cudaStreamWaitEvent(stream, slot.copied, 0));
  PYRA_CUDA(cudaEventRecord(pass.begun, stream));
  read_images(slot, images);
  lane.launch(slot.batch, beside);
  PYRA_CUDA(cudaEventRecord(pass.done, stream));
  PYRA_CUDA(cudaMemcpyAsync(slot.host_logits.get(), lane.logits(),
                            size_t(slot.batch) * size_t(device_model_.config.num_classes) * sizeof(float),
                            cudaMemcpyDeviceToHost, stream));
  PYRA_CUDA(cudaEventRecord(slot.returned, stream));
}

/// What is in flight is waited for and forgotten, and so is what its plans threw.
void CudaEngine::abandon() noexcept {
  for (const auto& lane : lanes_) (void)cudaStreamSynchronize(lane->stream());
  collected_ = submitted_;
  for (const auto& lane : lanes_) lane->forget_host_plans();
}

void CudaEngine::submit(const at::Tensor& images) {
  check(images);
  if (submitted_ - collected_ == in_flight())
    fail(ExitCode::internal, "engine: ", in_flight(), " batches are in flight already; collect() one first");
  PYRA_CUDA(cudaSetDevice(device_));
  try {
    launch(images);
  } catch (...) {
    abandon();
    throw;
  }
  ++submitted_;
}

/// From its begin, or from the end of the one before where that came later, to its end: passes side by side share their
/// time.
double CudaEngine::seconds_of(const Pass& pass, const Pass& before) const {
  float all = 0, shared = 0;
  PYRA_CUDA(cudaEventElapsedTime(&all, pass.begun, pass.done));
  if (collected_ > 0) PYRA_CUDA(cudaEventElapsedTime(&shared, pass.begun, before.done));
  return 1e-3 * std::max(0.0, double(all) - std::max(0.0, double(shared)));
}

at::Tensor CudaEngine::collect() {
  if (collected_ == submitted_) fail(ExitCode::internal, "engine: collect() without a batch submitted");
  PYRA_CUDA(cudaSetDevice(device_));
  const Slot& slot = this->slot(collected_);
  PYRA_CUDA(cudaEventSynchronize(slot.returned));
  last_seconds_ = seconds_of(pass(collected_), pass(collected_ + int64_t(passes_.size()) - 1));
  ++collected_;
  try {
    lanes_[slot.lane]->check_host_plans();
  } catch (...) {  // one of a later batch, perhaps: none of them is to be taken for good
    abandon();
    throw;
  }
  at::Tensor logits = at::empty({slot.batch, device_model_.config.num_classes}, at::kFloat);
  std::memcpy(logits.data_ptr(), slot.host_logits.get(), bytes_of(logits));
  return logits;
}

at::Tensor CudaEngine::run(const at::Tensor& images) {
  check_idle("run");
  submit(images);
  return collect();
}

std::vector<double> CudaEngine::time_ms(const at::Tensor& images, int64_t runs, int64_t in_flight) {
  check_idle("time_ms");
  const size_t lanes = lanes_taken(images.size(0), in_flight);
  const bool beside = lanes > 1;
  // Plans, captures, and leaves the images in slots on the device, one for each lane.
  const int64_t first = submitted_;
  for (size_t i = 0; i < lanes; ++i) submit(images);
  while (collected_ < submitted_) (void)collect();
  for (size_t i = 0; i < lanes; ++i) prepare(*lanes_[slot(first + int64_t(i)).lane], int(images.size(0)), beside);
  // A pass is timed from the end of the one before it on its lane; the last have company to their end.
  Marks marks(lanes + size_t(runs) + lanes - 1);
  for (size_t i = 0; i < marks.size(); ++i) {
    const Slot& slot = this->slot(first + int64_t(i % lanes));
    Lane& lane = *lanes_[slot.lane];
    if (i >= lanes) {
      read_images(slot, images);
      lane.launch(slot.batch, beside);
    }
    marks.record(i, lane.stream());
  }
  wait_for_lanes();
  for (const auto& lane : lanes_) lane->check_host_plans();
  std::vector<double> times;
  for (size_t i = lanes; i < lanes + size_t(runs); ++i) times.push_back(marks.ms(i - lanes, i) / double(lanes));
  return times;
}

std::vector<Stage> CudaEngine::profile(const at::Tensor& images) {
  (void)run(images);
  StageTimer timer;
  lanes_[0]->profile(int(images.size(0)), timer);
  return timer.read();
}

int64_t CudaEngine::device_bytes(int64_t batch, int64_t in_flight) const {
  return int64_t(device_model_.bytes() +
                 lanes_taken(batch, in_flight) * Activations::bytes_for(device_model_, int(batch)));
}

}  // namespace pyra::engine
