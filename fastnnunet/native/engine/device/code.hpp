// The machine code of the kernels, as fastnnunet/engines/cuda/code.py has it.
#pragma once

#include <string>
#include <vector>

namespace fastnnunet::engine {

// kernels.cu and its headers, which are part of this library; written by CMake.
struct KernelSource {
    const char* name;
    const char* text;
};
const std::vector<KernelSource>& kernel_sources();

// A fatbin that was built of the same sources and lies among the plugins, or beside the sources in a package for Python
// (kernels.fatbin and kernels.sha256 of `make kernels`), else what NVRTC makes for an architecture such as 86, which is
// kept in $FASTNNUNET_CACHE_HOME/cuda. Throws BackendError where there is neither.
std::string kernel_code(int architecture, const std::string& plugins);

}  // namespace fastnnunet::engine
