// One GPU: its kernels, memory in the order of streams, and work on streams.
//
// A Stream puts work on the GPU and returns; only `download` and `synchronize` wait. What other streams made may be used
// after `follow`. As fastnnunet/engines/cuda/gpu.py and stream.py.
#pragma once

#include <map>
#include <memory>
#include <tuple>

#include "backends/cuda_driver.hpp"
#include "core/axis_operator.hpp"
#include "cuda/kernels.hpp"
#include "error.hpp"
#include "predict/arrays.hpp"

namespace fastnnunet::engine {

class Gpu {
public:
    // Throws BackendError with CUDA's words where there is no such GPU, and no code of the kernels for it.
    Gpu(int index, const std::string& plugins);

    const CudaDriver& driver() const { return driver_; }
    // Makes the GPU current in this thread.
    int try_to_use() const noexcept { return driver_.cuCtxSetCurrent(context_); }
    void use() const { check(try_to_use(), "cuCtxSetCurrent"); }
    // Throws BackendError, NoMemoryError for too little memory.
    void check(int status, const char* what) const;
    // Throws NoMemoryError that says how much there is.
    [[noreturn]] void no_memory(std::size_t bytes) const;

    enum Kernel {
#define FNN_KERNEL(name, Params, shared) k_##name,
        FNN_KERNELS(FNN_KERNEL)
#undef FNN_KERNEL
            kKernels
    };
    void* function(Kernel kernel) const { return functions_[kernel]; }

private:
    const CudaDriver& driver_;
    void* context_ = nullptr;
    void* functions_[kKernels] = {};
};

// Loaded once for the process, and never taken down. Throws as Gpu.
const Gpu& gpu_with_kernels(int index, const std::string& plugins);

// CUDA's stream, which lives as long as memory that is to be freed in its order.
struct StreamHandle {
    explicit StreamHandle(const Gpu& gpu);
    ~StreamHandle();
    StreamHandle(const StreamHandle&) = delete;
    StreamHandle& operator=(const StreamHandle&) = delete;

    const Gpu& gpu;
    StreamNumber number = nullptr;
};

// Gives memory back once the work on a stream so far is done.
struct FreeInOrder {
    std::shared_ptr<const StreamHandle> stream;
    void operator()(const void* memory) const noexcept;
};

// Memory of a GPU: the address is never looked at on the CPU.
template <class T>
using DeviceMemory = std::shared_ptr<T[]>;

struct Grid {  // of blocks of 32 x 8 threads
    std::int64_t x, y, z;
};
// For `rows` of `width` values, which threads walk over in strides where there are more; `reduces`: each block ends in
// atomic operations
Grid grid_of(std::int64_t width, std::int64_t rows, std::int64_t groups = 1, bool reduces = false);
Grid grid_of_blocks(std::int64_t blocks);  // for kernels that count blocks

class Stream {
public:
    explicit Stream(const Gpu& gpu) : handle_(std::make_shared<StreamHandle>(gpu)) {}

    const Gpu& gpu() const { return handle_->gpu; }
    StreamNumber number() const { return handle_->number; }

    // What is put here from now on waits for what is there now.
    void follow(const Stream& other) const;
    void synchronize() const;

    template <class T>
    DeviceMemory<T> memory(std::int64_t count) const {
        const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(std::max<std::int64_t>(1, count));
        return DeviceMemory<T>(static_cast<T*>(allocate(bytes)), FreeInOrder{handle_});
    }
    template <class T>
    DeviceMemory<T> upload(const T* values, std::int64_t count) const {
        DeviceMemory<T> made = memory<T>(count);
        copy_in(made.get(), values, sizeof(T) * static_cast<std::size_t>(count));
        return made;
    }
    template <class T>
    Array4<T> array(std::int64_t count, const Index& shape) const {
        Array4<T> made;
        made.values = memory<T>(count * voxels_of(shape));
        made.count = count;
        made.shape = shape;
        return made;
    }
    template <class T>
    Array4<T> upload(const Volumes<const T>& contiguous) const {
        Array4<T> made = array<T>(contiguous.count, contiguous.shape);
        copy_in(made.values.get(), contiguous.data, sizeof(T) * static_cast<std::size_t>(made.size()));
        return made;
    }
    void clear(void* to, std::size_t bytes) const;  // zeros
    void copy(void* to, const void* from, std::size_t bytes) const;
    void download(void* to, const void* from, std::size_t bytes) const;  // waits
    // Memory of another stream, which this one follows, is freed in the order of this one.
    template <class T>
    void take(const DeviceMemory<T>& memory) const {
        if (FreeInOrder* end = std::get_deleter<FreeInOrder>(memory)) end->stream = handle_;
    }

    // start_NAME: a kernel, by a copy of its parameters
#define FNN_KERNEL(name, Params, shared)                                    \
    void start_##name(const Grid& grid, const cuda::Params& params) const { \
        using namespace cuda;                                               \
        start(Gpu::k_##name, shared, grid, &params);                        \
    }
    FNN_KERNELS(FNN_KERNEL)
#undef FNN_KERNEL

    // The tables of an operator, brought over once for the stream.
    struct Tables {
        DeviceMemory<std::int32_t> first, sample;
        DeviceMemory<double> weights;
        DeviceMemory<float> low, high;  // of an operator that is local
    };
    const Tables& tables(const AxisOperator& op, int order, Convention convention) const;

    // Lowest and highest of no values yet
    DeviceMemory<cuda::Limits> new_limits(std::int64_t count) const;

private:
    void* allocate(std::size_t bytes) const;
    void copy_in(void* to, const void* from, std::size_t bytes) const;  // `from` may change as soon as this returns
    void start(Gpu::Kernel kernel, int shared, const Grid& grid, const void* params) const;

    std::shared_ptr<StreamHandle> handle_;
    mutable std::map<std::tuple<std::int64_t, std::int64_t, int, Convention>, Tables> tables_;
};

}  // namespace fastnnunet::engine
