// JSON as the Python runtime reads it: in bounded time and memory, keys named once, numbers kept as they are written.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fastnnunet::engine {

// A value of a document, with what Python would make of it.
class Json {
public:
    enum class Kind { null, boolean, integer, real, text, list, object };
    using Member = std::pair<std::string, Json>;

    Json() = default;
    Json(Kind kind, std::string text) : kind_(kind), text_(std::move(text)) {}

    Kind kind() const { return kind_; }
    bool is(Kind kind) const { return kind_ == kind; }
    bool is_null() const { return kind_ == Kind::null; }
    bool is_number() const { return kind_ == Kind::integer || kind_ == Kind::real; }

    bool truth() const { return text_ == "true"; }
    const std::string& text() const { return text_; }                // UTF-8; of a number, as Python prints it
    std::optional<std::int64_t> integer() const;                     // none: no integer, or of more than 64 bits
    double real() const;                                             // of a number; infinite where float64 has none
    const std::vector<Json>& items() const { return items_; }        // of a list
    const std::vector<Member>& members() const { return members_; }  // of an object, in the order of the file
    const Json* find(std::string_view key) const;                    // none where there is no such member
    bool erase(std::string_view key);

    std::vector<Json>& items() { return items_; }
    std::vector<Member>& members() { return members_; }

    std::string canonical() const;  // Python's json.dumps(sort_keys=True, separators=(",", ":"))
    // Python's json.dumps(indent=4); `sorted`: keys in order
    std::string indented(bool sorted, int level = 0) const;
    std::string python() const;     // Python's ascii(); lists in brackets
    std::string type_name() const;  // Python's

private:
    Kind kind_ = Kind::null;
    std::string text_;
    std::vector<Json> items_;
    std::vector<Member> members_;
};

// Raises CorruptError as Python's `parse_json(text, where, finite=True)`.
Json parse_json(std::string_view text, const std::string& where);

// Python's repr of a float
std::string python_real(double value);
// Python's ascii of a text, in quotes
std::string python_text(std::string_view utf8);
// `text` as a JSON string with all but ASCII escaped
std::string json_text(std::string_view utf8);
// Whether Python's str.isprintable holds, of ASCII; of other characters but controls, separators and surrogates it is
// taken to hold.
bool is_printable(std::string_view utf8);

// A number of digits, of which a point may be one, that a text begins with, and what follows behind any space.
// None where there is no such number, or it has more than `most` digits before or behind the point.
struct Measured {
    double number;
    std::string unit;
};
std::optional<Measured> parse_measured(std::string_view text, std::size_t most);

}  // namespace fastnnunet::engine
