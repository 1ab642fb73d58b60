// The C launchers of the CPU: each picks its kernel's copy for the active instruction set. One line per
// kernel.
#include "conelens.h"
#include "isa.h"

#if defined(CONELENS_X86)
#define CONELENS_CPU_LAUNCHER(kernel, params)                            \
  namespace conelens::cpu {                                              \
  namespace baseline {                                                   \
  int kernel(const params&, int);                                        \
  }                                                                      \
  namespace avx2 {                                                       \
  int kernel(const params&, int);                                        \
  }                                                                      \
  namespace avx512 {                                                     \
  int kernel(const params&, int);                                        \
  }                                                                      \
  }                                                                      \
  extern "C" int conelens_##kernel##_cpu(const params* p, int threads) { \
    switch (conelens::active_isa()) {                                    \
      case conelens::Isa::avx512:                                        \
        return conelens::cpu::avx512::kernel(*p, threads);               \
      case conelens::Isa::avx2:                                          \
        return conelens::cpu::avx2::kernel(*p, threads);                 \
      default:                                                           \
        return conelens::cpu::baseline::kernel(*p, threads);             \
    }                                                                    \
  }
#else
#define CONELENS_CPU_LAUNCHER(kernel, params)                            \
  namespace conelens::cpu::baseline {                                    \
  int kernel(const params&, int);                                        \
  }                                                                      \
  extern "C" int conelens_##kernel##_cpu(const params* p, int threads) { \
    return conelens::cpu::baseline::kernel(*p, threads);                 \
  }
#endif

CONELENS_CPU_LAUNCHER(channel_peaks, conelens_channel_peaks_params)
CONELENS_CPU_LAUNCHER(collapse_parents, conelens_collapse_parents_params)
CONELENS_CPU_LAUNCHER(deconv2d, conelens_deconv2d_params)
CONELENS_CPU_LAUNCHER(edge_scores, conelens_edge_scores_params)
CONELENS_CPU_LAUNCHER(gather_windows, conelens_gather_windows_params)
CONELENS_CPU_LAUNCHER(graph_e_step, conelens_graph_e_step_params)
CONELENS_CPU_LAUNCHER(max_pool2d_with_switches, conelens_max_pool2d_params)
CONELENS_CPU_LAUNCHER(max_unpool2d, conelens_max_unpool2d_params)
CONELENS_CPU_LAUNCHER(max_unpool2d_backward, conelens_max_unpool2d_params)
CONELENS_CPU_LAUNCHER(relu_change, conelens_relu_change_params)

extern "C" const char* conelens_error_string(int code) {
  switch (code) {
    case CONELENS_OK:
      return "no error";
    case CONELENS_UNSUPPORTED_DTYPE:
      return "unsupported dtype";
    case CONELENS_UNSUPPORTED_LAYOUT:
      return "unsupported layout: neither columns nor channels lie side by side in all maps";
    case CONELENS_INVALID_SWITCH:
      return "a switch points outside its window or outside the map";
    case CONELENS_INVALID_ARGUMENT:
      return "invalid argument";
    case CONELENS_OUT_OF_MEMORY:
      return "out of memory for a work area";
    default:
      return code >= CONELENS_CUDA_ERROR ? "CUDA error" : "unknown error";
  }
}
