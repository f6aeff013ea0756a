#include "kernels/cuda/embed.h"

#include <array>

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/layer_norm.h"
#include "kernels/tensors.h"

using namespace pyra;
using namespace pyra::test;
using kernels::cuda::AssembleCall;
using kernels::cuda::DType;
using kernels::cuda::PatchCall;

namespace {

/// [B,3,S,S] -> [B*P,3*patch*patch], as nn/vit_forward.cpp cuts it.
at::Tensor cut(const at::Tensor& images, int64_t patch) {
  const int64_t batch = images.size(0), side = images.size(2) / patch;
  return images.reshape({batch, 3, side, patch, side, patch})
      .permute({0, 2, 4, 1, 3, 5})
      .reshape({batch * side * side, 3 * patch * patch});
}

const std::array<float, 3> kMean{0.485f, 0.456f, 0.406f}, kStd{0.229f, 0.224f, 0.225f};

/// [B,S,S,3] bytes -> [B,3,S,S]: (v/255 - mean)/std, each operation rounded.
at::Tensor normalised(const at::Tensor& bytes) {
  const auto channels = [](float a, float b, float c) { return at::tensor({a, b, c}, at::kFloat).view({1, 3, 1, 1}); };
  const at::Tensor values = bytes.permute({0, 3, 1, 2}).to(at::kFloat).contiguous() / channels(255, 255, 255);
  return (values - channels(kMean[0], kMean[1], kMean[2])) / channels(kStd[0], kStd[1], kStd[2]);
}

at::Tensor patches(const at::Tensor& images, int64_t side, int64_t patch, DType compute) {
  const OnDevice in(images),
      out({images.size(0) * (side / patch) * (side / patch), 3 * patch * patch}, scalar_type(compute));
  PatchCall call;
  call.images = in.get();
  call.is_float = images.scalar_type() == at::kFloat;
  call.batch = int(images.size(0));
  call.side = int(side);
  call.patch = int(patch);
  std::copy(kMean.begin(), kMean.end(), call.mean);
  std::copy(kStd.begin(), kStd.end(), call.std);
  call.out = out.get();
  call.compute = compute;
  kernels::cuda::extract_patches(call, nullptr);
  return out.cpu();
}

struct Side {
  int64_t side, patch;
};
const Side kSides[] = {{224, 16}, {224, 14}, {224, 32}, {96, 8}, {21, 7}, {16, 16}, {640, 32}, {5, 1}};

struct Tokens {
  int64_t batch, patches, prefix, channels;
};
const Tokens kTokens[] = {{1, 4, 1, 8},    {3, 49, 1, 192}, {2, 49, 2, 384}, {3, 196, 1, 768},
                          {2, 9, 1, 1024}, {2, 9, 0, 1280}, {1, 3, 1, 4096}, {71, 196, 1, 264}};

struct Assembled {
  at::Tensor x, y;
};

Assembled assemble(const at::Tensor& embedded, const at::Tensor& prefix, const at::Tensor& positions, DType residual,
                   DType compute) {
  const int64_t batch = embedded.size(0), count = embedded.size(1), channels = embedded.size(2);
  const OnDevice e(embedded.to(scalar_type(compute))), p(prefix), q(positions), w(seeded({channels}, 2, 0.3) + 1),
      b(seeded({channels}, 3));
  const OnDevice x({batch, prefix.size(0) + count, channels}, scalar_type(residual)),
      y({batch, prefix.size(0) + count, channels}, scalar_type(compute));
  AssembleCall call;
  call.embedded = e.get();
  call.prefix = p.get<float>();
  call.positions = q.get<float>();
  call.batch = int(batch);
  call.patches = int(count);
  call.protected_tokens = int(prefix.size(0));
  call.channels = int(channels);
  call.x = x.get();
  call.norm_weight = w.get<float>();
  call.norm_bias = b.get<float>();
  call.y = y.get();
  call.residual = residual;
  call.compute = compute;
  kernels::cuda::assemble_tokens(call, nullptr);
  return {x.cpu(), y.cpu()};
}

}  // namespace

