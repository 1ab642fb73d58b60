/* conelens for C: params structs and launchers. A launcher reads its params, runs and returns CONELENS_OK or
 * an error code for conelens_error_string. Callers allocate outputs. Link against libconelens (CPU); the CUDA
 * launchers are in libconelens_cuda, take a cudaStream_t as void* and return after the launch. */
#ifndef CONELENS_H
#define CONELENS_H

#include "channel_peaks.h"
#include "collapse_parents.h"
#include "deconv2d.h"
#include "edge_scores.h"
#include "gather_windows.h"
#include "graph_e_step.h"
#include "max_pool2d_with_switches.h"
#include "max_unpool2d.h"
#include "relu_change.h"
#include "types.h"

#ifdef __cplusplus
extern "C" {
#endif

CONELENS_API const char* conelens_error_string(int code);

CONELENS_API int conelens_channel_peaks_cpu(const conelens_channel_peaks_params* params, int threads);
CONELENS_API int conelens_collapse_parents_cpu(const conelens_collapse_parents_params* params, int threads);
CONELENS_API int conelens_deconv2d_cpu(const conelens_deconv2d_params* params, int threads);
CONELENS_API int conelens_edge_scores_cpu(const conelens_edge_scores_params* params, int threads);
CONELENS_API int conelens_gather_windows_cpu(const conelens_gather_windows_params* params, int threads);
CONELENS_API int conelens_graph_e_step_cpu(const conelens_graph_e_step_params* params, int threads);
CONELENS_API int conelens_max_pool2d_with_switches_cpu(const conelens_max_pool2d_params* params, int threads);
CONELENS_API int conelens_max_unpool2d_cpu(const conelens_max_unpool2d_params* params, int threads);
CONELENS_API int conelens_max_unpool2d_backward_cpu(const conelens_max_unpool2d_params* params, int threads);
CONELENS_API int conelens_relu_change_cpu(const conelens_relu_change_params* params, int threads);

CONELENS_API int conelens_channel_peaks_cuda(const conelens_channel_peaks_params* params, void* stream);
/* few output channels, 16-bit floats, channels_last, stride 1, no pool; else CONELENS_UNSUPPORTED_LAYOUT or
 * _DTYPE */
CONELENS_API int conelens_deconv2d_cuda(const conelens_deconv2d_params* params, void* stream);
CONELENS_API int conelens_gather_windows_cuda(const conelens_gather_windows_params* params, void* stream);
CONELENS_API int conelens_max_pool2d_with_switches_cuda(const conelens_max_pool2d_params* params,
                                                        void* stream);
CONELENS_API int conelens_max_unpool2d_cuda(const conelens_max_unpool2d_params* params, void* stream);
CONELENS_API int conelens_max_unpool2d_backward_cuda(const conelens_max_unpool2d_params* params,
                                                     void* stream);
CONELENS_API int conelens_relu_change_cuda(const conelens_relu_change_params* params, void* stream);

#ifdef __cplusplus
}
#endif

#endif
