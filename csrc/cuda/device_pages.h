// Memory of the key/value pages on the device: pages cut from slabs, each as large as all before it together, up to a
// limit, or half of that, and half again, where the device has no more. What was allocated stays until the model is
// closed. A page's bytes are zeros before it is first used, so what it holds is finite at all times, as cache.h
// demands. Who holds which page is model/sequence.h's business.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/runtime.h"

namespace pyllama {
namespace cuda {

class DevicePages {
 public:
  DevicePages(Stream& stream, size_t page_bytes) : stream_(stream), page_bytes_(page_bytes) {}

  size_t page_bytes() const { return page_bytes_; }
  int take();                         // an id; throws Error where the device has no memory left
  void give_back(int page) noexcept;  // what the stream still does with it comes before what is done next
  void copy(int from, int to);        // in the stream
  uint8_t* address(int page) const { return pages_[static_cast<size_t>(page)]; }

 private:
  void add_slab();
  Memory allocate_slab(size_t& n) const;

  Stream& stream_;
  const size_t page_bytes_;
  std::vector<Memory> slabs_;
  std::vector<uint8_t*> pages_;  // by id
  std::vector<int> free_;
};

}  // namespace cuda
}  // namespace pyllama
