// The library for programs that run models: a file in, logits out. No tensor type and no LibTorch header in sight.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace pyra {

/// A model file ready to run on the CPU or a GPU, merges and all.
///
///   const pyra::Engine engine = pyra::Engine::load("flowers.safetensors");
///   std::vector<uint8_t> image = engine.prepare(bytes_of_a_jpeg);
///   std::vector<float> logits = engine.run(image);
///
/// Threads: an engine may be shared; its calls of run() take turns. For batches in parallel load one engine a thread:
/// they share nothing but the CPU's cores. Failures throw pyra::Error (base/error.h) with the exit code that pyractl
/// would end with; want of memory, std::bad_alloc or LibTorch's c10::Error. Logits may be NaN where a model's weights
/// are.
class Engine {
 public:
  struct Options {
    std::string device = "auto";                     ///< "auto", "cpu", "cuda", "cuda:1"
    std::string dtype = "auto";                      ///< "auto", "fp32", "tf32", "bf16", "fp16"
    std::vector<std::filesystem::path> plugin_path;  ///< looked through before the places PluginRegistry names
    bool exact_gelu = false;                         ///< a GPU's bf16 and fp16: GELU by erf instead of its tanh form
  };

  /// Reads what `pyractl eval` reads: a .safetensors file, ours or timm's, a folder of the Hugging Face hub, an .npz.
  /// Error(input) for the file, Error(plugin) for a merger that is not there, Error(device) for a device that is not.
  [[nodiscard]] static Engine load(const std::filesystem::path& file, const Options& options);
  [[nodiscard]] static Engine load(const std::filesystem::path& file);
  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  [[nodiscard]] int64_t image_size() const;                           ///< S: an image is S x S pixels
  [[nodiscard]] int64_t num_classes() const;                          ///< logits an image
  [[nodiscard]] const std::vector<std::string>& class_names() const;  ///< by label; may be empty
  [[nodiscard]] const std::string& device() const;                    ///< "cpu" or "cuda:0"

  /// An encoded image (JPEG, PNG, BMP, PNM) decoded and resized as the model was trained: S*S*3 bytes, RGB, row by row.
  [[nodiscard]] std::vector<uint8_t> prepare(std::span<const uint8_t> encoded) const;

  /// images: B*S*S*3 bytes as prepare() makes them, B >= 1 -> B*num_classes logits. An image's logits do not depend on
  /// the images beside it, and are bit-equal from run to run at the same B. A GPU captures a graph at the first call
  /// with a B, so that one takes longer; and memory for the largest B seen stays planned.
  [[nodiscard]] std::vector<float> run(std::span<const uint8_t> images) const;

 private:
  struct State;
  explicit Engine(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace pyra
