#include "device/gpu.hpp"

#include <mutex>

#include "device/code.hpp"

namespace fastnnunet::engine {
namespace {

constexpr std::int64_t kMostRows = 65535;  // blocks along y and z
constexpr std::int64_t kReducingX = 16, kReducingY = 64;

std::string mebibytes(std::size_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20); }

}  // namespace

Gpu::Gpu(int index, const std::string& plugins) : driver_(cuda_driver()) {
    int device = 0, major = 0, minor = 0;
    check(driver_.cuDeviceGet(&device, index), "cuDeviceGet");
    check(driver_.cuDeviceGetAttribute(&major, CudaDriver::kMajor, device), "cuDeviceGetAttribute");
    check(driver_.cuDeviceGetAttribute(&minor, CudaDriver::kMinor, device), "cuDeviceGetAttribute");
    check(driver_.cuDevicePrimaryCtxRetain(&context_, device), "cuDevicePrimaryCtxRetain");
    use();
    const std::string code = kernel_code(10 * major + minor, plugins);
    void* module = nullptr;
    check(driver_.cuModuleLoadData(&module, code.data()), "cuModuleLoadData");
#define FNN_KERNEL(name, Params, shared)                                                               \
    check(driver_.cuModuleGetFunction(&functions_[k_##name], module, "fastnnunet_" #name), "the kernel " #name);
    FNN_KERNELS(FNN_KERNEL)
#undef FNN_KERNEL
}

void Gpu::check(int status, const char* what) const {
    if (status == 0) return;
    const std::string text = std::string(what) + " failed: " + driver_.describe(status);
    if (status == CudaDriver::kOutOfMemory) throw NoMemoryError("the GPU has not enough memory: " + text);
    throw BackendError("the GPU failed: " + text);
}

void Gpu::no_memory(std::size_t bytes) const {
    std::size_t free = 0, total = 0;
    check(driver_.cuMemGetInfo(&free, &total), "cuMemGetInfo");
    throw NoMemoryError("the GPU has not enough memory: " + mebibytes(bytes) + " MiB are needed at once, " +
                        mebibytes(free) + " of " + mebibytes(total) +
                        " MiB are free\nclose other programs that use it, or predict with -device cpu");
}

const Gpu& gpu_with_kernels(int index, const std::string& plugins) {
    static std::mutex turn;
    static std::map<int, const Gpu*> gpus;
    const std::lock_guard lock(turn);
    const Gpu*& one = gpus[index];
    if (one == nullptr) one = new Gpu(index, plugins);
    return *one;
}

StreamHandle::StreamHandle(const Gpu& on) : gpu(on) {
    gpu.use();
    gpu.check(gpu.driver().cuStreamCreate(&number, CudaDriver::kNonBlocking), "cuStreamCreate");
}

// Whoever waits for a stream is told what failed on it; nothing is left to be done about it here.
StreamHandle::~StreamHandle() {
    gpu.try_to_use();
    gpu.driver().cuStreamDestroy(number);
}

void FreeInOrder::operator()(const void* memory) const noexcept {
    stream->gpu.try_to_use();  // any thread may be the one that drops the last view
    stream->gpu.driver().cuMemFreeAsync(reinterpret_cast<DeviceAddress>(memory), stream->number);
}

Grid grid_of(std::int64_t width, std::int64_t rows, std::int64_t groups, bool reduces) {
    const auto blocks = [](std::int64_t count, std::int64_t size, std::int64_t most) {
        return std::clamp<std::int64_t>((count + size - 1) / size, 1, most);
    };
    return {blocks(width, cuda::kBlockX, reduces ? kReducingX : std::int64_t{1} << 20),
            blocks(rows, cuda::kBlockY, reduces ? kReducingY : kMostRows), blocks(groups, 1, kMostRows)};
}

Grid grid_of_blocks(std::int64_t blocks) { return {std::clamp<std::int64_t>(blocks, 1, 1 << 16), 1, 1}; }

void Stream::follow(const Stream& other) const {
    const Gpu& on = gpu();
    const CudaDriver& driver = on.driver();
    on.use();
    void* event = nullptr;
    on.check(driver.cuEventCreate(&event, CudaDriver::kNoTiming), "cuEventCreate");
    int status = driver.cuEventRecord(event, other.number());
    if (status == 0) status = driver.cuStreamWaitEvent(number(), event, 0);
    driver.cuEventDestroy(event);  // its memory goes when it has come to pass
    on.check(status, "cuStreamWaitEvent");
}

void Stream::synchronize() const {
    gpu().use();
    gpu().check(gpu().driver().cuStreamSynchronize(number()), "cuStreamSynchronize");
}

void* Stream::allocate(std::size_t bytes) const {
    const CudaDriver& driver = gpu().driver();
    gpu().use();
    DeviceAddress address = 0;
    int status = driver.cuMemAllocAsync(&address, bytes, number());
    if (status == CudaDriver::kOutOfMemory) {  // what is to be freed may wait for its stream
        gpu().check(driver.cuCtxSynchronize(), "cuCtxSynchronize");
        status = driver.cuMemAllocAsync(&address, bytes, number());
        if (status == CudaDriver::kOutOfMemory) gpu().no_memory(bytes);
    }
    gpu().check(status, "cuMemAllocAsync");
    return reinterpret_cast<void*>(address);
}

void Stream::clear(void* to, std::size_t bytes) const {
    gpu().use();
    gpu().check(gpu().driver().cuMemsetD8Async(reinterpret_cast<DeviceAddress>(to), 0, bytes, number()),
                "cuMemsetD8Async");
}

void Stream::copy(void* to, const void* from, std::size_t bytes) const {
    gpu().use();
    gpu().check(gpu().driver().cuMemcpyDtoDAsync(reinterpret_cast<DeviceAddress>(to),
                                                 reinterpret_cast<DeviceAddress>(from), bytes, number()),
                "cuMemcpyDtoDAsync");
}

void Stream::copy_in(void* to, const void* from, std::size_t bytes) const {  // ordinary memory is staged by the driver
    gpu().use();
    gpu().check(gpu().driver().cuMemcpyHtoDAsync(reinterpret_cast<DeviceAddress>(to), from, bytes, number()),
                "cuMemcpyHtoDAsync");
}

void Stream::download(void* to, const void* from, std::size_t bytes) const {
    gpu().use();
    gpu().check(gpu().driver().cuMemcpyDtoHAsync(to, reinterpret_cast<DeviceAddress>(from), bytes, number()),
                "cuMemcpyDtoHAsync");
    synchronize();
}

void Stream::start(Gpu::Kernel kernel, int shared, const Grid& grid, const void* params) const {
    void* pointers[] = {const_cast<void*>(params)};
    gpu().use();
    gpu().check(gpu().driver().cuLaunchKernel(gpu().function(kernel), static_cast<unsigned>(grid.x),
                                              static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z),
                                              cuda::kBlockX, cuda::kBlockY, 1, static_cast<unsigned>(shared), number(),
                                              pointers, nullptr),
                "cuLaunchKernel");
}

const Stream::Tables& Stream::tables(const AxisOperator& op, int order, Convention convention) const {
    const std::tuple key{op.size_in(), op.size_out(), order, convention};
    if (const auto found = tables_.find(key); found != tables_.end()) return found->second;
    Tables made;
    const std::int64_t size = op.size_out();
    const auto count = static_cast<std::size_t>(size);
    made.first = upload(op.first(), size);
    made.weights = upload(op.weights(), size * op.taps());
    if (op.is_local()) {  // in float32, as the core's labelling has them
        std::vector<float> low(count), high(count, 0.0f);
        for (std::size_t i = 0; i < count; ++i) {
            const double* weights = op.weights() + i * static_cast<std::size_t>(op.taps());
            low[i] = static_cast<float>(weights[0]);
            if (!op.is_selection()) high[i] = static_cast<float>(weights[1]);
        }
        made.low = upload(low.data(), size);
        made.high = upload(high.data(), size);
    } else {
        std::vector<std::int32_t> sample(count);
        for (std::size_t i = 0; i < count; ++i) sample[i] = op.sample(static_cast<std::int64_t>(i));
        made.sample = upload(sample.data(), size);
    }
    return tables_.emplace(key, std::move(made)).first->second;
}

DeviceMemory<cuda::Limits> Stream::new_limits(std::int64_t count) const {
    DeviceMemory<cuda::Limits> limits = memory<cuda::Limits>(count);
    start_fill_limits(grid_of(count, 1), {limits.get(), count});
    return limits;
}

}  // namespace fastnnunet::engine
