#include "outputs/dicom_seg/headers.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <random>
#include <regex>
#include <set>

#include "bundle/digest.hpp"
#include "outputs/dicom_seg/values.hpp"

namespace fastnnunet::dicom_seg {
namespace {

const char* const kWithout = "\nleave dicom-seg and rtstruct out of --output-format";
constexpr int kDeepest = 8;  // sequences in sequences
constexpr int kMostSeriesNumber = 2147483647;
constexpr int kOurs = 1000;  // added to the number of the series, which is not one of the scanner's then

// The modules Patient, General Study, Patient Study, Clinical Trial Subject and Clinical Trial Study (PS3.3 C.7)
const std::set<Uint32>& taken_over() {
    static const std::set<Uint32> tags{
        0x00080020, 0x00080030, 0x00080050, 0x00080051, 0x00080090, 0x00080096, 0x0008009c, 0x0008009d, 0x00081030,
        0x00081032, 0x00081048, 0x00081049, 0x00081060, 0x00081062, 0x00081080, 0x00081084, 0x00081110, 0x00081120,
        0x00100010, 0x00100020, 0x00100021, 0x00100022, 0x00100024, 0x00100026, 0x00100027, 0x00100030, 0x00100032,
        0x00100033, 0x00100034, 0x00100035, 0x00100040, 0x00100200, 0x00100212, 0x00100213, 0x00100216, 0x00100218,
        0x00100219, 0x00100221, 0x00101001, 0x00101002, 0x00101010, 0x00101020, 0x00101021, 0x00101022, 0x00101023,
        0x00101024, 0x00101030, 0x00101100, 0x00102000, 0x00102110, 0x00102161, 0x00102180, 0x001021a0, 0x001021b0,
        0x001021c0, 0x001021d0, 0x00102201, 0x00102202, 0x00102203, 0x00102292, 0x00102293, 0x00102294, 0x00102297,
        0x00102298, 0x00102299, 0x00104000, 0x00120010, 0x00120020, 0x00120021, 0x00120022, 0x00120023, 0x00120030,
        0x00120031, 0x00120032, 0x00120040, 0x00120041, 0x00120042, 0x00120043, 0x00120050, 0x00120051, 0x00120052,
        0x00120053, 0x00120054, 0x00120055, 0x00120062, 0x00120063, 0x00120064, 0x00120081, 0x00120082, 0x00120083,
        0x00200010, 0x00321033, 0x00321034, 0x00321066, 0x00321067, 0x00380010, 0x00380014, 0x00380060, 0x00380062,
        0x00380064, 0x00380500, 0x00401012};
    return tags;
}
// Institution, its address, station, department and model: beside the maker
const std::set<Uint32>& of_equipment() {
    static const std::set<Uint32> tags{0x00080070, 0x00080080, 0x00080081, 0x00081010, 0x00081040, 0x00081090};
    return tags;
}
// They may be empty but must be there (type 2); anonymisers and converters leave some out.
constexpr Uint32 kIdentifying[] = {0x00080020, 0x00080030, 0x00080050, 0x00080090, 0x00100010,
                                   0x00100020, 0x00100030, 0x00100040, 0x00200010};

Uint32 number_of(const DcmTagKey& tag) { return Uint32{tag.getGroup()} << 16 | tag.getElement(); }
DcmTagKey key_of(Uint32 number) { return {static_cast<Uint16>(number >> 16), static_cast<Uint16>(number & 0xffff)}; }

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts(1);
    for (const char c : text) {
        if (c == '\\') {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    for (std::string& part : parts) part = stripped(part);
    return parts;
}

void must(const OFCondition& condition, const char* what) {
    if (condition.bad()) throw Refused(std::string("DCMTK cannot ") + what + ": " + condition.text());
}

// What DICOM's dictionary says of a tag
struct Entry {
    std::string keyword, vr;
    bool is_single;
};
std::optional<Entry> look_up(const DcmTagKey& tag) {
    std::optional<Entry> found;
    if (tag.isPrivate() || tag.getElement() == 0) return found;
    const DcmDictEntry* entry = dcmDataDict.rdlock().findEntry(tag, nullptr);
    if (entry != nullptr)
        found = Entry{entry->getTagName(), DcmVR(entry->getEVR()).getVRName(), entry->getVMMax() == 1};
    dcmDataDict.rdunlock();
    return found;
}

// The bytes of a text attribute; none where it is of another kind or missing
std::optional<std::string> bytes_of(DcmItem& item, const DcmTagKey& tag) {
    DcmElement* element = nullptr;
    if (item.findAndGetElement(tag, element).bad() || element == nullptr) return {};
    char* text = nullptr;
    if (element->getString(text).bad()) return {};
    return text == nullptr ? "" : text;
}

std::string plain_text(DcmItem& item, const DcmTagKey& tag) { return stripped(bytes_of(item, tag).value_or("")); }

bool is_utf8(const std::string& text) {
    std::size_t left = 0;
    Uint32 letter = 0, least = 0;
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        if (left > 0) {
            if ((byte & 0xc0) != 0x80) return false;
            letter = letter << 6 | (byte & 0x3f);
            if (--left == 0 && (letter < least || letter > 0x10ffff || (letter >= 0xd800 && letter < 0xe000)))
                return false;
        } else if (byte >= 0x80) {
            left = byte >= 0xf0 ? 3 : byte >= 0xe0 ? 2 : 1;
            if (byte < 0xc2 || byte > 0xf4) return false;
            letter = byte & (0x3f >> left);
            least = left == 1 ? 0x80 : left == 2 ? 0x800 : 0x10000;
        }
    }
    return left == 0;
}

// Text in UTF-8 of the character sets that a header names; where it names none, or one that does not exist, or its text
// does not fit, UTF-8 if it is that, or Latin-1.
class Decoder {
public:
    static Decoder of(DcmItem& item, const Decoder& inherited) {
        if (!item.tagExists(DCM_SpecificCharacterSet)) return inherited;
        Decoder made;
        made.names_ = names_in(plain_text(item, DCM_SpecificCharacterSet));
        return made;
    }

