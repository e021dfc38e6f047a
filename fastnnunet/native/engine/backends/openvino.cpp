// OpenVINO through its C interface, which is the same for every release: the plugin is compiled without OpenVINO and
// works with whichever is installed, of the wheel, of Debian or of the archive.
//
// As fastnnunet/engines/openvino.py: fp32 unless asked for otherwise, no pinned threads, kernels for the patch size,
// and compiled models kept for the next process ($FASTNNUNET_CACHE_HOME/compiled/KEY.blob: SHA-256 of the rest, the
// rest).
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <mutex>
#include <sstream>
#include <thread>
#include <tuple>
#include <utility>

#include "backends/library.hpp"
#include "bundle/digest.hpp"

namespace fs = std::filesystem;
using namespace fastnnunet::engine;

namespace {

// Of openvino/c/*.h
struct ov_core;
struct ov_model;
struct ov_compiled_model;
struct ov_infer_request;
struct ov_tensor;
struct ov_output_const_port;
struct Shape {
    std::int64_t rank;
    std::int64_t* dims;
};
struct Dimension {
    std::int64_t min, max;
};
struct PartialShape {
    Dimension rank;
    Dimension* dims;
};
struct Version {
    const char* build_number;
    const char* description;
};

struct Functions {
    int (*ov_get_openvino_version)(Version*);
    void (*ov_version_free)(Version*);
    const char* (*ov_get_last_err_msg)();
    int (*ov_core_create)(ov_core**);
    int (*ov_core_set_property)(const ov_core*, const char*, ...);
    int (*ov_core_get_property)(const ov_core*, const char*, const char*, char**);
    void (*ov_free)(const char*);
    int (*ov_core_read_model)(const ov_core*, const char*, const char*, ov_model**);
    void (*ov_model_free)(ov_model*);
    int (*ov_model_const_input)(const ov_model*, ov_output_const_port**);
    int (*ov_model_const_output)(const ov_model*, ov_output_const_port**);
    int (*ov_port_get_partial_shape)(const ov_output_const_port*, PartialShape*);
    void (*ov_partial_shape_free)(PartialShape*);
    void (*ov_output_const_port_free)(ov_output_const_port*);
    int (*ov_model_reshape_single_input)(const ov_model*, PartialShape);
    int (*ov_core_compile_model)(const ov_core*, const ov_model*, const char*, std::size_t, ov_compiled_model**, ...);
    int (*ov_core_import_model)(const ov_core*, const char*, std::size_t, const char*, ov_compiled_model**);
    int (*ov_compiled_model_export_model)(const ov_compiled_model*, const char*);
    int (*ov_compiled_model_input)(const ov_compiled_model*, ov_output_const_port**);
    int (*ov_compiled_model_create_infer_request)(const ov_compiled_model*, ov_infer_request**);
    void (*ov_compiled_model_free)(ov_compiled_model*);
    int (*ov_port_get_element_type)(const ov_output_const_port*, int*);
    int (*ov_tensor_create_from_host_ptr)(int, Shape, void*, ov_tensor**);
    int (*ov_tensor_get_shape)(const ov_tensor*, Shape*);
    int (*ov_shape_free)(Shape*);
    void (*ov_tensor_free)(ov_tensor*);
    int (*ov_infer_request_set_input_tensor)(ov_infer_request*, const ov_tensor*);
    int (*ov_infer_request_set_output_tensor)(ov_infer_request*, const ov_tensor*);
    int (*ov_infer_request_get_output_tensor)(const ov_infer_request*, ov_tensor**);
    int (*ov_infer_request_infer)(ov_infer_request*);
    int (*ov_tensor_data)(const ov_tensor*, void**);
    void (*ov_infer_request_free)(ov_infer_request*);
};

struct Library {
    Functions ov{};
    std::string version;

