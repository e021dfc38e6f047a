#include "backends/plugins.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>

#include "backends/cuda_driver.hpp"
#include "bundle/file.hpp"
#include "core/no_memory.hpp"
#include "error.hpp"
#include "predict/arrays.hpp"

namespace fastnnunet::engine {
namespace {

namespace fs = std::filesystem;

constexpr const char* kEnding = ".so";                                     // of modules that are opened, on macOS too
constexpr const char* kNames[] = {"openvino", "onnxruntime", "tensorrt"};  // on a CPU, the fastest first

// Where this code lies.
fs::path own_folder() {
    Dl_info info{};
    if (dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0 || info.dli_fname == nullptr) return ".";
    std::error_code error;
    const fs::path file = fs::canonical(info.dli_fname, error);  // a program is named as it was called
    if (!error) return file.parent_path();
    return fs::read_symlink("/proc/self/exe", error).parent_path();
}

// Plugins stay open for good: what they opened may have threads of its own.
const fastnnunet_backend& open_plugin(const std::string& name, const std::string& given) {
    static std::mutex turn;
    static std::map<std::string, const fastnnunet_backend*> open;
    const std::lock_guard lock(turn);
    const std::string file = "libfastnnunet_" + name + kEnding;
    std::string places;
    for (const std::string& folder : plugin_folders(given)) {
        const std::string path = joined(folder, file);
        places += "\n  - " + folder;
        if (const auto found = open.find(path); found != open.end()) return *found->second;
        if (!is_regular_file(path)) continue;
        void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) throw BackendError("backend " + name + ": " + path + " does not load: " + dlerror());
        const auto entry = reinterpret_cast<fastnnunet_backend_entry>(dlsym(library, FASTNNUNET_BACKEND_ENTRY));
        const fastnnunet_backend* backend = entry == nullptr ? nullptr : entry();
        if (backend == nullptr || backend->interface_version != FASTNNUNET_BACKEND_INTERFACE) {
            throw BackendError("backend " + name + ": " + path + " is of another version of this engine\n" +
                               "install the two together");
        }
        open[path] = backend;
        return *backend;
    }
    throw BackendError(
        "backend " + name + " is not part of this engine: " + file + " is in none of its folders" + places +
        "\nbuild it with `make engine`, install it with pip install 'fastnnunet[engine]', or name its folder "
        "with FASTNNUNET_PLUGINS");
}

bool has_word(const std::string& words, const std::string& word) {
    return (" " + words + " ").find(" " + word + " ") != std::string::npos;
}

std::string or_words(std::string words) {
    for (std::size_t at = 0; (at = words.find(' ', at)) != std::string::npos; at += 4) words.replace(at, 1, " or ");
    return words;
}

void check_found(const fastnnunet_backend& backend) {
    fastnnunet_failure failure{};
    if (backend.find(&failure) != 0) throw BackendError(failure.message);
}

bool is_device(const std::string& name) {
    if (name == "cpu" || name == "cuda") return true;
    return name.rfind("cuda:", 0) == 0 && name.size() > 5 &&
           name.find_first_not_of("0123456789", 5) == std::string::npos;
}

const fastnnunet_backend& choose(const BackendChoice& choice) {
    const bool on_gpu = choice.device.rfind("cuda", 0) == 0;
    if (!choice.device.empty() && !is_device(choice.device)) {
        throw SpecError("device: got " + python_text(choice.device) +
                        ", expected cpu, cuda, or cuda:1, cuda:2, ... for another GPU");
    }
    if (choice.name != "auto") {
        if (std::find(std::begin(kNames), std::end(kNames), choice.name) == std::end(kNames)) {
            throw SpecError("backend: got " + python_text(choice.name) +
                            ", expected auto or one of openvino, onnxruntime, tensorrt");
        }
        const fastnnunet_backend& backend = open_plugin(choice.name, choice.plugins);
        check_found(backend);
        return backend;
    }
    std::string reasons;
    std::vector<const char*> order(std::begin(kNames), std::end(kNames) - 1);
    if (on_gpu) order = {"tensorrt", "onnxruntime"};
    for (const char* name : order) {
        try {
            const fastnnunet_backend& backend = open_plugin(name, choice.plugins);
            check_found(backend);
            return backend;
        } catch (const BackendError& e) {
            reasons += std::string("\n") + e.what();
        }
    }
    throw BackendError("no backend can be used here:" + reasons);
}

// Throws BackendError where the GPU of `cuda`, `cuda:1`, ... is none that this process sees.
void check_gpu(const std::string& device) {
    std::string reason;
    try {
        int count = 0;
        cuda_driver().check(cuda_driver().cuDeviceGetCount(&count), "cuDeviceGetCount");
        if (gpu_index(device) < count) return;
        reason = "this process sees " + std::to_string(count) + " GPU(s), of which CUDA_VISIBLE_DEVICES decides";
    } catch (const std::exception& e) {
        reason = e.what();
    }
    throw BackendError("-device " + device + " needs an NVIDIA GPU with a current driver: " + reason +
                       "\ngive -device cpu, or another --backend");
}

std::string model_path(const Bundle& bundle, const std::string& model_file, const std::string& precision,
                       const std::string& backend) {
    if (precision != "int8") return model_file;
    const auto name_for = [&](const char* name) {
        return int8_file(model_file, std::strcmp(name, "openvino") == 0 ? ".xml" : ".onnx");
    };
    const std::string wanted = name_for(backend.c_str());  // TensorRT builds from that of ONNX Runtime
    if (bundle.files.count(wanted) > 0) return wanted;
    std::string other;
    for (const char* name : {"onnxruntime", "openvino"}) {
        if (other.empty() && bundle.files.count(name_for(name)) > 0) other = name;
    }
    throw BackendError("this bundle has no int8 model for " + backend + ": " + wanted +
                       " is missing\nmake it: fastnnunet export quantize " + bundle.folder +
                       " --precision int8 --backend " + backend +
                       (other.empty() ? "" : "\nor predict with --backend " + other + ", which has one"));
}

}  // namespace

