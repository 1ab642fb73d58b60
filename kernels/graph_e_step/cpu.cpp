// graph_e_step on the CPU, compiled once per instruction set: every channel of every image by itself, in
// separable form. Rules: README.md.
#include "graph_e_step.h"

#include <stdlib.h>

#include "dtype.h"
#include "moments.h"
#include "parallel.h"

namespace conelens::cpu::CONELENS_ISA {
namespace {

using Params = conelens_graph_e_step_params;

constexpr int64_t kThreadWork = 1 << 17;  // products worth a thread

inline int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// The channels of one thread, one after the other, in the same work area.
template <class E>
class Worker {
  using T = typename Element<E>::Compute;
  using I = IntLike<T>;
  static constexpr int lanes = kLanes<T>;
  using V = Vec<T, lanes>;
  using Quad = Vec<T, 4>;

 public:
  explicit Worker(const Params& p) : p_(p) {
    constexpr int unit = lanes < 4 ? 4 : lanes;
    const int64_t nodes = round_up(p.nodes, unit), width = round_up(p.width, unit);
    const int64_t room = nodes * (11 + 2 * p.height + 3 * width) + 2 * p.height * width;
    c_.nodes = p.nodes, c_.padded_nodes = nodes, c_.width = p.width, c_.padded_width = width;
    area_ = static_cast<char*>(calloc(1, room * sizeof(T) + p.height * c_.words() * sizeof(uint64_t) + 64));
    if (!area_) return;
    T* at = reinterpret_cast<T*>(area_ + (64 - reinterpret_cast<uintptr_t>(area_) % 64));
    const auto take = [&](int64_t n) { return at += n, at - n; };
    c_.columns = take(width * nodes), c_.across = take(nodes * width), c_.below = take(width * nodes);
    c_.rows = take(p.height * nodes), c_.weighted = take(p.height * nodes);
    c_.activity = take(p.height * width), c_.evidence = take(p.height * width);
    c_.narrow = take(nodes), c_.weight = take(nodes), c_.mass = take(nodes), c_.second = take(nodes);
    c_.score = take(nodes),
    c_.position = reinterpret_cast<int64_t*>(take(nodes * (sizeof(int64_t) / sizeof(T))));
    for (int axis = 0; axis < 2; ++axis) {
      c_.mean[axis] = take(nodes), c_.first[axis] = take(nodes);
      c_.start[axis] = static_cast<T>(p.start[axis]), c_.step[axis] = static_cast<T>(p.step[axis]);
    }
    c_.lit = reinterpret_cast<uint64_t*>(at);
  }
  ~Worker() { free(area_); }
  Worker(const Worker&) = delete;
  bool has_memory() const { return area_; }

  void run(int64_t image, int64_t channel) {
    const int64_t index = image * p_.channels + channel, k = index * p_.nodes;
    const T* weight =
        static_cast<const T*>(p_.weight) + image * p_.weight_stride[0] + channel * p_.weight_stride[1];
    for (int64_t i = 0; i < p_.nodes; ++i) c_.weight[i] = weight[i * p_.weight_stride[2]];
    T* likelihood = static_cast<T*>(p_.log_likelihood) + index;
    if (!load_features(image, channel)) {
      *likelihood = 0;
      return store_dark(k);
    }
    if (p_.shift || channel != channel_) make_tables(image, channel);
    weigh_rows();
    c_.tau = static_cast<const T*>(p_.tau)[image];
    *likelihood = find_evidence(c_);
    over_nodes([&](auto n, int64_t i) {
      using N = Vec<T, decltype(n)::value>;
      find_moments<N>(c_, i);
      if (p_.position) find_peaks<N>(c_, i);
    });
    store(k);
  }

 private:
  // body(Lanes<n>{}, first) over the nodes, the last ones in half a vector where that is enough
  template <class Body>
  CONELENS_INLINE void over_nodes(const Body& body) const {
    int64_t i = 0;
    for (; c_.nodes - i > kHalfLanes<T>; i += lanes) body(Lanes<lanes>{}, i);
    if (i < c_.nodes) body(Lanes<kHalfLanes<T>>{}, i);
  }

