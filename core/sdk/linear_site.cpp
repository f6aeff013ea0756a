#include "sdk/linear_site.h"

namespace pyra::sdk {

LinearSite linear_site(const ModelShape& shape, int64_t block, LinearKind kind) {
  const int64_t width = shape.embed_dim;
  switch (kind) {
    case LinearKind::qkv:
      return {block, kind, width, 3 * width};
    case LinearKind::proj:
      return {block, kind, width, width};
    case LinearKind::fc1:
      return {block, kind, width, shape.mlp_dim};
    case LinearKind::fc2:
      return {block, kind, shape.mlp_dim, width};
  }
  return {};
}

}  // namespace pyra::sdk