std::vector<std::string> plugin_folders(const std::string& given) {
    if (!given.empty()) return {given};
    std::vector<std::string> folders;
    if (const char* variable = std::getenv("FASTNNUNET_PLUGINS"); variable != nullptr && *variable != '\0') {
        folders.emplace_back(variable);
    }
    const fs::path own = own_folder();
    for (const fs::path& folder : {own, own / "fastnnunet", own.parent_path() / "lib" / "fastnnunet",
                                   own.parent_path() / "lib"}) {
        folders.push_back(folder.string());
    }
    // of an environment of Python in whose `bin` a program is
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(own.parent_path() / "lib", error)) {
        if (entry.path().filename().string().rfind("python3", 0) == 0) {
            folders.push_back((entry.path() / "site-packages" / "fastnnunet" / "native" / "lib").string());
        }
    }
    return folders;
}

Network::Network(const fastnnunet_backend& backend, fastnnunet_network* network, const Bundle& bundle)
    : backend_(backend), network_(network), channels_(bundle.channels()), heads_(bundle.num_heads),
      batch_size_(bundle.batch_size), dims_(bundle.patch_size.size()) {}

Network::~Network() { backend_.unload(network_); }

Sizes Network::largest_tile() const {
    Sizes tile(dims_);
    if (backend_.largest_tile(network_, tile.data()) == 0) tile.clear();
    return tile;
}

void Network::run_exactly(const float* batch, std::int64_t count, const Sizes& tile, float* logits) const {
    fastnnunet_failure failure{};
    if (backend_.run(network_, batch, count, tile.data(), logits, &failure) != 0) fail(failure, count, tile);
}

KeptLogits Network::run_in_place(const float* batch, std::int64_t count, const Sizes& tile) const {
    if (backend_.run_in_place == nullptr || (batch_size_ != 0 && count != batch_size_)) return nullptr;
    const float* logits = nullptr;
    void* held = nullptr;
    fastnnunet_failure failure{};
    if (backend_.run_in_place(network_, batch, count, tile.data(), &logits, &held, &failure) != 0) {
        fail(failure, count, tile);
    }
    return {logits, [this, held](const float*) { backend_.let_go(network_, held); }};
}

void Network::fail(const fastnnunet_failure& failure, std::int64_t count, const Sizes& tile) const {
    std::string shape = "(" + std::to_string(count) + ", " + std::to_string(channels_);
    for (const std::int64_t size : tile) shape += ", " + std::to_string(size);
    const std::string said = std::string(backend_.name) + " failed on a batch of shape " + shape + "): ";
    if (tells_no_memory(failure.message)) throw NoMemoryError(said + failure.message);
    throw BackendError(said + failure.message);
}