  // `cells` <= lanes cells, zeros behind them; `readable`: a whole vector may be read
  static V load_cells(const E* from, int64_t cells, bool readable) {
    E copy[lanes];
    if (!readable) {
      for (int64_t i = 0; i < lanes; ++i) copy[i] = i < cells ? from[i] : E{};
      from = copy;
    }
    V v;
    if constexpr (sizeof(E) == sizeof(T))
      v = load_vec<V>(from);
    else
      v = widen<E, lanes>(reinterpret_cast<const int16_t*>(from));
    if (cells < lanes) {
      Vec<I, lanes> number;
      for (int i = 0; i < lanes; ++i) number[i] = i;
      v = number < static_cast<I>(cells) ? v : V{};
    }
    return v;
  }

  // Activity, where it is not zero, and the box around that; false where it is zero everywhere. NaN counts as
  // lit.
  bool load_features(int64_t image, int64_t channel) {
    const E* plane =
        static_cast<const E*>(p_.features) + image * p_.features_stride[0] + channel * p_.features_stride[1];
    const int64_t end = (p_.height - 1) * p_.features_stride[2] + p_.width;  // of what may be read
    c_.top = p_.height, c_.bottom = 0, c_.left = p_.width, c_.right = 0;
    Vec<I, lanes> nan = {};
    for (int64_t x = 0; x < p_.width; x += lanes) {
      const int64_t cells = p_.width - x < lanes ? p_.width - x : lanes;
      uint32_t any = 0;
      for (int64_t y = 0; y < p_.height; ++y) {
        const int64_t at = y * p_.features_stride[2] + x;
        const V value = load_cells(plane + at, cells, at + lanes <= end);
        const V activity = value < T{0} ? V{} : value;
        const uint32_t bits = lane_bits(activity != T{0});
        nan |= activity != activity;
        store_vec(c_.activity + y * c_.padded_width + x, activity);
        uint64_t& lit = c_.lit[y * c_.words() + x / 64];
        lit = (x % 64 ? lit : 0) | uint64_t{bits} << x % 64;
        any |= bits;
        if (bits) c_.top = y < c_.top ? y : c_.top, c_.bottom = y >= c_.bottom ? y + 1 : c_.bottom;
      }
      if (!any) continue;
      if (c_.right == 0) c_.left = x + __builtin_ctz(any);
      c_.right = x + 32 - __builtin_clz(any);
    }
    has_nan_ = lane_bits(nan) != 0;
    return c_.right > 0;
  }

  // Gaussians of the channel's nodes over the rows and columns of the box; over all of them where other
  // images will use them too.
  void make_tables(int64_t image, int64_t channel) {
    channel_ = channel;
    const T* mean = static_cast<const T*>(p_.mean) + channel * p_.nodes * 2;
    const T* sigma = static_cast<const T*>(p_.sigma) + channel * p_.nodes;
    const T* shift = static_cast<const T*>(p_.shift);
    if (shift) shift += (image * p_.channels + channel) * p_.nodes * 2;
    for (int64_t i = 0; i < p_.nodes; ++i) c_.mean[0][i] = mean[2 * i], c_.mean[1][i] = mean[2 * i + 1];
    if (shift)
      for (int64_t i = 0; i < p_.nodes; ++i) c_.mean[0][i] += shift[2 * i], c_.mean[1][i] += shift[2 * i + 1];
    constexpr T root_of_half_log2_e = static_cast<T>(0.84932180028801904);
    for (int64_t i = 0; i < p_.nodes; ++i) c_.narrow[i] = root_of_half_log2_e / sigma[i];
    make_axis(0, c_.rows, shift ? c_.top : 0, shift ? c_.bottom : p_.height);
    const int64_t left = shift ? c_.left / lanes * lanes : 0, right = shift ? c_.right : p_.width;
    make_axis(1, c_.columns, left, right);
    for (int64_t x = left / 4 * 4; x < right; x += 4)
      for (int64_t i = 0; i < c_.nodes; i += 4) transpose(x, i);
  }

  void make_axis(int axis, T* table, int64_t begin, int64_t end) {
    over_nodes([&](auto n, int64_t i) {
      using N = Vec<T, decltype(n)::value>;
      const N mean = load_vec<N>(c_.mean[axis] + i), narrow = load_vec<N>(c_.narrow + i);
      for (int64_t cell = begin; cell < end; ++cell) {
        const N root = (c_.coordinate(axis, cell) - mean) * narrow;
        store_vec(table + cell * c_.padded_nodes + i, exp2_vec<T, kLanesOf<N>>(-root * root));
      }
    });
  }

