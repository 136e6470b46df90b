// Memory of the key/value pages. Pages are cut from slabs, which are large enough for huge pages of memory: reading a
// head's 16 KB here and there would miss the address cache at every turn. What no page was written to takes no memory,
// and a slab that no page is used of gives its memory back, but for one that is kept for the next text. Who holds which
// page is model/sequence.h's business.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "os.h"

namespace pyllama {
namespace cpu {

class Pages {
 public:
  explicit Pages(size_t page_bytes)
      : page_bytes_(page_bytes), per_slab_(std::clamp<size_t>((size_t{64} << 20) / page_bytes, 1, 16)) {}
  ~Pages() {
    for (const Slab& slab : slabs_) free_zeroed(slab.memory, slab_bytes());
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  size_t page_bytes() const { return page_bytes_; }
  const std::vector<uint8_t*>& by_id() const { return pages_; }

  // An id. Slabs in use come first, so that others can become free; std::bad_alloc.
  int take() {
    size_t best = slabs_.size();
    for (size_t s = 0; s < slabs_.size(); ++s) {
      const uint32_t used = slabs_[s].used;
      if (used == all_used()) continue;
      if (used == 0 && best < slabs_.size() && s != spare_) continue;
      best = s;
      if (used != 0) break;
    }
    if (best == slabs_.size()) add_slab();
    if (best == spare_) spare_ = kNone;
    size_t at = 0;
    while (slabs_[best].used >> at & 1) ++at;
    slabs_[best].used |= uint32_t{1} << at;
    return static_cast<int>(best * per_slab_ + at);
  }

  void give_back(int page) noexcept {
    const size_t s = static_cast<size_t>(page) / per_slab_, at = static_cast<size_t>(page) % per_slab_;
    slabs_[s].used &= ~(uint32_t{1} << at);
    if (slabs_[s].used != 0) return;
    if (spare_ == kNone) {
      spare_ = s;
    } else {
      forget_content(slabs_[s].memory, slab_bytes());
    }
  }

 private:
  static constexpr size_t kNone = SIZE_MAX;

  struct Slab {
    uint8_t* memory;
    uint32_t used;  // a bit for each page
  };

  size_t slab_bytes() const { return per_slab_ * page_bytes_; }
  uint32_t all_used() const { return (uint32_t{1} << per_slab_) - 1; }

  void add_slab() {
    slabs_.reserve(slabs_.size() + 1);
    pages_.reserve(pages_.size() + per_slab_);
    auto* memory = static_cast<uint8_t*>(alloc_zeroed(slab_bytes()));
    slabs_.push_back({memory, 0});
    for (size_t i = 0; i < per_slab_; ++i) pages_.push_back(memory + i * page_bytes_);
  }

  const size_t page_bytes_, per_slab_;
  std::vector<Slab> slabs_;
  std::vector<uint8_t*> pages_;  // by id
  size_t spare_ = kNone;         // the slab without a page in use that keeps its memory
};

}  // namespace cpu
}  // namespace pyllama
