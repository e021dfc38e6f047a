// libcuda.so.1 without a GPU, for the tests: the functions of the driver that the engine uses, by CUDA's rules, with the
// kernels' bodies on the CPU (emulate.cpp).
//
// A stream does nothing until somebody waits for it, so whoever does not wait where it must finds NaN: memory starts as
// that. Every address that is copied is checked, as is that the context is current. What a GPU punishes with undefined
// behaviour ends the process with a word on stderr.
//
// FASTNNUNET_EMULATED_GPUS    how many there are; 1
// FASTNNUNET_EMULATED_BYTES   memory of each; 1 GiB
// FASTNNUNET_EMULATED_FAIL    FUNCTION:N:STATUS: what its Nth call returns, from 1, and all after that
// FASTNNUNET_EMULATED_LOG     a file that tells, whenever a stream was waited for and at the end, what was done: JSON
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "../kernels.hpp"

extern "C" int fastnnunet_emulate(const char* name, const long long* grid, long long shared, const void* params,
                                  unsigned seed);
extern "C" long long fastnnunet_params_bytes(const char* name);

namespace {

using Address = unsigned long long;
using Operation = std::function<void()>;

enum Status {
    kOk = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNoDevice = 100,
    kInvalidContext = 201,
    kNotFound = 500,
    kCaptureUnsupported = 900,
};

[[noreturn]] void refuse(const std::string& what) {
    std::fprintf(stderr, "emulated GPU: %s\n", what.c_str());
    std::abort();
}

long long number_of(const char* variable, long long otherwise) {
    const char* text = std::getenv(variable);
    return text == nullptr || *text == '\0' ? otherwise : std::atoll(text);
}

struct Stream {
    std::deque<Operation> pending;
    std::unique_ptr<std::vector<Operation>> captured;
    bool is_running = false;

    void put(Operation operation) {
        if (captured) {
            captured->push_back(std::move(operation));
        } else {
            pending.push_back(std::move(operation));
        }
    }
};

struct Reached {
    Stream* stream;
    bool is_done = false;
};

struct Event {
    std::shared_ptr<Reached> last;
};

struct Graph {
    std::vector<Operation> operations;
};

struct Machine {
    std::recursive_mutex turn;
    std::map<Address, std::size_t> memory;
    std::set<Stream*> streams;
    std::size_t used = 0, peak = 0;
    unsigned seed = 0;
    std::map<std::string, long long> calls, kernels;
    std::vector<std::size_t> uploads, downloads;

    ~Machine() { write_log(); }

    void write_log() const {
        const char* path = std::getenv("FASTNNUNET_EMULATED_LOG");
        if (path == nullptr) return;
        std::FILE* file = std::fopen(path, "w");
        if (file == nullptr) return;
        const auto list = [&](const char* name, const std::vector<std::size_t>& values) {
            std::fprintf(file, "\"%s\": [", name);
            for (std::size_t i = 0; i < values.size(); ++i) std::fprintf(file, "%s%zu", i ? ", " : "", values[i]);
            std::fprintf(file, "], ");
        };
        const auto counts = [&](const char* name, const std::map<std::string, long long>& values) {
            std::fprintf(file, "\"%s\": {", name);
            const char* comma = "";
            for (const auto& [key, count] : values) {
                std::fprintf(file, "%s\"%s\": %lld", comma, key.c_str(), count);
                comma = ", ";
            }
            std::fprintf(file, "}, ");
        };
        std::fprintf(file, "{");
        list("uploads", uploads);
        list("downloads", downloads);
        counts("kernels", kernels);
        counts("calls", calls);
        std::fprintf(file, "\"peak_bytes\": %zu, \"left_bytes\": %zu, \"left_streams\": %zu}\n", peak, used,
                     streams.size());
        std::fclose(file);
    }

    void check(Address address, std::size_t bytes) const {
        auto after = memory.upper_bound(address);
        if (bytes == 0) return;
        if (after == memory.begin()) refuse("an address that is no memory of the GPU");
        --after;
        if (address + bytes > after->first + after->second) refuse("an access beyond memory that was allocated");
    }

    int allocate(Address* address, std::size_t bytes) {
        if (bytes == 0) return kInvalidValue;
        const auto most = static_cast<std::size_t>(number_of("FASTNNUNET_EMULATED_BYTES", 1LL << 30));
        if (used + bytes > most) return kOutOfMemory;
        void* made = std::malloc(bytes);
        if (made == nullptr) return kOutOfMemory;
        std::memset(made, 0xFF, bytes);
        *address = reinterpret_cast<Address>(made);
        memory[*address] = bytes;
        used += bytes;
        peak = std::max(peak, used);
        return kOk;
    }

