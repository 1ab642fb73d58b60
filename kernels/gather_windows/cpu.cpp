// gather_windows on the CPU, compiled once per instruction set. Rules: README.md.
//
// A window falls into rectangles, each with one source: fill, base, patch (or their sum). Nothing is decided
// per cell.
#include "gather_windows.h"

#include <cstring>

#include "dtype.h"
#include "parallel.h"
#include "simd.h"

namespace conelens::cpu::CONELENS_ISA {
namespace {

using Params = conelens_gather_windows_params;
using gather::Axis;

constexpr int64_t kGrain = 1 << 15;  // elements worth a thread
constexpr int64_t kLong = 1024;      // bytes from which the C library's copy is faster than its call costs

// --- blocks: `rows` runs of n neighbouring elements ---

template <class T>
struct Rows {
  T* at;
  int64_t step;
};

// Few vectors to a row: all rows by one vector after the other, so that nothing is decided per row.
template <int lanes, class Body>
CONELENS_INLINE void over_block(int64_t rows, int64_t n, const Body& body) {
  if (n <= 4 * lanes)
    in_vectors<lanes>(n, [&](auto width, int64_t i) CONELENS_INLINE_LAMBDA {
      for (int64_t row = 0; row < rows; ++row) body(width, row, i);
    });
  else
    for (int64_t row = 0; row < rows; ++row)
      in_vectors<lanes>(n, [&](auto width, int64_t i) CONELENS_INLINE_LAMBDA { body(width, row, i); });
}

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
void fill_block(Rows<T> out, int64_t rows, int64_t n, T value) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < n; ++i) out.at[row * out.step + i] = value;
}

template <class T>
void copy_block(Rows<T> out, Rows<const T> from, int64_t rows, int64_t n) {
  using Bits = typename UintOfBytes<sizeof(T)>::type;
  if (n * static_cast<int64_t>(sizeof(T)) >= kLong)
    for (int64_t row = 0; row < rows; ++row)
      std::memcpy(out.at + row * out.step, from.at + row * from.step, n * sizeof(T));
  else
    over_block<kLanes<T>>(rows, n, [=](auto width, int64_t row, int64_t i) CONELENS_INLINE_LAMBDA {
      using V = Vec<Bits, decltype(width)::value>;
      store_vec(out.at + row * out.step + i, load_vec<V>(from.at + row * from.step + i));
    });
}

// halves are summed in float
template <class T>
void add_block(Rows<T> out, Rows<const T> a, Rows<const T> b, int64_t rows, int64_t n) {
  using C = typename Element<T>::Compute;
  over_block<kLanes<C>>(rows, n, [=](auto width, int64_t row, int64_t i) CONELENS_INLINE_LAMBDA {
    constexpr int lanes = decltype(width)::value;
    const T *x = a.at + row * a.step + i, *y = b.at + row * b.step + i;
    T* to = out.at + row * out.step + i;
    if constexpr (sizeof(T) == sizeof(C)) {
      using V = Vec<T, lanes>;
      store_vec(to, load_vec<V>(x) + load_vec<V>(y));
    } else {
      const auto load = [](const T* p) { return widen<T, lanes>(reinterpret_cast<const int16_t*>(p)); };
      store_vec(to, narrow<T, lanes>(load(x) + load(y)));
    }
  });
}

// --- one plane of a window: a channel of it, or, channels side by side, all of them ---

// Where window cell (0, 0) of a plane would lie in a map, perhaps far outside, and the steps on from there.
template <class T>
struct Map {
  uintptr_t corner;
  int64_t plane, row, column;

  Map(const void* map, const int64_t* stride, uint64_t n, uint64_t y, uint64_t x)
      : corner(reinterpret_cast<uintptr_t>(map) +
               (n * stride[0] + y * stride[2] + x * stride[3]) * sizeof(T)),
        plane(stride[1]),
        row(stride[2]),
        column(stride[3]) {}
  void move(int64_t planes) { corner += static_cast<uint64_t>(planes * plane) * sizeof(T); }
  T* at(int64_t y, int64_t x) const {
    return reinterpret_cast<T*>(corner + static_cast<uint64_t>(y * row + x * column) * sizeof(T));
  }
};

struct Span {
  int64_t begin, end;
};

template <class T, bool add>
struct Plane {
  Axis rows, columns;
  Map<T> out;
  Map<const T> base, patch;
  int64_t width, depth;  // columns; neighbouring elements that make a cell
  T value;               // outside the map

  Plane(const Params& p, int64_t unit, int64_t sample, int64_t cell)
      : rows(gather::axis(p, unit, 0)),
        columns(gather::axis(p, unit, 1)),
        out(p.out, p.out_stride, unit, 0, 0),
        base(p.base, p.base_stride, sample, rows.first, columns.first),
        patch(p.patch, p.patch_stride, unit, -rows.shift, -columns.shift),
        width(p.out_width),
        depth(cell) {
    std::memcpy(&value, &p.fill, sizeof value);
    if (sample < 0) rows = {0, 0, 0, 0, 0, 0};
  }
  void move(int64_t planes) { out.move(planes), base.move(planes), patch.move(planes); }

