// See step_times.h.
#include "cuda/step_times.h"

#include <utility>

namespace pyllama {
namespace cuda {

StepTimes StepTimer::restart(bool on) {
  on_ = on;
  return std::exchange(times_, {});
}

void StepTimer::turn_to(Stream& stream, Part part) {
  if (!on_ || (n_ > 0 && turns_[n_ - 1].part == part)) return;
  if (n_ == turns_.size()) {
    stream.make_current();
    turns_.push_back({std::make_unique<Event>(Event::kTimed), nullptr});
  }
  stream.record(*turns_[n_].event);
  turns_[n_++].part = part;
}

void StepTimer::end(Stream& stream) { turn_to(stream, nullptr); }

void StepTimer::collect() {
  for (size_t i = 1; i < n_; i++) {
    if (const Part part = turns_[i - 1].part) times_.*part += seconds_between(*turns_[i - 1].event, *turns_[i].event);
  }
  n_ = 0;
}

}  // namespace cuda
}  // namespace pyllama