    void free(Address address) {
        const auto found = memory.find(address);
        if (found == memory.end()) refuse("memory is freed that is not allocated, or twice");
        used -= found->second;
        memory.erase(found);
        std::free(reinterpret_cast<void*>(address));
    }

    void run(Stream& stream) {
        while (!stream.pending.empty()) step(stream);
    }
    void run_until(const Reached& reached) {
        while (!reached.is_done) step(*reached.stream);
    }
    void step(Stream& stream) {
        if (stream.is_running) refuse("streams that wait for each other");
        const Operation operation = std::move(stream.pending.front());
        stream.pending.pop_front();
        stream.is_running = true;
        operation();
        stream.is_running = false;
    }
};

Machine& machine() {
    static Machine one;
    return one;
}

thread_local bool is_current = false;
int primary;  // its address is the context

// What every function begins with: its turn, and what it is told to fail with
struct Call {
    std::lock_guard<std::recursive_mutex> lock{machine().turn};
    int status = kOk;

    explicit Call(const char* function, bool needs_context = true) {
        const long long number = ++machine().calls[function];
        const char* told = std::getenv("FASTNNUNET_EMULATED_FAIL");
        if (told != nullptr) {
            const std::string text = told;
            const std::size_t first = text.find(':'), second = text.find(':', first + 1);
            if (text.substr(0, first) == function && number >= std::atoll(text.c_str() + first + 1)) {
                status = std::atoi(text.c_str() + second + 1);
            }
        }
        if (status == kOk && needs_context && !is_current) status = kInvalidContext;
    }
};

#define FNN_BEGIN(...)              \
    const Call call(__VA_ARGS__);   \
    if (call.status != kOk) return call.status

Stream& stream_of(void* handle) {
    auto* stream = static_cast<Stream*>(handle);
    if (machine().streams.count(stream) == 0) refuse("a stream that was destroyed, or none");
    return *stream;
}

}  // namespace

#define FNN_EXPORT extern "C" __attribute__((visibility("default")))

FNN_EXPORT int cuInit(unsigned) {
    FNN_BEGIN("cuInit", false);
    return number_of("FASTNNUNET_EMULATED_GPUS", 1) > 0 ? kOk : kNoDevice;
}
FNN_EXPORT int cuDeviceGetCount(int* count) {
    FNN_BEGIN("cuDeviceGetCount", false);
    *count = static_cast<int>(number_of("FASTNNUNET_EMULATED_GPUS", 1));
    return kOk;
}
FNN_EXPORT int cuDeviceGet(int* device, int index) {
    FNN_BEGIN("cuDeviceGet", false);
    *device = index;
    return kOk;
}
FNN_EXPORT int cuDeviceGetName(char* name, int size, int) {
    FNN_BEGIN("cuDeviceGetName", false);
    std::snprintf(name, static_cast<std::size_t>(size), "Emulated GPU");
    return kOk;
}
FNN_EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
    FNN_BEGIN("cuDeviceGetAttribute", false);
    if (attribute != 75 && attribute != 76) return kInvalidValue;
    *value = attribute == 75 ? 8 : 6;
    return kOk;
}
FNN_EXPORT int cuDevicePrimaryCtxRetain(void** context, int) {
    FNN_BEGIN("cuDevicePrimaryCtxRetain", false);
    *context = &primary;
    return kOk;
}
FNN_EXPORT int cuCtxSetCurrent(void* context) {
    FNN_BEGIN("cuCtxSetCurrent", false);
    if (context != &primary) return kInvalidContext;
    is_current = true;
    return kOk;
}
FNN_EXPORT int cuCtxSynchronize() {
    FNN_BEGIN("cuCtxSynchronize");
    for (Stream* stream : machine().streams) machine().run(*stream);
    return kOk;
}

FNN_EXPORT int cuModuleLoadData(void** module, const void* image) {
    FNN_BEGIN("cuModuleLoadData");
    if (std::strncmp(static_cast<const char*>(image), "emulated", 8) != 0) return kInvalidValue;
    *module = &primary;
    return kOk;
}
FNN_EXPORT int cuModuleGetFunction(void** function, void*, const char* name) {
    FNN_BEGIN("cuModuleGetFunction");
    static const std::map<std::string, const char*> names{
#define FNN_KERNEL(kernel, Params, shared) {"fastnnunet_" #kernel, #kernel},
        FNN_KERNELS(FNN_KERNEL)
#undef FNN_KERNEL
    };
    const auto found = names.find(name);
    if (found == names.end()) return kNotFound;
    *function = const_cast<char*>(found->second);
    return kOk;
}

