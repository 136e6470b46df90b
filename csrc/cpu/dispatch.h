// From an instruction set's name to its table of kernels.
#pragma once

#include <string>

#include "kernels.h"

namespace pyllama {
namespace cpu {

const Kernels& kernels_for(const std::string& isa);  // "" for the best; see choose_isa in cpu.h

}  // namespace cpu
}  // namespace pyllama
