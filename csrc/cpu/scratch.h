// Scratch<T>: a std::vector whose resize() writes nothing. Its memory comes from calloc, where large blocks are zeros
// that the system provides page by page when they are first touched: a model opened for 512 tokens a step that only
// decodes holds one row of each buffer. After a later resize() the contents are whatever was there.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace pyllama {
namespace cpu {

template <class T>
struct LazyAllocator {
  static_assert(std::is_trivial<T>::value && alignof(T) <= alignof(std::max_align_t), "made by calloc alone");
  using value_type = T;

  LazyAllocator() = default;
  template <class U>
  LazyAllocator(const LazyAllocator<U>&) {}

  T* allocate(size_t n) {
    void* data = std::calloc(n, sizeof(T));
    if (!data) throw std::bad_alloc();
    return static_cast<T*>(data);
  }
  void deallocate(T* data, size_t) { std::free(data); }

  template <class U>
  void construct(U*) {}  // what resize() asks for
  template <class U, class... Arguments>
  void construct(U* at, Arguments&&... arguments) {
    ::new (static_cast<void*>(at)) U(std::forward<Arguments>(arguments)...);
  }
};

template <class T, class U>
bool operator==(const LazyAllocator<T>&, const LazyAllocator<U>&) {
  return true;
}
template <class T, class U>
bool operator!=(const LazyAllocator<T>&, const LazyAllocator<U>&) {
  return false;
}

template <class T>
using Scratch = std::vector<T, LazyAllocator<T>>;

}  // namespace cpu
}  // namespace pyllama
