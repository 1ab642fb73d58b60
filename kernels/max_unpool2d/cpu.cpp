#include "max_unpool2d.h"
namespace conelens::cpu::CONELENS_ISA {
int max_unpool2d(const conelens_max_unpool2d_params&, int) { return CONELENS_UNSUPPORTED_DTYPE; }
int max_unpool2d_backward(const conelens_max_unpool2d_params&, int) { return CONELENS_UNSUPPORTED_DTYPE; }
}
