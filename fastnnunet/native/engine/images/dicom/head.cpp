#include "head.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

#include "../image.hpp"
#include "../text.hpp"
#include "../text_headers.hpp"

namespace fastnnunet::images {
namespace {

constexpr std::int64_t kPreambleBytes = 128, kLongestValue = 4096;
constexpr std::uint32_t kUndefined = 0xffffffffu;
constexpr std::uint32_t kItem = 0xfffee000u, kItemEnd = 0xfffee00du, kSequenceEnd = 0xfffee0ddu;
constexpr std::uint32_t kFrames = 0x52009229u;  // what follows describes single frames, and is long
constexpr int kMostElements = 100'000, kDeepest = 32;

bool is_one_of(const std::uint8_t* vr, const char* names) {
    for (; *names != 0; names += 2) {
        if (vr[0] == static_cast<std::uint8_t>(names[0]) && vr[1] == static_cast<std::uint8_t>(names[1])) return true;
    }
    return false;
}
bool is_long(const std::uint8_t* vr) { return is_one_of(vr, "OBODOFOLOVOWSQSVUCUNURUTUV"); }
bool is_short(const std::uint8_t* vr) { return is_one_of(vr, "AEASATCSDADSDTFDFLISLOLTPNSHSLSSSTTMUIULUS"); }

struct Odd {};  // the bytes are not what is expected at this place

struct Encoding {
    bool is_explicit = true, big_endian = false;
};

struct Element {
    std::uint32_t tag = 0, length = 0;
    bool is_unknown = false;  // whose undefined length means implicit little endian inside
};

// A file read from front to back
class Source {
public:
    explicit Source(File& file) : file_(file) {}

    std::int64_t at = 0;
    std::int64_t size() const { return file_.size(); }