    Library() {
        void* open = open_library({"FASTNNUNET_OPENVINO", "openvino/libs", "libopenvino_c"},
                                  "backend openvino needs OpenVINO\ninstall it: pip install openvino");
#define LOOK_UP(name) look_up(open, #name, ov.name)
        LOOK_UP(ov_get_openvino_version);
        LOOK_UP(ov_version_free);
        LOOK_UP(ov_get_last_err_msg);
        LOOK_UP(ov_core_create);
        LOOK_UP(ov_core_set_property);
        LOOK_UP(ov_core_get_property);
        LOOK_UP(ov_free);
        LOOK_UP(ov_core_read_model);
        LOOK_UP(ov_model_free);
        LOOK_UP(ov_model_const_input);
        LOOK_UP(ov_model_const_output);
        LOOK_UP(ov_port_get_partial_shape);
        LOOK_UP(ov_partial_shape_free);
        LOOK_UP(ov_output_const_port_free);
        LOOK_UP(ov_model_reshape_single_input);
        LOOK_UP(ov_core_compile_model);
        LOOK_UP(ov_core_import_model);
        LOOK_UP(ov_compiled_model_export_model);
        LOOK_UP(ov_compiled_model_input);
        LOOK_UP(ov_compiled_model_create_infer_request);
        LOOK_UP(ov_compiled_model_free);
        LOOK_UP(ov_port_get_element_type);
        LOOK_UP(ov_tensor_create_from_host_ptr);
        LOOK_UP(ov_tensor_get_shape);
        LOOK_UP(ov_shape_free);
        LOOK_UP(ov_tensor_free);
        LOOK_UP(ov_infer_request_set_input_tensor);
        LOOK_UP(ov_infer_request_set_output_tensor);
        LOOK_UP(ov_infer_request_get_output_tensor);
        LOOK_UP(ov_infer_request_infer);
        LOOK_UP(ov_tensor_data);
        LOOK_UP(ov_infer_request_free);
#undef LOOK_UP
        Version found{};
        if (ov.ov_get_openvino_version(&found) == 0) {
            version = found.build_number;
            ov.ov_version_free(&found);
        }
    }
};

Library& library() {
    static Library* one = new Library;  // never torn down: its threads may outlive this
    return *one;
}

void check(int status) {
    if (status == 0) return;
    const char* reason = library().ov.ov_get_last_err_msg();
    throw std::runtime_error(reason == nullptr || *reason == '\0' ? "status " + std::to_string(status) : reason);
}

// A handle that is freed by a function of the library.
template <class T>
class Handle {
public:
    Handle(T* one, void (*release)(T*)) : one_(one), release_(release) {}
    ~Handle() {
        if (one_ != nullptr) release_(one_);
    }
    Handle(Handle&& other) noexcept : one_(other.release()), release_(other.release_) {}
    Handle& operator=(Handle&&) = delete;
    T* get() const { return one_; }
    T* release() {
        T* one = one_;
        one_ = nullptr;
        return one;
    }

private:
    T* one_;
    void (*release_)(T*);
};

// One for the process: opening the plugin of the CPU takes as long as loading a small model.
ov_core* core() {
    static ov_core* one = [] {
        ov_core* made = nullptr;
        check(library().ov.ov_core_create(&made));
        return made;
    }();
    return one;
}

std::string property(const char* name) {
    char* value = nullptr;
    if (library().ov.ov_core_get_property(core(), "CPU", name, &value) != 0 || value == nullptr) return "";
    std::string text = value;
    library().ov.ov_free(value);
    return text;
}

std::string cpu_flags() {
    std::ifstream lines("/proc/cpuinfo");
    for (std::string line; std::getline(lines, line);) {
        if (line.rfind("flags", 0) == 0 || line.rfind("Features", 0) == 0) return line;
    }
    return "";
}

constexpr int kRecipe = 1;  // counts up with every change of how a model is prepared for compiling
constexpr std::uintmax_t kMostBytes = std::uintmax_t{1} << 30, kLargestBytes = std::uintmax_t{1} << 28;
constexpr std::size_t kDigestDigits = 64;

struct Hints {
    std::string precision, threads;

