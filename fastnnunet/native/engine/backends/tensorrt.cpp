// TensorRT, or TensorRT for RTX: an engine of `fastnnunet export tensorrt`, found by the same keys as
// fastnnunet/engines/trt/store.py. Compiled only where the headers are; the library and the CUDA driver are opened at
// run time. One batch is on the device at a time.
//
// Each size of batches and tiles has an execution context of its own, as its shapes are part of a CUDA graph that was
// captured of it; all of them share the working memory, since they run one after the other on one stream.
#include <NvInferRuntime.h>

#include <cstring>
#include <list>
#include <memory>
#include <mutex>

#include "backends/cuda_driver.hpp"
#include "bundle/digest.hpp"
#include "bundle/file.hpp"
#include "bundle/json.hpp"

namespace fs = std::filesystem;
using namespace fastnnunet::engine;

namespace {

#ifdef FASTNNUNET_TENSORRT_RTX
constexpr const char *kLibrary = "tensorrt_rtx", *kStem = "libtensorrt_rtx", *kPackage = "tensorrt_rtx_libs";
#else
constexpr const char *kLibrary = "tensorrt", *kStem = "libnvinfer", *kPackage = "tensorrt_libs";
#endif

const CudaDriver& driver() {
    try {
        return cuda_driver();
    } catch (const std::exception& e) {
        throw Missing(std::string("backend tensorrt needs an NVIDIA GPU with a current driver: ") + e.what() +
                      "\nuse another --backend");
    }
}

class Logger : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity > Severity::kERROR) return;
        const std::lock_guard lock(turn_);
        try {
            errors_ += (errors_.empty() ? "" : "; ") + std::string(message);
        } catch (...) {
            errors_.clear();
        }
    }

    std::string take() {
        const std::lock_guard lock(turn_);
        std::string errors;
        std::swap(errors, errors_);
        return errors.empty() ? "the library gave no reason" : errors;
    }

private:
    std::mutex turn_;
    std::string errors_;
};

struct Library {
    Logger logger;
    std::string version;
    nvinfer1::IRuntime* runtime = nullptr;

    Library() {
        driver();  // there is none without it
        const std::string package = std::string(kLibrary) == "tensorrt" ? "fastnnunet[gpu]" : "fastnnunet[rtx]";
        void* open =
            open_library({"FASTNNUNET_TENSORRT", kPackage, kStem}, "backend tensorrt needs " + std::string(kLibrary) +
                                                                       "\ninstall it: pip install '" + package + "'");
        std::int32_t (*version_of)() = nullptr;
        void* (*create)(void*, std::int32_t) = nullptr;
        look_up(open, "getInferLibVersion", version_of);
        look_up(open, "createInferRuntime_INTERNAL", create);
        const std::int32_t number = version_of();  // as NV_TENSORRT_VERSION: 10 000, 100 and 1
        const std::int32_t major = number / 10000, minor = number / 100 % 100, patch = number % 100;
        version = std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
        if (major != NV_TENSORRT_MAJOR) {
            throw Missing(std::string(kLibrary) + " " + version + " is installed, this plugin was compiled for " +
                          std::to_string(NV_TENSORRT_MAJOR) + ".x\ninstall that, or build the engine with its headers");
        }
        runtime = static_cast<nvinfer1::IRuntime*>(create(&logger, NV_TENSORRT_VERSION));
        if (runtime == nullptr) throw std::runtime_error(std::string(kLibrary) + " does not start: " + logger.take());
    }
};

Library& library() {
    static Library* one = new Library;  // never torn down
    return *one;
}

// What an engine was built for; see EngineKey.
struct Stored {
    std::string path, plan_sha256, precision, library, library_version, architecture;
    std::int64_t max_batch = 0;
    std::vector<std::int64_t> input, output, smallest_tile;  // (C, *patch), (heads, *patch); empty: of the patch

    std::string text() const {
        return precision + " " + architecture + " " + library + " " + library_version + " batch " +
               std::to_string(max_batch);
    }
};

std::vector<std::int64_t> numbers(const Json* list) {
    std::vector<std::int64_t> made;
    if (list == nullptr) return made;
    for (const Json& item : list->items()) made.push_back(item.integer().value_or(0));
    return made;
}