    std::string text(const std::string& bytes, bool is_name) const {
        std::string converted;
        if (!names_.empty() && convert(bytes, is_name, &converted)) return converted;
        if (is_utf8(bytes)) return bytes;
        std::string latin;
        for (const char c : bytes) {
            const auto byte = static_cast<unsigned char>(c);
            if (byte >= 0x80) latin += static_cast<char>(0xc0 | byte >> 6);
            latin += byte < 0x80 ? c : static_cast<char>(0x80 | (byte & 0x3f));
        }
        return latin;
    }

private:
    // They are written in many ways.
    static std::string names_in(const std::string& given) {
        static const std::regex iso_ir("ISO[-_ ]?(2022)?[-_ ]?IR[-_ ]?");
        std::string names;
        bool is_first = true, is_any = false;
        for (std::string part : split(given.substr(0, kLongestName))) {
            std::transform(part.begin(), part.end(), part.begin(),
                           [](char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c; });
            std::smatch match;
            if (std::regex_search(part, match, iso_ir)) {
                part =
                    match.prefix().str() + (match[1].length() > 0 ? "ISO 2022 IR " : "ISO_IR ") + match.suffix().str();
            }
            names += (is_first ? "" : "\\") + part;
            is_any = is_any || !part.empty();
            is_first = false;
        }
        return is_any ? names : "";
    }

    bool convert(const std::string& bytes, bool is_name, std::string* converted) const {
        OFString to;
        const OFString from(bytes.data(), bytes.size());
        const auto has = [&](const char* set) { return names_.find(set) != std::string::npos; };
        if (has("IR 87") || has("IR 159")) {  // which DCMTK hands to iconv by names that glibc does not know
            OFCharacterEncoding encoding;
            if (encoding.selectEncoding("ISO-2022-JP-2", "UTF-8").bad() || encoding.convertString(from, to).bad())
                return false;
        } else {
            DcmSpecificCharacterSet sets;
            if (sets.selectCharacterSet(OFString(names_.data(), names_.size())).bad()) return false;
            // at these the character set is the first one again
            if (sets.convertString(from, to, is_name ? "\\^=" : "\\\t\n\f\r").bad()) return false;
        }
        converted->assign(to.data(), to.size());
        return true;
    }

