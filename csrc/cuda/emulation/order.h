// The orders in which emulated blocks, warps and lanes take turns. A correct kernel gives the same bits in all of them;
// one that lacks a barrier does not: ascending and descending let one thread run as far ahead of the others as barriers
// allow, to either side, and random ones mix at every barrier and collective.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace pyllama::cuda::emulation {

struct Order {
  enum Kind { kAscending, kDescending, kRandom };
  Kind kind = kAscending;
  uint64_t seed = 0;
};

// "ascending", "descending", "random" or "random:SEED"; anything else throws.
Order parse_order(const std::string& text);

// The order of launches from now on. At first it is that of the environment variable PYLLAMA_CUDA_ORDER, or ascending.
void set_order(const Order& order);
Order current_order();

// Calls `run` under ascending, descending and several random orders and throws if what it returns, bytes of results, is
// not the same each time. The order is afterwards what it was.
void run_in_all_orders(const std::function<std::vector<unsigned char>()>& run);

// Counts 0 … n-1 in an order. Random ones come from (seed, stream) alone, so that a run can be repeated.
class Turns {
 public:
  Turns(const Order& order, uint64_t stream) : order_(order), state_(order.seed * 0x9e3779b97f4a7c15 + stream) {}

  bool random() const { return order_.kind == Order::kRandom; }

  // A number below n.
  unsigned draw(unsigned n);

  // Calls body(i) for all i below n. Inside it no other each() may run on the same Turns.
  template <class F>
  void each(unsigned n, const F& body) {
    if (order_.kind == Order::kAscending) {
      for (unsigned i = 0; i < n; i++) body(i);
    } else if (order_.kind == Order::kDescending) {
      for (unsigned i = n; i-- > 0;) body(i);
    } else {
      shuffle(n);
      for (unsigned i = 0; i < n; i++) body(shuffled_[i]);
    }
  }

 private:
  void shuffle(unsigned n);

  Order order_;
  uint64_t state_;
  std::vector<unsigned> shuffled_;
};

}  // namespace pyllama::cuda::emulation
