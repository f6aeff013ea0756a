// Training on a GPU: one captured graph a step, from the choice of images to changed weights. The host only says which
// images and which rates, up to eight steps ahead of it.
#pragma once
#include <array>
#include <memory>

#include "engine/cuda/graph.h"
#include "engine/cuda/train_step.h"

namespace pyra::engine {

class CudaTrainer final : public Trainer {
 public:
  CudaTrainer(nn::Vit& model, const TrainingImages& images, const nn::Preprocess& preprocess,
              const TrainerOptions& options, int device);
  ~CudaTrainer() override;

  void step(const TrainStep& step) override;
  [[nodiscard]] StepSums collect() override;
  void publish() override;
  void take_over() override;
  [[nodiscard]] int64_t device_bytes() const override;
  [[nodiscard]] int64_t set_bytes() const override { return int64_t(set_.bytes()); }

 private:
  /// A step's numbers on their way to the device, a teacher's logits, and its images where the set is not there.
  struct Slot {
    PinnedMemory inputs, images, teacher;
    DeviceMemory device_images;
    cudaEvent_t read = nullptr;    ///< the device has taken the images
    cudaEvent_t copied = nullptr;  ///< they are on the device
  };
  /// Where things stand in the block of inputs: StepInputs, then order, labels and drop-path's factors.
  struct Layout {
    size_t order, labels, scales, total;
  };
  void place_images();
  void upload_set();
  void write_inputs(const TrainStep& step, char* to) const;
  void stage_images(const TrainStep& step, Slot& slot);
  void make_room_for_teacher();
  void send_teacher(const TrainStep& step, Slot& slot);
  void enqueue_step();
  void optimise();
  void capture();
  [[nodiscard]] TrainBatch batch() const;
  void reset_sums();
  [[nodiscard]] cudaStream_t stream() const { return runner_->stream(); }

  int device_;
  nn::Vit& vit_;
  TrainingImages images_;
  TrainerOptions options_;
  int batch_;
  int64_t image_bytes_;
  bool augmented_ = false;  ///< batches come as normalised floats; known at the first step
  Layout layout_;
  DeviceMemory inputs_, status_, norms_;
  PinnedMemory host_status_;
  std::unique_ptr<TrainModel> model_;
  std::shared_ptr<kernels::cuda::GemmCache> cache_;
  std::unique_ptr<TrainStepRunner> runner_;
  DeviceMemory segments_;
  DeviceMemory set_;           ///< all images, where they fit
  DeviceMemory batch_images_;  ///< of the step
  DeviceMemory teacher_;       ///< [B,classes] of the step; empty where nobody teaches, known at the first step
  cudaStream_t copy_ = nullptr;
  Graph graph_;
  std::array<Slot, 8> slots_;
  size_t next_ = 0;
};

}  // namespace pyra::engine
