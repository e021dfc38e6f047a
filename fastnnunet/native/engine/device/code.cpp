#include "device/code.hpp"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include "backends/library.hpp"
#include "backends/plugins.hpp"
#include "bundle/digest.hpp"
#include "bundle/file.hpp"
#include "error.hpp"

namespace fastnnunet::engine {
namespace {

namespace fs = std::filesystem;

constexpr const char* kOptions[] = {"--std=c++17", "--fmad=false"};  // no contraction: results are those of the core
constexpr const char* kMend = "install it: pip install nvidia-cuda-nvrtc (for CUDA 12: nvidia-cuda-nvrtc-cu12)";

class Nvrtc {
public:
    // Throws BackendError where it is missing.
    Nvrtc() {
        try {
            void* open = open_any();
#define FNN_LOOK_UP(name) look_up(open, "nvrtc" #name, name)
            FNN_LOOK_UP(Version);
            open_builtins();
            FNN_LOOK_UP(GetErrorString);
            FNN_LOOK_UP(GetNumSupportedArchs);
            FNN_LOOK_UP(GetSupportedArchs);
            FNN_LOOK_UP(CreateProgram);
            FNN_LOOK_UP(DestroyProgram);
            FNN_LOOK_UP(CompileProgram);
            FNN_LOOK_UP(GetProgramLogSize);
            FNN_LOOK_UP(GetProgramLog);
            FNN_LOOK_UP(GetCUBINSize);
            FNN_LOOK_UP(GetCUBIN);
            FNN_LOOK_UP(GetPTXSize);
            FNN_LOOK_UP(GetPTX);
#undef FNN_LOOK_UP
        } catch (const Missing& e) {
            throw BackendError(std::string("the CUDA kernels have to be compiled, and NVRTC is missing: ") + e.what());
        }
    }

    std::string version() const {
        int major = 0, minor = 0;
        check(Version(&major, &minor));
        return std::to_string(major) + "." + std::to_string(minor);
    }

    // Machine code, or PTX where it does not know an architecture this new
    std::string compile(int architecture) const {
        int count = 0;
        check(GetNumSupportedArchs(&count));
        std::vector<int> known(static_cast<std::size_t>(count));
        check(GetSupportedArchs(known.data()));
        const bool is_known = std::find(known.begin(), known.end(), architecture) != known.end();
        int target = 0;
        for (const int one : known) target = one <= architecture ? std::max(target, one) : target;
        if (target == 0) {
            throw BackendError("the GPU is of architecture sm" + std::to_string(architecture) +
                               ", NVRTC compiles for sm" + std::to_string(*std::min_element(known.begin(), known.end())) +
                               " and later");
        }
        const std::string wanted =
            std::string("--gpu-architecture=") + (is_known ? "sm_" : "compute_") + std::to_string(target);
        const char* main = nullptr;
        std::vector<const char*> texts, names, options(std::begin(kOptions), std::end(kOptions));
        for (const KernelSource& source : kernel_sources()) {
            if (std::string(source.name) == "kernels.cu") {
                main = source.text;
            } else {
                texts.push_back(source.text);
                names.push_back(source.name);
            }
        }
        options.push_back(wanted.c_str());
        void* program = nullptr;
        check(CreateProgram(&program, main, "kernels.cu", static_cast<int>(texts.size()), texts.data(), names.data()));
        const struct Destroys {
            const Nvrtc& with;
            void* program;
            ~Destroys() { with.DestroyProgram(&program); }
        } destroys{*this, program};
        if (CompileProgram(program, static_cast<int>(options.size()), options.data()) != 0) {
            throw BackendError("the CUDA kernels do not compile for sm" + std::to_string(architecture) + ": " +
                               text_of(program, GetProgramLogSize, GetProgramLog));
        }
        return is_known ? text_of(program, GetCUBINSize, GetCUBIN) : text_of(program, GetPTXSize, GetPTX);
    }

private:
    using Size = int (*)(void*, std::size_t*);
    using Text = int (*)(void*, char*);

    static void* open_any() {
        const std::string needed = std::string("the library libnvrtc is needed\n") + kMend;
        try {
            return open_library({"FASTNNUNET_NVRTC", "nvidia/cu13/lib", "libnvrtc"}, needed);
        } catch (const Missing&) {
            return open_library({"FASTNNUNET_NVRTC", "nvidia/cuda_nvrtc/lib", "libnvrtc"}, needed);
        }
    }

