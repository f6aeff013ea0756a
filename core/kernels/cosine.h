// For each of some tokens, the most alike of some others: what ToMe's matching and DiffRate's merge share.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/wide.h"

namespace pyra::kernels {

/// The partner of one token.
struct Partner {
  float cosine = 0;    ///< of token and partner; 0 where either is all zero
  int32_t column = 0;  ///< position in the list of candidates
};

/// Work space of one thread, kept from image to image.
class CosineSearch {
 public:
  /// tokens [*,width] fp32, rows of one image. out[i] = the candidate with the highest cosine to token rows[i];
  /// ties go to the first. `candidates` must not be empty. A cosine that is not a number never wins; where none
  /// is a number, partner 0 is returned with -infinity. The cosine of two tokens depends on these two alone, bit
  /// for bit: not on their positions, nor on the other tokens.
  void run(const float* tokens, int64_t width, std::span<const int32_t> rows, std::span<const int32_t> candidates,
           std::span<Partner> out, Isa isa = widest_isa());

 private:
  std::vector<float> packed_;  // candidates, normalised, [candidates / kColumns][width][kColumns]
  std::vector<float> bias_;    // 0 for a candidate, -infinity for the padding behind the last one
};

}  // namespace pyra::kernels
