// What a program asks of the CUDA driver, counted by CUPTI: waiting, allocating and copying by hand can all be done in
// a way that no result shows.
#pragma once
#include <cupti.h>

#include <initializer_list>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace pyra::test {

/// Counts the driver's functions by name ("cuStreamSynchronize") from its construction on, whichever thread calls them
/// and through whichever copy of the runtime. One at a time in a process.
class DriverCalls {
 public:
  DriverCalls() {
    check(cuptiSubscribe(&subscriber_, &DriverCalls::called, this));
    check(cuptiEnableDomain(1, subscriber_, CUPTI_CB_DOMAIN_DRIVER_API));
  }
  ~DriverCalls() { (void)cuptiUnsubscribe(subscriber_); }
  DriverCalls(const DriverCalls&) = delete;
  DriverCalls& operator=(const DriverCalls&) = delete;

  /// The calls since the last take(), by name.
  [[nodiscard]] std::map<std::string, int> take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(calls_, {});
  }

  /// How many of them have one of these in their names.
  [[nodiscard]] static int count(const std::map<std::string, int>& calls, std::initializer_list<const char*> parts) {
    int sum = 0;
    for (const auto& [name, times] : calls)
      for (const char* part : parts)
        if (name.find(part) != std::string::npos) {
          sum += times;
          break;
        }
    return sum;
  }

 private:
  static void check(CUptiResult result) {
    const char* text = "";
    if (result == CUPTI_SUCCESS) return;
    (void)cuptiGetResultString(result, &text);
    throw std::runtime_error(std::string("CUPTI: ") + text);
  }
  static void CUPTIAPI called(void* self, CUpti_CallbackDomain, CUpti_CallbackId, const void* data) {
    const auto* call = static_cast<const CUpti_CallbackData*>(data);
    if (call->callbackSite != CUPTI_API_ENTER) return;
    auto* calls = static_cast<DriverCalls*>(self);
    const std::lock_guard lock(calls->mutex_);
    ++calls->calls_[call->functionName];
  }

  CUpti_SubscriberHandle subscriber_{};
  std::mutex mutex_;
  std::map<std::string, int> calls_;
};

}  // namespace pyra::test
