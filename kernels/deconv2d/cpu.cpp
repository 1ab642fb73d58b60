// deconv2d on the CPU: a product that skips zeros. A rectified signal is about half zeros and an unpooled one
// at least three quarters, so each cell lists its non-zero channels and only those meet the filter. The order
// of every sum follows from the shapes alone, never from the number of threads.
#include "deconv2d.h"

#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "parallel.h"
#include "sparse_lists.h"
#include "sparse_product.h"

namespace conelens::cpu::CONELENS_ISA {
namespace {

using deconv::Axis;
using deconv::intersect;
using deconv::Span;
using Params = conelens_deconv2d_params;

constexpr int64_t kFilterBytes = 24576;  // a packed filter block lives in the first-level cache
constexpr int64_t kTileBytes = 262144;   // an output tile, and the lists beside it, in the second-level cache
constexpr int64_t kThreadWork = 262144;
constexpr int64_t kStage = 32;  // cells whose channels are put side by side at a time
constexpr int64_t kDepth = kFilterBytes / (kSums * kVectorBytes);  // input channels of a list

inline int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t max(int64_t a, int64_t b) {
  return a > b ? a : b;
}
inline int64_t div_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t floor_div(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -div_up(-a, b);
}
inline int64_t ceil_div(int64_t a, int64_t b) {
  return -floor_div(-a, b);
}

// How the work is cut. A tile holds one block of output channels of a strip of result rows, of one or more
// samples.
//
// wide:  the filter's output channels fill vectors; a segment is one tap.
// flat:  a few output channels; a segment is a row of taps with its channels side by side, [kx][co], as is
// the tile.
template <class T>
struct Plan {
  Axis rows, columns;
  bool flat;
  int vectors, segments;        // of one pass over the lists
  int64_t taps_per_run;         // columns of taps in a segment
  int64_t block, blocks;        // output channels of a tile; number of blocks in all groups
  int64_t depth, lists, slot;   // input channels of a list, lists of a cell (of one group), room of a list
  int64_t in_group, out_group;  // channels of a group
  int64_t natural;              // columns that the whole signal reaches
  int64_t cell, row;            // elements of a tile's cell and of its row
  int64_t strip, strips, batch, batches;  // result rows and samples of a tile, and the numbers of such parts
  int64_t shares;                         // parts that the blocks of one strip are dealt to
  int64_t signal_rows, cells, tile;  // of a task, at most: signal rows, signal cells, elements of the tile

  Plan(const Params& p, int threads) : rows(deconv::axis(p, 0)), columns(deconv::axis(p, 1)) {
    const int64_t lanes = Simd<T>::lanes;
    in_group = p.in_channels / p.groups;
    out_group = p.out_channels / p.groups;
    depth = min(in_group, kDepth);
    lists = div_up(in_group, depth);
    slot = div_up(depth, kSlotUnit) * kSlotUnit;
    natural = (columns.signal - 1) * columns.stride + columns.dilation * (columns.taps - 1) + 1;
    flat = columns.dilation == 1 && 2 * out_group <= lanes;
    if (flat) {
      taps_per_run = min(columns.taps, 4 * lanes / out_group);
      vectors = static_cast<int>(div_up(taps_per_run * out_group, lanes));
      segments = static_cast<int>(min(rows.taps, kSums / vectors));
      block = out_group;
    } else {
      taps_per_run = 1;
      vectors = static_cast<int>(min(4, div_up(out_group, lanes)));
      segments = static_cast<int>(min(columns.taps, 3));
      if (vectors > 1 && p.groups * div_up(out_group, vectors * lanes) < threads) vectors = (vectors + 1) / 2;
      block = vectors * lanes;
    }
    blocks = p.groups * div_up(out_group, block);
    cell = flat ? out_group : block;
    row = natural * cell + (flat ? vectors * lanes : 0);
    const int64_t row_bytes = row * static_cast<int64_t>(sizeof(T));
    strip = max(1, min(rows.out, kTileBytes / row_bytes));
    if (strip < rows.out || p.batch * blocks < threads)
      strip = max(1, min(strip, div_up(rows.out * p.batch * blocks, 2 * threads)));
    strips = div_up(rows.out, strip);
    signal_rows = min(rows.signal, (strip - 1 + rows.dilation * (rows.taps - 1)) / rows.stride + 1);
    batch = 1;
    if (strips == 1) {
      const int64_t list_bytes =
          signal_rows * columns.signal * in_group * static_cast<int64_t>(sizeof(Entry<T>));
      batch = max(1, min(p.batch, min(kTileBytes / (strip * row_bytes), 4 * kTileBytes / list_bytes)));
    }
    batches = div_up(p.batch, batch);
    shares = batches * strips >= 2 * threads ? 1 : min(blocks, div_up(2 * threads, batches * strips));
    cells = batch * signal_rows * columns.signal;
    tile = (batch * strip + 1) * row;
  }

