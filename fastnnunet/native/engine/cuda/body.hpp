// What kernel bodies need on both sides: the macro of shared functions, threads, and numbers.
//
// A body is a template over `At`, which says where in the grid it runs: `DeviceThread` on a GPU, the thread of
// `emulation/` on a CPU. Blocks are kBlockX x kBlockY threads. No standard header on the device: NVRTC has none.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <cmath>
#include <cstring>
#endif

#if defined(__CUDACC__)
#define FNN_HD __host__ __device__ __forceinline__
#else
#define FNN_HD inline
#endif

namespace fastnnunet::cuda {

using i64 = long long;
using i32 = int;
using u32 = unsigned int;
using u16 = unsigned short;
using u8 = unsigned char;

constexpr int kBlockX = 32, kBlockY = 8, kBlockThreads = kBlockX * kBlockY;
constexpr int kMostFlips = 8;  // mirrored copies of a tile: every subset of three axes
constexpr int kMostTiles = 16;

struct Half {
    u16 bits;
};

FNN_HD u32 bits_of(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    u32 bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

FNN_HD float float_of(u32 bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

FNN_HD float infinity() { return float_of(0x7F800000u); }
FNN_HD i64 least(i64 a, i64 b) { return a < b ? a : b; }

// Of numbers below 2^32: GPUs divide those of 64 bits by a subroutine. Whoever launches keeps volumes below that.
FNN_HD i64 quotient(i64 a, i64 b) { return static_cast<u32>(a) / static_cast<u32>(b); }

// Which row of volumes the number of a row is: row = (head * depth + z) * height + y
struct RowOf {
    i64 head, z, y;
};
FNN_HD RowOf row_of(i64 row, i64 depth, i64 height) {
    const i64 plane = quotient(row, height), head = quotient(plane, depth);
    return {head, plane - head * depth, row - plane * height};
}

// float16 as in core/half.hpp, by the same operations

FNN_HD float round_to_half(float value) {
    u32 magic = (bits_of(value) & 0x7F800000u) + ((13u << 23) | 0x00400000u);
    magic = magic < 0x3F400000u ? 0x3F400000u : magic;
    const float shift = float_of(magic);
    return (value + shift) - shift;
}

FNN_HD float to_float(float value) { return value; }
FNN_HD float to_float(Half half) {
    const u32 magnitude = (half.bits & 0x7FFFu) << 13;
    const u32 sign = static_cast<u32>(half.bits & 0x8000u) << 16;
    const u32 subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
    u32 bits = magnitude < (1u << 23) ? subnormal : magnitude + (112u << 23);
    bits = magnitude >= (31u << 23) ? magnitude | 0x7F800000u : bits;
    return float_of(bits | sign);
}

FNN_HD Half to_half(float value) {
    const u32 sign = (bits_of(value) >> 16) & 0x8000u;
    const u32 magnitude = bits_of(value) & 0x7FFFFFFFu;
    const u32 rounded = bits_of(round_to_half(float_of(magnitude)));
    const u32 subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    u32 bits = (rounded - (112u << 23)) >> 13;
    bits = magnitude < (113u << 23) ? subnormal : bits;
    bits = magnitude >= 0x477FF000u ? 0x7C00u : bits;
    bits = magnitude > 0x7F800000u ? 0x7E00u : bits;
    return Half{static_cast<u16>(bits | sign)};
}

// Keys in the order of the floats they stand for, so that limits are integer atomics. NaN is counted apart.
FNN_HD u32 key_of(float value) {
    const u32 bits = bits_of(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
FNN_HD float value_of_key(u32 key) { return float_of(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

// Lowest and highest of values. Starts as {key of infinity, key of -infinity, 0}; see `fill_limits`.
struct Limits {
    u32 low, high;
    u32 has_nan;
    u32 unused;
};
FNN_HD Limits no_limits() { return {key_of(infinity()), key_of(-infinity()), 0, 0}; }
FNN_HD void extend(Limits& limits, float value) {
    if (value != value) {
        limits.has_nan = 1;
        return;
    }
    const u32 key = key_of(value);
    limits.low = key < limits.low ? key : limits.low;
    limits.high = key > limits.high ? key : limits.high;
}

enum Type : i64 { kFloat = 0, kHalf = 1, kDouble = 2 };

FNN_HD double load(const void* from, i64 type, i64 at) {
    if (type == kHalf) return to_float(static_cast<const Half*>(from)[at]);
    if (type == kDouble) return static_cast<const double*>(from)[at];
    return static_cast<const float*>(from)[at];
}
FNN_HD float load_float(const void* from, i64 type, i64 at) {
    return type == kHalf ? to_float(static_cast<const Half*>(from)[at]) : static_cast<const float*>(from)[at];
}

#if defined(__CUDACC__)
struct DeviceThread {
#if defined(__CUDA_ARCH__)
    __device__ i64 x() const { return static_cast<i64>(blockIdx.x) * kBlockX + threadIdx.x; }
    __device__ i64 row() const { return static_cast<i64>(blockIdx.y) * kBlockY + threadIdx.y; }
    __device__ i64 x_step() const { return static_cast<i64>(gridDim.x) * kBlockX; }
    __device__ i64 row_step() const { return static_cast<i64>(gridDim.y) * kBlockY; }
    __device__ i64 group() const { return blockIdx.z; }
    __device__ i64 groups() const { return gridDim.z; }
    __device__ i64 block() const { return blockIdx.x; }
    __device__ i64 blocks() const { return gridDim.x; }
    __device__ int in_block() const { return threadIdx.y * kBlockX + threadIdx.x; }
    __device__ void sync() const { __syncthreads(); }
    __device__ void lower(u32* to, u32 value) const { atomicMin(to, value); }
    __device__ void raise(u32* to, u32 value) const { atomicMax(to, value); }
    template <class T>
    __device__ T* shared() const {
        extern __shared__ double memory[];
        return reinterpret_cast<T*>(memory);
    }
#else  // nvcc's pass for the host, which compiles no body
    i64 x() const, row() const, x_step() const, row_step() const, group() const, groups() const, block() const;
    i64 blocks() const;
    int in_block() const;
    void sync() const;
    void lower(u32*, u32) const;
    void raise(u32*, u32) const;
    template <class T>
    T* shared() const;
#endif
};
#endif

// The values of a block's threads in shared memory, halved until the first holds what `merge(into, other)` makes of all.
template <class T, class At, class Merge>
FNN_HD T* over_block(const At& at, const T& value, const Merge& merge) {
    T* all = at.template shared<T>();
    const int me = at.in_block();
    all[me] = value;
    at.sync();
    for (int half = kBlockThreads / 2; half > 0; half /= 2) {
        if (me < half) merge(all[me], all[me + half]);
        at.sync();
    }
    return all;
}

}  // namespace fastnnunet::cuda