FNN_EXPORT int cuStreamCreate(void** stream, unsigned) {
    FNN_BEGIN("cuStreamCreate");
    auto* made = new Stream;
    machine().streams.insert(made);
    *stream = made;
    return kOk;
}
FNN_EXPORT int cuStreamDestroy_v2(void* stream) {  // what is on it is still done
    FNN_BEGIN("cuStreamDestroy");
    Stream& one = stream_of(stream);
    machine().run(one);
    machine().streams.erase(&one);
    delete &one;
    return kOk;
}
FNN_EXPORT int cuStreamSynchronize(void* stream) {
    FNN_BEGIN("cuStreamSynchronize");
    if (stream_of(stream).captured) return kCaptureUnsupported;
    machine().run(stream_of(stream));
    machine().write_log();
    return kOk;
}
FNN_EXPORT int cuStreamWaitEvent(void* stream, void* event, unsigned) {
    FNN_BEGIN("cuStreamWaitEvent");
    const std::shared_ptr<Reached> reached = static_cast<Event*>(event)->last;
    if (!reached) refuse("an event that was never recorded is waited for");
    stream_of(stream).put([reached] { machine().run_until(*reached); });
    return kOk;
}

FNN_EXPORT int cuEventCreate(void** event, unsigned flags) {
    FNN_BEGIN("cuEventCreate");
    if (flags != 2) return kInvalidValue;
    *event = new Event;
    return kOk;
}
FNN_EXPORT int cuEventRecord(void* event, void* stream) {
    FNN_BEGIN("cuEventRecord");
    const auto reached = std::make_shared<Reached>(Reached{&stream_of(stream)});
    reached->stream->put([reached] { reached->is_done = true; });
    static_cast<Event*>(event)->last = reached;
    return kOk;
}
FNN_EXPORT int cuEventSynchronize(void* event) {
    FNN_BEGIN("cuEventSynchronize");
    machine().run_until(*static_cast<Event*>(event)->last);
    return kOk;
}
FNN_EXPORT int cuEventDestroy_v2(void* event) {
    FNN_BEGIN("cuEventDestroy");
    delete static_cast<Event*>(event);
    return kOk;
}

FNN_EXPORT int cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
    FNN_BEGIN("cuMemGetInfo");
    *total = static_cast<std::size_t>(number_of("FASTNNUNET_EMULATED_BYTES", 1LL << 30));
    *free = *total - machine().used;
    return kOk;
}
FNN_EXPORT int cuMemAlloc_v2(Address* address, std::size_t bytes) {
    FNN_BEGIN("cuMemAlloc");
    return machine().allocate(address, bytes);
}
FNN_EXPORT int cuMemFree_v2(Address address) {  // waits for the device
    FNN_BEGIN("cuMemFree");
    for (Stream* stream : machine().streams) machine().run(*stream);
    machine().free(address);
    return kOk;
}
FNN_EXPORT int cuMemAllocAsync(Address* address, std::size_t bytes, void* stream) {
    FNN_BEGIN("cuMemAllocAsync");
    if (stream_of(stream).captured) return kCaptureUnsupported;
    return machine().allocate(address, bytes);
}
FNN_EXPORT int cuMemFreeAsync(Address address, void* stream) {
    FNN_BEGIN("cuMemFreeAsync");
    stream_of(stream).put([address] { machine().free(address); });
    return kOk;
}
FNN_EXPORT int cuMemsetD8Async(Address address, unsigned char byte, std::size_t bytes, void* stream) {
    FNN_BEGIN("cuMemsetD8Async");
    stream_of(stream).put([=] {
        machine().check(address, bytes);
        std::memset(reinterpret_cast<void*>(address), byte, bytes);
    });
    return kOk;
}
FNN_EXPORT int cuMemcpyHtoDAsync_v2(Address to, const void* from, std::size_t bytes, void* stream) {
    FNN_BEGIN("cuMemcpyHtoDAsync");
    if (stream_of(stream).captured) return kCaptureUnsupported;  // ordinary memory
    machine().uploads.push_back(bytes);
    const auto* begin = static_cast<const char*>(from);
    stream_of(stream).put([to, staged = std::vector<char>(begin, begin + bytes)] {
        machine().check(to, staged.size());
        std::memcpy(reinterpret_cast<void*>(to), staged.data(), staged.size());
    });
    return kOk;
}
FNN_EXPORT int cuMemcpyDtoHAsync_v2(void* to, Address from, std::size_t bytes, void* stream) {
    FNN_BEGIN("cuMemcpyDtoHAsync");
    if (stream_of(stream).captured) return kCaptureUnsupported;
    machine().downloads.push_back(bytes);
    machine().run(stream_of(stream));
    machine().check(from, bytes);
    std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
    return kOk;
}
FNN_EXPORT int cuMemcpyDtoDAsync_v2(Address to, Address from, std::size_t bytes, void* stream) {
    FNN_BEGIN("cuMemcpyDtoDAsync");
    stream_of(stream).put([=] {
        machine().check(to, bytes);
        machine().check(from, bytes);
        std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    });
    return kOk;
}