    template <class Set>
    int give(const Set& set) const {
        return set("INFERENCE_PRECISION_HINT", precision.c_str(), "INFERENCE_NUM_THREADS", threads.c_str(),
                   // pinned threads wait for their core while others are idle
                   "ENABLE_CPU_PINNING", "NO", "PERFORMANCE_HINT", "LATENCY");
    }
};

std::string shape_text(const ov_output_const_port* port) {
    PartialShape shape{};
    check(library().ov.ov_port_get_partial_shape(port, &shape));
    std::string text = "[";
    for (std::int64_t i = 0; i < shape.rank.max; ++i) {
        text +=
            (i == 0 ? "" : ",") + (shape.dims[i].min == shape.dims[i].max ? std::to_string(shape.dims[i].min) : "?");
    }
    library().ov.ov_partial_shape_free(&shape);
    return text + "]";
}

// Whether every axis of the port takes the length wanted, 0 or more; -1: any.
bool takes(const ov_output_const_port* port, const std::vector<std::int64_t>& wanted) {
    PartialShape shape{};
    check(library().ov.ov_port_get_partial_shape(port, &shape));
    bool fits = shape.rank.max == static_cast<std::int64_t>(wanted.size());
    for (std::size_t i = 0; fits && i < wanted.size(); ++i) {
        const Dimension& one = shape.dims[i];
        const bool is_dynamic = one.min != one.max;
        fits = is_dynamic || wanted[i] == -1 || one.min == wanted[i];
    }
    library().ov.ov_partial_shape_free(&shape);
    return fits;
}

class OpenVINO {
public:
    explicit OpenVINO(const fastnnunet_network_spec& spec)
        : channels_(spec.channels), heads_(spec.heads), dims_(spec.dims), shapes_vary_(spec.shapes_vary != 0),
          version_(library().version) {
        precision_ = spec.precision;
        if (precision_ == "bf16" && property("OPTIMIZATION_CAPABILITIES").find("BF16") == std::string::npos) {
            precision_ = "fp32";
        }
        const Hints hints{precision_ == "bf16" ? "bf16" : "f32", std::to_string(spec.threads)};
        const std::string kept = spec.cache_folder == nullptr ? "" : blob_path(spec, hints);
        if (kept.empty() || !read_kept(kept, hints)) {
            compile(spec, hints);
            if (!kept.empty()) keep(kept);
        }
        ov_output_const_port* port = nullptr;
        check(ov().ov_compiled_model_input(compiled_, &port));
        const int status = ov().ov_port_get_element_type(port, &float32_);
        ov().ov_output_const_port_free(port);
        check(status);
    }

    ~OpenVINO() {
        for (ov_infer_request* request : idle_) ov().ov_infer_request_free(request);
        ov().ov_compiled_model_free(compiled_);
    }

    OpenVINO(const OpenVINO&) = delete;
    OpenVINO& operator=(const OpenVINO&) = delete;

    void run(const float* batch, std::int64_t count, const std::int64_t* tile, float* logits) {
        if (shapes_vary_) {
            const auto [found, request] = run_in_place(batch, count, tile);
            std::int64_t values = count * heads_;
            for (std::int32_t axis = 0; axis < dims_; ++axis) values *= tile[axis];
            std::memcpy(logits, found, static_cast<std::size_t>(values) * sizeof(float));
            return let_go(request);
        }
        Handle<ov_infer_request> request = with_input(batch, count, tile);
        // straight to where they are wanted: those of many classes are large
        std::vector<std::int64_t> shape = shape_of(count, heads_, tile);
        const Handle<ov_tensor> output(tensor(shape, logits), ov().ov_tensor_free);
        check(ov().ov_infer_request_set_output_tensor(request.get(), output.get()));
        check(ov().ov_infer_request_infer(request.get()));
        let_go(request.release());
    }