    static constexpr std::size_t kLongestName = 256;
    std::string names_;
};

struct Reading {
    Notes& notes;

    std::string text(DcmItem& item, const DcmTagKey& tag, const std::string& vr, const Decoder& decoder) const {
        const auto bytes = bytes_of(item, tag);
        return bytes ? stripped(decoder.text(*bytes, vr == "PN")) : "";
    }

    // An attribute with legal values only. False: it is none that can be taken over.
    void copy(DcmItem& from, const DcmTagKey& tag, const Decoder& decoder, int depth, DcmItem& to) const {
        const auto entry = look_up(tag);
        DcmElement* element = nullptr;
        if (!entry || from.findAndGetElement(tag, element).bad() || element == nullptr) return;
        if (is_text_kind(entry->vr)) {
            const auto [values, what] = mended(entry->vr, text(from, tag, entry->vr, decoder), entry->is_single);
            std::string together;
            for (std::size_t i = 0; i < values.size(); ++i) together += (i > 0 ? "\\" : "") + values[i];
            put(to, tag, together);
            notes.add(entry->keyword, what);
        } else if (entry->vr == "SQ") {
            auto* sequence = dynamic_cast<DcmSequenceOfItems*>(element);
            if (sequence == nullptr) {
                notes.add(entry->keyword, "left out, it cannot be read");
                return;
            }
            must(to.insertEmptyElement(tag), "make a sequence");
            for (unsigned long i = 0; depth < kDeepest && i < sequence->card(); ++i) {
                DcmItem& item = *sequence->getItem(i);
                copy_all(item, Decoder::of(item, decoder), depth + 1, add_item(to, tag));
            }
        } else if (DcmVR(element->ident()).getVRName() == entry->vr) {
            DcmElement* same = OFstatic_cast(DcmElement*, element->clone());
            if (const OFCondition done = to.insert(same, OFTrue); done.bad()) {
                delete same;
                must(done, "copy an attribute");
            }
        } else if (entry->vr.size() == 2 && entry->vr[0] >= 'A' && entry->vr[0] <= 'Z') {
            notes.add(entry->keyword, "left out, it cannot be read");
        }
    }

