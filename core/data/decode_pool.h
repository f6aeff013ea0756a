// Work on many images at once. Inside the room only.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/progress.h"

namespace pyra::data {

/// work(i) for i in [0, count) by as many threads as LibTorch uses. Returns for each i the text of the input error
/// that it threw, "" for none; with `stop_at_first`, work beyond the lowest failing i may have been left undone. Any
/// other exception is thrown again here. A pending signal ends it: Error(interrupted or terminated).
[[nodiscard]] std::vector<std::string> for_each_image(int64_t count, bool stop_at_first,
                                                      const std::function<void(int64_t)>& work, Progress& progress);

}  // namespace pyra::data
