// Vector mathematics, for the vector whose header was included before.
#pragma once
#include <cstdint>

namespace pyra::kernels::simd {
namespace {

PYRA_INLINE Vector load_any(const void* base, bool bf16, int64_t index, Lanes which) {
  return bf16 ? load_bf16(static_cast<const uint16_t*>(base) + index, which)
              : load(static_cast<const float*>(base) + index, which);
}

PYRA_INLINE void store_any(void* base, bool bf16, int64_t index, Lanes which, Vector value) {
  if (bf16) {
    store_bf16(static_cast<uint16_t*>(base) + index, which, value);
  } else {
    store(static_cast<float*>(base) + index, which, value);
  }
}

/// 2^x for finite x <= 127. Relative error 9e-8 (own minimax fit of degree 5 on [-1/2, 1/2]).
PYRA_INLINE Vector exp2_of(Vector x) {
  const Vector n = nearest(x);
  const Vector f = subtract(x, n);
  Vector p = broadcast(0.0013264726899201418f);
  p = fmadd(p, f, broadcast(0.0096715126605719f));
  p = fmadd(p, f, broadcast(0.05550733744243393f));
  p = fmadd(p, f, broadcast(0.24022242084919124f));
  p = fmadd(p, f, broadcast(0.693146977598471f));
  p = fmadd(p, f, broadcast(1.0f));
  return times_power(p, n);
}

/// As exp2_of, relative error 3e-6 (degree 4): for results that are rounded to bf16 (4e-3).
PYRA_INLINE Vector exp2_coarse(Vector x) {
  const Vector n = nearest(x);
  const Vector f = subtract(x, n);
  Vector p = broadcast(0.009582852867472428f);
  p = fmadd(p, f, broadcast(0.055906424924598075f));
  p = fmadd(p, f, broadcast(0.24024098616711403f));
  p = fmadd(p, f, broadcast(0.6931241933586664f));
  p = fmadd(p, f, broadcast(1.0f));
  return times_power(p, n);
}

/// The upper tail of the normal distribution at 0 <= u <= 20: Q(u) = 2^g(u). g is smooth and nearly a parabola: an own
/// minimax fit of degree 8 on [0, 5.5] gives max(u, 1) Q(u) to 5e-8, and falls on beyond, where Q is below 2e-8. With
/// erfc's usual form, a polynomial in 1 / (1 + p u) times exp(-u²/2), it took a reciprocal and 7 operations more.
PYRA_INLINE Vector normal_tail(Vector u) {
  Vector g = broadcast(-1.1209443898260228e-06f);
  g = fmadd(g, u, broadcast(1.8664976899603044e-05f));
  g = fmadd(g, u, broadcast(-8.809474733270866e-05f));
  g = fmadd(g, u, broadcast(-0.00036983043616734993f));
  g = fmadd(g, u, broadcast(0.007357664152001272f));
  g = fmadd(g, u, broadcast(-0.05268945392983588f));
  g = fmadd(g, u, broadcast(-0.45914868230962524f));
  g = fmadd(g, u, broadcast(-1.1511118922613675f));
  g = fmadd(g, u, broadcast(-0.9999998738952093f));
  return exp2_of(g);
}

/// As normal_tail, degree 5 and error 5e-6: for results that are rounded to bf16.
PYRA_INLINE Vector normal_tail_coarse(Vector u) {
  Vector g = broadcast(-0.00041713168826828807f);
  g = fmadd(g, u, broadcast(0.006815674392042111f));
  g = fmadd(g, u, broadcast(-0.051475821581144214f));
  g = fmadd(g, u, broadcast(-0.4600295222411151f));
  g = fmadd(g, u, broadcast(-1.1509114778513552f));
  g = fmadd(g, u, broadcast(-1.0000065137386756f));
  return exp2_coarse(g);
}

/// |x|, cut where its tail is 0 already, so that squares stay finite.
PYRA_INLINE Vector tail_argument(Vector x) {
  return smaller(broadcast(20.0f), absolute(x));
}

/// x Φ(x) = max(x, 0) - |x| Q(|x|): no cancellation on either side.
PYRA_INLINE Vector gelu_from_tail(Vector x, Vector tail) {
  return fnmadd(absolute(x), tail, larger(zero(), x));
}

PYRA_INLINE Vector gelu(Vector x) {
  return gelu_from_tail(x, normal_tail(tail_argument(x)));
}

PYRA_INLINE Vector gelu_coarse(Vector x) {
  return gelu_from_tail(x, normal_tail_coarse(tail_argument(x)));
}

/// GELU, and its slope Φ(x) + x φ(x).
PYRA_INLINE Vector gelu_with_slope(Vector x, Vector& slope) {
  const Vector u = tail_argument(x);
  const Vector tail = normal_tail(u);
  const Vector density = exp2_of(multiply(multiply(u, u), broadcast(-0.7213475204444817f)));
  const Vector below = by_sign(x, tail, subtract(broadcast(1.0f), tail));
  // x is cut as the tail's argument was: beyond, the density is 0 but infinity times 0 is not.
  const Vector cut = larger(broadcast(-20.0f), smaller(broadcast(20.0f), x));
  slope = fmadd(multiply(cut, broadcast(0.3989422804014327f)), density, below);
  return gelu_from_tail(x, tail);
}

}  // namespace
}  // namespace pyra::kernels::simd
