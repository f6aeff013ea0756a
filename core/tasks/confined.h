// Work on a file that nobody vouches for, in a process of its own.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

namespace pyra::tasks {

struct Confinement {
  uint64_t memory_bytes = 0;  ///< address space beyond what this process has now (RLIMIT_AS)
  uint64_t file_bytes = 0;    ///< the largest file it may write (RLIMIT_FSIZE)
  uint64_t cpu_seconds = 0;   ///< RLIMIT_CPU
};

/// Runs `work` in a child made by fork: PR_SET_NO_NEW_PRIVS, the limits above, no core file, one thread, killed when
/// this process ends. What it leaves behind are the files it wrote. An Error that it throws is thrown here; a child
/// that ran out of memory or time is Error(input), `where` opens the text, one that crashed Error(internal). SIGINT and
/// SIGTERM end it (Error 130, 143).
void run_confined(const Confinement& limits, const std::string& where, const std::function<void()>& work);

}  // namespace pyra::tasks
