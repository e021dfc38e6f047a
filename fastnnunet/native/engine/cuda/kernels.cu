// The kernels of kernels.hpp as functions of a GPU, fastnnunet_NAME. Compile with -fmad=false: the core's compilers
// contract nothing to fused multiply-adds either, so results are the core's.
#include "kernels.hpp"

// Two blocks of 256 threads fit the registers of a multiprocessor; told less, ptxas saves registers and spills some.
#define FNN_KERNEL(name, Params, shared)                                             \
    extern "C" __global__ void __launch_bounds__(fastnnunet::cuda::kBlockThreads, 2) \
        fastnnunet_##name(const __grid_constant__ fastnnunet::cuda::Params params) { \
        fastnnunet::cuda::name(fastnnunet::cuda::DeviceThread{}, params);            \
    }
FNN_KERNELS(FNN_KERNEL)
