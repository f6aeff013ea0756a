#include "tasks/bench_end_to_end.h"

#include <ATen/Functions.h>

#include <chrono>
#include <deque>

#include "base/error.h"
#include "data/image.h"
#include "data/loader.h"

namespace pyra::tasks {
namespace {

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

class EndToEnd {
 public:
  EndToEnd(std::shared_ptr<const Model> model, std::shared_ptr<const data::Dataset> dataset,
           const BenchSettings& settings, int64_t batch)
      : model_(std::move(model)),
        dataset_(std::move(dataset)),
        split_(settings.split),
        batch_(batch),
        engine_(make_engine(*model_, settings.device, resolve_precision(settings.dtype, settings.device))) {
    const auto count = int64_t(dataset_->split(split_).size());
    if (count < batch)
      fail(ExitCode::input, dataset_->path().string(), ": split ", split_, " has ", count, " images, a batch takes ",
           batch);
  }

  double time_ms(int64_t iterations) {
    const auto start = Clock::now();
    for (int64_t i = 0; i < iterations; ++i) {
      const auto begun = Clock::now();
      const at::Tensor images = next_batch();
      if (int64_t(begun_.size()) == engine_->in_flight()) label_oldest();
      engine_->submit(images);
      begun_.push_back(begun);
    }
    while (!begun_.empty()) label_oldest();
    return ms_since(start);
  }

  [[nodiscard]] std::vector<engine::Stage> stages() {
    engine::Stage read{.name = "read"}, decode{.name = "decode"}, resize{.name = "resize"}, compute{.name = "compute"};
    const auto& samples = dataset_->split(split_);
    for (int64_t i = 0; i < batch_; ++i) {
      auto start = Clock::now();
      const std::vector<uint8_t> bytes = dataset_->read(samples[size_t(i)]);
      read.ms += ms_since(start);
      read.bytes += double(bytes.size());
      start = Clock::now();
      const data::Image image = data::decode(bytes, dataset_->describe(samples[size_t(i)]));
      decode.ms += ms_since(start);
      decode.bytes += double(image.pixels.size());
      start = Clock::now();
      const data::Image prepared = data::prepare(image, model_->file.preprocess);
      resize.ms += ms_since(start);
      resize.bytes += double(prepared.pixels.size());
    }
    compute.ms = engine_->time_ms(next_batch(), 1, 1)[0];
    for (engine::Stage* stage : {&read, &decode, &resize}) stage->calls = batch_;
    compute.calls = 1;
    return {read, decode, resize, compute};
  }

  [[nodiscard]] std::vector<double> latency_ms() const { return latency_ms_; }
  void forget_latency() { latency_ms_.clear(); }
  [[nodiscard]] int64_t device_bytes() const { return engine_->device_bytes(batch_, engine_->in_flight()); }

 private:
  at::Tensor next_batch() {
    if (!reader_ || reader_->total() - taken_ < batch_) {  // whole batches only: a part would be decoded for nothing
      reader_.emplace(*dataset_, split_, model_->file.preprocess);
      taken_ = 0;
    }
    taken_ += batch_;
    return reader_->next(batch_)->images;
  }

  void label_oldest() {
    const at::Tensor labels = engine_->collect().argmax(1);
    if (labels.size(0) != batch_) fail(ExitCode::internal, "a batch of ", batch_, " got ", labels.size(0), " labels");
    latency_ms_.push_back(ms_since(begun_.front()));
    begun_.pop_front();
  }

  std::shared_ptr<const Model> model_;
  std::shared_ptr<const data::Dataset> dataset_;
  std::string split_;
  int64_t batch_;
  std::unique_ptr<engine::Engine> engine_;
  std::optional<data::SplitReader> reader_;
  int64_t taken_ = 0;  // from it
  std::deque<Clock::time_point> begun_;
  std::vector<double> latency_ms_;
};

}  // namespace

BenchSubject end_to_end_subject(const std::shared_ptr<const Model>& model,
                                const std::shared_ptr<const data::Dataset>& dataset, const BenchSettings& settings,
                                BenchRow row) {
  const auto scene = std::make_shared<EndToEnd>(model, dataset, settings, row.batch);
  BenchSubject subject{.row = std::move(row), .time_ms = [scene](int64_t n) { return scene->time_ms(n); }};
  if (settings.device != "cpu") subject.device_bytes = [scene] { return scene->device_bytes(); };
  subject.profile = [scene] { return scene->stages(); };
  subject.warmed = [scene] { scene->forget_latency(); };
  subject.latency_ms = [scene] { return scene->latency_ms(); };
  return subject;
}

}  // namespace pyra::tasks