  int64_t filter() const { return depth * segments * vectors * Simd<T>::lanes; }
  int64_t scratch_bytes() const {
    return lists * cells * (slot * static_cast<int64_t>(sizeof(Entry<T>)) + 4) +
           (filter() + tile) * static_cast<int64_t>(sizeof(T)) + 256;
  }
};

template <class E>
struct Task {
  using T = typename Element<E>::Compute;

  const Params& p;
  const Plan<T>& plan;
  Entry<T>* entries;  // [lists, cells, slot]
  int32_t* counts;    // [lists, cells]
  T* filter;          // [depth, segments, vectors]
  T* tile;            // [batch, strip, row], and a spare row
  Span samples, out_rows, signal_rows;
  bool invalid = false;

  static T convert_staged(E element) { return Element<E>::load(element); }
  static uint8_t convert_staged(uint8_t element) { return element; }

  int64_t cell_index(int64_t sample, int64_t row) const {
    return ((sample - samples.begin) * plan.signal_rows + row - signal_rows.begin) * plan.columns.signal;
  }
  int32_t offset_of(int64_t channel) const {
    return static_cast<int32_t>(channel * plan.segments * plan.vectors * Simd<T>::lanes);
  }

  Entry<T>* slot(int64_t list, int64_t cell) const {
    return entries + (list * plan.cells + cell) * plan.slot;
  }

  // Channels of up to kStage neighbouring cells, side by side: `from` where they already lie so, else a copy.
  template <class To, class From>
  const To* stage(To* copy, const From* from, int64_t cell_stride, int64_t channel_stride, int64_t cells,
                  int64_t channels, int64_t* stride) const {
    if constexpr (sizeof(To) == sizeof(From))
      if (channel_stride == 1) return *stride = cell_stride, reinterpret_cast<const To*>(from);
    *stride = kDepth;
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t c = 0; c < cells; ++c)
        copy[c * kDepth + channel] = convert_staged(from[c * cell_stride + channel * channel_stride]);
    return copy;
  }

  void list_map(int64_t sample, int64_t first_channel, Span rows, Span columns) {
    T copy[kStage * kDepth];
    const int64_t* stride = p.y_stride;
    const E* y = static_cast<const E*>(p.y) + sample * stride[0] + first_channel * stride[1];
    for (int64_t r = rows.begin; r < rows.end; ++r)
      for (int64_t begin = columns.begin; begin < columns.end; begin += kStage)
        for (int64_t list = 0; list < plan.lists; ++list) {
          const int64_t cells = min(kStage, columns.end - begin), channel = list * plan.depth;
          const int64_t channels = min(plan.depth, plan.in_group - channel),
                        cell = cell_index(sample, r) + begin;
          int64_t step;
          const T* values = stage(copy, y + r * stride[2] + begin * stride[3] + channel * stride[1],
                                  stride[3], stride[1], cells, channels, &step);
          for (int64_t c = 0; c < cells; ++c)
            counts[list * plan.cells + cell + c] = append_channels<T>(
                slot(list, cell + c), 0, values + c * step, nullptr, 0, channels, offset_of(1), p.relu);
        }
  }

