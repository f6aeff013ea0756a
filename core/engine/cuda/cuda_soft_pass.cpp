#include "engine/cuda/cuda_soft_pass.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "engine/cuda/device.h"

namespace pyra::engine {

namespace cuda = kernels::cuda;

namespace {

constexpr int64_t kMaxSearchBatch = 4096;

int checked_search_batch(const SoftPassOptions& options) {
  if (options.batch < 1 || options.batch > kMaxSearchBatch)
    fail(ExitCode::usage, "a step of ", options.batch, " images; a GPU takes 1 to ", kMaxSearchBatch,
         ": give --search-batch one of these, or --device cpu");
  return int(options.batch);
}

/// The model, once it is known that this pass is for it; before anything goes to the device.
const nn::Vit& searchable(const nn::Vit& model, const SoftPassOptions& options) {
  const nn::VitConfig& config = model.config();
  if (model.merge()) fail(ExitCode::internal, "soft pass: the model merges already");
  if (options.precision == Precision::fp16)
    fail(ExitCode::usage, "dtype fp16: its gradients vanish without loss scaling; search in bf16");
  if (config.distilled)
    fail(ExitCode::usage, config.arch, ": a model of two heads searches its rates on the CPU alone: --device cpu");
  if (config.embed_dim % 8 != 0 || config.mlp_dim % 8 != 0)
    fail(ExitCode::usage, config.arch, ": ", config.embed_dim, " channels and ", config.mlp_dim,
         " hidden ones; the GPU's kernels do multiples of 8; use --device cpu");
  return model;
}

}  // namespace

/// Calls allocate(memory, bytes) for all that a pass of `images` images needs.
template <class Allocate>
void SoftMemory::plan(const DeviceModel& model, int images_of_pass, const Allocate& allocate) {
  const nn::VitConfig& config = model.config;
  const size_t b = size_t(images_of_pass), n = size_t(config.tokens()), c = size_t(config.embed_dim),
               mlp = size_t(config.mlp_dim), heads = size_t(config.num_heads), all = b * n;
  const size_t wide_type = cuda::size_of(model.types.compute),
               pixels = 3 * size_t(config.image_size * config.image_size);
  blocks.resize(model.blocks.size());
  for (SoftBlock& block : blocks) {
    for (DeviceMemory* memory : {&block.normalised1, &block.normalised2, &block.attended})
      allocate(*memory, all * c * wide_type);
    for (DeviceMemory* memory : {&block.inverse1, &block.inverse2, &block.sizes, &block.mask, &block.keep, &block.src,
                                 &block.dst, &block.cosine})
      allocate(*memory, all * 4);
    allocate(block.qkv, all * 3 * c * wide_type);
    allocate(block.hidden, all * mlp * wide_type);
    for (DeviceMemory* memory : {&block.top, &block.inverse, &block.peak}) allocate(*memory, all * heads * 4);
    allocate(block.value_mean, b * c * 4);
  }
  allocate(images, b * pixels * 4);
  allocate(labels, b * 4);
  for (DeviceMemory* memory : {&stream[0], &stream[1], &d_stream[0], &d_stream[1]}) allocate(*memory, all * c * 4);
  for (DeviceMemory* memory : {&rows, &branch}) allocate(*memory, all * c * wide_type);
  allocate(wide, std::max(all * std::max(3 * c, mlp), b * pixels) * wide_type);
  for (DeviceMemory* memory : {&class_rows, &d_mask_rows, &delta, &correction}) allocate(*memory, all * heads * 4);
  for (DeviceMemory* memory : {&last_sizes, &last_mask, &attention, &d_ranks, &d_mask[0], &d_mask[1]})
    allocate(*memory, all * 4);
  allocate(d_survival, blocks.size() * 2 * n * 4);
  for (DeviceMemory* memory : {&pooled, &d_pooled, &normalised, &features, &d_features}) allocate(*memory, b * c * 4);
  allocate(inverse, b * 4);
  for (DeviceMemory* memory : {&logits, &d_logits}) allocate(*memory, b * size_t(config.num_classes) * 4);
  allocate(status, sizeof(cuda::StepStatus));
}

SoftMemory::SoftMemory(const DeviceModel& model, int batch) {
  plan(model, batch, [this](DeviceMemory& memory, size_t wanted) {
    memory = DeviceMemory(wanted);
    bytes += wanted;
  });
}

size_t SoftMemory::bytes_for(const DeviceModel& model, int batch) {
  SoftMemory unused;
  size_t total = 0;
  unused.plan(model, batch, [&](DeviceMemory&, size_t wanted) { total += wanted; });
  return total;
}

CudaSoftPass::CudaSoftPass(const nn::Vit& model, const nn::Preprocess& preprocess, const SoftPassOptions& options,
                           int device)
    : device_(set_device(device)),
      preprocess_(preprocess),
      proportional_(options.proportional_attention),
      batch_(checked_search_batch(options)),
      model_(searchable(model, options), types_of(options.precision)),
      cache_(gemm_cache(device_, options.deterministic)),
      runner_(cache_) {
  check_room(
      cat("a step of ", batch_, " images"), batch_, [this](int n) { return SoftMemory::bytes_for(model_, n); },
      "--search-batch ");
  memory_ = SoftMemory(model_, batch_);
  host_images_ = PinnedMemory(memory_.images.bytes());
  host_labels_ = PinnedMemory(memory_.labels.bytes());
  host_survival_ = PinnedMemory(memory_.d_survival.bytes());
  host_status_ = PinnedMemory(memory_.status.bytes());
  PYRA_CUDA(cudaMemset(memory_.status.get(), 0, memory_.status.bytes()));
  const at::Tensor ones = at::ones({rows()}, at::kFloat);
  for (const DeviceMemory* memory : {&memory_.blocks[0].sizes, &memory_.blocks[0].mask})
    PYRA_CUDA(cudaMemcpy(memory->get(), ones.const_data_ptr(), memory->bytes(), cudaMemcpyHostToDevice));
  PYRA_CUDA(cudaDeviceSynchronize());  // stream_ would not wait for these
  PYRA_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
}

CudaSoftPass::~CudaSoftPass() {
  (void)cudaSetDevice(device_);
  (void)cudaDeviceSynchronize();
  if (stream_) (void)cudaStreamDestroy(stream_);
}

void CudaSoftPass::check(const SoftBatch& batch, std::span<const kernels::SoftCounts> counts) const {
  const int64_t side = model_.config.image_size;
  const std::array<int64_t, 4> bytes{batch_, side, side, 3}, floats{batch_, 3, side, side};
  const at::ScalarType type = batch.images.scalar_type();
  const bool fits = (type == at::kByte && batch.images.sizes() == at::IntArrayRef(bytes)) ||
                    (type == at::kFloat && batch.images.sizes() == at::IntArrayRef(floats));
  if (!fits)
    fail(ExitCode::internal, "soft pass: images are ", batch.images.sizes(), " ", type, ", expected uint8 ",
         at::IntArrayRef(bytes), " or fp32 ", at::IntArrayRef(floats));
  if (batch.labels.dim() != 1 || batch.labels.size(0) != batch_ || batch.labels.scalar_type() != at::kLong)
    fail(ExitCode::internal, "soft pass: labels are ", batch.labels.sizes(), " ", batch.labels.scalar_type(),
         ", expected int64 [", batch_, "]");
  if (int64_t(counts.size()) != model_.config.depth)
    fail(ExitCode::internal, "soft pass: counts of ", counts.size(), " blocks, expected ", model_.config.depth);
  int present = tokens();
  for (const kernels::SoftCounts& c : counts) {
    if (c.present != present || c.pruned > c.present || c.kept > c.pruned ||
        c.kept <= int(model_.config.protected_tokens()))
      fail(ExitCode::internal, "soft pass: of ", c.present, " tokens ", c.pruned, " and ", c.kept, " stay; expected ",
           present, " and counts that do not rise, above ", model_.config.protected_tokens());
    present = c.kept;
  }
}

void CudaSoftPass::send(const SoftBatch& batch) {
  const at::Tensor images = batch.images.contiguous(), labels = batch.labels.contiguous();
  std::memcpy(host_images_.get(), images.const_data_ptr(), images.nbytes());
  const int64_t* const given = labels.const_data_ptr<int64_t>();
  for (int i = 0; i < batch_; ++i) {
    if (given[i] < 0 || given[i] >= model_.config.num_classes)
      fail(ExitCode::internal, "soft pass: label ", given[i], " of ", model_.config.num_classes, " classes");
    host_labels_.get<int32_t>()[i] = int32_t(given[i]);
  }
  PYRA_CUDA(
      cudaMemcpyAsync(memory_.images.get(), host_images_.get(), images.nbytes(), cudaMemcpyHostToDevice, stream_));
  PYRA_CUDA(cudaMemcpyAsync(memory_.labels.get(), host_labels_.get(), memory_.labels.bytes(), cudaMemcpyHostToDevice,
                            stream_));
}

SoftPassResult CudaSoftPass::receive() {
  PYRA_CUDA(cudaMemcpyAsync(host_survival_.get(), memory_.d_survival.get(), memory_.d_survival.bytes(),
                            cudaMemcpyDeviceToHost, stream_));
  PYRA_CUDA(cudaMemcpyAsync(host_status_.get(), memory_.status.get(), memory_.status.bytes(), cudaMemcpyDeviceToHost,
                            stream_));
  PYRA_CUDA(cudaStreamSynchronize(stream_));
  const auto& status = *host_status_.get<cuda::StepStatus>();
  const at::Tensor both = at::empty({depth(), 2, tokens()}, at::kFloat);
  std::memcpy(both.data_ptr(), host_survival_.get(), host_survival_.bytes());
  return {.cross_entropy = status.pending_loss,
          .correct = status.pending_correct,
          .d_prune = both.select(1, 0).contiguous(),
          .d_merge = both.select(1, 1).contiguous()};
}

SoftPassResult CudaSoftPass::run(const SoftBatch& batch, std::span<const kernels::SoftCounts> counts) {
  check(batch, counts);
  PYRA_CUDA(cudaSetDevice(device_));
  counts_.assign(counts.begin(), counts.end());
  send(batch);
  embed(batch.images.scalar_type() == at::kFloat);
  for (int i = 0; i < depth(); ++i) forward_block(i);
  head();
  backward();
  SoftPassResult result = receive();
  if (cache_) cache_->save();  // which products there are follows the counts, and so may change from pass to pass
  return result;
}

}  // namespace pyra::engine
