#include "bundle/onnx_file.hpp"

#include <algorithm>

#include "error.hpp"

namespace fastnnunet::engine {
namespace {

constexpr int kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5;
constexpr std::size_t kSmall = std::size_t{1} << 20;  // bytes of a node that are searched as a whole
constexpr int kMostDepth = 48;

struct Malformed {
    std::string reason;
};

// A field of a message. Of a number `value`, of anything else its place.
struct Field {
    std::uint64_t number;
    int wire;
    std::uint64_t value;
    std::string_view content;
};

std::uint64_t varint(std::string_view content, std::size_t& at) {
    std::uint64_t value = 0;
    for (int shift = 0; at < content.size() && shift < 70; shift += 7) {
        const auto byte = static_cast<unsigned char>(content[at++]);
        if (shift < 64) value |= std::uint64_t{byte & 0x7Fu} << shift;
        if (byte < 0x80) return value;
    }
    throw Malformed{"it is truncated"};
}

// body(field) for each field of a message
template <class Body>
void for_each_field(std::string_view message, const Body& body) {
    for (std::size_t at = 0; at < message.size();) {
        const std::uint64_t key = varint(message, at);
        Field field{key >> 3, static_cast<int>(key & 7), 0, {}};
        if (field.wire == kVarint) {
            field.value = varint(message, at);
            body(field);
            continue;
        }
        std::uint64_t length = 0;
        if (field.wire == kBytes) {
            length = varint(message, at);
        } else if (field.wire == kFixed64 || field.wire == kFixed32) {
            length = field.wire == kFixed64 ? 8 : 4;
        } else {
            throw Malformed{"a field of wire type " + std::to_string(field.wire)};
        }
        if (length > message.size() - at) throw Malformed{"it is truncated"};
        field.content = message.substr(at, length);
        body(field);
        at += length;
    }
}

enum class Holds { nothing, model, training, function, graph, node, attribute, sparse, tensor };

// What a field of a message holds; other fields are of no interest. onnx.proto names them.
Holds held(Holds message, std::uint64_t number) {
    switch (message) {
        case Holds::model:
            return number == 7    ? Holds::graph
                   : number == 20 ? Holds::training
                   : number == 25 ? Holds::function
                                  : Holds::nothing;
        case Holds::training: return number == 1 || number == 2 ? Holds::graph : Holds::nothing;
        case Holds::function: return number == 7 ? Holds::node : number == 11 ? Holds::attribute : Holds::nothing;
        case Holds::graph:
            return number == 1    ? Holds::node
                   : number == 5  ? Holds::tensor
                   : number == 15 ? Holds::sparse
                                  : Holds::nothing;
        case Holds::node: return number == 5 ? Holds::attribute : Holds::nothing;
        case Holds::attribute:
            if (number == 5 || number == 10) return Holds::tensor;
            if (number == 6 || number == 11) return Holds::graph;
            return number == 22 || number == 23 ? Holds::sparse : Holds::nothing;
        case Holds::sparse: return number == 1 || number == 2 ? Holds::tensor : Holds::nothing;
        default: return Holds::nothing;
    }
}

// A reference to another file has one of these words.
bool is_suspicious(std::string_view node) {
    return node.find("location") != std::string_view::npos || node.find("EPContext") != std::string_view::npos;
}

void walk(std::string_view message, Holds kind, int depth) {
    if (depth > kMostDepth) throw Malformed{"its graphs are nested too deep"};
    for_each_field(message, [&](const Field& field) {
        if (kind == Holds::tensor &&
            (field.number == 13 || (field.number == 14 && field.wire == kVarint && field.value == 1))) {
            throw Malformed{"weights lie in another file, expected all of them inside"};
        }
        if (kind == Holds::node && field.number == 4 && field.wire == kBytes && field.content == "EPContext") {
            throw Malformed{"a node EPContext takes a compiled network from another file"};
        }
        const Holds below = held(kind, field.number);
        if (below == Holds::nothing || field.wire != kBytes) return;
        if (below != Holds::node || field.content.size() > kSmall || is_suspicious(field.content)) {
            walk(field.content, below, depth + 1);
        }
    });
}

// The last text of that number
std::string text_of(std::string_view message, std::uint64_t number) {
    std::string_view found;
    for_each_field(message, [&](const Field& field) {
        if (field.number == number && field.wire == kBytes) found = field.content;
    });
    return std::string(found);
}

// body(message) for each message of that number
template <class Body>
void inside(std::string_view message, std::uint64_t number, const Body& body) {
    for_each_field(message, [&](const Field& field) {
        if (field.number == number && field.wire == kBytes) body(field.content);
    });
}

// ValueInfoProto: 1 name, 2 type; its 1 tensor_type: 1 elem_type, 2 shape; its 1 dim: 1 dim_value
OnnxValue read_value(std::string_view message) {
    OnnxValue value;
    value.name = text_of(message, 1);
    inside(message, 2, [&](std::string_view type) {
        inside(type, 1, [&](std::string_view tensor) {
            for_each_field(tensor, [&](const Field& field) {
                if (field.number == 1 && field.wire == kVarint) {
                    value.element_type = static_cast<std::int64_t>(field.value);
                } else if (field.number == 2 && field.wire == kBytes) {
                    inside(field.content, 1, [&](std::string_view dimension) {
                        std::optional<std::int64_t> size;
                        for_each_field(dimension, [&](const Field& one) {
                            if (one.number == 1 && one.wire == kVarint) size = static_cast<std::int64_t>(one.value);
                        });
                        value.shape.push_back(size);
                    });
                }
            });
        });
    });
    return value;
}

}  // namespace

OnnxFile read_onnx(std::string_view content, const std::string& path) {
    OnnxFile found;
    std::vector<std::string> stored;
    try {
        if (content.empty()) throw Malformed{"cannot mmap an empty file"};
        walk(content, Holds::model, 0);
        inside(content, 7, [&](std::string_view graph) {
            for_each_field(graph, [&](const Field& field) {
                if (field.wire != kBytes) return;
                if (field.number == 5) stored.push_back(text_of(field.content, 8));
                if (field.number == 11) found.inputs.push_back(read_value(field.content));
                if (field.number == 12) found.outputs.push_back(read_value(field.content));
            });
        });
    } catch (const Malformed& e) {
        throw CorruptError(path + " is no usable ONNX file: " + e.reason + "\nexport the bundle again");
    }
    const auto is_stored = [&](const OnnxValue& value) {
        return std::find(stored.begin(), stored.end(), value.name) != stored.end();
    };
    found.inputs.erase(std::remove_if(found.inputs.begin(), found.inputs.end(), is_stored), found.inputs.end());
    return found;
}

}  // namespace fastnnunet::engine
