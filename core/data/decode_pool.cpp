#include "data/decode_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <exception>
#include <mutex>
#include <thread>

#include "base/error.h"

namespace pyra::data {
namespace {

class Pool {
 public:
  Pool(int64_t count, bool stop_at_first, const std::function<void(int64_t)>& work)
      : count_(count), stop_at_first_(stop_at_first), work_(work), reasons_(size_t(count)) {}

  std::vector<std::string> run(Progress& progress) {
    running_ = int(std::clamp<int64_t>(count_, 1, at::get_num_threads()));
    {
      std::vector<std::jthread> threads;
      for (int i = 0, n = running_; i < n; ++i) threads.emplace_back([this] { take_turns(); });
      watch(progress);
    }
    if (failure_) std::rethrow_exception(failure_);
    if (const int signal = pending_signal()) {
      fail(signal == SIGTERM ? ExitCode::terminated : ExitCode::interrupted, "interrupted while images were decoded");
    }
    return std::move(reasons_);
  }

 private:
  // Indices are handed out in ascending order and none that was taken is dropped, so lower ones than a failing one are
  // all finished:
  // the lowest failing index does not depend on the number of threads.
  void take_turns() {
    while (!stop_) {
      const int64_t i = next_.fetch_add(1);
      if (i >= count_) break;
      try {
        work_(i);
      } catch (const Error& error) {
        if (error.code() == ExitCode::input) {
          refuse(i, error.what());
        } else {
          abandon();
        }
      } catch (...) {
        abandon();
      }
      ++done_;
    }
    const std::lock_guard lock(mutex_);
    if (--running_ == 0) finished_.notify_one();
  }

  void refuse(int64_t i, const std::string& reason) {
    reasons_[size_t(i)] = reason;
    if (stop_at_first_) stop_ = true;
  }

  void abandon() {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = std::current_exception();
    stop_ = true;
  }

  /// Progress and signals are looked at here only, ten times a second.
  void watch(Progress& progress) {
    std::unique_lock lock(mutex_);
    while (!finished_.wait_for(lock, std::chrono::milliseconds(100), [this] { return running_ == 0; })) {
      lock.unlock();
      progress.update(done_);
      if (pending_signal()) stop_ = true;
      lock.lock();
    }
    progress.update(done_);
  }

  const int64_t count_;
  const bool stop_at_first_;
  const std::function<void(int64_t)>& work_;
  std::vector<std::string> reasons_;
  std::atomic<int64_t> next_ = 0, done_ = 0;
  std::atomic<bool> stop_ = false;
  std::mutex mutex_;
  std::condition_variable finished_;
  int running_ = 0;
  std::exception_ptr failure_;
};

}  // namespace

std::vector<std::string> for_each_image(int64_t count, bool stop_at_first, const std::function<void(int64_t)>& work,
                                        Progress& progress) {
  return Pool(count, stop_at_first, work).run(progress);
}

}  // namespace pyra::data
