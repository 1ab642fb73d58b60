// channel_peaks on CUDA: one read of x. Where there are too few maps to fill the card each is cut into
// slices, whose partial results a second small kernel joins, always in the same order.
#include "channel_peaks.h"
#include "cuda_lanes.cuh"

namespace conelens::cuda {
namespace {

using Params = conelens_channel_peaks_params;

constexpr int kNowhere = 0x7fffffff;

template <class C>
struct Peak {
  C value, sum;
  int position;

  // cells must come by rising position
  CONELENS_DEVICE void see(C cell, int at) {
    if (cell > value || (cell != cell && value == value) || position == kNowhere) {
      value = cell;
      position = at;
    }
    sum += cell;
  }
  // joins disjoint parts, in either order
  CONELENS_DEVICE void join(const Peak& other) {
    const bool mine_nan = value != value, other_nan = other.value != other.value;
    const bool equal = value == other.value || (mine_nan && other_nan);
    const bool larger = mine_nan == other_nan ? other.value > value : other_nan;
    if (larger || (equal && other.position < position)) {
      value = other.value;
      position = other.position;
    }
    sum += other.sum;
  }
};

template <class C>
CONELENS_DEVICE Peak<C> nothing() {
  return {-static_cast<C>(INFINITY), C(0), kNowhere};
}

// V cells at a time: each of the V slots keeps its maximum and the step at which it first came, two 16-bit
// floats to an instruction. Steps count to 65535. A NaN spoils its slot, which is then read again.
constexpr int kMostSteps = 65536;

template <class T, int V, bool with_sum>
struct Slots {
  static constexpr int N = kWords<T, V>;
  uint32_t best[N], step[N];
  Compute<T> sum[with_sum ? V : 1];

  CONELENS_DEVICE Slots() {
#pragma unroll
    for (int i = 0; i < N; ++i) best[i] = kLowest<T>, step[i] = 0;
#pragma unroll
    for (int i = 0; i < (with_sum ? V : 1); ++i) sum[i] = 0;
  }
  CONELENS_DEVICE void see(const T (&cells)[V], int now) {
    uint32_t words[N];
    to_words(words, cells);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      step[i] = select(lane_greater<T>(words[i], best[i]), in_lanes<T>(now), step[i]);
      best[i] = lane_max<T>(words[i], best[i]);
    }
    if constexpr (with_sum)
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += widen(cells[i]);
  }
  CONELENS_DEVICE bool spoiled() const {
    uint32_t equal = ~0u;
#pragma unroll
    for (int i = 0; i < N; ++i) equal &= lane_equal<T>(best[i], best[i]);
    return equal != ~0u;
  }
  CONELENS_DEVICE int step_of(int i) const { return lane_of<T>(step[i / kLanes<T>], i % kLanes<T>); }
  CONELENS_DEVICE Peak<Compute<T>> peak(int i, int position) const {
    return {widen(from_words<T>(best, i)), with_sum ? sum[i] : Compute<T>(0), position};
  }
};

template <class T>
CONELENS_DEVICE void write(const Params& p, int64_t plane, const Peak<Compute<T>>& peak) {
  Compute<T> value = peak.value;
  if (p.reduce == CONELENS_REDUCE_SUM) value = peak.sum;
  if (p.reduce == CONELENS_REDUCE_MEAN) value = peak.sum / static_cast<Compute<T>>(p.height * p.width);
  static_cast<T*>(p.values)[plane] = narrow<T>(value);
  p.positions[plane] = peak.position;
}

// [plane][slice]; null where one slice is the whole plane
template <class C>
using Partials = Peak<C>*;

template <class T>
CONELENS_DEVICE void hand_over(const Params& p, Partials<Compute<T>> partials, int64_t plane, int slice,
                               int slices, const Peak<Compute<T>>& peak) {
  if (partials)
    partials[plane * slices + slice] = peak;
  else
    write<T>(p, plane, peak);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    join_slices(const __grid_constant__ Params p, Partials<Compute<T>> partials, int slices) {
  const int64_t plane = thread_index<int64_t>();
  if (plane >= p.batch * p.channels) return;
  Peak<Compute<T>> peak = partials[plane * slices];
  for (int slice = 1; slice < slices; ++slice) peak.join(partials[plane * slices + slice]);
  write<T>(p, plane, peak);
}

// --- rows: a block reads one slice of one map
// ----------------------------------------------------------------------

// `flat`: the map's rows follow each other, so that it is read as one line, 16 bytes at a time once aligned.
template <class T, bool flat, bool with_sum>
__global__ void __launch_bounds__(kThreads, 4)
    peaks_of_rows(const __grid_constant__ Params p, Partials<Compute<T>> partials, int slices) {
  using C = Compute<T>;
  constexpr int V = 16 / sizeof(T);
  const int64_t plane = blockIdx.x / slices;
  const int slice = static_cast<int>(blockIdx.x % slices), thread = static_cast<int>(threadIdx.x);
  const int64_t cells = p.height * p.width;
  const int begin = static_cast<int>(cells * slice / slices),
            end = static_cast<int>(cells * (slice + 1) / slices);
  const T* map =
      static_cast<const T*>(p.x) + plane / p.channels * p.x_stride[0] + plane % p.channels * p.x_stride[1];
  Peak<C> peak = nothing<C>();
  if constexpr (flat) {
    const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(map + begin) / sizeof(T) % V);
    const int head = (V - skew) % V < end - begin ? (V - skew) % V : end - begin;
    const int vectors = (end - begin - head) / V, body = begin + head, tail = body + vectors * V;
    if (thread < head) peak.see(widen(load_one(map + begin + thread)), begin + thread);
    if (tail + thread < end) peak.see(widen(load_one(map + tail + thread)), tail + thread);
    if (thread < vectors) {
      Slots<T, V, with_sum> slots;
      int step = 0;
#pragma unroll 4
      for (int i = thread; i < vectors; i += kThreads, ++step) {
        T raw[V];
        load_vector(raw, map + body + i * V);
        slots.see(raw, step);
      }
      if (slots.spoiled()) {
        Peak<C> again = nothing<C>();
#pragma unroll 1
        for (int at = thread * V; at < vectors * V; at += at % V == V - 1 ? (kThreads - 1) * V + 1 : 1)
          again.see(widen(load_one(map + body + at)), body + at);
        peak.join(again);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i)
          peak.join(slots.peak(i, body + (slots.step_of(i) * kThreads + thread) * V + i));
      }
    }
  } else {
    const int width = static_cast<int>(p.width);
    for (int i = begin + thread; i < end; i += kThreads)
      peak.see(widen(load_one(map + i / width * p.x_stride[2] + i % width * p.x_stride[3])), i);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    Peak<C> other;
    other.value = __shfl_xor_sync(~0u, peak.value, step);
    other.sum = __shfl_xor_sync(~0u, peak.sum, step);
    other.position = __shfl_xor_sync(~0u, peak.position, step);
    peak.join(other);
  }
  __shared__ Peak<C> of_warps[kThreads / 32];
  if (thread % 32 == 0) of_warps[thread / 32] = peak;
  __syncthreads();
  if (thread > 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) peak.join(of_warps[warp]);
  hand_over<T>(p, partials, plane, slice, slices, peak);
}

