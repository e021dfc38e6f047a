// libnvinfer.so for the tests of backends/tensorrt.cpp: engines whose network is that of stencil.hpp. A plan is a text,
// "DIGEST CHANNELS HEADS DIMS MOST", MOST patches in a batch.
#include <NvInferRuntime.h>

#include <cstring>
#include <sstream>

#include "stencil.hpp"

namespace {

using fastnnunet::emulation::Stencil;

struct Engine;

constexpr std::int64_t kWorkBytes = 64;

class Context : public nvinfer1::IExecutionContext {
public:
    explicit Context(Engine& engine) : engine_(engine) {}

    bool setInputShape(char const* name, nvinfer1::Dims const& dims) noexcept override;
    bool setTensorAddress(char const* name, void* data) noexcept override {
        (std::strcmp(name, "image") == 0 ? in_ : out_) = static_cast<float*>(data);
        return true;
    }
    void setDeviceMemoryV2(void* memory, int64_t size) noexcept override { has_memory_ = memory && size == kWorkBytes; }
    bool enqueueV3(cudaStream_t stream) noexcept override;

private:
    Engine& engine_;
    nvinfer1::Dims shape_{};
    float *in_ = nullptr, *out_ = nullptr;
    bool has_memory_ = false, is_enqueued_ = false;
};

struct Engine : nvinfer1::ICudaEngine {
    Engine(nvinfer1::ILogger& logger, const std::string& digest, std::int64_t channels, std::int64_t heads,
           std::int32_t dims, std::int64_t most)
        : logger(logger), channels(channels), most(most), dims(dims), stencil(channels, heads, dims, digest) {}

    nvinfer1::IExecutionContext* createExecutionContext(
        nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override {
        if (strategy != nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED) return nullptr;
        return new Context(*this);
    }
    int32_t getNbIOTensors() const noexcept override { return 2; }
    char const* getIOTensorName(int32_t index) const noexcept override { return index == 0 ? "image" : "logits"; }
    nvinfer1::TensorIOMode getTensorIOMode(char const* name) const noexcept override {
        return std::strcmp(name, "image") == 0 ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
    }
    int64_t getDeviceMemorySizeV2() const noexcept override { return kWorkBytes; }

    bool refuse(const char* what) const noexcept {
        logger.log(nvinfer1::ILogger::Severity::kERROR, what);
        return false;
    }

    nvinfer1::ILogger& logger;
    std::int64_t channels, most;
    std::int32_t dims;
    Stencil stencil;
};

// Shapes are part of graphs that were captured, so a context that was used is never given others.
bool Context::setInputShape(char const* name, nvinfer1::Dims const& dims) noexcept {
    if (std::strcmp(name, "image") != 0 || dims.nbDims != engine_.dims + 2 || dims.d[1] != engine_.channels ||
        dims.d[0] < 1 || dims.d[0] > engine_.most) {
        return engine_.refuse("a shape that the engine was not built for");
    }
    if (is_enqueued_) return engine_.refuse("a context that was used is given another shape");
    shape_ = dims;
    return true;
}

bool Context::enqueueV3(cudaStream_t stream) noexcept {
    if (!has_memory_ || shape_.nbDims == 0 || in_ == nullptr || out_ == nullptr) {
        return engine_.refuse("shape, memory or addresses are missing");
    }
    is_enqueued_ = true;
    engine_.stencil.put(in_, shape_.d[0], shape_.d + 2, out_, stream);
    return true;
}

struct Runtime : nvinfer1::IRuntime {
    explicit Runtime(nvinfer1::ILogger& logger) : logger(logger) {}

    nvinfer1::ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
        std::istringstream text(std::string(static_cast<const char*>(blob), size));
        std::string digest;
        std::int64_t channels = 0, heads = 0, dims = 0, most = 0;
        if (!(text >> digest >> channels >> heads >> dims >> most)) {
            logger.log(nvinfer1::ILogger::Severity::kERROR, "no plan");
            return nullptr;
        }
        return new Engine(logger, digest, channels, heads, static_cast<std::int32_t>(dims), most);
    }

    nvinfer1::ILogger& logger;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) std::int32_t getInferLibVersion() { return NV_TENSORRT_VERSION; }

extern "C" __attribute__((visibility("default"))) void* createInferRuntime_INTERNAL(void* logger, std::int32_t) {
    return new Runtime(*static_cast<nvinfer1::ILogger*>(logger));
}
