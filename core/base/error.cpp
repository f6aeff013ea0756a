#include "base/error.h"

namespace pyra {

Error::Error(ExitCode code, const std::string& text) : std::runtime_error(text), code_(code) {}

// Out of line, so that one typeinfo, the core's, is seen by every plugin.
Error::~Error() = default;

}  // namespace pyra