  // Each signal cell collects at most one pooled cell: overlapping pools are unpooled before they come here.
  void list_pooled(int64_t sample, int64_t first_channel, Span rows, Span columns) {
    T value_copy[kStage * kDepth];
    uint8_t switch_copy[kStage * kDepth];
    const Axis &ra = plan.rows, &ca = plan.columns;
    const int64_t *ys = p.y_stride, *ss = p.switches_stride;
    const E* y = static_cast<const E*>(p.y) + sample * ys[0] + first_channel * ys[1];
    const uint8_t* switches =
        static_cast<const uint8_t*>(p.switches) + sample * ss[0] + first_channel * ss[1];
    const int64_t first =
        max(0, ceil_div(rows.begin + ra.pool_shift - ra.pool_dilation * (ra.pool_taps - 1), ra.pool_stride));
    const int64_t last = min(ra.y - 1, floor_div(rows.end - 1 + ra.pool_shift, ra.pool_stride));
    for (int64_t q = first; q <= last; ++q)
      for (int64_t begin = 0; begin < ca.y; begin += kStage)
        for (int64_t list = 0; list < plan.lists; ++list) {
          const int64_t cells = min(kStage, ca.y - begin), channel = list * plan.depth;
          const int64_t channels = min(plan.depth, plan.in_group - channel);
          int64_t value_step, switch_step;
          const T* values = stage(value_copy, y + q * ys[2] + begin * ys[3] + channel * ys[1], ys[3], ys[1],
                                  cells, channels, &value_step);
          const uint8_t* taps = stage(switch_copy, switches + q * ss[2] + begin * ss[3] + channel * ss[1],
                                      ss[3], ss[1], cells, channels, &switch_step);
          for (int64_t c = 0; c < cells; ++c) {
            int64_t x = begin + c, tap = 0;
            for (int64_t i = 0; i < channels; ++i)
              invalid |= taps[c * switch_step + i] >= ra.pool_taps * ca.pool_taps;
            for (int64_t ky = 0; ky < ra.pool_taps; ++ky)
              for (int64_t kx = 0; kx < ca.pool_taps; ++kx, ++tap) {
                const int64_t row = q * ra.pool_stride - ra.pool_shift + ra.pool_dilation * ky;
                const int64_t column = x * ca.pool_stride - ca.pool_shift + ca.pool_dilation * kx;
                const bool outside =
                    column < columns.begin || column >= columns.end || row < rows.begin || row >= rows.end;
                if (!outside) {
                  const int64_t cell = cell_index(sample, row) + column;
                  counts[list * plan.cells + cell] =
                      append_channels<T>(slot(list, cell), 0, values + c * value_step, taps + c * switch_step,
                                         static_cast<int>(tap), channels, offset_of(1), p.relu);
                } else if (!p.origin && (column < 0 || column >= ca.signal || row < 0 || row >= ra.signal)) {
                  for (int64_t i = 0; i < channels; ++i) invalid |= taps[c * switch_step + i] == tap;
                }
              }
          }
        }
  }

  void list_group(int64_t group) {
    memset(counts, 0, plan.lists * plan.cells * sizeof(int32_t));
    for (int64_t n = samples.begin; n < samples.end; ++n) {
      const Span rows = intersect(signal_rows, deconv::live_signal(p, n, 0, plan.rows.signal));
      const Span columns = deconv::live_signal(p, n, 1, plan.columns.signal);
      if (rows.begin >= rows.end || columns.begin >= columns.end) continue;
      if (p.switches)
        list_pooled(n, group * plan.in_group, rows, columns);
      else
        list_map(n, group * plan.in_group, rows, columns);
    }
  }

  // Filter rows of a list's channels -> [channel][segment][run], zero-padded to whole vectors.
  void pack(int64_t list, int64_t group, int64_t out_channel, int64_t ky, int64_t kx, int segments,
            const bool* used) {
    const int64_t run = plan.vectors * Simd<T>::lanes;
    const int64_t *stride = p.weight_stride, segment_stride = plan.flat ? stride[2] : stride[3];
    const int64_t channels = min(plan.depth, plan.in_group - list * plan.depth);
    const int64_t outs = min(plan.block, plan.out_group - out_channel);
    const int64_t taps = min(plan.taps_per_run, plan.columns.taps - kx);
    const E* first = static_cast<const E*>(p.weight) +
                     (group * plan.in_group + list * plan.depth) * stride[0] + out_channel * stride[1] +
                     ky * stride[2] + kx * stride[3];
    for (int64_t channel = 0; channel < channels; ++channel) {
      if (used && !used[channel]) continue;
      for (int s = 0; s < segments; ++s) {
        const E* from = first + channel * stride[0] + s * segment_stride;
        T* packed = filter + offset_of(channel) + s * run;
        for (int64_t t = 0; t < taps; ++t, from += stride[3], packed += outs) {
          if (stride[1] == 1)
            for (int64_t co = 0; co < outs; ++co) packed[co] = Element<E>::load(from[co]);
          else
            for (int64_t co = 0; co < outs; ++co) packed[co] = Element<E>::load(from[co * stride[1]]);
        }
        memset(packed, 0, (run - taps * outs) * sizeof(T));
      }
    }
  }

