#include "kernels/cuda/linear.h"

#include "cuda/device.h"
#include "kernels/cuda/linear_paths.h"
#include "kernels/tensors.h"

using namespace pyra;
using namespace pyra::test;
using kernels::cuda::DType;
using kernels::cuda::Epilogue;
using kernels::cuda::LinearCall;

namespace {

/// A layer with everything it may be given, on the device, and its result in double.
struct Layer {
  Layer(int64_t rows, int64_t in, int64_t out, DType compute, DType result, bool gelu)
      : x(seeded({rows, in}, 1).to(scalar_type(compute))),
        weight((seeded({out, in}, 2) / std::sqrt(double(in))).to(scalar_type(compute))),
        bias(seeded({out}, 3).to(scalar_type(result))),
        residual(seeded({rows, out}, 4).to(scalar_type(result))),
        on_x(x),
        on_weight(weight),
        on_bias(bias),
        on_residual(residual) {
    call.x = on_x.get();
    call.weight = on_weight.get();
    call.bias = on_bias.get();
    call.residual = gelu ? nullptr : on_residual.get();
    call.rows = int(rows);
    call.in = int(in);
    call.out = int(out);
    call.compute = compute;
    call.result = result;
    call.epilogue = gelu ? Epilogue::gelu_tanh : Epilogue::none;
  }
  [[nodiscard]] at::Tensor expected() const {
    at::Tensor y = at::linear(x.to(at::kDouble), weight.to(at::kDouble), bias.to(at::kDouble));
    if (call.epilogue == Epilogue::gelu_tanh) y = at::gelu(y, "tanh");
    return call.residual ? y + residual.to(at::kDouble) : y;
  }
  template <class F>
  [[nodiscard]] at::Tensor run(const F& f) const {
    const OnDevice y({x.size(0), weight.size(0)}, scalar_type(call.result));
    LinearCall to_y = call;
    to_y.y = y.get();
    f(to_y);
    return y.cpu();
  }
  at::Tensor x, weight, bias, residual;
  OnDevice on_x, on_weight, on_bias, on_residual;
  LinearCall call;
};

#define PYRA_NEEDS_HOPPER()                                         \
  PYRA_NEEDS_GPU();                                                 \
  if (!test::is_hopper()) {                                         \
    std::puts("skipped: no CUDA device of compute capability 9.0"); \
    return;                                                         \
  }

}  // namespace

TEST_CASE("linear layers on the device equal the reference, few rows or many", "[cuda][linear][gpu]") {
  PYRA_NEEDS_GPU();
  kernels::cuda::LinearRunner runner(nullptr);
  const auto compute = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const bool onto_stream = GENERATE(false, true), gelu = GENERATE(false, true);
  const auto [in, out] = GENERATE(table<int64_t, int64_t>(
      {{768, 2304}, {768, 768}, {3072, 768}, {192, 576}, {384, 1536}, {1024, 1024}, {4096, 1024}, {96, 160}}));
  const int64_t rows = GENERATE(1, 9, 51, 123, 160, 161, 240, 394, 401);
  CAPTURE(int(compute), onto_stream, gelu, in, out, rows);
  const Layer layer(rows, in, out, compute, onto_stream ? DType::fp32 : compute, gelu);
  const auto by_runner = [&](const LinearCall& call) { runner.run(call, nullptr); };
  const at::Tensor y = layer.run(by_runner);
  CHECK(relative_difference(y, layer.expected()) < rounding_limit(layer.call.result, 2e-5));
  CHECK(at::equal(layer.run(by_runner), y));
}

TEST_CASE("a layer for few rows equals the reference however it is cut", "[cuda][linear][gpu]") {
  PYRA_NEEDS_HOPPER();
  const int tile = GENERATE(8, 16, 32, 48, 64, 80), splits = GENERATE(1, 2, 3, 4, 6, 8);
  const auto dtype = GENERATE(DType::bf16, DType::fp16);
  CAPTURE(tile, splits, int(dtype));
  const int64_t in = 64 * 5 * int64_t(splits), rows = tile + 5;  // the second tile is not full
  const Layer layer(rows, in, 192, dtype, DType::fp32, false);
  const auto by_cut = [&](const LinearCall& call) {
    REQUIRE(kernels::cuda::linear_sm90(call, {tile, splits}, nullptr));
  };
  const at::Tensor y = layer.run(by_cut);
  CHECK(relative_difference(y, layer.expected()) < rounding_limit(DType::fp32, 2e-5));
  // A row's result is its own: the same without those that follow.
  Layer fewer(rows, in, 192, dtype, DType::fp32, false);
  fewer.call.rows = 3;
  CHECK(at::equal(fewer.run(by_cut).narrow(0, 0, 3), y.narrow(0, 0, 3)));
}

