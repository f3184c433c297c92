// One binary for every x86-64: the compiler makes a copy of the marked functions per instruction set, and the loader
// picks the widest that the processor has.
#pragma once

#include <cstdlib>  // defines __GLIBC__, whose loader the choice needs

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define TORCHFLAT_VECTORIZED __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define TORCHFLAT_VECTORIZED
#endif
