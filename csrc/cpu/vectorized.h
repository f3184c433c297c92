// What makes loops over elements fast on the CPU.
#pragma once

#include <cstdint>
#include <cstdlib>  // defines __GLIBC__, whose loader the choice needs

#include "../arithmetic.h"

// One binary for every x86-64: the compiler makes a copy of the marked functions per instruction set, and the loader
// picks the widest that the processor has.

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define TORCHFLAT_VECTORIZED __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define TORCHFLAT_VECTORIZED
#endif

namespace torchflat {

constexpr int kLanes = 32;  // elements that a step of a loop takes, with a sum for each
constexpr int64_t kAhead = 16384;  // bytes: the processor's own prefetching ends at each page, of 4096

template <class T>
TORCHFLAT_INLINE bool is_long(int64_t count) {
  return count * static_cast<int64_t>(sizeof(T)) > kAhead;
}

// Ask for the `kLanes` elements that lie `kAhead` bytes further on; where nothing lies there, that does nothing. Of use
// in long runs only: what follows a short one is not what comes next.
template <class T>
TORCHFLAT_INLINE void fetch_ahead(const T* here) {
#if defined(__GNUC__)
  for (size_t byte = 0; byte < kLanes * sizeof(T); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(here) + kAhead + byte);
  }
#endif
}

}  // namespace torchflat