  // Which channels of a list occur at all; null where looking would cost more than packing them.
  const bool* used_channels(int64_t list, bool* used) const {
    if (plan.cells > 64) return nullptr;
    memset(used, 0, plan.depth);
    const int32_t unit = offset_of(1);
    for (int64_t cell = list * plan.cells; cell < (list + 1) * plan.cells; ++cell)
      for (int32_t i = 0; i < counts[cell]; ++i) used[entries[cell * plan.slot + i].offset / unit] = true;
    return used;
  }

  bool empty(int64_t list) const {
    for (int64_t cell = list * plan.cells; cell < (list + 1) * plan.cells; ++cell)
      if (counts[cell]) return false;
    return true;
  }

  T* tile_row(int64_t sample, int64_t row) const {
    const bool here =
        row >= out_rows.begin && row < out_rows.end;  // rows of another strip go to the spare one
    const int64_t index = (sample - samples.begin) * plan.strip + row - out_rows.begin;
    return tile + (here ? index : plan.batch * plan.strip) * plan.row;
  }

  void multiply(int64_t list, int64_t ky, int64_t kx, int segments) {
    const Axis &ra = plan.rows, &ca = plan.columns;
    // wide tiles narrow with the number of threads, which must not reach the order of sums
    const bool two_ways = plan.flat ? segments * plan.vectors <= 4 : segments == 1;
    const AddRow<T> add_row = pick_add_row<T>(segments, plan.vectors, two_ways);
    const int64_t last_ky = plan.flat ? ky + segments - 1 : ky;
    const Span reaching = {ceil_div(out_rows.begin + ra.shift - ra.dilation * last_ky, ra.stride),
                           floor_div(out_rows.end - 1 + ra.shift - ra.dilation * ky, ra.stride) + 1};
    for (int64_t n = samples.begin; n < samples.end; ++n) {
      const Span rows = intersect(intersect(signal_rows, reaching), deconv::live_signal(p, n, 0, ra.signal));
      const Span columns = deconv::live_signal(p, n, 1, ca.signal);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const int64_t cell = list * plan.cells + cell_index(n, r) + columns.begin;
        CellRow<T> row{entries + cell * plan.slot,
                       counts + cell,
                       columns.end - columns.begin,
                       plan.slot,
                       ca.stride * plan.cell,
                       filter,
                       {}};
        for (int s = 0; s < segments; ++s) {
          const int64_t tap_row = plan.flat ? ky + s : ky, tap_column = plan.flat ? kx : kx + s;
          row.runs[s] = tile_row(n, r * ra.stride - ra.shift + ra.dilation * tap_row) +
                        (columns.begin * ca.stride + ca.dilation * tap_column) * plan.cell;
        }
        add_row(row);
      }
    }
  }

  void write(int64_t channel, int64_t outs) const {
    const int64_t *stride = p.out_stride, shift = plan.columns.shift, width = plan.columns.out;
    for (int64_t n = samples.begin; n < samples.end; ++n) {
      const Span rows = deconv::live_out(p, n, 0);
      const Span columns = intersect(deconv::live_out(p, n, 1), {-shift, plan.natural - shift});
      for (int64_t r = out_rows.begin; r < out_rows.end; ++r) {
        E* out = static_cast<E*>(p.out) + n * stride[0] + channel * stride[1] + r * stride[2];
        const T* from = tile_row(n, r) + shift * plan.cell;
        const bool live = r >= rows.begin && r < rows.end && columns.begin < columns.end;
        const int64_t begin = live ? columns.begin : width, end = live ? columns.end : width;
        if (stride[1] == 1) {
          for (int64_t c = 0; c < width; ++c)
            for (int64_t co = 0; co < outs; ++co)
              out[c * stride[3] + co] =
                  Element<E>::store(c < begin || c >= end ? T(0) : from[c * plan.cell + co]);
        } else {
          for (int64_t co = 0; co < outs; ++co, out += stride[1], ++from) {
            for (int64_t c = 0; c < begin; ++c) out[c * stride[3]] = Element<E>::store(0);
            for (int64_t c = begin; c < end; ++c) out[c * stride[3]] = Element<E>::store(from[c * plan.cell]);
            for (int64_t c = end; c < width; ++c) out[c * stride[3]] = Element<E>::store(0);
          }
        }
      }
    }
  }