// --- channels_last: a block reads V * groups channels of one slice
// --------------------------------------------------

// Threads stand as [kThreads / groups cells][groups of V channels].
template <class T, int V, bool with_sum>
__global__ void __launch_bounds__(kThreads, 4)
    peaks_of_channels(const __grid_constant__ Params p, Partials<Compute<T>> partials, int slices,
                      int groups) {
  using C = Compute<T>;
  const int bands = static_cast<int>(ceil_div(p.channels, int64_t{V} * groups));
  const int slice = static_cast<int>(blockIdx.x % slices),
            band = static_cast<int>(blockIdx.x / slices % bands);
  const int64_t sample = blockIdx.x / slices / bands;
  const int group = static_cast<int>(threadIdx.x) % groups, lane = static_cast<int>(threadIdx.x) / groups;
  const int lanes = kThreads / groups, width = static_cast<int>(p.width);
  const int64_t cells = p.height * p.width;
  const int begin = static_cast<int>(cells * slice / slices),
            end = static_cast<int>(cells * (slice + 1) / slices);
  const int64_t channel = (int64_t{band} * groups + group) * V;
  const bool flat = p.x_stride[2] == p.width * p.x_stride[3];
  const T* x = static_cast<const T*>(p.x) + sample * p.x_stride[0] + channel;
  const auto place = [&](int cell) {
    return flat ? cell * p.x_stride[3] : cell / width * p.x_stride[2] + cell % width * p.x_stride[3];
  };
  const bool any = channel < p.channels && begin + lane < end;
  Slots<T, V, with_sum> slots;
  if (any) {
    int step = 0;
#pragma unroll 4
    for (int cell = begin + lane; cell < end; cell += lanes, ++step) {
      T raw[V];
      load_vector(raw, x + place(cell));
      slots.see(raw, step);
    }
  }
  __shared__ Peak<C> shared[kThreads * V];  // [lane][group][i]
  Peak<C>* mine = shared + static_cast<int>(threadIdx.x) * V;
#pragma unroll
  for (int i = 0; i < V; ++i)
    mine[i] = any ? slots.peak(i, begin + lane + slots.step_of(i) * lanes) : nothing<C>();
  if (any && slots.spoiled()) {
#pragma unroll 1
    for (int i = 0; i < V; ++i) {
      Peak<C> again = nothing<C>();
#pragma unroll 1
      for (int cell = begin + lane; cell < end; cell += lanes)
        again.see(widen(load_one(x + i + place(cell))), cell);
      mine[i] = again;
    }
  }
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < groups * V; at += kThreads) {
    const int64_t to = int64_t{band} * groups * V + at;
    if (to >= p.channels) continue;
    Peak<C> peak = shared[at];
    for (int other = 1; other < lanes; ++other) peak.join(shared[other * groups * V + at]);
    hand_over<T>(p, partials, sample * p.channels + to, slice, slices, peak);
  }
}

