#include "tasks/confined.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <fstream>
#include <new>

#include "base/descriptor.h"
#include "base/error.h"
#include "tasks/run_model.h"

namespace pyra::tasks {
namespace {

constexpr size_t kMaxMessage = 16 << 10;
constexpr char kDone = 0;

/// Killed and waited for, whatever happens here.
class Child {
 public:
  explicit Child(pid_t number) : number_(number) {}
  ~Child() {
    if (number_ < 0) return;
    kill(number_, SIGKILL);
    (void)wait();
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  int wait() {
    int status = 0;
    while (waitpid(number_, &status, 0) < 0 && errno == EINTR) {
    }
    number_ = -1;
    return status;
  }

 private:
  pid_t number_;
};

void limit(int what, uint64_t value) {
  rlimit now{};
  if (getrlimit(static_cast<__rlimit_resource>(what), &now) != 0)
    fail(ExitCode::internal, "getrlimit: ", system_reason(errno));
  const rlim_t most = std::min<rlim_t>(value, now.rlim_max);  // what the system's owner set stays
  const rlimit wanted{.rlim_cur = most, .rlim_max = most};
  if (setrlimit(static_cast<__rlimit_resource>(what), &wanted) != 0)
    fail(ExitCode::internal, "setrlimit: ", system_reason(errno));
}

uint64_t address_space() {
  uint64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages * uint64_t(sysconf(_SC_PAGESIZE));
}

void confine(const Confinement& limits, pid_t parent) {
  if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
    fail(ExitCode::internal, "prctl: ", system_reason(errno));
  if (getppid() != parent) _exit(1);  // it ended before the line above
  limit(RLIMIT_CORE, 0);
  limit(RLIMIT_CPU, limits.cpu_seconds);
  limit(RLIMIT_FSIZE, limits.file_bytes);
  limit(RLIMIT_AS, address_space() + limits.memory_bytes);
  // The other threads of a pool that the parent may have had were not copied: nobody must wait for them.
  at::set_num_threads(1);
}

void send(int pipe, char code, std::string_view text) {
  const std::string message = std::string(1, code).append(text.substr(0, kMaxMessage));
  for (std::string_view rest = message; !rest.empty();) {
    const ssize_t done = write(pipe, rest.data(), rest.size());
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return;
    rest.remove_prefix(size_t(done));
  }
}

[[noreturn]] void child_main(const Confinement& limits, pid_t parent, int pipe, const std::string& where,
                             const std::function<void()>& work) {
  const auto no_memory = [&] {
    send(pipe, char(ExitCode::input), cat(where, ": needs more memory than a file of its size accounts for"));
  };
  try {
    confine(limits, parent);
    work();
    send(pipe, kDone, "");
  } catch (const Error& error) {
    send(pipe, char(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    no_memory();
  } catch (const c10::Error& error) {
    // LibTorch's CPU allocator reports exhaustion as a plain c10::Error that names it.
    const std::string text = error.what_without_backtrace();
    if (text.find("DefaultCPUAllocator") != text.npos)
      no_memory();
    else
      send(pipe, char(ExitCode::internal), cat(where, ": ", text));
  } catch (const std::exception& error) {
    send(pipe, char(ExitCode::internal), cat(where, ": ", error.what()));
  }
  _exit(0);  // destructors and handlers of the copied process are the parent's to run
}

std::string receive(int pipe, const std::string& where) {
  std::string message;
  for (char buffer[4096]; message.size() <= kMaxMessage;) {
    const ssize_t got = read(pipe, buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) {
      stop_if_asked("reading " + where);
      continue;
    }
    if (got <= 0) break;
    message.append(buffer, size_t(got));
  }
  return message;
}

[[noreturn]] void fail_died(int status, const Confinement& limits, const std::string& where) {
  const int number = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
  if (number == SIGXCPU || number == SIGKILL)
    fail(ExitCode::input, where, ": reading it took more processor time than is allowed (", limits.cpu_seconds,
         " s, or the limit of the shell), or it was killed for its memory");
  if (number == SIGXFSZ)
    fail(ExitCode::input, where, ": unpacks to more than ", limits.file_bytes, " bytes, the limit for its size");
  fail(ExitCode::internal, where, ": the process that read it ended by ",
       number != 0 ? cat("signal ", number) : cat("code ", WEXITSTATUS(status)), "; please report it");
}

}  // namespace

void run_confined(const Confinement& limits, const std::string& where, const std::function<void()>& work) {
  int ends[2] = {-1, -1};
  if (pipe2(ends, O_CLOEXEC) != 0) fail(ExitCode::device, "pipe: ", system_reason(errno));
  const Descriptor read_end(ends[0]);
  Descriptor write_end(ends[1]);
  const pid_t parent = getpid();
  const pid_t number = fork();
  if (number < 0) fail(ExitCode::device, "fork: ", system_reason(errno));
  if (number == 0) child_main(limits, parent, write_end.get(), where, work);
  Child child(number);
  write_end = Descriptor();
  const std::string message = receive(read_end.get(), where);
  const int status = child.wait();
  if (message.empty()) fail_died(status, limits, where);
  if (message[0] != kDone)
    throw Error(static_cast<ExitCode>(static_cast<unsigned char>(message[0])), message.substr(1));
}

}  // namespace pyra::tasks
