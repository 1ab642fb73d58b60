// deconv2d on CUDA for few output channels (a network's first layer, to pixels): bytes decide, so y is read
// once.
//
// One product per map cell gives its contributions through all taps to all output channels at once, [cells,
// taps * Co]: a column fills the tensor cores' tile where Co alone would leave it empty. The contributions
// wait in shared memory, a plane per column, until every output cell of the tile has collected its own. A
// block walks down a strip of columns, so that only the strip's edges are read twice.
//
// Tensor cores add over channels in any order, so a thread takes 8 neighbouring channels with one 16-byte
// load and calls them its own of two products' 16: weights are laid out alike. 16-bit floats, channels_last,
// stride 1, no pool.
#include "cuda_device.cuh"
#include "deconv2d.h"

namespace conelens::cuda {
namespace {

using Params = conelens_deconv2d_params;

constexpr int kStep = kThreads / 32;          // map rows per step: one per warp
constexpr int kColumns = 32;                  // map cells per row of a strip
constexpr int kTaps = 3;                      // most taps per axis
constexpr int kRing = kStep + kTaps - 1;      // rows of contributions that are alive
constexpr int kPlane = kRing * kColumns + 4;  // + 4: a warp's stores fall into 32 banks
constexpr int kMostColumns = 28;              // taps * Co
constexpr int kMostChannels = 128;
constexpr int kSteps = 4;  // steps per block

// c += a * b on one 16x8x16 tile; lane = 4 * group + t holds rows group and group + 8 of a and c, column
// group of b
template <class T>
CONELENS_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
  emulation::multiply_16x8x16(c, a, b, [](uint16_t bits) { return widen(T{bits}); });
#elif __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// A span of cells in 32 bits; `fits` looks that it can.
struct Range {
  int begin, end;
  CONELENS_DEVICE Range(deconv::Span span)
      : begin(static_cast<int>(span.begin)), end(static_cast<int>(span.end)) {}
  CONELENS_DEVICE bool holds(int cell) const { return cell >= begin && cell < end; }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    few_outputs(const __grid_constant__ Params p, int strips, int bands) {
  __shared__ float contributions[kMostColumns * kPlane];
  // [16 channels][8 columns][lane][2]: as multiply wants them
  __shared__ uint2 weights[kMostChannels / 16 * 4 * 32];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int group = lane / 4, t = lane % 4;
  const int kh = static_cast<int>(p.kernel[0]), kw = static_cast<int>(p.kernel[1]);
  const int outputs = static_cast<int>(p.out_channels), channels = static_cast<int>(p.in_channels);
  const int columns = kh * kw * outputs;
  const int strip = static_cast<int>(blockIdx.x % strips),
            band = static_cast<int>(blockIdx.x / strips % bands);
  const int64_t sample = blockIdx.x / strips / bands;

  for (int i = thread; i < channels / 16 * 4 * 32; i += kThreads) {
    const int of_lane = i % 32, column = i / 32 % 4 * 8 + of_lane / 4, step = i / 128;
    T w[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // step 2k and 2k + 1 share 32 channels: lane t holds 8t ... 8t + 7, four for each
      const int channel = step / 2 * 32 + of_lane % 4 * 8 + step % 2 * 4 + j;
      const int tap = column / outputs, output = column % outputs;
      w[j] = column < columns ? load_one(static_cast<const T*>(p.weight) + channel * p.weight_stride[0] +
                                         output * p.weight_stride[1] + tap / kw * p.weight_stride[2] +
                                         tap % kw * p.weight_stride[3])
                              : T{0};
    }
    memcpy(&weights[i], w, sizeof w);
  }

  const Range rows = deconv::live_signal(p, sample, 0, p.y_size[0]),
              out_rows = deconv::live_out(p, sample, 0);
  const Range cols = deconv::live_signal(p, sample, 1, p.y_size[1]),
              out_cols = deconv::live_out(p, sample, 1);
  const int first_out_y = band * (kSteps * kStep - kh + 1), first_out_x = strip * (kColumns - kw + 1);
  const int first_y = first_out_y + static_cast<int>(p.origin ? 0 : p.padding[0]) - (kh - 1);
  const int first_x = first_out_x + static_cast<int>(p.origin ? 0 : p.padding[1]) - (kw - 1);
  const T* y = static_cast<const T*>(p.y) + sample * p.y_stride[0];
  __syncthreads();

  for (int step = 0; step < kSteps; ++step) {
    // contributions of the cells of one row: lanes hold cells group, group + 8, + 16, + 24
    const int row = step * kStep + warp;
    const int map_y = first_y + row;
    float sums[2][4][4] = {};
    const T* cells = y + map_y * p.y_stride[2] + (first_x + group) * p.y_stride[3] + 8 * t;
    bool inside[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      inside[i] = rows.holds(map_y) && cols.holds(first_x + group + 8 * i);
    }
#pragma unroll 2
    for (int chunk = 0; chunk < channels / 32; ++chunk) {
      uint32_t a[4][4];  // [cell][pair of channels]
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T raw[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) raw[j] = T{0};
        if (inside[i]) load_vector(raw, cells + 8 * i * p.y_stride[3] + chunk * 32);
        if (p.relu)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            if (widen(raw[j]) < 0) raw[j] = T{0};
        memcpy(a[i], raw, sizeof raw);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          uint32_t b[2];
          memcpy(b, &weights[((chunk * 2 + half) * 4 + n) * 32 + lane], sizeof b);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const uint32_t tile[4] = {a[2 * m][2 * half], a[2 * m + 1][2 * half], a[2 * m][2 * half + 1],
                                      a[2 * m + 1][2 * half + 1]};
            multiply<T>(sums[m][n], tile, b);
          }
        }
    }
    float* line = contributions + row % kRing * kColumns;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = n * 8 + 2 * t + i % 2, cell = m * 16 + group + i / 2 * 8;
          if (column < columns) line[column * kPlane + cell] = sums[m][n][i];
        }
    __syncthreads();