    // Where the logits of a network whose shapes vary are, which its library puts nowhere else, until `let_go`
    std::pair<const float*, ov_infer_request*> run_in_place(const float* batch, std::int64_t count,
                                                            const std::int64_t* tile) {
        if (!shapes_vary_) return {nullptr, nullptr};
        Handle<ov_infer_request> request = with_input(batch, count, tile);
        check(ov().ov_infer_request_infer(request.get()));
        const float* logits = output(request.get(), shape_of(count, heads_, tile));
        return {logits, request.release()};
    }

    void let_go(ov_infer_request* request) {
        const std::lock_guard lock(turn_);
        idle_.push_back(request);
    }

    const char* precision() const { return precision_.c_str(); }
    const char* version() const { return version_.c_str(); }

private:
    static const Functions& ov() { return library().ov; }

    ov_tensor* tensor(std::vector<std::int64_t>& shape, float* values) const {
        ov_tensor* made = nullptr;
        check(ov().ov_tensor_create_from_host_ptr(float32_, {static_cast<std::int64_t>(shape.size()), shape.data()},
                                                  values, &made));
        return made;
    }

    std::vector<std::int64_t> shape_of(std::int64_t count, std::int64_t channels, const std::int64_t* tile) const {
        std::vector<std::int64_t> shape{count, channels};
        shape.insert(shape.end(), tile, tile + dims_);
        return shape;
    }

    Handle<ov_infer_request> with_input(const float* batch, std::int64_t count, const std::int64_t* tile) {
        Handle<ov_infer_request> request(take(), ov().ov_infer_request_free);
        std::vector<std::int64_t> shape = shape_of(count, channels_, tile);
        const Handle<ov_tensor> input(tensor(shape, const_cast<float*>(batch)), ov().ov_tensor_free);
        check(ov().ov_infer_request_set_input_tensor(request.get(), input.get()));
        return request;
    }

    static const float* output(ov_infer_request* request, const std::vector<std::int64_t>& shape) {
        ov_tensor* found = nullptr;
        check(ov().ov_infer_request_get_output_tensor(request, &found));
        const Handle<ov_tensor> output(found, ov().ov_tensor_free);
        Shape got{};
        check(ov().ov_tensor_get_shape(output.get(), &got));
        const bool fits =
            got.rank == static_cast<std::int64_t>(shape.size()) && std::equal(shape.begin(), shape.end(), got.dims);
        ov().ov_shape_free(&got);
        if (!fits) throw std::runtime_error("the network returned logits of another shape");
        void* data = nullptr;
        check(ov().ov_tensor_data(output.get(), &data));
        return static_cast<const float*>(data);
    }

    void compile(const fastnnunet_network_spec& spec, const Hints& hints) {
        ov_model* read = nullptr;
        check(ov().ov_core_read_model(core(), spec.model_file, nullptr, &read));
        const Handle<ov_model> model(read, ov().ov_model_free);
        check_shapes(model.get(), spec);
        if (!spec.shapes_vary) {
            std::vector<std::int64_t> wanted{spec.batch_size == 0 ? -1 : spec.batch_size, spec.channels};
            wanted.insert(wanted.end(), spec.patch_size, spec.patch_size + spec.dims);
            std::vector<Dimension> dims;
            for (const std::int64_t size : wanted) dims.push_back({std::max<std::int64_t>(size, 0), size});
            const auto rank = static_cast<std::int64_t>(dims.size());
            if (has_dynamic_space(model.get())) {
                check(ov().ov_model_reshape_single_input(model.get(), {{rank, rank}, dims.data()}));
            }
        }
        check(hints.give([&](auto... words) {
            return ov().ov_core_compile_model(core(), model.get(), "CPU", sizeof...(words), &compiled_, words...);
        }));
    }

    static bool has_dynamic_space(const ov_model* model) {
        ov_output_const_port* port = nullptr;
        check(ov().ov_model_const_input(model, &port));
        const std::string text = shape_text(port);
        ov().ov_output_const_port_free(port);
        return text.find('?', text.find(',')) != std::string::npos;
    }

