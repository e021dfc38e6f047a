#include "outputs/dicom_seg/values.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <regex>

namespace fastnnunet::dicom_seg {
namespace {

using Found = std::optional<std::string>;  // none: the text is no such value
using Match = std::smatch;

constexpr std::size_t kNumberCharacters = 16;
constexpr std::size_t kLongString = 64;
constexpr std::size_t kLongestPattern = 256;  // std::regex takes memory of the stack for every character

const std::map<std::string, std::size_t>& characters() {
    static const std::map<std::string, std::size_t> most{{"LO", kLongString}, {"SH", 16},         {"CS", 16},
                                                         {"AE", 16},          {"ST", 1024},       {"LT", 10240},
                                                         {"UC", 0x80000000},  {"UT", 0x80000000}, {"UR", 0x80000000}};
    return most;
}

bool is_paragraph(const std::string& vr) { return vr == "ST" || vr == "LT" || vr == "UT" || vr == "UR"; }
bool is_filling(char c) { return c == ' ' || c == '\0'; }
bool is_start(char byte) { return (static_cast<unsigned char>(byte) & 0xc0) != 0x80; }  // of a character of UTF-8

std::string right_stripped(std::string text) {
    while (!text.empty() && is_filling(text.back())) text.pop_back();
    return text;
}

std::string shortened(const std::string& text, std::size_t most) {
    std::size_t count = 0;
    for (std::size_t at = 0; at < text.size(); ++at) {
        if (is_start(text[at]) && count++ == most) return text.substr(0, at);
    }
    return text;
}

std::size_t length(const std::string& text) {
    return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), is_start));
}