// --- choice
// --------------------------------------------------------------------------------------------------------

constexpr int64_t kEnoughBlocks = 1024;  // they fill any card

// Runs start(partials, slices), with a work area and a joining kernel when there are several slices: as many
// as fill the card, while each has at least `least` cells; and so many that none has more than `most`.
template <class T, class Start>
int in_slices(const Params& p, int64_t blocks, int64_t least, int64_t most, void* stream,
              const Start& start) {
  const int64_t cells = p.height * p.width;
  int64_t slices = ceil_div(kEnoughBlocks, blocks);
  slices = slices > cells / least ? cells / least : slices;
  slices = slices < ceil_div(cells, most) ? ceil_div(cells, most) : slices;
  if (slices <= 1) return start(static_cast<Partials<Compute<T>>>(nullptr), 1);
  const auto on = static_cast<cudaStream_t>(stream);
  void* memory = nullptr;
  const int64_t planes = p.batch * p.channels;
  const cudaError_t refused = cudaMallocAsync(&memory, planes * slices * sizeof(Peak<Compute<T>>), on);
  if (refused != cudaSuccess) return CONELENS_CUDA_ERROR + static_cast<int>(refused);
  const auto partials = static_cast<Partials<Compute<T>>>(memory);
  int status = start(partials, static_cast<int>(slices));
  if (status == CONELENS_OK)
    status = launch(join_slices<T>, ceil_div(planes, kThreads), kThreads, stream, p, partials,
                    static_cast<int>(slices));
  const cudaError_t error = cudaFreeAsync(memory, on);
  return status != CONELENS_OK || error == cudaSuccess ? status
                                                       : CONELENS_CUDA_ERROR + static_cast<int>(error);
}

template <class T, int V>
int run_channels(const Params& p, void* stream) {
  int groups = 1;  // a power of two, so that lanes fill the block
  while (groups < 32 && groups * V < p.channels) groups *= 2;
  const int64_t blocks = p.batch * ceil_div(p.channels, int64_t{V} * groups);
  const int64_t lanes = kThreads / groups;
  return in_slices<T>(p, blocks, 8 * lanes, lanes * kMostSteps, stream, [&](auto partials, int slices) {
    const auto kernel =
        p.reduce == CONELENS_REDUCE_MAX ? peaks_of_channels<T, V, false> : peaks_of_channels<T, V, true>;
    return launch(kernel, blocks * slices, kThreads, stream, p, partials, slices, groups);
  });
}

template <class T, bool flat>
int run_rows(const Params& p, void* stream) {
  constexpr int64_t per_step = kThreads * (16 / sizeof(T));
  const int64_t planes = p.batch * p.channels;
  return in_slices<T>(p, planes, per_step, per_step * kMostSteps, stream, [&](auto partials, int slices) {
    const auto kernel =
        p.reduce == CONELENS_REDUCE_MAX ? peaks_of_rows<T, flat, false> : peaks_of_rows<T, flat, true>;
    return launch(kernel, planes * slices, kThreads, stream, p, partials, slices);
  });
}

template <class T>
int run(const Params& p, void* stream) {
  if constexpr (sizeof(T) == 8) {
    return run_rows<T, false>(p, stream);  // for exactness tests: cell by cell
  } else {
    constexpr int full = 16 / sizeof(T);
    if (p.x_stride[1] == 1 && p.x_stride[3] != 1) {
      const bool wide = p.channels % full == 0 && vectorises({p.x, p.x_stride, sizeof(T)}, 1, full);
      return wide ? run_channels<T, full>(p, stream) : run_channels<T, 1>(p, stream);
    }
    const bool flat = p.x_stride[3] == 1 && p.x_stride[2] == p.width;
    return flat ? run_rows<T, true>(p, stream) : run_rows<T, false>(p, stream);
  }
}

}  // namespace
}  // namespace conelens::cuda

extern "C" CONELENS_API int conelens_channel_peaks_cuda(const conelens_channel_peaks_params* p,
                                                        void* stream) {
  if (p->batch * p->channels == 0) return CONELENS_OK;
  return conelens::dispatch_dtype(
      p->dtype, [&](auto t) { return conelens::cuda::run<typename decltype(t)::type>(*p, stream); });
}