    void copy_all(DcmItem& from, const Decoder& decoder, int depth, DcmItem& to) const {
        for (unsigned long i = 0; i < from.card(); ++i) {
            const DcmTagKey tag = from.getElement(i)->getTag();
            if (tag != DCM_SpecificCharacterSet) copy(from, tag, decoder, depth, to);
        }
    }
};

// The modules of the first slice, and the equipment beside them
void take_over(DcmItem& first, const Decoder& decoder, Headers& made) {
    const Reading reading{made.notes};
    for (unsigned long i = 0; i < first.card(); ++i) {
        const DcmTagKey tag = first.getElement(i)->getTag();
        const Uint32 number = number_of(tag);
        if (taken_over().count(number) > 0) reading.copy(first, tag, decoder, 0, made.patient_and_study);
        if (of_equipment().count(number) > 0) reading.copy(first, tag, decoder, 0, made.equipment);
        // of each slice as it is; said where it is not legal
        if (tag == DCM_SOPClassUID) made.notes.add("SOPClassUID", mended("UI", plain_text(first, tag), true).second);
    }
    for (const Uint32 number : kIdentifying) {
        if (!made.patient_and_study.tagExists(key_of(number))) put(made.patient_and_study, key_of(number), "");
    }
    const auto [sex, what] = mended_sex(reading.text(first, DCM_PatientSex, "CS", decoder));
    made.notes.erase("PatientSex");
    put(made.patient_and_study, DCM_PatientSex, sex);
    made.notes.add("PatientSex", what);
    if (plain_text(made.equipment, DCM_Manufacturer).empty()) {
        for (const Uint32 number : of_equipment()) made.notes.erase(look_up(key_of(number))->keyword);
        made.equipment.clear();
    }
}

std::string class_of(const std::string& modality) {
    if (modality == "CT") return UID_CTImageStorage;
    if (modality == "MR") return UID_MRImageStorage;
    return modality == "PT" ? UID_PositronEmissionTomographyImageStorage : UID_SecondaryCaptureImageStorage;
}

// The UIDs of the slices: as they are, were they not legal, since others refer to the images by them
void identify(const fastnnunet_seg& segmentation, Headers& made) {
    const std::string folder = segmentation.folder;
    std::set<std::string> seen;
    std::string all;
    for (int64_t i = 0; i < segmentation.slice_count; ++i) {
        const fastnnunet_seg_slice& slice = segmentation.slices[i];
        const std::string uid = slice.sop_uid, storage_class = slice.storage_class;
        if (uid.empty()) {
            throw Refused(std::string(slice.path) +
                          " has no SOPInstanceUID, by which a DICOM object refers to its image" + kWithout);
        }
        made.storage_classes.push_back(storage_class.empty() ? class_of(slice.modality) : storage_class);
        if (storage_class.empty()) made.notes.set("SOPClassUID", "missing, taken from the modality");
        seen.insert(uid);
        all += "\n" + uid;
    }
    if (static_cast<int64_t>(seen.size()) < segmentation.slice_count) {
        throw Refused(folder +
                      ": several slices have the same SOPInstanceUID (anonymised?), so that a DICOM object "
                      "cannot refer to them" +
                      kWithout);
    }
    const fastnnunet_seg_slice& first = segmentation.slices[0];
    if (*first.frame_uid == 0) {
        throw Refused(folder + ": the series has no FrameOfReferenceUID, which a DICOM object must share with it" +
                      kWithout);
    }
    struct Shared {
        const char* name;
        const char* fastnnunet_seg_slice::*of_slice;
        std::string* to;
    };
    const std::array<Shared, 3> shared{{{"StudyInstanceUID", &fastnnunet_seg_slice::study_uid, &made.study_uid},
                                        {"SeriesInstanceUID", &fastnnunet_seg_slice::series_uid, &made.series_uid},
                                        {"FrameOfReferenceUID", &fastnnunet_seg_slice::frame_uid, &made.frame_uid}}};
    for (const Shared& one : shared) {
        *one.to = first.*one.of_slice;
        if (!one.to->empty()) continue;
        // one and the same for every segmentation of these images
        *one.to = uid_of_digest(engine::sha256_hex(one.name + all));
        made.notes.set(one.name, std::string("made up, the series has no ") + one.name + " (anonymised?)");
    }
    for (const Shared& one : shared) {
        for (int64_t i = 0; i < segmentation.slice_count; ++i) {
            const std::string uid = segmentation.slices[i].*one.of_slice;
            if (!uid.empty() && uid != *one.to)
                made.notes.set(one.name, "that of the first slice, others have another one");
        }
    }
}

// The distance of the slices as their positions have it; SpacingBetweenSlices is often missing or not that.
void measure(const fastnnunet_seg& segmentation, const std::string& given, Headers& made) {
    const std::optional<double> thickness = positive(given);
    std::optional<double> spacing;
    if (segmentation.slice_count > 1) {
        const double *a = segmentation.slices[0].position_mm,
                     *b = segmentation.slices[segmentation.slice_count - 1].position_mm;
        const double squared =
            (a[0] - b[0]) * (a[0] - b[0]) + (a[1] - b[1]) * (a[1] - b[1]) + (a[2] - b[2]) * (a[2] - b[2]);
        spacing = std::sqrt(squared) / static_cast<double>(segmentation.slice_count - 1);
    }
    if (!thickness && (!given.empty() || !spacing)) {
        made.notes.set("SliceThickness", std::string(given.empty() ? "missing" : "no positive number") + ", " +
                                             (spacing ? "the distance of the slices" : "1 mm") + " is taken");
    }
    made.thickness_mm = thickness ? *thickness : spacing ? *spacing : 1;
    made.spacing_mm = spacing ? *spacing : thickness ? *thickness : 1;
}

void number_series(const std::string& given, Headers& made) {
    const std::string value = mended("IS", given, true).first[0];
    std::int64_t number = value.empty() ? 0 : std::stoll(value);
    if (number < 0 || number > kMostSeriesNumber - kOurs || (!given.empty() && value.empty())) {
        const std::string most = std::to_string(kMostSeriesNumber - kOurs);
        made.notes.set("SeriesNumber", std::to_string(kOurs) + ", that of the series is no number from 0 to " + most);
        number = 0;
    }
    made.series_number = static_cast<int>(number) + kOurs;
}

}  // namespace

void Notes::add(const std::string& name, const std::string& what) {
    const bool is_new =
        std::none_of(notes_.begin(), notes_.end(), [&](const auto& note) { return note.first == name; });
    if (!what.empty() && is_new) notes_.emplace_back(name, what);
}

void Notes::set(const std::string& name, const std::string& what) {
    for (auto& note : notes_) {
        if (note.first == name) note.second = what;
    }
    add(name, what);
}

void Notes::erase(const std::string& name) {
    notes_.erase(std::remove_if(notes_.begin(), notes_.end(), [&](const auto& note) { return note.first == name; }),
                 notes_.end());
}

std::string Notes::text() const {
    std::string text;
    for (const auto& [name, what] : notes_) text += (text.empty() ? "" : "; ") + name + " (" + what + ")";
    return text;
}

Headers read_headers(const fastnnunet_seg& segmentation) {
    const std::string folder = segmentation.folder;
    DcmFileFormat file;
    const OFCondition read = file.loadFileUntilTag(segmentation.slices[0].path, EXS_Unknown, EGL_noChange,
                                                   DCM_MaxReadLength, ERM_autoDetect, DCM_PixelData);
    if (read.bad()) throw Refused(folder + ": DCMTK cannot read its headers: " + read.text() + kWithout);
    DcmItem& first = *file.getDataset();
    Headers made;
    const Decoder decoder = Decoder::of(first, {});
    take_over(first, decoder, made);
    identify(segmentation, made);
    const Reading reading{made.notes};
    measure(segmentation, reading.text(first, DCM_SliceThickness, "DS", decoder), made);
    number_series(reading.text(first, DCM_SeriesNumber, "IS", {}), made);
    return made;
}

std::string uid_of_digest(const std::string& hex) {
    std::array<int, 39> digits{};  // of 128 bits, the lowest first
    for (std::size_t i = 0; i < 32; ++i) {
        int carry = std::stoi(hex.substr(i, 1), nullptr, 16);
        for (int& digit : digits) {
            carry += digit * 16;
            digit = carry % 10;
            carry /= 10;
        }
    }
    std::string text;
    for (auto digit = digits.rbegin(); digit != digits.rend(); ++digit) {
        if (!text.empty() || *digit != 0) text += static_cast<char>('0' + *digit);
    }
    return "2.25." + (text.empty() ? "0" : text);
}

std::string new_uid() {
    std::random_device random;
    std::string hex;
    for (int i = 0; i < 32; ++i) hex += "0123456789abcdef"[random() % 16];
    return uid_of_digest(hex);
}

void put(DcmItem& item, const DcmTagKey& tag, const std::string& value) {
    must(item.putAndInsertOFStringArray(tag, OFString(value.data(), value.size())), "set an attribute");
}

DcmItem& add_item(DcmItem& item, const DcmTagKey& sequence) {
    DcmItem* made = nullptr;
    must(item.findOrCreateSequenceItem(sequence, made, -2), "add to a sequence");
    return *made;
}

}  // namespace fastnnunet::dicom_seg