FNN_EXPORT int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                              unsigned block_z, unsigned shared, void* stream, void** params, void** extra) {
    FNN_BEGIN("cuLaunchKernel");
    const std::string name = static_cast<const char*>(function);
    if (block_x != fastnnunet::cuda::kBlockX || block_y != fastnnunet::cuda::kBlockY || block_z != 1 ||
        extra != nullptr) {
        return kInvalidValue;
    }
    const auto* begin = static_cast<const char*>(params[0]);
    std::vector<char> copy(begin, begin + fastnnunet_params_bytes(name.c_str()));
    ++machine().kernels[name];
    const unsigned seed = ++machine().seed;
    stream_of(stream).put([=] {
        const long long grid[3] = {x, y, z};
        const int status = fastnnunet_emulate(name.c_str(), grid, shared, copy.data(), seed);
        if (status != 0) refuse("kernel " + name + ": status " + std::to_string(status) + " of emulate.cpp");
    });
    return kOk;
}
FNN_EXPORT int cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
    FNN_BEGIN("cuLaunchHostFunc");
    stream_of(stream).put([=] { function(data); });
    return kOk;
}

FNN_EXPORT int cuStreamBeginCapture_v2(void* stream, int mode) {
    FNN_BEGIN("cuStreamBeginCapture");
    if (mode != 1 || stream_of(stream).captured) return kInvalidValue;
    stream_of(stream).captured = std::make_unique<std::vector<Operation>>();
    return kOk;
}
FNN_EXPORT int cuStreamEndCapture(void* stream, void** graph) {
    FNN_BEGIN("cuStreamEndCapture");
    if (!stream_of(stream).captured) return kInvalidValue;
    *graph = new Graph{std::move(*stream_of(stream).captured)};
    stream_of(stream).captured.reset();
    return kOk;
}
FNN_EXPORT int cuGraphInstantiateWithFlags(void** made, void* graph, unsigned long long) {
    FNN_BEGIN("cuGraphInstantiate");
    *made = new Graph(*static_cast<Graph*>(graph));
    return kOk;
}
FNN_EXPORT int cuGraphLaunch(void* graph, void* stream) {
    FNN_BEGIN("cuGraphLaunch");
    for (const Operation& operation : static_cast<Graph*>(graph)->operations) stream_of(stream).put(operation);
    return kOk;
}
FNN_EXPORT int cuGraphDestroy(void* graph) {
    FNN_BEGIN("cuGraphDestroy");
    delete static_cast<Graph*>(graph);
    return kOk;
}
FNN_EXPORT int cuGraphExecDestroy(void* graph) {
    FNN_BEGIN("cuGraphExecDestroy");
    delete static_cast<Graph*>(graph);
    return kOk;
}

FNN_EXPORT int cuGetExportTable(const void** table, const void*) {  // NVRTC asks for it
    *table = nullptr;
    return kNotFound;
}

FNN_EXPORT int cuGetErrorName(int status, const char** name) {
    static const std::map<int, const char*> names{
        {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},     {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
        {kNoDevice, "CUDA_ERROR_NO_DEVICE"},             {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
        {kNotFound, "CUDA_ERROR_NOT_FOUND"},             {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
        {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
    const auto found = names.find(status);
    *name = found == names.end() ? nullptr : found->second;
    return found == names.end() ? kInvalidValue : kOk;
}
FNN_EXPORT int cuGetErrorString(int, const char** text) {
    *text = "emulated";
    return kOk;
}
