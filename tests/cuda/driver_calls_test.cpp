// The engine neither waits for the device nor asks it for memory while it replays a forward or a training step.
#include "cuda/driver_calls.h"

#include <cstring>

#include "cuda/device.h"
#include "cuda/small_vit.h"
#include "engine/engine.h"
#include "engine/trainer.h"
#include "support.h"

using namespace pyra;
using test::DriverCalls;

namespace {

const std::initializer_list<const char*> kWaits = {"Synchronize", "cuMemcpyHtoD_", "cuMemcpyDtoH_", "cuMemcpyDtoD_",
                                                   "cuMemcpy_"};
const std::initializer_list<const char*> kMemory = {"MemAlloc",     "MemFree",   "MemHostAlloc",
                                                    "MemAllocHost", "MemCreate", "GraphInstantiate"};

nn::Vit merging_model() {
  const nn::VitConfig config = test::small_config();
  nn::Vit vit(config, nn::random_weights(config, 1));
  test::attach(vit, "pyra", test::removing({9, 4, 6}));
  return vit;
}

}  // namespace

TEST_CASE("waiting and allocating are counted", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  const test::OnDevice begun(at::zeros({4}));  // a context is there
  DriverCalls calls;
  CHECK(DriverCalls::count(calls.take(), kWaits) == 0);
  const test::OnDevice memory(at::zeros({4}));
  PYRA_CUDA(cudaDeviceSynchronize());
  const auto seen = calls.take();
  CHECK(DriverCalls::count(seen, kMemory) >= 1);
  CHECK(DriverCalls::count(seen, kWaits) >= 2);  // the copy, and the wait
}

TEST_CASE("100 replayed forwards neither wait nor allocate", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  const auto gpu =
      engine::make_engine(merging_model(), {.size = 48}, {.device = "cuda:0", .precision = engine::Precision::bf16});
  const at::Tensor images = test::bytes(test::small_config(), 8);
  DriverCalls calls;
  const int64_t in_flight = GENERATE(1, 3);
  CAPTURE(in_flight);
  for (int slot = 0; slot < 3; ++slot) (void)gpu->time_ms(images, 1, in_flight);  // captures, and makes slots' memory
  (void)calls.take();
  REQUIRE(gpu->time_ms(images, 1, in_flight).size() == 1);
  const auto one = calls.take();
  REQUIRE(gpu->time_ms(images, 100, in_flight).size() == 100);
  const auto hundred = calls.take();
  // What time_ms itself does, once a call, whatever the number of forwards.
  CHECK(DriverCalls::count(one, kWaits) >= 1);
  CHECK(DriverCalls::count(hundred, kWaits) == DriverCalls::count(one, kWaits));
  CHECK(DriverCalls::count(hundred, kMemory) == DriverCalls::count(one, kMemory));
  CHECK(DriverCalls::count(hundred, {"GraphLaunch"}) - DriverCalls::count(one, {"GraphLaunch"}) == 99);
}

TEST_CASE("100 training steps neither wait nor allocate", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  nn::Vit vit = merging_model();
  const at::Tensor images = test::bytes(test::small_config(), 20);
  const auto read = [&](std::span<const int64_t> indices, uint8_t* to) {
    for (const int64_t i : indices) {
      std::memcpy(to, images[i].const_data_ptr(), images[i].nbytes());
      to += images[i].nbytes();
    }
  };
  const auto trainer = engine::make_cuda_trainer(
      vit, {.size = 48, .labels = at::arange(20) % 7, .read = read}, {.size = 48},
      {.device = "cuda:0", .precision = engine::Precision::bf16, .adamw = {}, .batch = 8, .distillation = {}});
  engine::TrainStep step;
  step.indices = {0, 3, 5, 7, 11, 13, 17, 19};
  step.lr = step.merge_lr = 1e-4;
  const auto train = [&](uint64_t from, uint64_t to) {
    for (step.number = from; step.number < to; ++step.number) trainer->step(step);
  };
  DriverCalls calls;
  train(0, 8);  // captures
  CHECK(trainer->collect().images == 64);
  (void)calls.take();
  train(8, 108);
  const auto hundred = calls.take();
  CHECK(trainer->collect().images == 800);
  // The host may be held back by a slot of inputs that the device has not read yet: an event of an older step.
  CHECK(DriverCalls::count(hundred, {"StreamSynchronize", "CtxSynchronize", "cuMemcpyHtoD_", "cuMemcpyDtoH_"}) == 0);
  CHECK(DriverCalls::count(hundred, kMemory) == 0);
  CHECK(DriverCalls::count(hundred, {"GraphLaunch"}) == 100);
}
