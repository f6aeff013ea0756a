// The arithmetic of merge.cpp for one image, forward and backward, on plain pointers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/wide.h"

namespace pyra::kernels::merge_image {

struct Gate {
  const float *a, *b, *weight, *bias;
  float eps;
};

/// A call's tensors as pointers, image 0 first.
struct Plan {
  int64_t tokens, kept, merged, width;
  const float *x, *sizes;
  const int64_t *keep, *src, *dst;
  const float *src_weight, *size_scale;  // or null
  bool weighted;
  const Gate* gate;  // or null

  [[nodiscard]] Plan image(int64_t i) const {
    Plan p = *this;
    p.x += i * tokens * width;
    p.sizes += i * tokens;
    p.keep += i * kept;
    p.src += i * merged;
    p.dst += i * merged;
    if (src_weight) p.src_weight += i * merged;
    if (size_scale) p.size_scale += i * merged;
    return p;
  }
  [[nodiscard]] float unit(int64_t token) const { return weighted ? sizes[token] : 1.0f; }
  [[nodiscard]] float weight(int64_t i) const { return src_weight ? src_weight[i] : 1.0f; }
  [[nodiscard]] const float* source(int64_t i) const { return x + src[i] * width; }
  [[nodiscard]] const float* destination(int64_t i) const { return x + keep[dst[i]] * width; }
};

/// Gradients of one image; null where not wanted.
struct Gradients {
  const float* out;              // [K,C] given
  const float* merged;           // [K,C] the forward's result; for src_weight
  float* x;                      // [N,C]
  float *a, *b, *weight, *bias;  // [R], [C], [C], [C]
  float* src_weight;             // [R]
};

/// One thread's work space, from one allocation.
struct Scratch {
  explicit Scratch(const Plan& p)
      : memory(size_t(2 * p.kept + (p.gate ? 3 * p.merged + (p.merged + 4) * p.width : 0))) {
    float* next = memory.data();
    const auto take = [&next](int64_t n) { return std::exchange(next, next + n); };
    divisor = take(p.kept);
    receives = take(p.kept);
    if (!p.gate) return;
    token_gate = take(p.merged);
    inverse_deviation = take(p.merged);
    token_gradient = take(p.merged);
    normalised = take(p.merged * p.width);
    channel_gate = take(p.width);
    channel_gradient = take(p.width);
    row = take(p.width);
    scaled = take(p.width);
  }
  std::vector<float> memory;
  float *divisor, *receives;                                   // [K]: sum of weights; 1 where a token is added, else 0
  float* token_gate = nullptr;                                 // [R] w2
  float* inverse_deviation = nullptr;                          // [R] of the gate's LayerNorm
  float* token_gradient = nullptr;                             // [R] of w2's argument
  float* normalised = nullptr;                                 // [R,C] LayerNorm before its affine part
  float *channel_gate = nullptr, *channel_gradient = nullptr;  // [C] w1, and the gradient of its argument
  float *row = nullptr, *scaled = nullptr;                     // [C]
};

PYRA_INLINE float sigmoid(float value) {
  return 1.0f / (1.0f + std::exp(-value));
}

inline void weights_of(const Plan& p, Scratch& s, float* sizes) {
  for (int64_t k = 0; k < p.kept; ++k) {
    s.divisor[k] = p.unit(p.keep[k]);
    s.receives[k] = 0;
    if (sizes) sizes[k] = p.sizes[p.keep[k]];
  }
  for (int64_t i = 0; i < p.merged; ++i) {
    const int64_t k = p.dst[i], token = p.src[i];
    s.divisor[k] += p.weight(i) * p.unit(token);
    s.receives[k] = 1;
    if (sizes) sizes[k] += p.size_scale ? p.sizes[token] * std::max(0.f, p.size_scale[i]) : p.sizes[token];
  }
}

/// S[i] + D'[i] normalised into `to`; returns 1 / deviation.
PYRA_INLINE float normalise(const Plan& p, int64_t i, float* __restrict to) {
  const float *source = p.source(i), *destination = p.destination(i);
  const float source_unit = p.unit(p.src[i]), destination_unit = p.unit(p.keep[p.dst[i]]);
  for (int64_t c = 0; c < p.width; ++c) to[c] = source_unit * source[c] + destination_unit * destination[c];
  const float mean = total(to, p.width) / float(p.width);
  for (int64_t c = 0; c < p.width; ++c) to[c] -= mean;
  const float inverse = 1.0f / std::sqrt(dot(to, to, p.width) / float(p.width) + p.gate->eps);
  for (int64_t c = 0; c < p.width; ++c) to[c] *= inverse;
  return inverse;
}

PYRA_INLINE void affine(const Plan& p, const float* __restrict normalised, float* __restrict to) {
  for (int64_t c = 0; c < p.width; ++c) to[c] = normalised[c] * p.gate->weight[c] + p.gate->bias[c];
}

/// w1 and w2 of the image; with `keep_rows` the normalised rows stay in the scratch for the backward pass.
PYRA_INLINE void compute_gates(const Plan& p, Scratch& s, bool keep_rows) {
  std::fill(s.channel_gate, s.channel_gate + p.width, 0.0f);
  for (int64_t i = 0; i < p.merged; ++i) {
    float* __restrict normalised = s.normalised + (keep_rows ? i * p.width : 0);
    s.inverse_deviation[i] = normalise(p, i, normalised);
    affine(p, normalised, s.row);
    for (int64_t c = 0; c < p.width; ++c) s.channel_gate[c] += p.gate->a[i] * s.row[c];
    s.token_gate[i] = 2.0f * sigmoid(dot(s.row, p.gate->b, p.width)) - 1.0f;
  }
  for (int64_t c = 0; c < p.width; ++c) s.channel_gate[c] = 2.0f * sigmoid(s.channel_gate[c]);
}

PYRA_INLINE void forward_image(const Plan& p, Scratch& s, float* out, float* sizes) {
  weights_of(p, s, sizes);
  if (p.gate) compute_gates(p, s, false);
  for (int64_t k = 0; k < p.kept; ++k) {
    const float* __restrict token = p.x + p.keep[k] * p.width;
    float* __restrict to = out + k * p.width;
    if (s.receives[k] == 0) {
      std::memcpy(to, token, size_t(p.width) * sizeof(float));
      continue;
    }
    const float share = p.unit(p.keep[k]) / s.divisor[k];
    for (int64_t c = 0; c < p.width; ++c) to[c] = token[c] * share;
  }
  for (int64_t i = 0; i < p.merged; ++i) {
    const float* __restrict token = p.source(i);
    float* __restrict to = out + p.dst[i] * p.width;
    const float share = p.weight(i) * p.unit(p.src[i]) / s.divisor[p.dst[i]];
    if (!p.gate) {
      for (int64_t c = 0; c < p.width; ++c) to[c] += token[c] * share;
      continue;
    }
    // In this order a gate of 1 leaves the factor, and so the sum, exactly as without a gate.
    const float w2 = s.token_gate[i];
    for (int64_t c = 0; c < p.width; ++c) to[c] += token[c] * (share * (1.0f + s.channel_gate[c] * w2));
  }
}

/// Gradients that pass the gate. With T the gradient of the gated tokens, w1 and w2 the gates:
///   dw1 = sum T S w2,  dw2 = <T S, w1>,  dP = a dz1 + dz2 b,  and LayerNorm's backward adds to S and D' alike.
PYRA_INLINE void backward_gate(const Plan& p, const Gradients& g, Scratch& s) {
  const Gate& gate = *p.gate;
  const int64_t width = p.width;
  std::fill(s.channel_gradient, s.channel_gradient + width, 0.0f);
  for (int64_t i = 0; i < p.merged; ++i) {
    const float* __restrict token = p.source(i);
    const float* __restrict given = g.out + p.dst[i] * width;
    const float share = p.weight(i) * p.unit(p.src[i]) / s.divisor[p.dst[i]];
    const float w2 = s.token_gate[i];
    for (int64_t c = 0; c < width; ++c) s.row[c] = given[c] * token[c] * share;
    for (int64_t c = 0; c < width; ++c) s.channel_gradient[c] += s.row[c] * w2;
    s.token_gradient[i] = dot(s.row, s.channel_gate, width) * (1.0f + w2) * (1.0f - w2) * 0.5f;
  }
  for (int64_t c = 0; c < width; ++c) s.channel_gradient[c] *= s.channel_gate[c] * (1.0f - 0.5f * s.channel_gate[c]);
  float *db = g.b, *dweight = g.weight, *dbias = g.bias, *row = s.row, *scaled = s.scaled;
  const float *dz1 = s.channel_gradient, *b = gate.b, *weight = gate.weight;
  std::fill(db, db + width, 0.0f);
  std::fill(dweight, dweight + width, 0.0f);
  std::fill(dbias, dbias + width, 0.0f);
  for (int64_t i = 0; i < p.merged; ++i) {
    const float* __restrict normalised = s.normalised + i * width;
    const float dz2 = s.token_gradient[i], a = gate.a[i];
    affine(p, normalised, row);
    g.a[i] = dot(dz1, row, width);
    // These are too many arrays for the compiler to test at run time that none overlap.
#pragma GCC ivdep
    for (int64_t c = 0; c < width; ++c) {
      const float dp = a * dz1[c] + dz2 * b[c];
      db[c] += dz2 * row[c];
      dweight[c] += dp * normalised[c];
      dbias[c] += dp;
      scaled[c] = dp * weight[c];
    }
    if (!g.x) continue;
    const float mean = total(scaled, width) / float(width);
    const float slope = dot(scaled, normalised, width) / float(width);
    const float inverse = s.inverse_deviation[i];
    const float source_unit = p.unit(p.src[i]) * inverse, destination_unit = p.unit(p.keep[p.dst[i]]) * inverse;
    float* __restrict source = g.x + p.src[i] * width;
    float* __restrict destination = g.x + p.keep[p.dst[i]] * width;
    for (int64_t c = 0; c < width; ++c) {
      const float dy = scaled[c] - mean - normalised[c] * slope;
      source[c] += source_unit * dy;
      destination[c] += destination_unit * dy;
    }
  }
}

PYRA_INLINE void backward_tokens(const Plan& p, const Gradients& g, Scratch& s) {
  if (p.kept + p.merged < p.tokens) std::fill(g.x, g.x + p.tokens * p.width, 0.0f);
  for (int64_t k = 0; k < p.kept; ++k) {
    const float* __restrict given = g.out + k * p.width;
    float* __restrict to = g.x + p.keep[k] * p.width;
    const float share = s.receives[k] == 0 ? 1.0f : p.unit(p.keep[k]) / s.divisor[k];
    for (int64_t c = 0; c < p.width; ++c) to[c] = given[c] * share;
  }
  for (int64_t i = 0; i < p.merged; ++i) {
    const float* __restrict given = g.out + p.dst[i] * p.width;
    float* __restrict to = g.x + p.src[i] * p.width;
    const float share = p.weight(i) * p.unit(p.src[i]) / s.divisor[p.dst[i]];
    if (!p.gate) {
      for (int64_t c = 0; c < p.width; ++c) to[c] = given[c] * share;
      continue;
    }
    const float w2 = s.token_gate[i];
    for (int64_t c = 0; c < p.width; ++c) to[c] = given[c] * (share * (1.0f + s.channel_gate[c] * w2));
  }
}

/// d w[i] = <gradient of out[dst], S'[i] - u[i] out[dst]> / divisor: a weight counts above and below the line.
PYRA_INLINE void backward_weights(const Plan& p, const Gradients& g, Scratch& s) {
  for (int64_t i = 0; i < p.merged; ++i) {
    const float* __restrict given = g.out + p.dst[i] * p.width;
    const float* __restrict merged = g.merged + p.dst[i] * p.width;
    const float* __restrict token = p.source(i);
    float sum = 0;
    for (int64_t c = 0; c < p.width; ++c) {
      const float factor = p.gate ? 1.0f + s.channel_gate[c] * s.token_gate[i] : 1.0f;
      sum += given[c] * (token[c] * factor - merged[c]);
    }
    g.src_weight[i] = sum * p.unit(p.src[i]) / s.divisor[p.dst[i]];
  }
}

PYRA_INLINE void backward_image(const Plan& p, const Gradients& g, Scratch& s) {
  weights_of(p, s, nullptr);
  if (p.gate) compute_gates(p, s, true);
  if (g.x) backward_tokens(p, g, s);
  if (p.gate && g.a) backward_gate(p, g, s);
  if (g.src_weight) backward_weights(p, g, s);
}

}  // namespace pyra::kernels::merge_image