    // As many bytes as there are, at most `count`; `at` moves on
    std::vector<std::uint8_t> take(std::size_t count) {
        auto bytes = peek(count);
        at += static_cast<std::int64_t>(bytes.size());
        return bytes;
    }
    std::vector<std::uint8_t> peek(std::size_t count) {
        if (at < begin_ || at + static_cast<std::int64_t>(count) > begin_ + static_cast<std::int64_t>(held_.size())) {
            begin_ = at;
            held_ = at < size() ? file_.read(at, std::max<std::size_t>(count, 8192)) : std::vector<std::uint8_t>{};
        }
        const auto from = held_.begin() + std::min<std::int64_t>(at - begin_, static_cast<std::int64_t>(held_.size()));
        return {from, from + std::min<std::int64_t>(static_cast<std::int64_t>(count), held_.end() - from)};
    }

private:
    File& file_;
    std::int64_t begin_ = 0;
    std::vector<std::uint8_t> held_;
};

std::uint32_t whole(const std::uint8_t* bytes, int count, bool big_endian) {
    std::uint32_t value = 0;
    for (int i = 0; i < count; ++i) value |= std::uint32_t{bytes[i]} << (8 * (big_endian ? count - 1 - i : i));
    return value;
}

std::uint32_t tag_of(const std::uint8_t* bytes, bool big_endian) {
    return whole(bytes, 2, big_endian) << 16 | whole(bytes + 2, 2, big_endian);
}

// How the data set that begins here is encoded, whatever the file says
Encoding sniff(Source& source) {
    const auto first = source.peek(8);
    if (first.size() < 8) return {};
    const bool is_explicit = is_short(first.data() + 4) || is_long(first.data() + 4);
    return {is_explicit, is_explicit && first[0] == 0 && first[1] != 0};
}

// The source is at the value then; false at the end of the file
bool next(Source& source, const Encoding& encoding, Element* element) {
    const auto start = source.take(8);
    if (start.empty()) return false;
    if (start.size() < 8) throw Odd{};
    *element = {tag_of(start.data(), encoding.big_endian), 0, false};
    const std::uint32_t tag = element->tag;
    if (tag == kItem || tag == kItemEnd || tag == kSequenceEnd || !encoding.is_explicit) {
        element->length = whole(start.data() + 4, 4, encoding.big_endian);
    } else if (is_short(start.data() + 4)) {
        element->length = whole(start.data() + 6, 2, encoding.big_endian);
    } else if (is_long(start.data() + 4)) {
        const auto length = source.take(4);
        if (length.size() < 4) throw Odd{};
        element->length = whole(length.data(), 4, encoding.big_endian);
        element->is_unknown = start[4] == 'U' && start[5] == 'N';
    } else {
        throw Odd{};
    }
    return true;
}

// To behind the end of a sequence of undefined length
void skip_sequence(Source& source, const Encoding& encoding, int depth) {
    if (depth > kDeepest) throw Odd{};
    while (true) {
        Element item;
        if (!next(source, encoding, &item) || (item.tag != kItem && item.tag != kSequenceEnd)) throw Odd{};
        if (item.tag == kSequenceEnd) return;
        if (item.length != kUndefined) {
            source.at += item.length;
            continue;
        }
        while (true) {
            Element element;
            if (!next(source, encoding, &element)) throw Odd{};
            if (element.tag == kItemEnd) break;
            if (element.length == kUndefined) {
                skip_sequence(source, element.is_unknown ? Encoding{false, false} : encoding, depth + 1);
            } else {
                source.at += element.length;
            }
        }
    }
}

std::string stripped(const std::vector<std::uint8_t>& value) {
    const auto is_filling = [](std::uint8_t c) { return c == 0 || c == ' '; };
    const auto begin = std::find_if_not(value.begin(), value.end(), is_filling);
    const auto end = std::find_if_not(value.rbegin(), value.rend(), is_filling).base();
    return begin < end ? utf8(std::string(begin, end)) : "";
}

std::vector<std::string> parts_of(const std::string& text) {
    std::vector<std::string> parts(1);
    for (const char c : text) {
        if (c == '\\') {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    return parts;
}

struct Meta {  // the file's own header repeats the two
    std::string storage_class, sop_uid;
    bool is_recognised = false;
};

void keep(DicomHead& head, Meta& meta, std::uint32_t tag, const std::vector<std::uint8_t>& value, bool big_endian) {
    const auto number = [&] { return value.size() >= 2 ? static_cast<int>(whole(value.data(), 2, big_endian)) : 0; };
    switch (tag) {
        case 0x00020002: meta.storage_class = stripped(value); break;
        case 0x00020003: meta.sop_uid = stripped(value); break;
        case 0x00020010: head.transfer_syntax = stripped(value); break;
        case 0x00080008:
            for (std::string part : parts_of(stripped(value))) {
                for (char& c : part) c = c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
                if (!part.empty()) head.image_type.push_back(trimmed(part));
            }
            break;
        case 0x00080010: meta.is_recognised = true; break;
        case 0x00080016: head.storage_class = stripped(value); break;
        case 0x00080018: head.sop_uid = stripped(value); break;
        case 0x00080060: head.modality = stripped(value); break;
        case 0x0008103e: head.description = stripped(value); break;
        case 0x0020000d: head.study_uid = stripped(value); break;
        case 0x0020000e: head.series_uid = stripped(value); break;
        case 0x00200032: head.position = decimals(stripped(value)); break;
        case 0x00200037: head.orientation = decimals(stripped(value)); break;
        case 0x00200052: head.frame_uid = stripped(value); break;
        case 0x00280002: head.samples = number(); break;
        case 0x00280008: {
            const std::string text = trimmed(stripped(value));
            std::int64_t frames = 0;
            const auto [end, error] =
                std::from_chars(text.data(), text.data() + std::min<std::size_t>(9, text.size()), frames);
            head.frames = error == std::errc() && end != text.data() && frames >= 0 ? frames : 1;
            break;
        }
        case 0x00280010: head.rows = number(); break;
        case 0x00280011: head.columns = number(); break;
        case 0x00280030: head.pixel_spacing = decimals(stripped(value)); break;
        case 0x00280100: head.bits_allocated = number(); break;
        case 0x00280101: head.bits_stored = number(); break;
        case 0x00280102: head.high_bit = number(); break;
        case 0x00280103: head.is_signed = number(); break;
        case 0x00281052: head.intercept = stripped(value); break;
        case 0x00281053: head.slope = stripped(value); break;
        default: break;
    }
}

void parse(Source& source, DicomHead& head, Meta& meta) {
    Encoding encoding = head.has_preamble ? Encoding{} : sniff(source);
    bool in_meta = true;
    std::int64_t last = -1;
    for (int count = 0; count < kMostElements; ++count) {
        if (in_meta) {
            const auto group = source.peek(2);
            if (group.size() < 2 || whole(group.data(), 2, false) != 2) {
                encoding = sniff(source);
                in_meta = false;
            }
        }
        Element element;
        if (!next(source, encoding, &element)) return;
        if (element.tag <= last && !head.has_preamble) throw Odd{};  // some writers keep no order
        last = element.tag;
        head.has_value_mapping = head.has_value_mapping || element.tag == 0x00409096u;
        const bool are_pixels = element.tag == 0x7fe00008u || element.tag == 0x7fe00009u || element.tag == 0x7fe00010u;
        if (are_pixels || element.tag == kFrames) {
            head.pixels_at = source.at;
            head.has_plain_pixels = element.tag == 0x7fe00010u;
            head.big_endian = encoding.big_endian;
            if (element.length != kUndefined && element.tag != kFrames) head.pixel_bytes = element.length;
            return;
        }
        if (element.length == kUndefined) {
            skip_sequence(source, element.is_unknown ? Encoding{false, false} : encoding, 0);
            continue;
        }
        if (source.at + element.length > source.size()) throw Odd{};
        if (element.length > kLongestValue) {
            source.at += element.length;
        } else {
            keep(head, meta, element.tag, source.take(element.length), encoding.big_endian);
        }
    }
    throw Odd{};
}

// Whether bytes may be the first element of a data set without preamble
bool may_begin(const std::vector<std::uint8_t>& start) {
    if (start.size() < 16) return false;
    for (const bool big_endian : {false, true}) {
        const auto group = whole(start.data(), 2, big_endian), number = whole(start.data() + 2, 2, big_endian);
        if (!(group == 2 && number <= 0x0102) && !(group == 8 && number <= 0x0070)) continue;
        const bool names_type = is_short(start.data() + 4) || is_long(start.data() + 4);
        const auto length =
            names_type ? whole(start.data() + 6, 2, big_endian) : whole(start.data() + 4, 4, big_endian);
        return length <= kLongestValue && (names_type || !big_endian);
    }
    return false;
}

}  // namespace

bool DicomHead::is_localizer() const {
    return std::find(image_type.begin(), image_type.end(), "LOCALIZER") != image_type.end();
}

std::vector<double> decimals(const std::string& text) {
    std::vector<double> values;
    if (text.empty()) return values;
    for (std::string part : parts_of(text)) {
        std::replace(part.begin(), part.end(), ',', '.');
        part = trimmed(part);
        const char* begin = part.c_str() + (!part.empty() && part[0] == '+');
        double value = 0;
        const auto [end, error] = std::from_chars(begin, part.c_str() + part.size(), value);
        if (error != std::errc() || end != part.c_str() + part.size() || !std::isfinite(value)) return {};
        values.push_back(value);
    }
    return values;
}

std::optional<DicomHead> read_dicom_head(const std::string& path) {
    File file(path);
    Source source(file);
    const auto start = source.peek(kPreambleBytes + 4);
    DicomHead head;
    head.has_preamble =
        start.size() == kPreambleBytes + 4 && std::memcmp(start.data() + kPreambleBytes, "DICM", 4) == 0;
    if (!head.has_preamble && !may_begin(start)) return std::nullopt;
    source.at = head.has_preamble ? kPreambleBytes + 4 : 0;
    Meta meta;
    try {
        parse(source, head, meta);
    } catch (const Odd&) {
        head.is_whole = false;
    }
    if (head.storage_class.empty()) head.storage_class = meta.storage_class;
    if (head.sop_uid.empty()) head.sop_uid = meta.sop_uid;
    const bool says_what = !head.storage_class.empty() || !head.modality.empty() || meta.is_recognised;
    if (head.has_preamble || (head.is_image() && says_what)) return head;
    // begun like DICOM and cut off; anything else is another kind of file
    if (!head.is_whole && head.storage_class.rfind("1.2.840.", 0) == 0) return head;
    return std::nullopt;
}

}  // namespace fastnnunet::images
