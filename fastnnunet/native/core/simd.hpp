// One function compiled for several instruction sets, the best one chosen when the library is loaded.
#pragma once

#include <cstdint>  // brings __GLIBC__ where that is the C library: the choice when loading is its ifunc

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define FASTNNUNET_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTNNUNET_CLONES
#endif

// For helpers of such functions: they must become part of each clone.
#if defined(__GNUC__)
#define FASTNNUNET_INLINE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define FASTNNUNET_INLINE __forceinline
#else
#define FASTNNUNET_INLINE inline
#endif