  void run_block(int64_t group, int64_t out_channel) {
    memset(tile, 0, plan.tile * sizeof(T));
    bool flags[kDepth];
    const int64_t outer = plan.flat ? plan.columns.taps : plan.rows.taps;
    const int64_t inner = plan.flat ? plan.rows.taps : plan.columns.taps;
    for (int64_t list = 0; list < plan.lists; ++list) {
      if (empty(list)) continue;
      const bool* used = used_channels(list, flags);
      for (int64_t a = 0; a < outer; a += plan.taps_per_run)
        for (int64_t b = 0; b < inner; b += plan.segments) {
          const int segments = static_cast<int>(min(plan.segments, inner - b));
          const int64_t ky = plan.flat ? b : a, kx = plan.flat ? a : b;
          pack(list, group, out_channel, ky, kx, segments, used);
          multiply(list, ky, kx, segments);
        }
    }
    write(group * plan.out_group + out_channel, min(plan.block, plan.out_group - out_channel));
  }

  void run(Span blocks) {
    const int64_t per_group = plan.blocks / p.groups;
    int64_t listed = -1;
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      const int64_t group = b / per_group;
      if (group != listed) list_group(listed = group);
      run_block(group, b % per_group * plan.block);
    }
  }
};

// Threads that the work can keep busy: waking one costs as much as kThreadWork products.
int useful_threads(const Params& p, int threads) {
  const int64_t cells = p.batch * p.y_size[0] * p.y_size[1], taps = p.kernel[0] * p.kernel[1];
  return static_cast<int>(
      min(threads, 1 + cells * p.in_channels * (p.out_channels / p.groups) * taps / kThreadWork));
}

template <class E>
int run(const Params& p, int threads) {
  using T = typename Element<E>::Compute;
  threads = useful_threads(p, threads);
  const Plan<T> plan(p, threads);
  const int64_t tasks = plan.batches * plan.strips * plan.shares;
  int code = CONELENS_OK;
  parallel_for(tasks, 1, threads, [&](int64_t begin, int64_t end) {
    char* memory = static_cast<char*>(aligned_alloc(64, (plan.scratch_bytes() + 63) / 64 * 64));
    if (!memory) {
      __atomic_store_n(&code, static_cast<int>(CONELENS_OUT_OF_MEMORY), __ATOMIC_RELAXED);
      return;
    }
    Task<E> task{p, plan, nullptr, nullptr, nullptr, nullptr, {}, {}, {}};
    task.filter = reinterpret_cast<T*>(memory);
    task.tile = task.filter + plan.filter();
    task.entries = reinterpret_cast<Entry<T>*>(task.tile + (plan.tile + 15) / 16 * 16);
    task.counts = reinterpret_cast<int32_t*>(task.entries + plan.lists * plan.cells * plan.slot);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t share = t % plan.shares, strip = t / plan.shares % plan.strips,
                    batch = t / plan.shares / plan.strips;
      const Axis& rows = plan.rows;
      task.samples = {batch * plan.batch, min((batch + 1) * plan.batch, p.batch)};
      task.out_rows = {strip * plan.strip, min((strip + 1) * plan.strip, rows.out)};
      task.signal_rows = intersect(
          {0, rows.signal},
          {ceil_div(task.out_rows.begin + rows.shift - rows.dilation * (rows.taps - 1), rows.stride),
           floor_div(task.out_rows.end - 1 + rows.shift, rows.stride) + 1});
      task.run({plan.blocks * share / plan.shares, plan.blocks * (share + 1) / plan.shares});
    }
    if (task.invalid) __atomic_store_n(&code, static_cast<int>(CONELENS_INVALID_SWITCH), __ATOMIC_RELAXED);
    free(memory);
  });
  return code;
}

}  // namespace

int deconv2d(const conelens_deconv2d_params& p, int threads) {
  if (p.switches && p.switch_bytes != 1) return CONELENS_INVALID_ARGUMENT;  // windows of more than 256 taps
  for (int i = 0; i < 2; ++i)                                               // lists hold a channel once
    if (p.switches && p.pool_stride[i] <= p.pool_dilation[i] * (p.pool_kernel[i] - 1))
      return CONELENS_INVALID_ARGUMENT;
  return dispatch_dtype(p.dtype, [&](auto type) { return run<typename decltype(type)::type>(p, threads); });
}

}  // namespace conelens::cpu::CONELENS_ISA