TEST_CASE("cuda extract_patches equals the CPU's images, bit for bit", "[cuda][embed][gpu]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto& s = GENERATE(from_range(std::begin(kSides), std::end(kSides)));
  const int64_t batch = GENERATE(1, 3);
  CAPTURE(int(dtype), s.side, s.patch, batch);
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t(1));
  const at::Tensor bytes = at::randint(0, 256, {batch, s.side, s.side, 3}, generator, at::kByte);
  const at::Tensor images = normalised(bytes);
  const at::Tensor expected = cut(images, s.patch).to(scalar_type(dtype));
  CHECK(at::equal(patches(bytes, s.side, s.patch, dtype), expected));
  CHECK(at::equal(patches(images.contiguous(), s.side, s.patch, dtype), expected));
}

TEST_CASE("cuda assemble_tokens equals the reference", "[cuda][embed][gpu]") {
  PYRA_NEEDS_GPU();
  const auto compute = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const bool narrow = GENERATE(false, true);
  const auto& t = GENERATE(from_range(std::begin(kTokens), std::end(kTokens)));
  CAPTURE(int(compute), narrow, t.batch, t.patches, t.prefix, t.channels);
  const DType residual = narrow ? compute : DType::fp32;
  const at::Tensor embedded = seeded({t.batch, t.patches, t.channels}, 4).to(scalar_type(compute)).to(at::kFloat);
  const at::Tensor prefix = seeded({t.prefix, t.channels}, 5), positions = seeded({t.patches, t.channels}, 6);
  const at::Tensor x = at::cat({prefix.expand({t.batch, t.prefix, t.channels}), embedded + positions}, 1);
  const at::Tensor y = kernels::layer_norm_reference(x.reshape({-1, t.channels}).to(at::kDouble),
                                                     (seeded({t.channels}, 2, 0.3) + 1).to(at::kDouble),
                                                     seeded({t.channels}, 3).to(at::kDouble), 1e-6, at::kDouble);
  const Assembled got = assemble(embedded, prefix, positions, residual, compute);
  CHECK(at::equal(got.x, x.to(scalar_type(residual))));
  CHECK(relative_difference(got.y.view({-1, t.channels}), y) < rounding_limit(compute));

  const Assembled reversed = assemble(embedded.flip(0), prefix, positions, residual, compute);
  CHECK(at::equal(reversed.x, got.x.flip(0)));
  CHECK(at::equal(reversed.y, got.y.flip(0)));
  const Assembled last =
      assemble(embedded.narrow(0, t.batch - 1, 1).contiguous(), prefix, positions, residual, compute);
  CHECK(at::equal(last.x, got.x.narrow(0, t.batch - 1, 1)));
  CHECK(at::equal(last.y, got.y.narrow(0, t.batch - 1, 1)));
}

TEST_CASE("cuda gelu_erf is exact GELU in place", "[cuda][embed][gpu]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const int64_t count = GENERATE(0, 1, 7, 8, 4095, 4096, 4099, 100000);
  CAPTURE(int(dtype), count);
  const at::Tensor x = seeded({count}, 1, 2.0).to(scalar_type(dtype));
  const OnDevice y(x);
  kernels::cuda::gelu_erf(y.get(), dtype, count, nullptr);
  CHECK(relative_difference(y.cpu(), at::gelu(x.to(at::kDouble))) < rounding_limit(dtype));
}

TEST_CASE("cuda embedding refuses calls it cannot serve", "[cuda][embed][gpu]") {
  PYRA_NEEDS_GPU();
  const OnDevice memory({64}, at::kFloat);
  PatchCall call;
  call.images = memory.get();
  call.out = memory.get();
  call.batch = 1;
  call.side = 4;
  call.patch = 2;
  SECTION("a patch that does not divide the image") {
    call.patch = 3;
    CHECK_THROWS_WITH(kernels::cuda::extract_patches(call, nullptr), Catch::Contains("patches of 3"));
  }
  SECTION("no deviation to divide by") {
    CHECK_THROWS_WITH(kernels::cuda::extract_patches(call, nullptr), Catch::Contains("std"));
  }
  SECTION("tokens without memory") {
    AssembleCall assemble;
    assemble.batch = 1;
    assemble.patches = 1;
    assemble.channels = 8;
    CHECK_THROWS_WITH(kernels::cuda::assemble_tokens(assemble, nullptr), Catch::Contains("null"));
  }
  SECTION("values that are not aligned") {
    CHECK_THROWS_AS(kernels::cuda::gelu_erf(memory.get<float>() + 1, DType::fp32, 4, nullptr), Error);
  }
}
