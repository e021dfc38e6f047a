// What a bundle is made of: the last byte says whether the rest is a bundle.json or an ONNX file.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "bundle/bundle.hpp"
#include "bundle/onnx_file.hpp"
#include "error.hpp"
#include "fuzz/scratch.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace fastnnunet::engine;
    static const fuzz::Scratch scratch;
    if (size == 0) return 0;
    const bool is_model = data[size - 1] == 'm';
    try {
        if (is_model) {
            read_onnx({reinterpret_cast<const char*>(data), size - 1}, "model.onnx");
        } else {
            scratch.write("bundle.json", data, size - 1);
            const Bundle bundle = load_bundle(scratch.folder());
            if (bundle.num_heads < 1) __builtin_trap();  // checked, so that nothing that reads it divides by it
        }
    } catch (const Error&) {
    }
    return 0;
}