    static void check_shapes(const ov_model* model, const fastnnunet_network_spec& spec) {
        for (const bool is_input : {true, false}) {
            ov_output_const_port* port = nullptr;
            check(is_input ? ov().ov_model_const_input(model, &port) : ov().ov_model_const_output(model, &port));
            const Handle<ov_output_const_port> held(port, ov().ov_output_const_port_free);
            std::vector<std::int64_t> wanted{spec.batch_size == 0 ? -1 : spec.batch_size,
                                             is_input ? spec.channels : spec.heads};
            for (std::int32_t i = 0; i < spec.dims; ++i) wanted.push_back(spec.shapes_vary ? -1 : spec.patch_size[i]);
            if (takes(port, wanted)) continue;
            std::string expected;
            for (const std::int64_t size : wanted) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
            throw std::runtime_error(std::string("it has ") + (is_input ? "input " : "output ") + shape_text(port) +
                                     ", expected one " + (is_input ? "input [" : "output [") + expected + "]");
        }
    }

    std::string blob_path(const fastnnunet_network_spec& spec, const Hints& hints) const {
        std::ostringstream key;
        key << "engine " << kRecipe << '\n'
            << version_ << '\n'
            << property("FULL_DEVICE_NAME") << '\n'
            << property("OPTIMIZATION_CAPABILITIES") << '\n'
            << cpu_flags() << '\n'
            << hints.precision << ' ' << hints.threads << '\n'
            << spec.file_digest << '\n'
            << spec.batch_size << ' ' << spec.channels << ' ' << spec.heads << ' ' << spec.shapes_vary;
        for (std::int32_t i = 0; i < spec.dims; ++i) key << ' ' << spec.patch_size[i];
        return (fs::path(spec.cache_folder) / (sha256_hex(key.str()).substr(0, 32) + ".blob")).string();
    }

    // False where there is no whole file, or it does not load.
    bool read_kept(const std::string& path, const Hints& hints) {
        std::ifstream file(path, std::ios::binary | std::ios::ate);
        if (!file) return false;
        const auto size = static_cast<std::streamoff>(file.tellg());
        if (size <= static_cast<std::streamoff>(kDigestDigits)) return false;
        kept_.assign(static_cast<std::size_t>(size), '\0');
        file.seekg(0);
        if (!file.read(kept_.data(), size)) return false;
        const std::string_view blob = std::string_view(kept_).substr(kDigestDigits);
        if (sha256_hex(blob) != kept_.substr(0, kDigestDigits)) return false;
        {
            static std::mutex turn;  // the settings of an import are those of the core
            const std::lock_guard lock(turn);
            const int status = hints.give([&](auto... words) { return set_each(words...); });
            if (status != 0 || ov().ov_core_import_model(core(), blob.data(), blob.size(), "CPU", &compiled_) != 0) {
                compiled_ = nullptr;
                return false;
            }
        }
        std::error_code error;
        fs::last_write_time(path, fs::file_time_type::clock::now(), error);  // used today
        return true;
    }

    static int set_each() { return 0; }

    template <class... More>
    static int set_each(const char* name, const char* value, More... more) {
        const int status = ov().ov_core_set_property(core(), "CPU", name, value);
        return status != 0 ? status : set_each(more...);
    }

    // What cannot be kept is compiled again next time.
    void keep(const std::string& path) const {
        std::error_code error;
        const fs::path folder = fs::path(path).parent_path();
        fs::create_directories(folder, error);
        const std::size_t own = std::hash<std::thread::id>()(std::this_thread::get_id());
        const std::string raw = path + ".partial-" + std::to_string(getpid()) + "-" + std::to_string(own);
        const std::string whole = raw + "-whole";
        if (!error && ov().ov_compiled_model_export_model(compiled_, raw.c_str()) == 0) {
            std::ifstream exported(raw, std::ios::binary);
            const std::string blob((std::istreambuf_iterator<char>(exported)), std::istreambuf_iterator<char>());
            if (!blob.empty() && blob.size() <= kLargestBytes) {
                std::ofstream file(whole, std::ios::binary);
                file << sha256_hex(blob) << blob;
                file.close();
                if (file) fs::rename(whole, path, error);
            }
        }
        fs::remove(raw, error);
        fs::remove(whole, error);
        make_room(folder);
    }

