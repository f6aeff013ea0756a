// What a block of DiffRate's search does with its tokens while none of them leaves: counts, the same in all images,
// that the CPU's masks and the GPU's kernels share.
#pragma once

namespace pyra::kernels {

/// Of the first `present` ranks, which are those not yet masked out, the first `pruned` survive pruning, and the first
/// `kept` of these survive merging.
struct SoftCounts {
  int present = 0, pruned = 0, kept = 0;
  [[nodiscard]] constexpr bool prunes() const { return pruned < present; }
  [[nodiscard]] constexpr bool merges() const { return kept < pruned; }
  /// Whether a rate says anything here.
  [[nodiscard]] constexpr bool acts() const { return prunes() || merges(); }
  /// Tokens that are averaged into another.
  [[nodiscard]] constexpr int tail() const { return pruned - kept; }
  /// The hard masks over ranks; those that are gone already stay as they are.
  [[nodiscard]] constexpr bool survives_pruning(int rank) const {
    return !prunes() || rank < pruned || rank >= present;
  }
  [[nodiscard]] constexpr bool survives_merging(int rank) const { return !merges() || rank < kept || rank >= pruned; }
};

}  // namespace pyra::kernels