  // body(rows of each map, number of rows, elements) over the cells of a rectangle
  template <class Body, class... Maps>
  CONELENS_INLINE void rectangle(Span y, Span x, const Body& body, const Maps&... maps) const {
    if (y.begin >= y.end || x.begin >= x.end) return;
    if (((maps.column == depth) && ...))
      body(Rows<std::remove_pointer_t<decltype(maps.at(0, 0))>>{maps.at(y.begin, x.begin), maps.row}...,
           y.end - y.begin, (x.end - x.begin) * depth);
    else
      for (int64_t row = y.begin; row < y.end; ++row)
        body(Rows<std::remove_pointer_t<decltype(maps.at(0, 0))>>{maps.at(row, x.begin), maps.column}...,
             x.end - x.begin, depth);
  }
  void fill(Span y, Span x) const {
    rectangle(y, x, [&](Rows<T> to, int64_t rows, int64_t n) { fill_block(to, rows, n, value); }, out);
  }
  void copy(Span y, Span x, const Map<const T>& from) const { rectangle(y, x, copy_block<T>, out, from); }
  void lay_over(Span y, Span x) const {
    if constexpr (add)
      rectangle(y, x, add_block<T>, out, base, patch);
    else
      copy(y, x, patch);
  }

  // rows `part` of the plane
  void make(Span part) const {
    const auto cut = [&](int64_t begin, int64_t end) {
      return Span{begin > part.begin ? begin : part.begin, end < part.end ? end : part.end};
    };
    const Span inside = cut(rows.begin, rows.end), x{columns.begin, columns.end};
    fill(cut(part.begin, rows.begin), {0, width});
    fill(inside, {0, columns.begin});
    fill(inside, {columns.end, width});
    fill(cut(rows.end, part.end), {0, width});
    if (columns.patch_begin == columns.patch_end) return copy(inside, x, base);
    copy(cut(rows.begin, rows.patch_begin), x, base);
    copy(cut(rows.patch_end, rows.end), x, base);
    // rims beside the patch are as wide as a vector at least; the patch comes over what is too much
    const Span y = cut(rows.patch_begin, rows.patch_end);
    const int64_t wide = (kFewestLanes + depth - 1) / depth;
    if (columns.patch_begin > columns.begin)
      copy(y, {columns.begin, gather::clamp(columns.begin + wide, columns.patch_begin, columns.end)}, base);
    if (columns.patch_end < columns.end)
      copy(y, {gather::clamp(columns.end - wide, columns.begin, columns.patch_end), columns.end}, base);
    lay_over(y, {columns.patch_begin, columns.patch_end});
  }
};

// Lines [begin, end) of units * planes * rows.
template <class T, bool add>
void make_lines(const Params& p, bool channels_last, int64_t begin, int64_t end) {
  const int64_t planes = channels_last ? 1 : p.channels, height = p.out_height;
  int64_t unit = begin / height / planes, plane = begin / height % planes, row = begin % height;
  while (begin < end) {
    Plane<T, add> window(p, unit, gather::sample(p, unit), channels_last ? p.channels : 1);
    window.move(plane);
    for (; plane < planes && begin < end; ++plane) {
      const int64_t stop = height - row < end - begin ? height : row + end - begin;
      window.make({row, stop});
      window.move(1);
      begin += stop - row;
      row = 0;
    }
    plane = 0;
    ++unit;
  }
}

template <class T, bool add>
int make_windows(const Params& p, int threads) {
  const auto along = [&](int axis) {
    return p.base_stride[axis] == 1 && p.out_stride[axis] == 1 && (!p.patch || p.patch_stride[axis] == 1);
  };
  const bool channels_last = !along(3);
  if (channels_last && !along(1)) return CONELENS_UNSUPPORTED_LAYOUT;
  const int64_t elements = p.out_width * (channels_last ? p.channels : 1);  // of a line
  parallel_for(p.units * p.out_height * (channels_last ? 1 : p.channels), 1 + kGrain / elements, threads,
               [&](int64_t begin, int64_t end) { make_lines<T, add>(p, channels_last, begin, end); });
  return CONELENS_OK;
}

}  // namespace

int gather_windows(const Params& p, int threads) {
  if (p.add && p.patch)
    return dispatch_dtype(
        p.dtype, [&](auto type) { return make_windows<typename decltype(type)::type, true>(p, threads); });
  switch (p.element_bytes) {
    case 1:
      return make_windows<uint8_t, false>(p, threads);
    case 2:
      return make_windows<uint16_t, false>(p, threads);
    case 4:
      return make_windows<uint32_t, false>(p, threads);
    case 8:
      return make_windows<uint64_t, false>(p, threads);
    default:
      return CONELENS_UNSUPPORTED_DTYPE;
  }
}

}  // namespace conelens::cpu::CONELENS_ISA
