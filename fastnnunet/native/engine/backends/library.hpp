// For plugins: finding and opening the library of a backend's maker.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

#include "backends/backend.h"

namespace fastnnunet::engine {

struct Missing : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void say(fastnnunet_failure* failure, const std::string& message) {
    std::snprintf(failure->message, sizeof failure->message, "%s", message.c_str());
}

// Runs body(); 0, or 1 and what it threw.
template <class Body>
std::int32_t guarded(fastnnunet_failure* failure, const Body& body) noexcept {
    try {
        body();
        return 0;
    } catch (const std::exception& e) {
        say(failure, e.what());
    } catch (...) {
        say(failure, "an exception of a type that is not known");
    }
    return 1;
}

struct LibraryPlace {
    const char* variable;  // of the environment: the library, or a folder it is in
    const char* package;   // in an environment of Python: where it lies below site-packages
    const char* stem;      // libonnxruntime: of libonnxruntime.so, libonnxruntime.so.1.20.0, ...
};

namespace places {

namespace fs = std::filesystem;

// Files of a folder whose names are the stem and an ending of libraries, the latest version last
inline std::vector<fs::path> libraries_in(const fs::path& folder, const std::string& stem) {
    std::vector<fs::path> found;
    std::error_code error;
    for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
        const std::string name = entry->path().filename().string();
        if (name.rfind(stem + ".so", 0) == 0 || name == stem + ".dylib") found.push_back(entry->path());
    }
    std::sort(found.begin(), found.end());
    return found;
}

// Folders `site-packages` that this plugin, this program or $VIRTUAL_ENV belong to
inline std::vector<fs::path> site_packages() {
    std::vector<fs::path> found;
    std::error_code error;
    const auto add_environment = [&](const fs::path& root) {
        for (fs::directory_iterator entry(root / "lib", error), end; !error && entry != end; entry.increment(error)) {
            if (entry->path().filename().string().rfind("python3", 0) == 0)
                found.push_back(entry->path() / "site-packages");
        }
        error.clear();
    };
    Dl_info info{};
    if (dladdr(reinterpret_cast<const void*>(&site_packages), &info) != 0 && info.dli_fname != nullptr) {
        for (fs::path at = fs::absolute(info.dli_fname, error); at != at.parent_path(); at = at.parent_path()) {
            if (at.filename() == "site-packages" || at.filename() == "dist-packages") found.push_back(at);
        }
    }
    if (const char* environment = std::getenv("VIRTUAL_ENV")) add_environment(environment);
    const fs::path program = fs::read_symlink("/proc/self/exe", error);
    error.clear();
    if (!program.empty()) add_environment(program.parent_path().parent_path());
    return found;
}

}  // namespace places

// The library, open for good. Throws Missing with `install`, which says what to do where there is none.
inline void* open_library(const LibraryPlace& place, const std::string& install) {
    namespace fs = std::filesystem;
    std::vector<std::string> candidates;
    const auto add_folder = [&](const fs::path& folder) {
        for (const fs::path& library : places::libraries_in(folder, place.stem)) candidates.push_back(library.string());
    };
    const char* given = std::getenv(place.variable);
    if (given != nullptr && *given != '\0') {
        std::error_code error;
        if (fs::is_directory(given, error)) {
            add_folder(given);
        } else {
            candidates.emplace_back(given);
        }
    } else {
        for (const fs::path& packages : places::site_packages()) add_folder(packages / place.package);
        candidates.push_back(std::string(place.stem) + ".so");  // of the system
        for (const char* folder :
             {"/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib"}) {
            add_folder(folder);
        }
    }
    std::string reasons;
    for (const std::string& candidate : candidates) {
        if (void* library = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
        const char* reason = dlerror();
        reasons += "\n  - " + std::string(reason == nullptr ? candidate : reason);
    }
    if (given != nullptr && candidates.empty())
        reasons = std::string("\n  - ") + place.variable + "=" + given + " has none";
    throw Missing(install + ", or name " + place.stem + ".so with " + place.variable + reasons);
}

template <class Function>
void look_up(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr)
        throw Missing(std::string("the library has no function ") + name + "; install a newer one");
}

}  // namespace fastnnunet::engine
