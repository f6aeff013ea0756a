#include "io/output_path.h"

#include <algorithm>

#include "base/error.h"

namespace pyra::io {
namespace fs = std::filesystem;

void keep_inputs(const fs::path& out, const std::vector<fs::path>& inputs) {
  std::error_code error;
  const fs::path whole = fs::canonical(out, error);
  if (error) return;  // nothing is there
  for (const fs::path& input : inputs) {
    const fs::path read = fs::canonical(input, error);
    if (error) continue;
    if (whole == read || fs::equivalent(whole, read, error))
      fail(ExitCode::usage, out.string(), ": is the file to read; give --out another name");
    const bool inside = std::ranges::mismatch(read, whole).in1 == read.end();
    if (inside && fs::is_directory(read, error))
      fail(ExitCode::usage, out.string(), ": is part of ", input.string(),
           ", which is read; give the result another name");
  }
}

}  // namespace pyra::io