  void weigh_rows() {
    over_nodes([&](auto n, int64_t i) {
      using N = Vec<T, decltype(n)::value>;
      const N weight = load_vec<N>(c_.weight + i);
      for (int64_t at = c_.top * c_.padded_nodes + i; at < c_.bottom * c_.padded_nodes; at += c_.padded_nodes)
        store_vec(c_.weighted + at, weight * load_vec<N>(c_.rows + at));
    });
  }

  // four nodes of four columns
  void transpose(int64_t x, int64_t i) {
    const T* from = c_.columns + x * c_.padded_nodes + i;
    Quad a[4], b[4];
    for (int row = 0; row < 4; ++row) a[row] = load_vec<Quad>(from + row * c_.padded_nodes);
    for (int pair = 0; pair < 2; ++pair) {
      b[pair] = __builtin_shufflevector(a[pair], a[pair + 2], 0, 4, 1, 5);
      b[pair + 2] = __builtin_shufflevector(a[pair], a[pair + 2], 2, 6, 3, 7);
    }
    T* to = c_.across + i * c_.padded_width + x;
    for (int pair = 0; pair < 2; ++pair) {
      store_vec(to + (2 * pair) * c_.padded_width,
                __builtin_shufflevector(b[2 * pair], b[2 * pair + 1], 0, 4, 1, 5));
      store_vec(to + (2 * pair + 1) * c_.padded_width,
                __builtin_shufflevector(b[2 * pair], b[2 * pair + 1], 2, 6, 3, 7));
    }
  }

  void store(int64_t k) {
    T *mass = static_cast<T*>(p_.mass) + k, *first = static_cast<T*>(p_.first) + 2 * k;
    T* second = static_cast<T*>(p_.second) + k;
    for (int64_t i = 0; i < p_.nodes; ++i) {
      mass[i] = c_.mass[i], second[i] = c_.second[i];
      first[2 * i] = c_.first[0][i], first[2 * i + 1] = c_.first[1][i];
    }
    if (!p_.position) return;
    const int64_t nan = has_nan_ ? first_nan() : 0;
    T* score = static_cast<T*>(p_.score) + k;
    for (int64_t i = 0; i < p_.nodes; ++i) {
      const bool known = mass[i] == mass[i];  // a NaN counts as the largest
      score[i] = known ? c_.score[i] : mass[i];
      p_.position[k + i] = static_cast<int32_t>(known ? c_.position[i] : nan);
    }
  }

  // of a channel without activity
  void store_dark(int64_t k) {
    for (int64_t i = 0; i < p_.nodes; ++i) {
      c_.mass[i] = c_.weight[i] * 0;  // NaN stays
      c_.first[0][i] = c_.first[1][i] = c_.second[i] = c_.score[i] = 0;
      c_.position[i] = -1;
    }
    store(k);
  }

  int64_t first_nan() const {
    for (int64_t y = 0;; ++y)
      for (int64_t x = 0; x < p_.width; ++x) {
        const T value = c_.activity[y * c_.padded_width + x];
        if (value != value) return y * p_.width + x;
      }
  }

  const Params& p_;
  Channel<T> c_;
  char* area_;
  int64_t channel_ = -1;  // whose tables are made
  bool has_nan_ = false;
};

template <class E>
int run(const Params& p, int threads) {
  const int64_t work = 3 * p.height * p.width * p.nodes;
  int code = CONELENS_OK;
  parallel_for(p.images * p.channels, kThreadWork / (work + 1), threads, [&](int64_t begin, int64_t end) {
    const WithoutDenormals guard;
    Worker<E> worker(p);
    if (!worker.has_memory()) {
      __atomic_store_n(&code, static_cast<int>(CONELENS_OUT_OF_MEMORY), __ATOMIC_RELAXED);
      return;
    }
    for (int64_t i = begin; i < end; ++i)  // images that share a channel's tables one after the other
      if (p.shift)
        worker.run(i / p.channels, i % p.channels);
      else
        worker.run(i % p.images, i / p.images);
  });
  return code;
}

}  // namespace

int graph_e_step(const Params& p, int threads) {
  return dispatch_dtype(p.dtype, [&](auto type) { return run<typename decltype(type)::type>(p, threads); });
}

}  // namespace conelens::cpu::CONELENS_ISA
