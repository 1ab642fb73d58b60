// Instruction sets: every kernels/*/cpu.cpp is compiled once per set, and the launcher picks one at run time.
#pragma once

#include "types.h"

namespace conelens {

enum class Isa { baseline, avx2, avx512 };

// The set in use: the best that the machine has, or the one that CONELENS_ISA names.
CONELENS_API Isa active_isa();
CONELENS_API const char* isa_name(Isa isa);
CONELENS_API bool isa_available(Isa isa);  // built and supported by this machine
// Choose a set for this process; false when it is not available. For tests; CONELENS_ISA is for users.
CONELENS_API bool select_isa(const char* name);
// Why CONELENS_ISA could not be honoured, or null.
CONELENS_API const char* isa_error();

}  // namespace conelens