    // output rows whose last map row has just come
    const int out_row = row - (kh - 1);
    const int out_y = first_out_y + out_row, out_x = first_out_x + lane;
    if (out_row >= 0 && out_y < p.out_size[0] && lane < kColumns - kw + 1 && out_x < p.out_size[1]) {
      const bool on_map = out_rows.holds(out_y) && out_cols.holds(out_x);
      T* out = static_cast<T*>(p.out) + sample * p.out_stride[0] + out_y * p.out_stride[2] +
               out_x * p.out_stride[3];
      for (int output = 0; output < outputs; ++output) {
        float sum = 0;
        for (int ty = 0; ty < kh; ++ty) {
          const float* from = contributions + (out_row + kh - 1 - ty) % kRing * kColumns + lane + kw - 1;
          for (int tx = 0; tx < kw; ++tx) sum += from[((ty * kw + tx) * outputs + output) * kPlane - tx];
        }
        out[output * p.out_stride[1]] = narrow<T>(on_map ? sum : 0.f);
      }
    }
    __syncthreads();
  }
}

bool fits(const Params& p) {
  const bool plain = p.groups == 1 && p.stride[0] == 1 && p.stride[1] == 1 && p.dilation[0] == 1 &&
                     p.dilation[1] == 1 && !p.switches;
  const bool small = p.kernel[0] <= kTaps && p.kernel[1] <= kTaps &&
                     p.kernel[0] * p.kernel[1] * p.out_channels <= kMostColumns;
  constexpr int64_t most = int64_t{1} << 30;
  for (int i = 0; i < 2; ++i)
    if (p.y_size[i] > most || p.out_size[i] > most || p.padding[i] > most) return false;
  return plain && small && p.in_channels % 32 == 0 && p.in_channels <= kMostChannels &&
         vectorises({p.y, p.y_stride, 2}, 1, 8);
}

template <class T>
int run(const Params& p, void* stream) {
  if (!fits(p)) return CONELENS_UNSUPPORTED_LAYOUT;
  const int64_t strips = ceil_div(p.out_size[1], kColumns - p.kernel[1] + 1);
  const int64_t bands = ceil_div(p.out_size[0], kSteps * kStep - p.kernel[0] + 1);
  return launch(few_outputs<T>, p.batch * strips * bands, kThreads, stream, p, static_cast<int>(strips),
                static_cast<int>(bands));
}

}  // namespace
}  // namespace conelens::cuda

extern "C" CONELENS_API int conelens_deconv2d_cuda(const conelens_deconv2d_params* p, void* stream) {
  if (p->batch * p->out_channels * p->out_size[0] * p->out_size[1] == 0) return CONELENS_OK;
  if (p->dtype == CONELENS_FLOAT16) return conelens::cuda::run<conelens::Half>(*p, stream);
  if (p->dtype == CONELENS_BFLOAT16) return conelens::cuda::run<conelens::BFloat16>(*p, stream);
  return CONELENS_UNSUPPORTED_DTYPE;
}
