#include "data/image_store.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <numeric>

#include "base/error.h"
#include "base/temporary.h"
#include "nn/config.h"

namespace pyra::data {
namespace {

constexpr int64_t kRowsPerTask = 8;

/// Whether the disk has so many bytes for the file; errno says why not.
bool reserve(const Descriptor& file, int64_t bytes) {
  if (fallocate(file.get(), 0, 0, bytes) == 0) return true;
  if (errno != EOPNOTSUPP) return false;
  struct statvfs disk {};
  const bool enough = fstatvfs(file.get(), &disk) == 0 && disk.f_bavail >= uint64_t(bytes) / disk.f_frsize + 1;
  errno = ENOSPC;
  return enough;
}

[[noreturn]] void fail_room(int64_t count, int64_t bytes, const std::filesystem::path& folder) {
  fail(ExitCode::output, folder.string(), ": no room for ", count, " decoded images, ", (bytes >> 20) + 1,
       " MiB: ", system_reason(errno), "; TMPDIR names another folder");
}

}  // namespace

int64_t checked_image_size(int64_t size) {
  if (size < 1 || size > nn::kMaxImageSize)
    fail(ExitCode::input, "preprocessing to ", size, " pixels; expected 1 to ", nn::kMaxImageSize);
  return size;
}

ImageStore::ImageStore(int64_t count, int64_t size)
    : count_(count), size_(checked_image_size(size)), folder_(temporary_folder()), file_(unnamed_file(folder_)) {
  const int64_t bytes = count_ * image_bytes();
  // Asked for at once: a disk that is too small is known before the first image is decoded.
  if (bytes > 0 && !reserve(file_, bytes)) fail_room(count_, bytes, folder_);
}

ImageStore::ImageStore(const at::Tensor& images)
    : count_(images.size(0)), size_(images.size(1)), memory_(images.contiguous()) {}

void ImageStore::write(int64_t row, const uint8_t* pixels) {
  for (int64_t done = 0; done < image_bytes();) {
    const ssize_t got =
        pwrite(file_.get(), pixels + done, size_t(image_bytes() - done), off_t(row * image_bytes() + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_room(count_, count_ * image_bytes(), folder_);
    done += got;
  }
}

void ImageStore::keep(std::vector<int64_t> rows) {
  rows_ = std::move(rows);
  count_ = int64_t(rows_.size());
}

void ImageStore::read(int64_t index, uint8_t* to) const {
  if (index < 0 || index >= count_) fail(ExitCode::internal, "image ", index, " of a set of ", count_);
  const int64_t offset = (rows_.empty() ? index : rows_[size_t(index)]) * image_bytes();
  if (memory_.defined()) {
    std::memcpy(to, memory_.const_data_ptr<uint8_t>() + offset, size_t(image_bytes()));
    return;
  }
  read_at(file_, folder_, uint64_t(offset), {reinterpret_cast<char*>(to), size_t(image_bytes())});
}

void ImageStore::read(std::span<const int64_t> indices, uint8_t* to) const {
  at::parallel_for(0, int64_t(indices.size()), kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) read(indices[size_t(i)], to + i * image_bytes());
  });
}

at::Tensor ImageStore::range(int64_t first, int64_t count) const {
  std::vector<int64_t> indices(static_cast<size_t>(count));
  std::iota(indices.begin(), indices.end(), first);
  at::Tensor images = at::empty({count, size_, size_, 3}, at::kByte);
  read(indices, images.data_ptr<uint8_t>());
  return images;
}

}  // namespace pyra::data
