// See order.h.
#include "order.h"

#include <cstdlib>

#include "../runtime.h"

namespace pyllama::cuda::emulation {

namespace {

// Read when first used, so that a wrong word in the environment is an error of a launch and not of loading the library.
Order& the_order() {
  static Order order = [] {
    const char* text = std::getenv("PYLLAMA_CUDA_ORDER");
    return text && *text ? parse_order(text) : Order{};
  }();
  return order;
}

}  // namespace

Order parse_order(const std::string& text) {
  const std::string word = text.substr(0, text.find(':'));
  const std::string seed = word == text ? "0" : text.substr(word.size() + 1);
  const bool number = !seed.empty() && seed.size() < 19 && seed.find_first_not_of("0123456789") == std::string::npos;
  if (text == "ascending") return {Order::kAscending, 0};
  if (text == "descending") return {Order::kDescending, 0};
  if (word == "random" && number) return {Order::kRandom, std::stoull(seed)};
  throw Error(
      kPyllamaCudaBadArgument,
      "thread order \"" + text + "\"; expected ascending, descending, random or random:SEED (PYLLAMA_CUDA_ORDER)");
}

void set_order(const Order& order) { the_order() = order; }
Order current_order() { return the_order(); }

void run_in_all_orders(const std::function<std::vector<unsigned char>()>& run) {
  const Order before = current_order();
  struct Restore {
    Order order;
    ~Restore() { set_order(order); }
  } restore{before};
  std::vector<unsigned char> expected;
  for (const char* text : {"ascending", "descending", "random:1", "random:2", "random:3"}) {
    set_order(parse_order(text));
    const std::vector<unsigned char> found = run();
    if (expected.empty()) expected = found;
    size_t i = 0;
    while (i < found.size() && i < expected.size() && found[i] == expected[i]) i++;
    if (i == found.size() && i == expected.size()) continue;
    throw Error(kPyllamaCudaInternal, "results under thread order " + std::string(text) +
                                          " differ from those under ascending, first at byte " + std::to_string(i) +
                                          ": a barrier is missing, or blocks depend on each other");
  }
}

unsigned Turns::draw(unsigned n) {
  state_ += 0x9e3779b97f4a7c15;  // splitmix64
  uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  z ^= z >> 31;
  return static_cast<unsigned>((z >> 32) * n >> 32);
}

void Turns::shuffle(unsigned n) {
  shuffled_.resize(n);
  for (unsigned i = 0; i < n; i++) shuffled_[i] = i;
  for (unsigned i = n; i > 1; i--) std::swap(shuffled_[i - 1], shuffled_[draw(i)]);
}

}  // namespace pyllama::cuda::emulation
