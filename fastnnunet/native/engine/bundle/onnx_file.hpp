// What an ONNX file says of itself: its inputs and outputs, and that it stands alone.
//
// Engines follow an ONNX file to other files (tensors as "external data"), wherever it says they are. A bundle's models
// have their weights inside, so a file that refers to another one is refused before an engine sees it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace fastnnunet::engine {

struct OnnxValue {
    std::string name;
    std::int64_t element_type = 0;                   // 1: float32
    std::vector<std::optional<std::int64_t>> shape;  // none: an axis of any length
};

struct OnnxFile {
    std::vector<OnnxValue> inputs, outputs;  // inputs without those that have a stored value
};

// Throws CorruptError when it is damaged, or takes weights or code from another file. `path`: what it is called.
OnnxFile read_onnx(std::string_view content, const std::string& path);

}  // namespace fastnnunet::engine