// Every engine of a model file, beside the bundle and in this machine's folder; unreadable ones are passed over.
std::vector<Stored> list_engines(const fastnnunet_network_spec& spec) {
    std::vector<Stored> found;
    for (const std::string& folder : {joined(spec.bundle, "engines"), joined(local_home(), "engines")}) {
        std::error_code error;
        for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
            const std::string file = (entry->path() / "engine.json").string();
            if (entry->path().filename().string()[0] == '.' || !is_regular_file(file)) continue;
            try {
                const MappedFile content(file);
                const Json info = parse_json(content.bytes(), file);
                const Json *key = info.find("key"), *digest = info.find("plan_sha256");
                if (key == nullptr || digest == nullptr) continue;
                const auto text = [&](const char* name) {
                    return key->find(name) == nullptr ? "" : key->find(name)->text();
                };
                if (text("model_sha256") != spec.file_digest || text("recipe") != "1") continue;
                found.push_back({entry->path().string(), digest->text(), text("precision"), text("library"),
                                 text("library_version"), text("architecture"),
                                 key->find("max_batch") == nullptr ? 0 : key->find("max_batch")->integer().value_or(0),
                                 numbers(key->find("input_shape")), numbers(key->find("output_shape")),
                                 numbers(key->find("smallest_tile"))});
            } catch (const std::exception&) {
                continue;
            }
        }
    }
    return found;
}

class TensorRT {
public:
    explicit TensorRT(const fastnnunet_network_spec& spec) : precision_(spec.precision) {
        use_device(spec.device);
        choose(spec);
        const MappedFile plan((fs::path(stored_.path) / "engine.plan").string());
        if (sha256_hex(plan.bytes()) != stored_.plan_sha256) {
            throw std::runtime_error(stored_.path + " was changed after it was built\nremove it and export again");
        }
        engine_ = library().runtime->deserializeCudaEngine(plan.bytes().data(), plan.bytes().size());
        if (engine_ == nullptr) {
            throw std::runtime_error(std::string(kLibrary) + " " + library().version + " cannot load " + stored_.path +
                                     ": " + library().logger.take() + "\nremove it and export again on this machine");
        }
        for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            const char* name = engine_->getIOTensorName(i);
            (engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT ? input_ : output_) = name;
        }
        const std::int64_t bytes = std::max<std::int64_t>(1, engine_->getDeviceMemorySizeV2());
        check(driver().cuMemAlloc(&work_, static_cast<std::size_t>(bytes)), "working memory");
    }

    ~TensorRT() {
        contexts_.clear();
        delete engine_;
        driver().cuCtxSetCurrent(device_);
        for (const DeviceAddress memory : {in_, out_, work_}) {
            if (memory != 0) driver().cuMemFree(memory);
        }
        if (stream_ != nullptr) driver().cuStreamDestroy(stream_);
    }

    TensorRT(const TensorRT&) = delete;
    TensorRT& operator=(const TensorRT&) = delete;

    void run(const float* batch, std::int64_t count, const std::int64_t* tile, float* logits) {
        const std::lock_guard lock(turn_);
        check(driver().cuCtxSetCurrent(device_), "the device is chosen");
        if (stream_ == nullptr) check(driver().cuStreamCreate(&stream_, CudaDriver::kNonBlocking), "a stream is made");
        if (in_ == 0) check(driver().cuMemAlloc(&in_, most_bytes(stored_.input)), "memory for a batch");
        if (out_ == 0) check(driver().cuMemAlloc(&out_, most_bytes(stored_.output)), "memory for logits");
        const std::size_t voxels = voxels_of(tile);
        const std::size_t in = static_cast<std::size_t>(stored_.input[0]) * voxels;
        const std::size_t out = static_cast<std::size_t>(stored_.output[0]) * voxels;
        for (std::int64_t first = 0; first < count; first += stored_.max_batch) {
            const std::int64_t now = std::min(stored_.max_batch, count - first);
            const auto rows = static_cast<std::size_t>(now), at = static_cast<std::size_t>(first);
            check(driver().cuMemcpyHtoDAsync(in_, batch + at * in, rows * in * sizeof(float), stream_),
                  "a batch is copied");
            enqueue(in_, now, tile, out_, stream_);
            check(driver().cuMemcpyDtoHAsync(logits + at * out, out_, rows * out * sizeof(float), stream_),
                  "logits are copied");
            check(driver().cuStreamSynchronize(stream_), "the device computes");
        }
    }

    void run_on_gpu(const float* batch, std::int64_t count, const std::int64_t* tile, float* logits, void* stream) {
        const std::lock_guard lock(turn_);
        enqueue(reinterpret_cast<DeviceAddress>(batch), count, tile, reinterpret_cast<DeviceAddress>(logits), stream);
    }

    std::int32_t largest_tile(std::int64_t* tile) const {
        std::copy(stored_.input.begin() + 1, stored_.input.end(), tile);
        return 1;
    }

    const char* precision() const { return precision_.c_str(); }
    std::int32_t gpu() const { return index_; }
    std::int64_t most() const { return stored_.max_batch; }

