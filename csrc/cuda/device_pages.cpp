// See device_pages.h.
#include "cuda/device_pages.h"

#include <algorithm>

namespace pyllama {
namespace cuda {

namespace {

constexpr size_t kSlabBytes = size_t{64} << 20;  // at most, but for a page that is larger

}  // namespace

int DevicePages::take() {
  if (free_.empty()) add_slab();
  const int page = free_.back();
  free_.pop_back();
  return page;
}

void DevicePages::give_back(int page) noexcept { free_.push_back(page); }

void DevicePages::copy(int from, int to) { stream_.copy_on_device(address(to), address(from), page_bytes_); }

// Room for n pages, or for as many as half of that and half again where there is less.
Memory DevicePages::allocate_slab(size_t& n) const {
  for (;; n /= 2) {
    try {
      return Memory(n * page_bytes_, "key/value pages");
    } catch (const Error& error) {
      if (error.kind != kPyllamaCudaOutOfMemory || n == 1) throw;
    }
  }
}

// Lower ids are taken first.
void DevicePages::add_slab() {
  const size_t have = pages_.size(), most = std::max<size_t>(1, kSlabBytes / page_bytes_);
  size_t n = std::clamp<size_t>(have, 1, most);
  slabs_.reserve(slabs_.size() + 1);
  pages_.reserve(have + n);
  free_.reserve(have + n);  // give_back cannot fail then
  stream_.make_current();
  Memory slab = allocate_slab(n);
  stream_.fill(slab.data(), 0, slab.bytes());
  for (size_t i = 0; i < n; i++) {
    pages_.push_back(slab.as<uint8_t>() + i * page_bytes_);
    free_.push_back(static_cast<int>(have + n - 1 - i));
  }
  slabs_.push_back(std::move(slab));
}

}  // namespace cuda
}  // namespace pyllama
