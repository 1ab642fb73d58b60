// relu_change on the CPU, compiled once per instruction set. Rules: README.md.
#include "relu_change.h"

#include "dtype.h"
#include "parallel.h"
#include "simd.h"

namespace conelens::cpu::CONELENS_ISA {
namespace {

using Params = conelens_relu_change_params;
using relu::Axis;

constexpr int64_t kGrain = 1 << 14;  // elements worth a thread

// `lanes` neighbours. A NaN of either makes the sum NaN, which no comparison replaces.
template <class T, int lanes>
CONELENS_INLINE void make_vector(T* out, const T* change, const T* base) {
  using C = typename Element<T>::Compute;
  using V = Vec<C, lanes>;
  const auto load = [](const T* from) CONELENS_INLINE_LAMBDA {
    if constexpr (sizeof(T) == sizeof(C))
      return load_vec<V>(from);
    else
      return widen<T, lanes>(reinterpret_cast<const int16_t*>(from));
  };
  const V z = load(base), none = V{};
  const V sum = load(change) + (z > none ? none : z), least = z > none ? -z : none;
  const V result = sum < least ? least : sum;
  if constexpr (sizeof(T) == sizeof(C))
    store_vec(out, result);
  else
    store_vec(out, narrow<T, lanes>(result));
}

// n neighbours, each of them once, as out may be change: fewer and fewer lanes instead of vectors that
// overlap
template <class T, int lanes>
CONELENS_INLINE void make_run(T* out, const T* change, const T* base, int64_t n) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) make_vector<T, lanes>(out + i, change + i, base + i);
  if constexpr (lanes > 1)
    if (i < n) make_run<T, (lanes > kFewestLanes ? lanes / 2 : 1)>(out + i, change + i, base + i, n - i);
}

// One row of a plane, which is a channel, or, channels side by side, all `depth` of them. `row` of base, in
// the unit's sample, lies under it; it is inside the map in the columns [begin, end).
template <class T>
void make_row(const Params& p, int64_t unit, int64_t sample, int64_t plane, int64_t y, int64_t row,
              const Axis& columns, int64_t depth) {
  constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(typename Element<T>::Compute));
  const auto at = [&](auto* map, const int64_t* stride, int64_t n, int64_t i, int64_t x) {
    return map + n * stride[0] + plane * stride[1] + i * stride[2] + x * stride[3];
  };
  T* out = at(static_cast<T*>(p.out), p.out_stride, unit, y, 0);
  const auto clear = [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; ++x)
      for (int64_t i = 0; i < depth; ++i) out[x * p.out_stride[3] + i] = T{};
  };
  clear(0, columns.begin);
  clear(columns.end, p.out_width);
  const int64_t cells = columns.end - columns.begin;
  if (cells == 0) return;
  out += columns.begin * p.out_stride[3];
  const T* change = at(static_cast<const T*>(p.change), p.change_stride, unit, y, columns.begin);
  const T* base =
      at(static_cast<const T*>(p.base), p.base_stride, sample, row, columns.begin + columns.first);
  if (p.out_stride[3] == depth && p.change_stride[3] == depth && p.base_stride[3] == depth)
    return make_run<T, lanes>(out, change, base, cells * depth);
  for (int64_t x = 0; x < cells; ++x)
    make_run<T, lanes>(out + x * p.out_stride[3], change + x * p.change_stride[3],
                       base + x * p.base_stride[3], depth);
}

// Lines [begin, end) of units * planes * rows.
template <class T>
void make_lines(const Params& p, bool channels_last, int64_t begin, int64_t end) {
  const int64_t planes = channels_last ? 1 : p.channels, depth = channels_last ? p.channels : 1;
  while (begin < end) {
    const int64_t unit = begin / p.out_height / planes, sample = gather::sample(p, unit);
    const Axis rows = relu::axis(p, unit, 0), columns = relu::axis(p, unit, 1);
    int64_t plane = begin / p.out_height % planes, y = begin % p.out_height;
    for (; plane < planes && begin < end; ++plane, y = 0)
      for (; y < p.out_height && begin < end; ++y, ++begin) {
        const bool inside = sample >= 0 && y >= rows.begin && y < rows.end;
        make_row<T>(p, unit, sample, plane, y, y + rows.first, inside ? columns : Axis{0, 0, 0}, depth);
      }
  }
}

}  // namespace

int relu_change(const Params& p, int threads) {
  const auto along = [&](int axis) {
    return p.change_stride[axis] == 1 && p.base_stride[axis] == 1 && p.out_stride[axis] == 1;
  };
  const bool channels_last = !along(3);
  if (channels_last && !along(1)) return CONELENS_UNSUPPORTED_LAYOUT;
  const int64_t planes = channels_last ? 1 : p.channels;
  const int64_t elements = p.out_width * (channels_last ? p.channels : 1);  // of a line
  return dispatch_dtype(p.dtype, [&](auto type) -> int {
    parallel_for(p.units * planes * p.out_height, 1 + kGrain / (1 + elements), threads,
                 [&](int64_t begin, int64_t end) {
                   make_lines<typename decltype(type)::type>(p, channels_last, begin, end);
                 });
    return CONELENS_OK;
  });
}

}  // namespace conelens::cpu::CONELENS_ISA
