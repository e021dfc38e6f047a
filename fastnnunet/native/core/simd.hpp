// One function compiled for several instruction sets, the best one chosen when the library is loaded.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FASTNNUNET_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTNNUNET_CLONES
#endif

// For helpers of such functions: they must become part of each clone.
#if defined(__GNUC__)
#define FASTNNUNET_INLINE inline __attribute__((always_inline))
#else
#define FASTNNUNET_INLINE inline
#endif