private:
    static constexpr std::size_t kMostContexts = 16;

    struct Context {
        std::vector<std::int64_t> shape;  // (count, channels, tile)
        std::unique_ptr<nvinfer1::IExecutionContext> one;
    };

    static void check(int status, const char* what) { driver().check(status, what); }

    // Throws std::runtime_error for tiles that the engine was not built for.
    std::size_t voxels_of(const std::int64_t* tile) const {
        std::size_t voxels = 1;
        for (std::size_t i = 0; i + 1 < stored_.input.size(); ++i) {
            const std::int64_t most = stored_.input[i + 1];
            const std::int64_t least = stored_.smallest_tile.empty() ? most : stored_.smallest_tile[i];
            if (tile[i] < least || tile[i] > most)
                throw std::runtime_error("the engine was not built for tiles of that size");
            voxels *= static_cast<std::size_t>(tile[i]);
        }
        return voxels;
    }

    std::size_t most_bytes(const std::vector<std::int64_t>& shape) const {
        std::size_t size = sizeof(float) * static_cast<std::size_t>(stored_.max_batch);
        for (const std::int64_t one : shape) size *= static_cast<std::size_t>(one);
        return size;
    }

    // The context of a shape, which was used last from here on.
    nvinfer1::IExecutionContext& context_of(std::int64_t count, const std::int64_t* tile) {
        std::vector<std::int64_t> shape{count, stored_.input[0]};
        shape.insert(shape.end(), tile, tile + stored_.input.size() - 1);
        for (auto found = contexts_.begin(); found != contexts_.end(); ++found) {
            if (found->shape != shape) continue;
            contexts_.splice(contexts_.begin(), contexts_, found);
            return *found->one;
        }
        if (contexts_.size() == kMostContexts) contexts_.pop_back();
        std::unique_ptr<nvinfer1::IExecutionContext> made(
            engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
        if (!made) throw std::runtime_error("no execution context: " + library().logger.take());
        made->setDeviceMemoryV2(reinterpret_cast<void*>(work_), engine_->getDeviceMemorySizeV2());
        nvinfer1::Dims dims{};
        dims.nbDims = static_cast<std::int32_t>(shape.size());
        std::copy(shape.begin(), shape.end(), dims.d);
        if (!made->setInputShape(input_.c_str(), dims)) {
            throw std::runtime_error("a shape is refused: " + library().logger.take());
        }
        contexts_.push_front({shape, std::move(made)});
        return *contexts_.front().one;
    }

    void enqueue(DeviceAddress batch, std::int64_t count, const std::int64_t* tile, DeviceAddress logits,
                 void* stream) {
        voxels_of(tile);
        if (count > stored_.max_batch) throw std::runtime_error("the engine was not built for batches of that size");
        nvinfer1::IExecutionContext& context = context_of(count, tile);
        if (!context.setTensorAddress(input_.c_str(), reinterpret_cast<void*>(batch)) ||
            !context.setTensorAddress(output_.c_str(), reinterpret_cast<void*>(logits)) ||
            !context.enqueueV3(static_cast<cudaStream_t>(stream))) {
            throw std::runtime_error("inference failed: " + library().logger.take());
        }
    }

    void use_device(const std::string& name) {
        const int index = gpu_index(name);
        int count = 0, device = 0, major = 0, minor = 0;
        check(driver().cuDeviceGetCount(&count), "devices are counted");
        if (index >= count) {
            throw std::runtime_error("-device " + name + ": this process sees " + std::to_string(count) +
                                     " GPU(s)\nCUDA_VISIBLE_DEVICES decides which they are");
        }
        index_ = index;
        check(driver().cuDeviceGet(&device, index), "the device is found");
        check(driver().cuDeviceGetAttribute(&major, CudaDriver::kMajor, device), "the device is asked");
        check(driver().cuDeviceGetAttribute(&minor, CudaDriver::kMinor, device), "the device is asked");
        check(driver().cuDevicePrimaryCtxRetain(&device_, device), "the device is opened");
        check(driver().cuCtxSetCurrent(device_), "the device is chosen");
        architecture_ = "sm" + std::to_string(10 * major + minor);
    }

    void choose(const fastnnunet_network_spec& spec) {
        std::string there;
        for (const Stored& one : list_engines(spec)) {
            there += "\n  - " + one.text();
            const bool fits =
                one.library == kLibrary && (one.library_version + ".").rfind(library().version + ".", 0) == 0 &&
                one.precision == spec.precision && one.architecture == architecture_ && one.max_batch > 0 &&
                one.input.size() == static_cast<std::size_t>(spec.dims) + 1 && one.output.size() == one.input.size() &&
                one.input[0] == spec.channels && one.output[0] == spec.heads;
            if (fits && one.max_batch > stored_.max_batch) stored_ = one;
        }
        if (stored_.max_batch > 0) return;
        throw std::runtime_error("no engine of " + std::string(spec.bundle) + " fits this machine: needed " +
                                 spec.precision + " " + architecture_ + " " + kLibrary + " " + library().version +
                                 "\nengines of this model that were found:" + (there.empty() ? "\n  - none" : there) +
                                 "\nmake one with: fastnnunet export tensorrt " + spec.bundle + " --arch " +
                                 architecture_ + " --precision " + spec.precision);
    }

    std::string precision_, architecture_, input_, output_;
    Stored stored_;
    nvinfer1::ICudaEngine* engine_ = nullptr;
    std::list<Context> contexts_;
    std::int32_t index_ = 0;
    void *device_ = nullptr, *stream_ = nullptr;
    DeviceAddress in_ = 0, out_ = 0, work_ = 0;  // a batch and logits: of `run`
    std::mutex turn_;
};

