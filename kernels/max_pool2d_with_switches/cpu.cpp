#include "max_pool2d_with_switches.h"
namespace conelens::cpu::CONELENS_ISA {
int max_pool2d_with_switches(const conelens_max_pool2d_params&, int) { return CONELENS_UNSUPPORTED_DTYPE; }
}