std::optional<int> Network::gpu() const {
    const int index = backend_.gpu == nullptr ? -1 : backend_.gpu(network_);
    return index < 0 ? std::nullopt : std::optional(index);
}

void Network::run_on_gpu(const float* batch, std::int64_t count, const Sizes& tile, float* logits,
                         void* stream) const {
    fastnnunet_failure failure{};
    if (backend_.run_on_gpu(network_, batch, count, tile.data(), logits, stream, &failure) != 0) {
        fail(failure, count, tile);
    }
}

void Network::run(const float* batch, std::int64_t count, const Sizes& tile, float* logits) const {
    if (batch_size_ == 0 || count == batch_size_) return run_exactly(batch, count, tile, logits);
    // a model that takes exactly so many patches at once
    std::int64_t voxels = 1;
    for (const std::int64_t size : tile) voxels *= size;
    const std::int64_t in = channels_ * voxels, out = heads_ * voxels;
    const auto full = allocate<float>(batch_size_ * in);
    const auto results = allocate<float>(batch_size_ * out);
    std::fill(full.get(), full.get() + batch_size_ * in, 0.0f);
    for (std::int64_t first = 0; first < count; first += batch_size_) {
        const std::int64_t now = std::min(batch_size_, count - first);
        std::copy(batch + first * in, batch + (first + now) * in, full.get());
        run_exactly(full.get(), batch_size_, tile, results.get());
        std::copy(results.get(), results.get() + now * out, logits + first * out);
    }
}

std::vector<std::unique_ptr<Network>> load_networks(const Bundle& bundle, const BackendChoice& choice) {
    const fastnnunet_backend& backend = choose(choice);
    if (!has_word(backend.precisions, choice.precision)) {
        throw BackendError(std::string("backend ") + backend.name + " computes in " + or_words(backend.precisions) +
                           " only, got precision " + python_text(choice.precision));
    }
    const std::string devices = backend.devices;
    const std::string device = choice.device.empty() ? devices.substr(0, devices.find(' ')) : choice.device;
    if (!has_word(devices, device.substr(0, device.find(':')))) {
        throw BackendError(std::string("backend ") + backend.name + " computes on " + or_words(devices) + ", not on " +
                           device + "\ngive -device " + or_words(devices) + ", or another --backend");
    }
    if (device.rfind("cuda", 0) == 0) check_gpu(device);
    const std::string cache = joined(local_home(), "compiled");
    std::vector<std::unique_ptr<Network>> networks;
    for (const std::string& model_file : bundle.model_files) {
        const std::string file = model_path(bundle, model_file, choice.precision, backend.name);
        std::string digest = bundle.files.at(file);
        if (file.size() > 4 && file.substr(file.size() - 4) == ".xml") {
            digest += bundle.files.at(file.substr(0, file.size() - 4) + ".bin");
        }
        const std::string path = joined(bundle.folder, file);
        fastnnunet_network_spec spec{};
        spec.struct_size = sizeof spec;
        spec.model_file = path.c_str();
        spec.bundle = bundle.folder.c_str();
        spec.precision = choice.precision.c_str();
        spec.device = device.c_str();
        spec.threads = choice.threads > 0 ? choice.threads : available_cores();
        spec.batch_size = bundle.batch_size;
        spec.channels = bundle.channels();
        spec.heads = bundle.num_heads;
        spec.dims = static_cast<std::int32_t>(bundle.patch_size.size());
        std::copy(bundle.patch_size.begin(), bundle.patch_size.end(), spec.patch_size);
        spec.shapes_vary = bundle.one_pass.has_value();
        spec.file_digest = digest.c_str();
        spec.cache_folder = cache.c_str();
        fastnnunet_failure failure{};
        fastnnunet_network* network = nullptr;
        if (backend.load(&spec, &network, &failure) != 0) throw BackendError(failure.message);
        networks.push_back(std::make_unique<Network>(backend, network, bundle));
    }
    return networks;
}

std::vector<std::pair<std::string, std::string>> list_backends(const std::string& plugins) {
    std::vector<std::pair<std::string, std::string>> found;
    for (const char* name : kNames) {
        try {
            check_found(open_plugin(name, plugins));
            found.emplace_back(name, "");
        } catch (const BackendError& e) {
            found.emplace_back(name, e.what());
        }
    }
    return found;
}

}  // namespace fastnnunet::engine
