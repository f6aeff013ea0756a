// Code of plugins, run so that a fault of theirs is told as one.
#pragma once
#include <exception>
#include <new>
#include <string>

#include "base/error.h"
#include "base/no_memory.h"

namespace pyra {

/// call(), which is `what` of `who`: whatever it throws becomes Error(plugin) that says so, but for Error(usage), which
/// is about what the user asked for, Error(plugin) itself, and want of memory: Error(device), std::bad_alloc and
/// LibTorch's.
template <class Call>
auto guard(const std::string& who, const std::string& what, const Call& call) -> decltype(call()) {
  std::string reason;
  try {
    return call();
  } catch (const Error& error) {
    const ExitCode code = error.code();
    if (code == ExitCode::usage || code == ExitCode::device || code == ExitCode::plugin) throw;
    reason = error.what();
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const c10::Error& error) {
    if (means_no_memory(error)) throw;
    reason = error.what_without_backtrace();
  } catch (const std::exception& error) {
    reason = error.what();
  } catch (...) {
    reason = "it threw something that is no std::exception";
  }
  fail(ExitCode::plugin, who, ": ", what, " failed: ", reason);
}

}  // namespace pyra
