#include "io/atomic_file.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "io_support.h"
#include "support.h"

namespace pyra::io {
namespace {

using test::check_error;
using test::get;
using test::put;
namespace fs = std::filesystem;

int64_t entries_in(const fs::path& folder) {
  return std::distance(fs::directory_iterator(folder), {});
}

/// Runs `body` in a forked child and returns its exit code, or 128 + the signal that ended it.
template <class Body>
int in_child(Body&& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

TEST_CASE("a file appears under its name only when committed") {
  const test::TempDir dir;
  {
    AtomicFile file(dir / "model");
    file.write("half ");
    CHECK_FALSE(fs::exists(dir / "model"));
    file.write("and half");
    file.commit();
  }
  CHECK(get(dir / "model") == "half and half");
  CHECK(entries_in(dir.path()) == 1);
}

TEST_CASE("what is not committed leaves no trace") {
  const test::TempDir dir;
  put(dir / "model", "old");
  { AtomicFile(dir / "model").write("new"); }
  CHECK(get(dir / "model") == "old");
  CHECK(entries_in(dir.path()) == 1);
}

TEST_CASE("a write that fails half way keeps the old file and leaves no temporary one") {
  const test::TempDir dir;
  put(dir / "model", "old");
  const int code = in_child([&] {
    signal(SIGXFSZ, SIG_IGN);  // the limit then shows as EFBIG, as a full disk shows as ENOSPC
    const rlimit limit{1000, 1000};
    setrlimit(RLIMIT_FSIZE, &limit);
    try {
      write_file(dir / "model", std::string(5000, 'x'));
    } catch (const Error& error) {
      const bool named = std::string(error.what()).find("model: cannot be written") != std::string::npos;
      return named ? int(error.code()) : 100;
    }
    return 101;
  });
  CHECK(code == int(ExitCode::output));
  CHECK(get(dir / "model") == "old");
  CHECK(entries_in(dir.path()) == 1);
}

TEST_CASE("a writer that is killed leaves the old file whole") {
  const test::TempDir dir;
  put(dir / "model", "old");
  const int code = in_child([&] {
    AtomicFile file(dir / "model");
    file.write("new");
    raise(SIGKILL);
    return 0;
  });
  CHECK(code == 128 + SIGKILL);
  CHECK(get(dir / "model") == "old");
}

TEST_CASE("a full device and a folder without permission are output errors") {
  const test::TempDir dir;
  SECTION("a device is never replaced") {
    check_error(ExitCode::output, {"/dev/full", "not a regular file"}, [] { write_file("/dev/full", "x"); });
    CHECK(fs::is_character_file("/dev/full"));
  }
  SECTION("a folder under that name") {
    check_error(ExitCode::output, {dir.path().string(), "it is a folder"}, [&] { write_file(dir.path(), "x"); });
  }
  SECTION("no such folder") {
    check_error(ExitCode::output, {"none", "does not exist"}, [&] { write_file(dir / "none" / "model", "x"); });
  }
  SECTION("a folder that may not be written to") {
    // Root may write anywhere, so there the child becomes nobody first.
    fs::permissions(dir.path(),
                    fs::perms::owner_read | fs::perms::owner_exec | fs::perms::others_read | fs::perms::others_exec);
    const int code = in_child([&] {
      if (geteuid() == 0 && setuid(65534) != 0) return 102;
      const auto error = test::error_of([&] { write_file(dir / "model", "x"); });
      return error ? int(error->code()) : 101;
    });
    fs::permissions(dir.path(), fs::perms::owner_all);
    CHECK(code == int(ExitCode::output));
    CHECK(entries_in(dir.path()) == 0);
  }
}

TEST_CASE("a file that is replaced keeps its permissions, and a link stays a link") {
  const test::TempDir dir;
  put(dir / "real", "old");
  fs::permissions(dir / "real", fs::perms::owner_read | fs::perms::owner_write);
  fs::create_symlink(dir / "real", dir / "link");
  write_file(dir / "link", "new");
  CHECK(fs::is_symlink(dir / "link"));
  CHECK(get(dir / "real") == "new");
  CHECK(fs::status(dir / "real").permissions() == (fs::perms::owner_read | fs::perms::owner_write));
}

TEST_CASE("a reader that has the old file open goes on reading the old one") {
  const test::TempDir dir;
  put(dir / "model", "old bytes");
  std::ifstream reader(dir / "model", std::ios::binary);
  write_file(dir / "model", "NEW BYTES");
  std::string seen;
  std::getline(reader, seen);
  CHECK(seen == "old bytes");
  CHECK(get(dir / "model") == "NEW BYTES");
}

TEST_CASE("read_file is bounded and names what it cannot read") {
  const test::TempDir dir;
  put(dir / "text", std::string("a\0b", 3));
  CHECK(read_file(dir / "text", 3) == std::string("a\0b", 3));
  check_error(ExitCode::input, {"text", "larger than 2 bytes"}, [&] { (void)read_file(dir / "text", 2); });
  check_error(ExitCode::input, {"/dev/zero", "larger than 100000"}, [&] { (void)read_file("/dev/zero", 100000); });
  check_error(ExitCode::input, {"none", "No such file"}, [&] { (void)read_file(dir / "none", 2); });
  check_error(ExitCode::input, {dir.path().string(), "is a folder"}, [&] { (void)read_file(dir.path(), 2); });
}

}  // namespace pyra::io
