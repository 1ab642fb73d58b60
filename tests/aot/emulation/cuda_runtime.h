// Stands in for the CUDA headers, so that kernels/*/cuda*.cu compile as plain C++ and run on the host: one
// fiber per thread, blocks one after another. Checks what a GPU would trap on: every vector access must be
// aligned.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one after another
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaMallocAsync(void** to, std::size_t bytes, cudaStream_t) {
  *to = std::malloc(bytes);
  return *to ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
  std::free(memory);
  return cudaSuccess;
}

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

template <class T>
void expect_aligned(const T* address, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T) == 0) return;
  std::fprintf(stderr, "misaligned %zu-byte %s at %p\n", sizeof(T), what, static_cast<const void*>(address));
  std::abort();
}

// The threads of one block as fibers; a barrier yields until every living thread of the group has come as
// far.
class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  void run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    fibers_.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers_[i];
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      fiber.done = false, fiber.block_phase = fiber.warp_phase = 0;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    for (unsigned left = threads; left > 0;)
      for (unsigned i = 0; i < threads; ++i) {
        if (fibers_[i].done) continue;
        at_ = i;
        threadIdx.x = i;
        swapcontext(&scheduler_, &fibers_[i].context);
        left -= fibers_[i].done;
      }
  }

  void block_barrier() { barrier(&Fiber::block_phase, 0, static_cast<unsigned>(fibers_.size())); }
  void warp_barrier() {
    const unsigned first = at_ / 32 * 32, end = first + 32;
    barrier(&Fiber::warp_phase, first, end < fibers_.size() ? end : static_cast<unsigned>(fibers_.size()));
  }

  // what lane `lane` of this warp passes; slots alternate, so that a fast lane cannot overwrite what is still
  // read
  template <class T>
  T exchange(T value, unsigned lane) {
    const unsigned turn = fibers_[at_].warp_phase % 2;
    std::memcpy(fibers_[at_].slot[turn], &value, sizeof value);
    warp_barrier();
    T other;
    std::memcpy(&other, fibers_[at_ / 32 * 32 + lane].slot[turn], sizeof other);
    return other;
  }
  // what all lanes of this warp pass
  template <class T>
  void gather(const T& mine, T (&all)[32]) {
    const unsigned turn = fibers_[at_].warp_phase % 2, first = at_ / 32 * 32;
    std::memcpy(fibers_[at_].slot[turn], &mine, sizeof mine);
    warp_barrier();
    for (unsigned i = 0; i < 32; ++i) std::memcpy(&all[i], fibers_[first + i].slot[turn], sizeof mine);
  }
  unsigned lane() const { return at_ % 32; }

 private:
  static constexpr std::size_t kStack = 256 << 10;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
    unsigned block_phase, warp_phase;
    char slot[2][32];
  };

  static void enter() {
    Block& block = current();
    const unsigned me = block.at_;
    (*block.body_)();
    block.fibers_[me].done = true;
  }

  void barrier(unsigned Fiber::* phase, unsigned first, unsigned end) {
    const unsigned me = at_, target = ++(fibers_[me].*phase);
    for (;;) {
      bool all = true;
      for (unsigned i = first; i < end; ++i) all = all && (fibers_[i].done || fibers_[i].*phase >= target);
      if (all) return;
      swapcontext(&fibers_[me].context, &scheduler_);
    }
  }

  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
  unsigned at_ = 0;
};

// mma.sync.m16n8k16 as the PTX manual lays its fragments out: lane = 4 * group + t
template <class Widen>
void multiply_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                      const Widen& widen) {
  struct Fragments {
    std::uint32_t a[4], b[2];
  } mine, all[32];
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  Block::current().gather(mine, all);
  const auto half = [&](std::uint32_t word, unsigned k) {
    return widen(static_cast<std::uint16_t>(word >> (k % 2 * 16)));
  };
  const unsigned group = Block::current().lane() / 4, t = Block::current().lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = group + i / 2 * 8, column = 2 * t + i % 2;
    for (unsigned k = 0; k < 16; ++k)
      c[i] += half(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k) *
              half(all[column * 4 + k % 8 / 2].b[k / 8], k);
  }
}

}  // namespace emulation

template <class T>
T __ldg(const T* from) {
  emulation::expect_aligned(from, "load");
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return __ldg(from);
}
template <class T>
void __stwb(T* to, T value) {
  emulation::expect_aligned(to, "store");
  *to = value;
}
inline void __syncthreads() {
  emulation::Block::current().block_barrier();
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  emulation::Block& block = emulation::Block::current();
  return block.exchange(value, block.lane() ^ mask);
}

namespace conelens::cuda {

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), std::int64_t blocks, int threads, void*, Args&&... args) {
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  for (std::int64_t i = 0; i < blocks; ++i) {
    blockIdx = {static_cast<unsigned>(i), 0, 0};
    emulation::Block::current().run(static_cast<unsigned>(threads), [&] { kernel(args...); });
  }
  return 0;
}

}  // namespace conelens::cuda