    // NVRTC opens another library by its name alone, which lies beside it in an environment of Python.
    void open_builtins() const {
        Dl_info info{};
        if (dladdr(reinterpret_cast<const void*>(Version), &info) == 0 || info.dli_fname == nullptr) return;
        const fs::path folder = fs::path(info.dli_fname).parent_path();
        for (const fs::path& file : places::libraries_in(folder, "libnvrtc-builtins")) {
            dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);  // whatever is missing then, NVRTC tells
        }
    }

    void check(int status) const {
        if (status != 0) throw BackendError(std::string("NVRTC failed: ") + GetErrorString(status));
    }

    std::string text_of(void* program, Size size, Text text) const {
        std::size_t bytes = 0;
        check(size(program, &bytes));
        std::string made(bytes, '\0');
        check(text(program, made.data()));
        return made;
    }

    int (*Version)(int*, int*);
    const char* (*GetErrorString)(int);
    int (*GetNumSupportedArchs)(int*);
    int (*GetSupportedArchs)(int*);
    int (*CreateProgram)(void**, const char*, const char*, int, const char* const*, const char* const*);
    int (*DestroyProgram)(void**);
    int (*CompileProgram)(void*, int, const char* const*);
    Size GetProgramLogSize;
    Text GetProgramLog;
    Size GetCUBINSize;
    Text GetCUBIN;
    Size GetPTXSize;
    Text GetPTX;
};

std::map<std::string, std::string> digests() {
    std::map<std::string, std::string> made;
    for (const KernelSource& source : kernel_sources()) made[source.name] = sha256_hex(std::string_view(source.text));
    return made;
}

// A fatbin of these sources, empty where there is none.
std::string built(const std::string& plugins) {
    std::vector<std::string> folders;
    for (const std::string& folder : plugin_folders(plugins)) {
        folders.push_back(folder);
        folders.push_back((fs::path(folder).parent_path() / "engine" / "cuda").string());  // of a package for Python
    }
    for (const std::string& folder : folders) {
        const std::string file = joined(folder, "kernels.fatbin"), list = joined(folder, "kernels.sha256");
        if (!is_regular_file(file) || !is_regular_file(list)) continue;
        std::map<std::string, std::string> named;
        std::ifstream lines(list);
        for (std::string digest, path; lines >> digest >> path;) named[fs::path(path).filename().string()] = digest;
        if (named == digests()) return std::string(MappedFile(file).bytes());
    }
    return {};
}

// What was kept, a digest of 64 letters before it; empty where there is no whole file.
std::string read_kept(const std::string& path) {
    if (!is_regular_file(path)) return {};
    const MappedFile file(path);
    if (file.bytes().size() <= 64) return {};
    const std::string_view digest = file.bytes().substr(0, 64), code = file.bytes().substr(64);
    return sha256_hex(code) == digest ? std::string(code) : std::string();
}

// Where nothing can be kept it is compiled again the next time.
void keep(const std::string& path, const std::string& code) {
    std::error_code error;
    fs::create_directories(fs::path(path).parent_path(), error);
    const std::string partial = path + ".partial-" + std::to_string(getpid());
    std::ofstream file(partial, std::ios::binary);
    file << sha256_hex(code) << code;
    file.close();
    if (file) fs::rename(partial, path, error);
    if (!file || error) fs::remove(partial, error);
}

}  // namespace

std::string kernel_code(int architecture, const std::string& plugins) {
    if (std::string code = built(plugins); !code.empty()) return code;
    const Nvrtc nvrtc;
    std::string recipe = "engine nvrtc " + nvrtc.version() + " sm" + std::to_string(architecture);
    for (const char* option : kOptions) recipe += std::string(" ") + option;
    for (const auto& [name, digest] : digests()) recipe += "\n" + name + " " + digest;
    const std::string path =
        joined(joined(local_home(), "cuda"), "engine-" + sha256_hex(recipe).substr(0, 32) + ".cubin");
    if (std::string code = read_kept(path); !code.empty()) return code;
    std::string code = nvrtc.compile(architecture);
    keep(path, code);
    return code;
}

}  // namespace fastnnunet::engine