std::vector<std::string> split(const std::string& text, char between) {
    std::vector<std::string> parts(1);
    for (const char c : text) {
        if (c == between) {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    return parts;
}

std::string joined(const std::vector<std::string>& parts, const char* between) {
    std::string text;
    for (std::size_t i = 0; i < parts.size(); ++i) text += (i > 0 ? between : "") + parts[i];
    return text;
}

// Those of Unicode below U+00A0
std::string without_control(const std::string& text) {
    std::string kept;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const auto byte = static_cast<unsigned char>(text[i]);
        if (byte == 0xc2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xa0) {
            ++i;
        } else if (byte >= 0x20 && byte != 0x7f) {
            kept += text[i];
        }
    }
    return kept;
}

std::string upper(std::string text) {
    for (char& c : text) c = c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
    return text;
}

Found date(const std::string& text) {
    static const std::regex pattern(R"((\d{4})([-./ ]?)(\d\d)\2(\d\d))");
    Match match;
    if (!std::regex_match(text, match, pattern)) return {};
    const int year = std::stoi(match[1]), month = std::stoi(match[3]), day = std::stoi(match[4]);
    constexpr int kDays[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    const bool is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    if (year < 1 || month < 1 || month > 12 || day < 1 || day > kDays[month - 1] + (month == 2 && is_leap)) return {};
    return match[1].str() + match[3].str() + match[4].str();
}

Found time_of_day(const std::string& text) {
    static const std::regex pattern(R"((\d\d)(?::?([0-5]\d)(?::?([0-5]\d|60)(?:[.,](\d{1,6})\d*)?)?)?)");
    Match match;
    if (!std::regex_match(text, match, pattern) || std::stoi(match[1]) > 23) return {};
    // the leap second of PS3.5 is none that every reader knows
    const std::string seconds = match[3] == "60" ? "59" : match[3].str();
    return match[1].str() + match[2].str() + seconds + (match[4].length() > 0 ? "." + match[4].str() : "");
}

Found date_time(const std::string& text) {
    static const std::regex pattern(R"(\d{4,14}(\.\d{1,6})?([+-]\d{4})?)");
    if (!std::regex_match(text, pattern)) return {};
    const std::string digits = text.substr(0, text.find_first_of(".+-"));
    if (digits.size() % 2 != 0 || (digits.size() >= 8 && !date(digits.substr(0, 8)))) return {};
    if (digits.size() == 6 && (digits.substr(4) < "01" || digits.substr(4) > "12")) return {};
    if (digits.size() <= 8 || time_of_day(digits.substr(8)) == digits.substr(8)) return text;
    return {};
}

Found age(const std::string& text) {
    static const std::regex pattern(R"((\d{1,3}) *([DWMY]))");
    const std::string capitals = upper(text);
    Match match;
    if (!std::regex_match(capitals, match, pattern)) return {};
    return std::string(3 - static_cast<std::size_t>(match[1].length()), '0') + match[1].str() + match[2].str();
}

std::optional<double> number(const std::string& given) {
    std::string text = stripped(given);
    if (std::count(text.begin(), text.end(), ',') == 1 && text.find('.') == std::string::npos) {
        std::replace(text.begin(), text.end(), ',', '.');
    }
    static const std::regex pattern(R"([+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)");
    if (!std::regex_match(text, pattern)) return {};
    const char* begin = text.c_str() + (text[0] == '+');
    double value = 0;
    const auto [end, error] = std::from_chars(begin, text.c_str() + text.size(), value);
    const bool is_small = error == std::errc::result_out_of_range && std::fabs(std::strtod(begin, nullptr)) < 1;
    if (is_small) return 0;
    if (error != std::errc() || !std::isfinite(value)) return {};
    return value;
}

Found decimal(const std::string& given) {
    const auto value = number(given);
    if (!value) return {};
    std::string text = given;
    std::replace(text.begin(), text.end(), ',', '.');
    if (text.size() <= kNumberCharacters) return text;
    char made[40];
    std::snprintf(made, sizeof made, "%.10g", *value);
    return made;
}

Found whole(const std::string& text) {
    const auto value = number(text);
    if (!value || *value != std::trunc(*value) || *value < -2147483648.0 || *value >= 2147483648.0) return {};
    static const std::regex plain(R"([+-]?\d{1,11})");
    if (std::regex_match(text, plain)) return text;
    return std::to_string(static_cast<std::int64_t>(*value));
}

Found code(const std::string& text) {
    static const std::regex pattern("[A-Z0-9 _]{1,16}");
    const std::string capitals = upper(text);
    return std::regex_match(capitals, pattern) ? Found(capitals) : Found();
}

Found uid(const std::string& text) {
    static const std::regex pattern(R"((0|[1-9]\d*)(\.(0|[1-9]\d*))*)");
    return text.size() <= 64 && std::regex_match(text, pattern) ? Found(text) : Found();
}

struct Kind {
    Found (*mend)(const std::string&);
    const char* name;
};
const std::map<std::string, Kind>& kinds() {
    static const std::map<std::string, Kind> known{{"AS", {age, "no age"}},
                                                   {"CS", {code, "no code of 16 capital letters, digits and _"}},
                                                   {"DA", {date, "no date"}},
                                                   {"DS", {decimal, "no number"}},
                                                   {"DT", {date_time, "no date and time"}},
                                                   {"IS", {whole, "no whole number"}},
                                                   {"TM", {time_of_day, "no time of day"}},
                                                   {"UI", {uid, "no UID"}}};
    return known;
}

// Up to three ways to write a name, each of five parts and 64 characters
std::pair<std::string, std::string> name(const std::string& text) {
    std::vector<std::string> groups = split(text, '=');
    if (groups.size() > 3) groups.resize(3);
    for (std::string& group : groups) {
        std::vector<std::string> parts = split(without_control(group), '^');
        if (parts.size() > 5) parts.resize(5);
        group = stripped(shortened(joined(parts, "^"), kLongString));
    }
    const std::string value = joined(groups, "=");
    return {value, value == text ? "" : "shortened to 64 characters or five parts"};
}

std::pair<std::string, std::string> mend(const std::string& vr, const std::string& text) {
    if (const auto kind = kinds().find(vr); kind != kinds().end()) {
        const Found value = text.size() > kLongestPattern ? Found() : kind->second.mend(text);
        if (!value) return {"", std::string("left empty, it is ") + kind->second.name};
        return {*value, *value == text ? "" : "rewritten"};
    }
    if (vr == "PN") return name(text);
    const std::string value = is_paragraph(vr) ? text : without_control(text);
    const std::size_t most = characters().at(vr);
    if (length(value) > most) {
        return {stripped(shortened(value, most)), "shortened to " + std::to_string(most) + " characters"};
    }
    return {value, value == text ? "" : "control characters taken out"};
}

}  // namespace

bool is_text_kind(const std::string& vr) { return vr == "PN" || kinds().count(vr) > 0 || characters().count(vr) > 0; }

Mended mended(const std::string& vr, const std::string& text, bool single) {
    std::vector<std::string> texts = is_paragraph(vr) ? std::vector<std::string>{text} : split(text, '\\');
    for (std::string& part : texts) part = is_paragraph(vr) ? right_stripped(part) : stripped(part);
    std::vector<std::string> done;
    if (single && texts.size() > 1) {
        texts.resize(1);
        done.emplace_back("only the first value kept");
    }
    for (std::string& part : texts) {
        if (part.empty()) continue;
        const auto [value, what] = mend(vr, part);
        part = value;
        if (!what.empty() && std::find(done.begin(), done.end(), what) == done.end()) done.push_back(what);
    }
    return {texts, joined(done, ", ")};
}

std::pair<std::string, std::string> mended_sex(const std::string& text) {
    static const std::map<std::string, std::string> known{{"M", "M"},      {"MALE", "M"}, {"F", "F"},
                                                          {"FEMALE", "F"}, {"O", "O"},    {"OTHER", "O"}};
    const std::string word = stripped(text);
    const auto found = known.find(upper(word));
    const std::string sex = found == known.end() ? "" : found->second;
    if (sex == word) return {sex, ""};
    return {sex, sex.empty() ? "left empty, it is none of M, F and O" : "written as " + sex};
}

std::optional<double> positive(const std::string& text) {
    const auto value = number(text.substr(0, std::min(kLongestPattern, text.find('\\'))));
    return value && *value > 0 ? value : std::nullopt;
}

std::string one_line(const std::string& text) {
    std::string line = without_control(text);
    std::replace(line.begin(), line.end(), '\\', '/');
    return stripped(shortened(stripped(line), kLongString));
}

std::string decimal_string(double number) {
    if (number == 0) return "0";
    char text[40];
    const auto shortest = std::to_chars(text, text + sizeof text, number);
    if (shortest.ptr <= text + kNumberCharacters) return {text, shortest.ptr};
    for (int digits = kNumberCharacters; digits > 0; --digits) {
        const int count = std::snprintf(text, sizeof text, "%.*g", digits, number);
        if (count <= static_cast<int>(kNumberCharacters)) break;
    }
    return text;
}

std::string stripped(const std::string& text) {
    const auto begin = std::find_if_not(text.begin(), text.end(), is_filling);
    return right_stripped({begin, text.end()});
}

bool is_ascii(const std::string& text) {
    return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

}  // namespace fastnnunet::dicom_seg
