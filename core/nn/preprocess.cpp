#include "nn/preprocess.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include "base/error.h"

namespace pyra::nn {

NormaliseTables normalise_tables(const Preprocess& preprocess) {
  NormaliseTables tables;
  for (size_t c = 0; c < 3; ++c) {
    for (size_t v = 0; v < 256; ++v) tables[c][v] = (float(v) / 255.0f - preprocess.mean[c]) / preprocess.std[c];
  }
  return tables;
}

void normalise_image(const uint8_t* from, float* to, int64_t pixels, const NormaliseTables& tables) {
  for (int64_t i = 0; i < pixels; ++i, from += 3) {
    to[i] = tables[0][from[0]];
    to[pixels + i] = tables[1][from[1]];
    to[2 * pixels + i] = tables[2][from[2]];
  }
}

at::Tensor normalise(const at::Tensor& images, const Preprocess& preprocess) {
  if (images.scalar_type() != at::kByte || images.dim() != 4 || images.size(3) != 3) {
    fail(ExitCode::internal, "normalise: got ", images.scalar_type(), " ", images.sizes(),
         "; expected uint8 [B,H,W,3]");
  }
  const at::Tensor dense = images.contiguous();
  at::Tensor out = at::empty({dense.size(0), 3, dense.size(1), dense.size(2)}, at::kFloat);
  const NormaliseTables tables = normalise_tables(preprocess);
  const int64_t pixels = dense.size(1) * dense.size(2);
  const uint8_t* const from = dense.const_data_ptr<uint8_t>();
  float* const to = out.data_ptr<float>();
  at::parallel_for(0, dense.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) normalise_image(from + i * pixels * 3, to + i * pixels * 3, pixels, tables);
  });
  return out;
}

}  // namespace pyra::nn
