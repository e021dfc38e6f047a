#include "bundle/json.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "error.hpp"

namespace fastnnunet::engine {
namespace {

constexpr std::size_t kMostBytes = std::size_t{1} << 25;  // as specs/checks/json_text.py
constexpr int kMostDepth = 64;
constexpr std::size_t kMostValues = std::size_t{1} << 21;
constexpr std::size_t kMostDigits = 4300;  // that Python makes an integer of

struct Malformed {
    std::string reason;
};

// The code point that begins at `at`, which moves behind it. Throws Malformed.
std::uint32_t next_point(std::string_view utf8, std::size_t& at) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(utf8[i]); };
    const unsigned char first = byte(at);
    const std::size_t start = at;
    int more = first < 0x80 ? 0 : (first >> 5) == 6 ? 1 : (first >> 4) == 14 ? 2 : (first >> 3) == 30 ? 3 : -1;
    std::uint32_t point = more <= 0 ? first : first & (0x3F >> more);
    ++at;
    if (more < 0 || start + static_cast<std::size_t>(more) >= utf8.size() + (more == 0)) more = -1;
    for (int i = 0; i < more; ++i, ++at) {
        if ((byte(at) >> 6) != 2) {
            more = -1;
            break;
        }
        point = point << 6 | (byte(at) & 0x3F);
    }
    constexpr std::uint32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
    if (more < 0 || point < kLeast[more] || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) {
        throw Malformed{"'utf-8' codec can't decode byte in position " + std::to_string(start)};
    }
    return point;
}

// The same for text that need not be UTF-8, of which a wrong byte is U+FFFD.
std::uint32_t any_point(std::string_view text, std::size_t& at) {
    const std::size_t start = at;
    try {
        return next_point(text, at);
    } catch (const Malformed&) {
        at = start + 1;
        return 0xFFFD;
    }
}

void append_point(std::string& to, std::uint32_t point) {
    if (point < 0x80) {
        to += static_cast<char>(point);
    } else if (point < 0x800) {
        to += static_cast<char>(0xC0 | point >> 6);
        to += static_cast<char>(0x80 | (point & 0x3F));
    } else if (point < 0x10000) {
        to += static_cast<char>(0xE0 | point >> 12);
        to += static_cast<char>(0x80 | (point >> 6 & 0x3F));
        to += static_cast<char>(0x80 | (point & 0x3F));
    } else {
        to += static_cast<char>(0xF0 | point >> 18);
        to += static_cast<char>(0x80 | (point >> 12 & 0x3F));
        to += static_cast<char>(0x80 | (point >> 6 & 0x3F));
        to += static_cast<char>(0x80 | (point & 0x3F));
    }
}

std::string hex(std::uint32_t value, int digits) {
    std::string text;
    for (int i = digits - 1; i >= 0; --i) text += "0123456789abcdef"[value >> 4 * i & 15];
    return text;
}

class Parser {
public:
    explicit Parser(std::string_view text) : text_(text) {
        for (std::size_t at = 0; at < text.size();) next_point(text, at);
    }

    Json document() {
        skip_space();
        Json value = parse(1);
        skip_space();
        if (at_ < text_.size()) fail("Extra data", at_);
        return value;
    }

private:
    [[noreturn]] void fail(const std::string& what, std::size_t where) const {
        std::size_t line = 1, column = 1, points = 0;
        for (std::size_t i = 0; i < where && i < text_.size(); ++i) {
            if ((static_cast<unsigned char>(text_[i]) >> 6) == 2) continue;  // inside a code point
            ++points;
            ++column;
            if (text_[i] == '\n') {
                ++line;
                column = 1;
            }
        }
        throw Malformed{what + ": line " + std::to_string(line) + " column " + std::to_string(column) + " (char " +
                        std::to_string(points) + ")"};
    }

