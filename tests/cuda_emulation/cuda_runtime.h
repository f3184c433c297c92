// CUDA's execution model on one CPU thread, enough of it to run csrc/cuda where there is no device: blocks run one after
// another, and a block is a set of fibers that take turns at every barrier and every shuffle. It finds wrong indices,
// sums and barriers; it does not find races between warps.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static

using cudaStream_t = void*;

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace emulation {

constexpr size_t kStackBytes = 65536;

struct Fiber {
  ucontext_t context;
  bool done;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<char> stacks;
inline std::function<void()> kernel;
inline unsigned alive, arrived, generation;
inline double exchanged[1024];

inline void run_fiber() {
  kernel();
  fibers[threadIdx.x].done = true;
  --alive;
}

inline void yield() {
  const unsigned thread = threadIdx.x;
  swapcontext(&fibers[thread].context, &scheduler);
  threadIdx.x = thread;
}

inline void launch(int64_t blocks, unsigned threads, std::function<void()> body) {
  kernel = std::move(body);
  fibers.resize(threads);
  stacks.resize(threads * kStackBytes);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    alive = threads;
    arrived = 0;
    for (unsigned thread = 0; thread < threads; ++thread) {
      Fiber& fiber = fibers[thread];
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks.data() + thread * kStackBytes;
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, run_fiber, 0);
    }
    while (alive > 0) {
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
        const unsigned thread = threadIdx.x;
        if (!fibers[thread].done) swapcontext(&scheduler, &fibers[thread].context);
        threadIdx.x = thread;
      }
    }
  }
}

}  // namespace emulation

inline void __syncthreads() {
  const unsigned mine = emulation::generation;
  if (++emulation::arrived == emulation::fibers.size()) {
    emulation::arrived = 0;
    ++emulation::generation;
  }
  while (emulation::generation == mine) emulation::yield();
}

// The fibers of a warp run in step between two yields, so that all have written before any reads.
inline double __shfl_down_sync(unsigned, double value, int offset) {
  emulation::exchanged[threadIdx.x] = value;
  emulation::yield();
  const bool inside = threadIdx.x % 32 + offset < 32;
  const double received = inside ? emulation::exchanged[threadIdx.x + offset] : value;
  emulation::yield();
  return received;
}