TensorRT* of(fastnnunet_network* network) { return reinterpret_cast<TensorRT*>(network); }
const TensorRT* of(const fastnnunet_network* network) { return reinterpret_cast<const TensorRT*>(network); }

std::int32_t find(fastnnunet_failure* failure) {
    return guarded(failure, [] { library(); });
}

std::int32_t load(const fastnnunet_network_spec* spec, fastnnunet_network** network, fastnnunet_failure* failure) {
    return guarded(failure, [&] { *network = reinterpret_cast<fastnnunet_network*>(new TensorRT(*spec)); });
}

std::int32_t run(fastnnunet_network* network, const float* batch, std::int64_t count, const std::int64_t* tile,
                 float* logits, fastnnunet_failure* failure) {
    return guarded(failure, [&] { of(network)->run(batch, count, tile, logits); });
}

std::int32_t run_on_gpu(fastnnunet_network* network, const float* batch, std::int64_t count, const std::int64_t* tile,
                        float* logits, void* stream, fastnnunet_failure* failure) {
    return guarded(failure, [&] { of(network)->run_on_gpu(batch, count, tile, logits, stream); });
}

#ifdef FASTNNUNET_TENSORRT_RTX
constexpr std::int32_t kCanCapture = 0;  // kernels may be exchanged for better ones while it runs
#else
constexpr std::int32_t kCanCapture = 1;
#endif

const fastnnunet_backend kBackend{
    FASTNNUNET_BACKEND_INTERFACE,
    "tensorrt",
    "fp32 fp16 int8",
    "cuda",
    find,
    load,
    run,
    [](fastnnunet_network* network) { delete of(network); },
    [](const fastnnunet_network*) { return 1.2; },
    [](const fastnnunet_network* network, std::int64_t* tile) { return of(network)->largest_tile(tile); },
    [](const fastnnunet_network* network) { return of(network)->precision(); },
    [](const fastnnunet_network*) { return library().version.c_str(); },
    [](const fastnnunet_network* network) { return of(network)->gpu(); },
    [](const fastnnunet_network* network) { return of(network)->most(); },
    [](const fastnnunet_network*) { return kCanCapture; },
    run_on_gpu,
    nullptr,  // it computes into the caller's memory
    nullptr,
};

}  // namespace

extern "C" FASTNNUNET_PLUGIN const fastnnunet_backend* fastnnunet_backend_entry_1(void) { return &kBackend; }