    void skip_space() {
        while (at_ < text_.size() &&
               (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r'))
            ++at_;
    }

    bool take(std::string_view word) {
        if (text_.substr(at_, word.size()) != word) return false;
        at_ += word.size();
        return true;
    }

    void count() {
        if (++values_ > kMostValues) throw Malformed{"it holds more than " + std::to_string(kMostValues) + " values"};
    }

    Json parse(int depth) {
        count();
        if (depth > kMostDepth) {
            throw Malformed{"it is nested deeper than " + std::to_string(kMostDepth) + " levels"};
        }
        if (at_ >= text_.size()) fail("Expecting value", at_);
        const char first = text_[at_];
        if (first == '{') return object(depth);
        if (first == '[') return list(depth);
        if (first == '"') {
            ++at_;
            return Json(Json::Kind::text, string());
        }
        if (take("null")) return Json();
        if (take("true")) return Json(Json::Kind::boolean, "true");
        if (take("false")) return Json(Json::Kind::boolean, "false");
        for (const auto& [word, shown] : {std::pair("NaN", "nan"), {"Infinity", "inf"}, {"-Infinity", "-inf"}}) {
            if (take(word)) throw Malformed{std::string("it holds the number ") + shown + ", expected finite ones"};
        }
        return number();
    }

    Json object(int depth) {
        Json made(Json::Kind::object, "");
        ++at_;
        skip_space();
        if (take("}")) return made;
        while (true) {
            if (at_ >= text_.size() || text_[at_] != '"') {
                fail("Expecting property name enclosed in double quotes", at_);
            }
            count();
            ++at_;
            std::string key = string();
            skip_space();
            if (!take(":")) fail("Expecting ':' delimiter", at_);
            skip_space();
            Json value = parse(depth + 1);
            made.members().emplace_back(std::move(key), std::move(value));
            skip_space();
            if (take("}")) break;
            if (!take(",")) fail("Expecting ',' delimiter", at_);
            skip_space();
        }
        check_keys(made);
        return made;
    }

    static void check_keys(const Json& object) {
        std::vector<std::string_view> keys;
        for (const auto& member : object.members()) keys.push_back(member.first);
        std::sort(keys.begin(), keys.end());
        if (std::adjacent_find(keys.begin(), keys.end()) == keys.end()) return;
        std::vector<std::string_view> seen;  // the first that comes again is the one that is named
        for (const auto& member : object.members()) {
            if (std::find(seen.begin(), seen.end(), member.first) != seen.end()) {
                throw Malformed{"the key " + python_text(member.first) + " is there twice"};
            }
            seen.push_back(member.first);
        }
    }

    Json list(int depth) {
        Json made(Json::Kind::list, "");
        ++at_;
        skip_space();
        if (take("]")) return made;
        while (true) {
            made.items().push_back(parse(depth + 1));
            skip_space();
            if (take("]")) return made;
            if (!take(",")) fail("Expecting ',' delimiter", at_);
            skip_space();
        }
    }

    std::uint32_t escaped_unit(std::size_t where) {
        std::uint32_t unit = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const char c = at_ < text_.size() ? text_[at_] : 'x';
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0) fail("Invalid \\uXXXX escape", where);
            unit = unit << 4 | static_cast<std::uint32_t>(digit);
        }
        return unit;
    }

    std::string string() {
        const std::size_t begin = at_ - 1;
        std::string made;
        while (true) {
            if (at_ >= text_.size()) fail("Unterminated string starting at", begin);
            const char c = text_[at_];
            if (c == '"') {
                ++at_;
                return made;
            }
            if (static_cast<unsigned char>(c) < 0x20) fail("Invalid control character at", at_);
            ++at_;
            if (c != '\\') {
                made += c;
                continue;
            }
            if (at_ >= text_.size()) fail("Unterminated string starting at", begin);
            const char kind = text_[at_++];
            constexpr std::string_view kKinds = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
            if (const std::size_t found = kKinds.find(kind); found != std::string_view::npos) {
                made += kMeanings[found];
                continue;
            }
            if (kind != 'u') fail("Invalid \\escape", at_ - 2);
            std::uint32_t point = escaped_unit(at_ - 1);
            if (point >= 0xD800 && point < 0xDC00 && text_.substr(at_, 2) == "\\u") {
                const std::size_t back = at_;
                at_ += 2;
                const std::uint32_t low = escaped_unit(at_ - 1);
                if (low >= 0xDC00 && low < 0xE000) {
                    point = 0x10000 + ((point - 0xD800) << 10 | (low - 0xDC00));
                } else {
                    at_ = back;
                }
            }
            if (point >= 0xD800 && point < 0xE000) throw Malformed{"'utf-8' codec can't encode a surrogate"};
            append_point(made, point);
        }
    }

    Json number() {
        const std::size_t begin = at_;
        const auto digits = [&] {
            const std::size_t first = at_;
            while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
            return at_ - first;
        };
        take("-");
        const std::size_t first = at_;
        if (at_ < text_.size() && text_[at_] == '0') {
            ++at_;
        } else if (digits() == 0) {
            at_ = begin;
            fail("Expecting value", begin);
        }
        if (at_ - first > kMostDigits) throw Malformed{"an integer has more digits than can be read"};
        bool is_real = false;
        const std::size_t whole = at_;
        if (take(".")) {
            if (digits() > 0)
                is_real = true;
            else
                at_ = whole;
        }
        const std::size_t mantissa = at_;
        if (at_ < text_.size() && (text_[at_] == 'e' || text_[at_] == 'E')) {
            ++at_;
            if (at_ < text_.size() && (text_[at_] == '+' || text_[at_] == '-')) ++at_;
            if (digits() > 0)
                is_real = true;
            else
                at_ = mantissa;
        }
        const std::string written(text_.substr(begin, at_ - begin));
        if (!is_real) return Json(Json::Kind::integer, written == "-0" ? "0" : written);
        const double value = std::strtod(written.c_str(), nullptr);
        if (!std::isfinite(value)) {
            throw Malformed{"it holds the number " + python_real(value) + ", expected finite ones"};
        }
        return Json(Json::Kind::real, python_real(value));
    }

