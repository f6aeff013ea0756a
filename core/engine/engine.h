// What runs a model, on whatever device: the tasks know this interface and nothing of what is behind it.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "nn/preprocess.h"
#include "nn/vit.h"

namespace pyra::engine {

enum class Precision {
  fp32,  ///< true fp32 everywhere
  tf32,  ///< fp32 storage, matrix products of linear layers in tf32 (CUDA only)
  bf16,  ///< bf16 operands; sums, softmax, statistics and the head in fp32
  fp16,  ///< likewise in fp16 (CUDA only)
};
[[nodiscard]] const char* precision_name(Precision precision);  ///< "fp32", …

struct EngineOptions {
  std::string device = "cpu";  ///< "cpu" or "cuda:INDEX"
  Precision precision = Precision::fp32;
  /// CUDA, bf16 and fp16: GELU by erf in a pass of its own, instead of the tanh form inside the matrix product. fp32
  /// and tf32 are always exact, and so is the CPU.
  bool exact_gelu = false;
  /// CUDA: matrix products take cuBLASLt's first algorithm instead of the one that was timed fastest, so that a result
  /// is bit-equal wherever GPU, driver and libraries are the same. Without it, it is so with the same cache of choices.
  bool deterministic = false;
};

/// What one kind of step takes of a forward pass.
struct Stage {
  std::string name;       ///< "qkv", "attention", "merge" …
  int64_t calls = 0;      ///< in one pass
  double ms = 0;          ///< all of them together
  double bytes = 0;       ///< that must move: each operand read once, each result written once
  double operations = 0;  ///< multiplications and additions of matrix products
};

/// An engine belongs to one thread at a time. Several engines may run at once, each in its own thread.
class Engine {
 public:
  virtual ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// images: uint8 [B,S,S,3] as loaded, or fp32 [B,3,S,S], normalised; CPU -> logits [B,num_classes] fp32 on the CPU.
  /// An image's logits are bit-equal whoever its companions are at the same B. B >= 1.
  [[nodiscard]] virtual at::Tensor run(const at::Tensor& images) = 0;

  /// run() in two halves, so that copying, computing and what the caller does in between overlap: at most in_flight()
  /// batches are submitted and not yet collected, and collect() gives their logits in the order of submission. One that
  /// throws loses all that is in flight; the engine may be used again, unless a device failed.
  virtual void submit(const at::Tensor& images) = 0;
  [[nodiscard]] virtual at::Tensor collect() = 0;
  [[nodiscard]] virtual int64_t in_flight() const = 0;
  /// Seconds of computing that the batch collected last took, without its way to the device and back, nor what it
  /// shared with the batch before: over a pipeline they add up to the time in which something was computed.
  [[nodiscard]] virtual double last_seconds() const = 0;

  /// Milliseconds that `runs` forward passes of `images` take, one entry each, with the images where the engine
  /// computes and without their way there: CUDA events on a GPU, the clock on the CPU. With in_flight 1 each pass
  /// begins when the one before is done; with more, as in a pipeline of submit(), where two may run side by side and an
  /// entry is a pass's share of their time. runs, in_flight >= 1.
  [[nodiscard]] virtual std::vector<double> time_ms(const at::Tensor& images, int64_t runs, int64_t in_flight) = 0;

  /// Where a pass spends its time, step by step, each timed alone: no two steps overlap, so it takes longer than
  /// time_ms says. Empty on the CPU.
  [[nodiscard]] virtual std::vector<Stage> profile(const at::Tensor& images);

  /// Bytes that weights and activations take on the device with so many batches of that size in flight; 0 on the CPU,
  /// where memory is the process's.
  [[nodiscard]] virtual int64_t device_bytes(int64_t batch, int64_t in_flight) const = 0;

 protected:
  Engine() = default;
};

/// Keeps what it needs of `model`; on the CPU that is a reference, so the model must outlive the engine and not change.
/// Throws Error(device) when the device is not there, too old or too small, Error(usage) for a precision or a shape of
/// model that it does not do.
[[nodiscard]] std::unique_ptr<Engine> make_engine(const nn::Vit& model, const nn::Preprocess& preprocess,
                                                  const EngineOptions& options);

}  // namespace pyra::engine
