// Where the time of steps goes on the device: an event wherever the work turns to something else. Off by default. While
// it is on, steps are not replayed, and kernels do not start early across an event.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "backend.h"
#include "cuda/runtime.h"

namespace pyllama {
namespace cuda {

class StepTimer {
 public:
  using Part = double StepTimes::*;

  // Times from now on, or no more; what was found since the last call.
  StepTimes restart(bool on);
  bool on() const { return on_; }

  void begin() { n_ = 0; }
  void turn_to(Stream& stream, Part part);  // what is launched from here on is of this kind
  void end(Stream& stream);                 // before the stream is waited for
  void collect();                           // after it

 private:
  struct Turn {
    std::unique_ptr<Event> event;
    Part part = nullptr;  // of what comes after the event
  };

  bool on_ = false;
  StepTimes times_;
  std::vector<Turn> turns_;  // the first n_ are this step's
  size_t n_ = 0;
};

}  // namespace cuda
}  // namespace pyllama