    std::string_view text_;
    std::size_t at_ = 0, values_ = 0;
};

}  // namespace

std::optional<std::int64_t> Json::integer() const {
    std::int64_t value = 0;
    if (kind_ != Kind::integer) return std::nullopt;
    const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), value);
    if (error != std::errc() || end != text_.data() + text_.size()) return std::nullopt;
    return value;
}

double Json::real() const { return std::strtod(text_.c_str(), nullptr); }

const Json* Json::find(std::string_view key) const {
    for (const Member& member : members_) {
        if (member.first == key) return &member.second;
    }
    return nullptr;
}

bool Json::erase(std::string_view key) {
    const auto found = std::find_if(members_.begin(), members_.end(), [&](const Member& m) { return m.first == key; });
    if (found == members_.end()) return false;
    members_.erase(found);
    return true;
}

std::string Json::canonical() const {
    switch (kind_) {
        case Kind::null: return "null";
        case Kind::boolean:
        case Kind::integer:
        case Kind::real: return text_;
        case Kind::text: return json_text(text_);
        case Kind::list: {
            std::string made = "[";
            for (const Json& item : items_) made += (made.size() > 1 ? "," : "") + item.canonical();
            return made + "]";
        }
        case Kind::object: break;
    }
    std::vector<const Member*> sorted;
    for (const Member& member : members_) sorted.push_back(&member);
    // bytes of UTF-8 are in the order of code points
    std::sort(sorted.begin(), sorted.end(), [](const Member* a, const Member* b) { return a->first < b->first; });
    std::string made = "{";
    for (const Member* member : sorted) {
        made += (made.size() > 1 ? "," : "") + json_text(member->first) + ":" + member->second.canonical();
    }
    return made + "}";
}

std::string Json::indented(bool sorted, int level) const {
    if (!is(Kind::list) && !is(Kind::object)) return canonical();
    if (items_.empty() && members_.empty()) return is(Kind::list) ? "[]" : "{}";
    const std::string inner = "\n" + std::string(static_cast<std::size_t>(4 * (level + 1)), ' ');
    const std::string outer = "\n" + std::string(static_cast<std::size_t>(4 * level), ' ');
    std::string made;
    for (const Json& item : items_) made += (made.empty() ? "" : ",") + inner + item.indented(sorted, level + 1);
    std::vector<const Member*> order;
    for (const Member& member : members_) order.push_back(&member);
    if (sorted) {
        std::sort(order.begin(), order.end(), [](const Member* a, const Member* b) { return a->first < b->first; });
    }
    for (const Member* member : order) {
        made += (made.empty() ? "" : ",") + inner + json_text(member->first) + ": " +
                member->second.indented(sorted, level + 1);
    }
    return (is(Kind::list) ? "[" : "{") + made + outer + (is(Kind::list) ? "]" : "}");
}

std::string Json::python() const {
    switch (kind_) {
        case Kind::null: return "None";
        case Kind::boolean: return truth() ? "True" : "False";
        case Kind::integer:
        case Kind::real: return text_;
        case Kind::text: return python_text(text_);
        case Kind::list: {
            std::string made = "[";
            for (const Json& item : items_) made += (made.size() > 1 ? ", " : "") + item.python();
            return made + "]";
        }
        case Kind::object: break;
    }
    std::string made = "{";
    for (const Member& member : members_) {
        made += (made.size() > 1 ? ", " : "") + python_text(member.first) + ": " + member.second.python();
    }
    return made + "}";
}

std::string Json::type_name() const {
    constexpr const char* kNames[] = {"NoneType", "bool", "int", "float", "str", "list", "dict"};
    return kNames[static_cast<int>(kind_)];
}

Json parse_json(std::string_view text, const std::string& where) {
    try {
        if (text.size() > kMostBytes) {
            throw Malformed{"it has " + std::to_string(text.size()) + " bytes, expected at most " +
                            std::to_string(kMostBytes)};
        }
        return Parser(text).document();
    } catch (const Malformed& e) {
        throw CorruptError(where + " is no usable JSON: " + e.reason);
    }
}

