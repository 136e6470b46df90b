// Where the time of steps goes, seen from the thread that runs them: it takes part in every parallel region, so its own
// time is the step's, cut where its work turns to something else. Off by default, and then a branch at each turn. What
// other threads do meanwhile is not looked at.
#pragma once

#include <chrono>

#include "../backend.h"

namespace pyllama {
namespace cpu {

class Stopwatch {
 public:
  using Part = double StepTimes::*;

  // Times from now on, or no more; what was found since the last call.
  StepTimes restart(bool on) {
    on_ = on;
    const StepTimes found = times_;
    times_ = {};
    return found;
  }

  // A step begins with what counts as `rest`.
  void begin() {
    if (on_) begun_ = Clock::now();
    part_ = &StepTimes::rest;
  }

  // The work until now was of the last kind named; what follows is of this one.
  void turn_to(Part part) {
    if (!on_) return;
    const Clock::time_point now = Clock::now();
    times_.*part_ += std::chrono::duration<double>(now - begun_).count();
    begun_ = now;
    part_ = part;
  }

 private:
  using Clock = std::chrono::steady_clock;
  bool on_ = false;
  StepTimes times_;
  Part part_ = &StepTimes::rest;
  Clock::time_point begun_;
};

}  // namespace cpu
}  // namespace pyllama
