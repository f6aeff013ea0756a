#include "progress_bar.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "base/text.h"
#include "command.h"

namespace pyra::cli {
namespace {

constexpr auto kRedrawEvery = std::chrono::milliseconds(100);
constexpr auto kLineEvery = std::chrono::seconds(5);
constexpr size_t kShortestBar = 10, kLongestBar = 40;

bool is_terminal(int descriptor) {
  const char* term = std::getenv("TERM");
  return isatty(descriptor) == 1 && term && *term && std::string_view(term) != "dumb";
}

size_t columns(int descriptor) {
  // Asked at every drawing: windows change size.
  winsize size{};
  return ioctl(descriptor, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

bool continues_character(char c) {
  return (static_cast<unsigned char>(c) & 0xC0) == 0x80;
}

size_t width(std::string_view text) {
  return size_t(std::count_if(text.begin(), text.end(), [](char c) { return !continues_character(c); }));
}

/// The first `columns` characters; never half of a UTF-8 sequence.
std::string_view cut(std::string_view text, size_t columns) {
  size_t at = 0;
  for (; at < text.size(); ++at)
    if (!continues_character(text[at]) && columns-- == 0) break;
  return text.substr(0, at);
}

std::string duration(double seconds) {
  char text[32];
  const auto whole = int64_t(std::llround(seconds));
  if (whole < 100)
    std::snprintf(text, sizeof text, "%lld s", static_cast<long long>(whole));
  else if (whole < 3600)
    std::snprintf(text, sizeof text, "%lld:%02lld", static_cast<long long>(whole / 60),
                  static_cast<long long>(whole % 60));
  else
    std::snprintf(text, sizeof text, "%lld:%02lld:%02lld", static_cast<long long>(whole / 3600),
                  static_cast<long long>(whole / 60 % 60), static_cast<long long>(whole % 60));
  return text;
}

std::string one_line(std::string_view text) {
  std::string line = printable(text);
  std::replace(line.begin(), line.end(), '\n', ' ');
  return line;
}

double seconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration<double>(time).count();
}

}  // namespace

ProgressBar::ProgressBar(int descriptor) : descriptor_(descriptor), terminal_(is_terminal(descriptor)) {}

ProgressBar::~ProgressBar() {
  if (active_ && terminal_) write("\n");
}

void ProgressBar::begin(std::string_view label, int64_t total, std::string_view unit) {
  const std::lock_guard lock(mutex_);
  label_ = one_line(label);
  unit_ = one_line(unit);
  note_.clear();
  total_ = total;
  done_ = 0;
  active_ = true;
  has_base_ = false;
  begun_ = updated_ = drawn_ = Clock::now();
}

void ProgressBar::update(int64_t done, std::string_view note) {
  const std::lock_guard lock(mutex_);
  if (!active_) return;
  done_ = done;
  note_ = one_line(note);
  updated_ = Clock::now();
  if (!has_base_) {
    has_base_ = true;
    base_done_ = done;
    base_time_ = updated_;
  }
  if (updated_ - drawn_ >= (terminal_ ? Clock::duration(kRedrawEvery) : Clock::duration(kLineEvery))) draw();
}

void ProgressBar::end() {
  const std::lock_guard lock(mutex_);
  if (!active_) return;
  active_ = false;
  const std::string took = cat(status(), "  in ", duration(seconds(Clock::now() - begun_)));
  write(terminal_ ? cat("\r\x1b[K", cut(took, columns(descriptor_) - 1), "\n") : cat(took, "\n"));
}

void ProgressBar::note(std::string_view line) {
  const std::lock_guard lock(mutex_);
  write(cat(terminal_ && active_ ? "\r\x1b[K" : "", printable(line), "\n"));
  if (terminal_ && active_) draw();
}

double ProgressBar::rate() const {
  const double since_base = seconds(updated_ - base_time_);
  if (has_base_ && done_ > base_done_ && since_base > 0) return double(done_ - base_done_) / since_base;
  return 0;
}

/// Everything but the bar: "eval  512/1000 images  123.4 images/s  4 s left  loss 0.31".
std::string ProgressBar::status() const {
  std::string text = cat("  ", done_);
  if (total_ > 0) text += cat("/", total_);
  if (!unit_.empty()) text += cat(" ", unit_);
  const double per_second = rate();
  if (per_second > 0) {
    char shown[32];
    std::snprintf(shown, sizeof shown, per_second < 10 ? "%.2f" : "%.1f", per_second);
    text += cat("  ", shown, " ", unit_.empty() ? "" : unit_, "/s");
    if (active_ && total_ > done_) text += cat("  ", duration(double(total_ - done_) / per_second), " left");
  }
  if (!note_.empty()) text += cat("  ", note_);
  return label_ + text;
}

std::string ProgressBar::line(size_t columns) const {
  const std::string text = status();
  const size_t used = width(text) + 4;
  if (total_ <= 0 || used + kShortestBar > columns) return std::string(cut(text, columns));
  const size_t length = std::min(kLongestBar, columns - used);
  const double share = std::clamp(double(done_) / double(total_), 0.0, 1.0);
  const auto filled = size_t(share * double(length));
  const std::string bar = "  [" + std::string(filled, '#') + std::string(length - filled, '-') + "]";
  return text.substr(0, label_.size()) + bar + text.substr(label_.size());
}

void ProgressBar::draw() {
  drawn_ = Clock::now();
  if (!terminal_) return write(status() + "\n");
  // The last column stays free: some terminals wrap as soon as it is written.
  write(cat("\r\x1b[K", line(std::max<size_t>(columns(descriptor_), 2) - 1)));
}

void ProgressBar::write(std::string_view text) const {
  while (!text.empty()) {
    const ssize_t written = ::write(descriptor_, text.data(), text.size());
    if (written <= 0) return;
    text.remove_prefix(size_t(written));
  }
}

}  // namespace pyra::cli