std::string python_real(double value) {
    if (std::isnan(value)) return "nan";
    if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
    char buffer[64];
    char* const end = std::to_chars(buffer, buffer + sizeof buffer - 1, value, std::chars_format::scientific).ptr;
    *end = '\0';
    const std::string_view shortest(buffer, static_cast<std::size_t>(end - buffer));
    const std::size_t e = shortest.find('e');
    const bool negative = shortest[0] == '-';
    std::string digits;
    for (const char c : shortest.substr(negative, e - negative)) {
        if (c != '.') digits += c;
    }
    const int exponent = std::atoi(shortest.data() + e + 1);
    const int count = static_cast<int>(digits.size());
    std::string made = negative ? "-" : "";
    if (exponent < -4 || exponent >= 16) {
        made += digits.substr(0, 1) + (count > 1 ? "." + digits.substr(1) : "") + (exponent < 0 ? "e-" : "e+");
        const std::string power = std::to_string(std::abs(exponent));
        return made + (power.size() < 2 ? "0" : "") + power;
    }
    if (exponent < 0) return made + "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + digits;
    if (count <= exponent + 1) {
        return made + digits + std::string(static_cast<std::size_t>(exponent + 1 - count), '0') + ".0";
    }
    return made + digits.substr(0, static_cast<std::size_t>(exponent + 1)) + "." +
           digits.substr(static_cast<std::size_t>(exponent + 1));
}

std::string json_text(std::string_view utf8) {
    std::string made = "\"";
    for (std::size_t at = 0; at < utf8.size();) {
        const std::uint32_t point = any_point(utf8, at);
        constexpr std::string_view kShort = "\"\\\n\r\t\f\b", kLetters = "\"\\nrtfb";
        const std::size_t found = point < 0x80 ? kShort.find(static_cast<char>(point)) : std::string_view::npos;
        if (found != std::string_view::npos) {
            made += '\\';
            made += kLetters[found];
        } else if (point >= 0x20 && point < 0x7F) {
            made += static_cast<char>(point);
        } else if (point < 0x10000) {
            made += "\\u" + hex(point, 4);
        } else {
            made += "\\u" + hex(0xD800 + ((point - 0x10000) >> 10), 4) + "\\u" + hex(0xDC00 + (point & 0x3FF), 4);
        }
    }
    return made + "\"";
}

std::string python_text(std::string_view utf8) {
    const bool has_single = utf8.find('\'') != std::string_view::npos;
    const char quote = has_single && utf8.find('"') == std::string_view::npos ? '"' : '\'';
    std::string made(1, quote);
    for (std::size_t at = 0; at < utf8.size();) {
        const std::uint32_t point = any_point(utf8, at);
        if (point == static_cast<std::uint32_t>(quote) || point == '\\') {
            made += '\\';
            made += static_cast<char>(point);
        } else if (point == '\n' || point == '\r' || point == '\t') {
            made += point == '\n' ? "\\n" : point == '\r' ? "\\r" : "\\t";
        } else if (point >= 0x20 && point < 0x7F) {
            made += static_cast<char>(point);
        } else if (point < 0x100) {
            made += "\\x" + hex(point, 2);
        } else if (point < 0x10000) {
            made += "\\u" + hex(point, 4);
        } else {
            made += "\\U" + hex(point, 8);
        }
    }
    return made + quote;
}

bool is_printable(std::string_view utf8) {
    for (std::size_t at = 0; at < utf8.size();) {
        const std::uint32_t point = any_point(utf8, at);
        const bool is_control = point < 0x20 || (point >= 0x7F && point <= 0xA0) || point == 0xAD;
        const bool is_separator = point == 0x1680 || (point >= 0x2000 && point <= 0x200F) ||
                                  (point >= 0x2028 && point <= 0x202F) || (point >= 0x205F && point <= 0x206F) ||
                                  point == 0x3000 || point == 0xFEFF || (point >= 0xE000 && point <= 0xF8FF) ||
                                  (point >= 0xFFF0 && point <= 0xFFFB) || point >= 0xE0000;
        if (is_control || is_separator) return false;
    }
    return true;
}

std::optional<Measured> parse_measured(std::string_view text, std::size_t most) {
    const auto digits = [&](std::size_t from) {
        const std::size_t end = std::min(text.find_first_not_of("0123456789", from), text.size());
        return end - from;
    };
    const std::size_t whole = digits(0);
    if (whole == 0 || whole > most) return std::nullopt;
    std::size_t at = whole;
    if (at < text.size() && text[at] == '.') {
        const std::size_t behind = digits(at + 1);
        if (behind == 0 || behind > most) return std::nullopt;
        at += 1 + behind;
    }
    const double number = std::strtod(std::string(text.substr(0, at)).c_str(), nullptr);
    at = std::min(text.find_first_not_of(" \t\n\r\f\v", at), text.size());
    return Measured{number, std::string(text.substr(at))};
}

}  // namespace fastnnunet::engine
