// The table's plain records as the project's own structs: what api.h brings becomes Config, ModelWeights and Step, so
// that nobody behind it knows the table. Views only: memory stays the caller's.
#pragma once

#include <vector>

#include "backend.h"
#include "config.h"
#include "cuda/api.h"

namespace pyllama {
namespace cuda {

Config config_of(const PyllamaCudaModel& record);
ModelWeights weights_of(const PyllamaCudaModel& record);

// What a Step points to and the table has in another form.
struct StepLists {
  std::vector<Span> spans;
  std::vector<Draw> draws;
};
Step step_of(const PyllamaCudaStep& record, StepLists& lists);

}  // namespace cuda
}  // namespace pyllama
