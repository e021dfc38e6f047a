// What backends say where a batch finds no memory: smaller ones may.
#pragma once

#include <algorithm>
#include <cctype>
#include <string>

namespace fastnnunet {

// Whether the message of a failed batch tells that. Backends share no code and no type for it, only words: those of the
// C++ library, ONNX Runtime, OpenVINO with oneDNN, PyTorch, CUDA and TensorRT.
inline bool tells_no_memory(std::string message) {
    std::transform(message.begin(), message.end(), message.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    for (const char* words : {"bad_alloc", "bad allocation", "failed to allocate", "could not allocate",
                              "can't allocate", "cannot allocate", "could not create a memory object", "out of memory",
                              "out_of_memory", "outofmemory", "not enough memory"}) {
        if (message.find(words) != std::string::npos) return true;
    }
    return false;
}

}  // namespace fastnnunet