    // Removes what was used longest ago. Another process may do the same.
    static void make_room(const fs::path& folder) {
        std::vector<std::pair<fs::file_time_type, fs::path>> files;
        std::error_code error;
        for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
            if (entry->path().extension() == ".blob") files.emplace_back(entry->last_write_time(error), entry->path());
        }
        std::sort(files.rbegin(), files.rend());
        std::uintmax_t total = 0;
        for (const auto& file : files) {
            const std::uintmax_t size = fs::file_size(file.second, error);
            if (!error && (total += size) > kMostBytes) fs::remove(file.second, error);
        }
    }

    ov_infer_request* take() {
        {
            const std::lock_guard lock(turn_);
            if (!idle_.empty()) {
                ov_infer_request* request = idle_.back();
                idle_.pop_back();
                return request;
            }
        }
        ov_infer_request* request = nullptr;
        check(ov().ov_compiled_model_create_infer_request(compiled_, &request));
        return request;
    }

    std::int64_t channels_, heads_;
    std::int32_t dims_;
    bool shapes_vary_;
    std::string precision_, version_;
    int float32_ = 0;
    std::string kept_;  // what an imported model was made of: its weights stay there
    ov_compiled_model* compiled_ = nullptr;
    std::mutex turn_;
    std::vector<ov_infer_request*> idle_;
};

OpenVINO* of(fastnnunet_network* network) { return reinterpret_cast<OpenVINO*>(network); }
const OpenVINO* of(const fastnnunet_network* network) { return reinterpret_cast<const OpenVINO*>(network); }

std::int32_t find(fastnnunet_failure* failure) {
    return guarded(failure, [] { library(); });
}

std::int32_t load(const fastnnunet_network_spec* spec, fastnnunet_network** network, fastnnunet_failure* failure) {
    const std::int32_t status =
        guarded(failure, [&] { *network = reinterpret_cast<fastnnunet_network*>(new OpenVINO(*spec)); });
    if (status != 0)
        say(failure, std::string("openvino cannot load ") + spec->model_file + ": " + std::string(failure->message));
    return status;
}

std::int32_t run(fastnnunet_network* network, const float* batch, std::int64_t count, const std::int64_t* tile,
                 float* logits, fastnnunet_failure* failure) {
    return guarded(failure, [&] { of(network)->run(batch, count, tile, logits); });
}

std::int32_t run_in_place(fastnnunet_network* network, const float* batch, std::int64_t count,
                          const std::int64_t* tile, const float** logits, void** held, fastnnunet_failure* failure) {
    return guarded(failure, [&] { std::tie(*logits, *held) = of(network)->run_in_place(batch, count, tile); });
}

void let_go(fastnnunet_network* network, void* held) { of(network)->let_go(static_cast<ov_infer_request*>(held)); }

const fastnnunet_backend kBackend{
    FASTNNUNET_BACKEND_INTERFACE,
    "openvino",
    "fp32 bf16 int8",
    "cpu",
    find,
    load,
    run,
    [](fastnnunet_network* network) { delete of(network); },
    [](const fastnnunet_network* network) { return std::strcmp(of(network)->precision(), "bf16") == 0 ? 0.8 : 1.2; },
    [](const fastnnunet_network*, std::int64_t*) -> std::int32_t { return 0; },
    [](const fastnnunet_network* network) { return of(network)->precision(); },
    [](const fastnnunet_network* network) { return of(network)->version(); },
    nullptr,  // on no GPU of CUDA's
    nullptr,
    nullptr,
    nullptr,
    run_in_place,
    let_go,
};

}  // namespace

extern "C" FASTNNUNET_PLUGIN const fastnnunet_backend* fastnnunet_backend_entry_1(void) { return &kBackend; }
