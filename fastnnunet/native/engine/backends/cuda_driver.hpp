// What is used of the CUDA driver, which is opened at run time: its functions and numbers, as cuda.h declares them.
//
// Names that end in _v2 are those that cuda.h gives every program from CUDA 4.0 on; tests/test_engine_device.py compares
// with the cuda.h of this machine. Memory in the order of a stream needs a driver of CUDA 11.4 or newer.
#pragma once

#include "backends/library.hpp"

namespace fastnnunet::engine {

using DeviceAddress = unsigned long long;  // CUdeviceptr
using StreamNumber = void*;                // CUstream; as all handles, a pointer to what only the driver knows

// name, symbol, arguments
#define FNN_DRIVER_FUNCTIONS(FUNCTION)                                                                              \
    FUNCTION(cuInit, cuInit, (unsigned))                                                                            \
    FUNCTION(cuDeviceGetCount, cuDeviceGetCount, (int*))                                                            \
    FUNCTION(cuDeviceGet, cuDeviceGet, (int*, int))                                                                 \
    FUNCTION(cuDeviceGetAttribute, cuDeviceGetAttribute, (int*, int, int))                                          \
    FUNCTION(cuDeviceGetName, cuDeviceGetName, (char*, int, int))                                                   \
    FUNCTION(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, (void**, int))                                     \
    FUNCTION(cuCtxSetCurrent, cuCtxSetCurrent, (void*))                                                             \
    FUNCTION(cuCtxSynchronize, cuCtxSynchronize, ())                                                                \
    FUNCTION(cuModuleLoadData, cuModuleLoadData, (void**, const void*))                                             \
    FUNCTION(cuModuleGetFunction, cuModuleGetFunction, (void**, void*, const char*))                                \
    FUNCTION(cuStreamCreate, cuStreamCreate, (void**, unsigned))                                                    \
    FUNCTION(cuStreamDestroy, cuStreamDestroy_v2, (void*))                                                          \
    FUNCTION(cuStreamSynchronize, cuStreamSynchronize, (void*))                                                     \
    FUNCTION(cuStreamWaitEvent, cuStreamWaitEvent, (void*, void*, unsigned))                                        \
    FUNCTION(cuEventCreate, cuEventCreate, (void**, unsigned))                                                      \
    FUNCTION(cuEventRecord, cuEventRecord, (void*, void*))                                                          \
    FUNCTION(cuEventSynchronize, cuEventSynchronize, (void*))                                                       \
    FUNCTION(cuEventDestroy, cuEventDestroy_v2, (void*))                                                            \
    FUNCTION(cuMemGetInfo, cuMemGetInfo_v2, (std::size_t*, std::size_t*))                                           \
    FUNCTION(cuMemAlloc, cuMemAlloc_v2, (DeviceAddress*, std::size_t))                                              \
    FUNCTION(cuMemFree, cuMemFree_v2, (DeviceAddress))                                                              \
    FUNCTION(cuMemAllocAsync, cuMemAllocAsync, (DeviceAddress*, std::size_t, void*))                                \
    FUNCTION(cuMemFreeAsync, cuMemFreeAsync, (DeviceAddress, void*))                                                \
    FUNCTION(cuMemsetD8Async, cuMemsetD8Async, (DeviceAddress, unsigned char, std::size_t, void*))                  \
    FUNCTION(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, (DeviceAddress, const void*, std::size_t, void*))             \
    FUNCTION(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, (void*, DeviceAddress, std::size_t, void*))                   \
    FUNCTION(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2, (DeviceAddress, DeviceAddress, std::size_t, void*))           \
    FUNCTION(cuLaunchKernel, cuLaunchKernel,                                                                        \
             (void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**))  \
    FUNCTION(cuStreamBeginCapture, cuStreamBeginCapture_v2, (void*, int))                                           \
    FUNCTION(cuStreamEndCapture, cuStreamEndCapture, (void*, void**))                                               \
    FUNCTION(cuGraphInstantiate, cuGraphInstantiateWithFlags, (void**, void*, unsigned long long))                  \
    FUNCTION(cuGraphLaunch, cuGraphLaunch, (void*, void*))                                                          \
    FUNCTION(cuGraphDestroy, cuGraphDestroy, (void*))                                                               \
    FUNCTION(cuGraphExecDestroy, cuGraphExecDestroy, (void*))                                                       \
    FUNCTION(cuGetErrorName, cuGetErrorName, (int, const char**))                                                   \
    FUNCTION(cuGetErrorString, cuGetErrorString, (int, const char**))

struct CudaDriver {
    static constexpr int kOutOfMemory = 2;                        // CUDA_ERROR_OUT_OF_MEMORY
    static constexpr int kMajor = 75, kMinor = 76;                // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...
    static constexpr unsigned kNonBlocking = 1;                   // CU_STREAM_NON_BLOCKING
    static constexpr unsigned kNoTiming = 2;                      // CU_EVENT_DISABLE_TIMING
    static constexpr int kCaptureInThread = 1;                    // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

#define FNN_DRIVER_FUNCTION(name, symbol, arguments) int(*name) arguments;
    FNN_DRIVER_FUNCTIONS(FNN_DRIVER_FUNCTION)
#undef FNN_DRIVER_FUNCTION

    // Throws Missing where there is no driver, or an old one.
    CudaDriver() {
        void* open = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (open == nullptr) throw Missing("there is no libcuda.so.1");
#define FNN_DRIVER_FUNCTION(name, symbol, arguments) look_up(open, #symbol, name);
        FNN_DRIVER_FUNCTIONS(FNN_DRIVER_FUNCTION)
#undef FNN_DRIVER_FUNCTION
    }

    // E.g. CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)
    std::string describe(int status) const {
        const char *name = nullptr, *text = nullptr;
        cuGetErrorName(status, &name);
        cuGetErrorString(status, &text);
        return name == nullptr ? "error " + std::to_string(status)
                               : std::string(name) + " (" + (text == nullptr ? "" : text) + ")";
    }

    // Throws std::runtime_error with CUDA's words.
    void check(int status, const char* what) const {
        if (status != 0) throw std::runtime_error(std::string(what) + " failed: " + describe(status));
    }
};

// Of this library, opened and begun once. Throws Missing, or std::runtime_error where there is no GPU.
inline const CudaDriver& cuda_driver() {
    static const CudaDriver* one = [] {
        const auto* made = new CudaDriver;  // never torn down
        made->check(made->cuInit(0), "cuInit");
        return made;
    }();
    return *one;
}

// The number in `cuda` or `cuda:N`
inline int gpu_index(const std::string& device) {
    const std::size_t colon = device.find(':');
    return colon == std::string::npos ? 0 : std::atoi(device.c_str() + colon + 1);
}

}  // namespace fastnnunet::engine
