// ONNX Runtime through its C interface: the plugin is compiled without it and works with whichever is installed, of the
// wheels onnxruntime and onnxruntime-gpu, of the system or of an archive. As fastnnunet/engines/onnxruntime.py.
#include <cstring>

#include "backends/cuda_driver.hpp"
#include "backends/ort_api.h"

using namespace fastnnunet::engine;

namespace {

class Library {
public:
    Library() {
        open_ =
            open_library({"FASTNNUNET_ONNXRUNTIME", "onnxruntime/capi", "libonnxruntime"},
                         "backend onnxruntime needs ONNX Runtime 1.18 or newer\ninstall it: pip install onnxruntime");
        const OrtApiBase* (*base)() = nullptr;
        look_up(open_, "OrtGetApiBase", base);
        version_ = base()->GetVersionString();
        table_ = base()->GetApi(ORT_API_VERSION_USED);
        if (table_ == nullptr) throw Missing("ONNX Runtime " + version_ + " is too old; install a newer one");
    }

    template <class... Arguments>
    void call(int number, Arguments... arguments) const {
        using Function = OrtStatus* (*)(Arguments...);
        if (OrtStatus* status = reinterpret_cast<Function>(const_cast<void*>(table_[number]))(arguments...))
            raise(status);
    }

    void raise(OrtStatus* status) const {
        using Message = const char* (*)(const OrtStatus*);
        const std::string message = reinterpret_cast<Message>(const_cast<void*>(table_[ORT_GetErrorMessage]))(status);
        release(ORT_ReleaseStatus, status);
        throw std::runtime_error(message);
    }

    template <class T>
    void release(int number, T* one) const {
        using Function = void (*)(T*);
        if (one != nullptr) reinterpret_cast<Function>(const_cast<void*>(table_[number]))(one);
    }

    void* open() const { return open_; }
    const std::string& version() const { return version_; }

private:
    void* open_ = nullptr;
    const void* const* table_ = nullptr;
    std::string version_;
};

const Library& ort() {
    static const Library* one = new Library;  // never torn down: its threads may outlive this
    return *one;
}

// One for the process, as ONNX Runtime wants it
OrtEnv* environment() {
    static OrtEnv* one = [] {
        OrtEnv* made = nullptr;
        ort().call(ORT_CreateEnv, static_cast<int>(ORT_LOG_ERROR), "fastnnunet", &made);
        return made;
    }();
    return one;
}

// Something of ONNX Runtime's that is released by the function of that number.
template <class T>
struct Held {
    explicit Held(int release) : release(release) {}
    ~Held() { ort().release(release, one); }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;

    T* one = nullptr;
    int release;
};

class OnnxRuntime {
public:
    explicit OnnxRuntime(const fastnnunet_network_spec& spec)
        : channels_(spec.channels), heads_(spec.heads), dims_(spec.dims), precision_(spec.precision) {
        Held<OrtSessionOptions> options(ORT_ReleaseSessionOptions);
        ort().call(ORT_CreateSessionOptions, &options.one);
        ort().call(ORT_SetIntraOpNumThreads, options.one, static_cast<int>(spec.threads));
        ort().call(ORT_SetInterOpNumThreads, options.one, 1);
        ort().call(ORT_SetSessionLogSeverityLevel, options.one, static_cast<int>(ORT_LOG_ERROR));
        // plans of memory, one for each shape, are kept: twice the memory from the second run of a large tile on
        if (spec.shapes_vary) ort().call(ORT_DisableMemPattern, options.one);
        if (std::strncmp(spec.device, "cuda", 4) == 0) gpu_ = use_gpu(options.one, spec.device);
        ort().call(ORT_CreateSession, environment(), spec.model_file, options.one, &session_.one);
        const auto describe = [](const char* where, int index, OrtMemoryInfo** made) {
            ort().call(ORT_CreateMemoryInfo, where, static_cast<int>(ORT_DEVICE_ALLOCATOR), index,
                       static_cast<int>(ORT_DEFAULT_MEMORY), made);
        };
        describe("Cpu", 0, &memory_.one);
        if (gpu_ >= 0) describe("Cuda", gpu_, &on_gpu_.one);
        OrtAllocator* allocator = nullptr;
        ort().call(ORT_GetAllocatorWithDefaultOptions, &allocator);
        for (const auto& [number, name] :
             {std::pair(ORT_SessionGetInputName, &input_), {ORT_SessionGetOutputName, &output_}}) {
            char* text = nullptr;
            ort().call(number, session_.one, std::size_t{0}, allocator, &text);
            *name = text;
            ort().call(ORT_AllocatorFree, allocator, static_cast<void*>(text));
        }
    }

    void run(const float* batch, std::int64_t count, const std::int64_t* tile, float* logits) const {
        run_in(memory_.one, batch, count, tile, logits);
    }

    // ONNX Runtime computes on a stream of its own and returns when it is done.
    void run_on_gpu(const float* batch, std::int64_t count, const std::int64_t* tile, float* logits,
                    void* stream) const {
        cuda_driver().check(cuda_driver().cuStreamSynchronize(stream), "cuStreamSynchronize");  // the batch is there
        run_in(on_gpu_.one, batch, count, tile, logits);
    }

    const char* precision() const { return precision_.c_str(); }
    std::int32_t gpu() const { return gpu_; }

private:
    void run_in(const OrtMemoryInfo* memory, const float* batch, std::int64_t count, const std::int64_t* tile,
                float* logits) const {
        Held<OrtValue> in(ORT_ReleaseValue), out(ORT_ReleaseValue);
        tensor(memory, const_cast<float*>(batch), {count, channels_}, tile, &in.one);
        tensor(memory, logits, {count, heads_}, tile, &out.one);
        const char *input = input_.c_str(), *output = output_.c_str();
        const OrtValue* inputs = in.one;
        ort().call(ORT_Run, session_.one, static_cast<const OrtRunOptions*>(nullptr), &input, &inputs, std::size_t{1},
                   &output, std::size_t{1}, &out.one);
    }