TEST_CASE("the way for few rows takes what it was made for", "[cuda][linear][gpu]") {
  PYRA_NEEDS_HOPPER();
  const auto taken = [](const auto& change) {
    LinearCall call;
    call.rows = 27;
    call.in = call.out = 768;
    change(call);
    return kernels::cuda::small_linear_cut(call).rows > 0;
  };
  CHECK(taken([](LinearCall&) {}));
  CHECK(taken([](LinearCall& call) { call.result = DType::fp32; }));
  CHECK(taken([](LinearCall& call) { call.epilogue = Epilogue::gelu_tanh; }));
  CHECK_FALSE(taken([](LinearCall& call) { call.rows = 1000; }));
  CHECK_FALSE(taken([](LinearCall& call) { call.in = 800; }));
  CHECK_FALSE(taken([](LinearCall& call) { call.out = 800; }));
  CHECK_FALSE(taken([](LinearCall& call) { call.compute = call.result = DType::fp32; }));
  CHECK_FALSE(taken([](LinearCall& call) { call.transposed = true; }));
  CHECK_FALSE(taken([](LinearCall& call) { call.y_stride = 1024; }));
  CHECK_FALSE(taken([](LinearCall& call) { call.epilogue = Epilogue::gelu_tanh_keep; }));
  CHECK_FALSE(taken([](LinearCall& call) { call.x = reinterpret_cast<const void*>(uintptr_t{8}); }));
}

TEST_CASE("cuts that do not fit are refused", "[cuda][linear][gpu]") {
  PYRA_NEEDS_HOPPER();
  const Layer layer(27, 768, 192, DType::bf16, DType::bf16, false);
  const auto refused = [&](int rows, int splits) {
    CHECK_THROWS_AS(layer.run([&](const LinearCall& call) {
      (void)kernels::cuda::linear_sm90(call, {rows, splits}, nullptr);
    }),
                    Error);
  };
  refused(0, 1);
  refused(32, 0);
  refused(32, 5);   // of 12 chunks
  refused(32, 12);  // more than a cluster has
}

TEST_CASE("a layer of few rows waits for a tally", "[cuda][linear][gpu]") {
  PYRA_NEEDS_HOPPER();
  kernels::cuda::LinearRunner runner(nullptr);
  const Layer layer(27, 768, 192, DType::bf16, DType::fp32, false);
  const at::Tensor expected = layer.run([&](const LinearCall& call) { runner.run(call, nullptr); });
  // x is written, and said to be, on another stream, when the layer has long been launched.
  const OnDevice count(at::zeros({1}, at::kInt)), late(at::zeros_like(layer.x)), x(layer.x),
      y(at::zeros_like(expected));
  const OnDevice whole(at::full({1}, 3, at::kInt));
  cudaStream_t waits = nullptr, writes = nullptr;
  for (cudaStream_t* stream : {&waits, &writes}) PYRA_CUDA(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking));
  PYRA_CUDA(cudaDeviceSynchronize());
  LinearCall call = layer.call;
  call.x = late.get();
  call.y = y.get();
  call.x_there = {count.get<int>(), 3};
  REQUIRE(kernels::cuda::awaits_tally(call));
  runner.run(call, waits);
  CHECK(cudaStreamQuery(waits) == cudaErrorNotReady);
  PYRA_CUDA(cudaMemcpyAsync(late.get(), x.get(), layer.x.nbytes(), cudaMemcpyDeviceToDevice, writes));
  PYRA_CUDA(cudaStreamSynchronize(writes));
  CHECK(cudaStreamQuery(waits) == cudaErrorNotReady);
  PYRA_CUDA(cudaMemcpyAsync(count.get(), whole.get(), sizeof(int), cudaMemcpyDeviceToDevice, writes));
  PYRA_CUDA(cudaStreamSynchronize(waits));
  CHECK(at::equal(y.cpu(), expected));
  for (cudaStream_t stream : {waits, writes}) PYRA_CUDA(cudaStreamDestroy(stream));
}

TEST_CASE("layers that start beside the end of the one before give what they give alone", "[cuda][linear][gpu]") {
  PYRA_NEEDS_HOPPER();
  kernels::cuda::LinearRunner runner(nullptr);
  const int64_t rows = GENERATE(9, 51, 160), channels = 768;
  CAPTURE(rows);
  // Each reads what the one before has just written; the last onto what it adds to, as in a block.
  const Layer layer(rows, channels, channels, DType::bf16, DType::bf16, false);
  const auto chain = [&](bool alone) {
    const OnDevice a(layer.x), b(layer.residual);
    LinearCall call = layer.call;
    for (int i = 0; i < 60; ++i) {
      call.x = i % 2 == 0 ? a.get() : b.get();
      call.y = i % 2 == 0 ? b.get() : a.get();
      call.residual = i % 3 == 0 ? call.y : nullptr;
      runner.run(call, nullptr);
      if (alone) PYRA_CUDA(cudaDeviceSynchronize());
    }
    return std::pair(a.cpu(), b.cpu());
  };
  const auto expected = chain(true);
  CHECK(at::isfinite(expected.first).all().item<bool>());
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto found = chain(false);
    CHECK(at::equal(found.first, expected.first));
    CHECK(at::equal(found.second, expected.second));
  }
}
