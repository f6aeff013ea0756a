// The one error type of the project and the exit codes that scripts rely on.
#pragma once
#include <stdexcept>
#include <string>

#include "base/text.h"

namespace pyra {

/// Exit codes of `pyractl`; the README keeps them stable.
enum class ExitCode : int {
  ok = 0,
  internal = 1,      ///< a bug of ours
  usage = 2,         ///< command line or recipe
  input = 3,         ///< a model or data file
  plugin = 4,        ///< a plugin that cannot load or breaks its contract
  regression = 5,    ///< bench --compare found one
  device = 6,        ///< device or memory
  untrusted = 7,     ///< a result that failed its own verification
  inconclusive = 8,  ///< noise too large to judge
  output = 9,        ///< a file that cannot be written
  interrupted = 130,
  terminated = 143,
};

/// An error a user can act on. Its text says what is wrong, where (file:line, tensor), what was
/// found, what was expected and what to do. Thrown anywhere, caught once, in cli/main.cpp.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& text);
  ~Error() override;
  [[nodiscard]] ExitCode code() const noexcept { return code_; }

 private:
  ExitCode code_;
};

/// Throws Error(code) with the parts written one after another: fail(ExitCode::input, path, ": ", ...).
template <class... Parts>
[[noreturn]] void fail(ExitCode code, const Parts&... parts) {
  throw Error(code, cat(parts...));
}

}  // namespace pyra