    // CUDA, or TensorRT for RTX in builds that have that instead. Returns the GPU whose memory it takes batches in, or -1.
    static std::int32_t use_gpu(OrtSessionOptions* options, const std::string& device) {
        const std::size_t colon = device.find(':');
        const std::string index = colon == std::string::npos ? "0" : device.substr(colon + 1);
        const std::string offered = providers();
        // it would compute on the CPU, operator by operator, what the GPU has no kernel for
        ort().call(ORT_AddSessionConfigEntry, options, "session.disable_cpu_ep_fallback", "1");
        if (offered.find("CUDAExecutionProvider") != std::string::npos) {
            OrtStatus* (*append)(OrtSessionOptions*, int) = nullptr;
            look_up(ort().open(), "OrtSessionOptionsAppendExecutionProvider_CUDA", append);
            if (OrtStatus* status = append(options, std::atoi(index.c_str()))) ort().raise(status);
            return std::atoi(index.c_str());
        } else if (offered.find("NvTensorRTRTXExecutionProvider") != std::string::npos) {
            const char *key = "device_id", *value = index.c_str();
            ort().call(ORT_AppendExecutionProvider, options, "NvTensorRtRtx", &key, &value, std::size_t{1});
        } else {
            throw Missing("ONNX Runtime " + ort().version() + " offers" + offered + ", expected CUDAExecutionProvider too\n" +
                          "install the one for GPUs alone: pip uninstall -y onnxruntime onnxruntime-gpu && " +
                          "pip install 'onnxruntime-gpu[cuda,cudnn]'");
        }
        return -1;
    }

    // What the library can compute with, a space before each
    static std::string providers() {
        char** names = nullptr;
        int count = 0;
        ort().call(ORT_GetAvailableProviders, &names, &count);
        std::string text;
        for (int i = 0; i < count; ++i) text += std::string(" ") + names[i];
        ort().call(ORT_ReleaseAvailableProviders, names, count);
        return text;
    }

    void tensor(const OrtMemoryInfo* memory, float* values, std::vector<std::int64_t> shape, const std::int64_t* tile,
                OrtValue** made) const {
        shape.insert(shape.end(), tile, tile + dims_);
        std::size_t bytes = sizeof(float);
        for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
        ort().call(ORT_CreateTensorWithDataAsOrtValue, memory, static_cast<void*>(values), bytes,
                   static_cast<const std::int64_t*>(shape.data()), shape.size(), static_cast<int>(ORT_FLOAT), made);
    }

    std::int64_t channels_, heads_;
    std::int32_t dims_;
    std::string precision_, input_, output_;
    std::int32_t gpu_ = -1;
    Held<OrtMemoryInfo> memory_{ORT_ReleaseMemoryInfo}, on_gpu_{ORT_ReleaseMemoryInfo};
    Held<OrtSession> session_{ORT_ReleaseSession};
};

OnnxRuntime* of(fastnnunet_network* network) { return reinterpret_cast<OnnxRuntime*>(network); }
const OnnxRuntime* of(const fastnnunet_network* network) { return reinterpret_cast<const OnnxRuntime*>(network); }

std::int32_t find(fastnnunet_failure* failure) {
    return guarded(failure, [] { ort(); });
}

std::int32_t load(const fastnnunet_network_spec* spec, fastnnunet_network** network, fastnnunet_failure* failure) {
    const std::int32_t status =
        guarded(failure, [&] { *network = reinterpret_cast<fastnnunet_network*>(new OnnxRuntime(*spec)); });
    if (status != 0) {
        say(failure, std::string("onnxruntime cannot load ") + spec->model_file + " on " + spec->device + ": " +
                         std::string(failure->message));
    }
    return status;
}

std::int32_t run(fastnnunet_network* network, const float* batch, std::int64_t count, const std::int64_t* tile,
                 float* logits, fastnnunet_failure* failure) {
    return guarded(failure, [&] { of(network)->run(batch, count, tile, logits); });
}

std::int32_t run_on_gpu(fastnnunet_network* network, const float* batch, std::int64_t count, const std::int64_t* tile,
                        float* logits, void* stream, fastnnunet_failure* failure) {
    return guarded(failure, [&] { of(network)->run_on_gpu(batch, count, tile, logits, stream); });
}

constexpr std::int64_t kMostOnGpu = 1 << 16;

const fastnnunet_backend kBackend{
    FASTNNUNET_BACKEND_INTERFACE,
    "onnxruntime",
    "fp32 int8",
    "cpu cuda",
    find,
    load,
    run,
    [](fastnnunet_network* network) { delete of(network); },
    [](const fastnnunet_network*) { return 1.25; },
    [](const fastnnunet_network*, std::int64_t*) -> std::int32_t { return 0; },
    [](const fastnnunet_network* network) { return of(network)->precision(); },
    [](const fastnnunet_network*) { return ort().version().c_str(); },
    [](const fastnnunet_network* network) { return of(network)->gpu(); },
    [](const fastnnunet_network*) { return kMostOnGpu; },
    [](const fastnnunet_network*) -> std::int32_t { return 0; },
    run_on_gpu,
    nullptr,  // it computes into the caller's memory
    nullptr,
};

}  // namespace

extern "C" FASTNNUNET_PLUGIN const fastnnunet_backend* fastnnunet_backend_entry_1(void) { return &kBackend; }
