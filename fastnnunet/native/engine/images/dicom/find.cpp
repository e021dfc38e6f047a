// Which files of a folder are the slices of a series.

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>
#include <tuple>

#include "../image.hpp"
#include "../text.hpp"
#include "series.hpp"

namespace fastnnunet::images {
namespace {

namespace fs = std::filesystem;
using Heads = std::vector<std::pair<std::string, DicomHead>>;

constexpr const char* kDeflated = "1.2.840.10008.1.2.1.99";

std::vector<std::string> files_of(const std::string& folder) {
    std::vector<std::string> names;
    std::error_code failed;
    for (const auto& entry : fs::directory_iterator(fs::u8path(folder), failed)) {
        const std::string name = entry.path().filename().u8string();
        std::string capitals = lowered(name);
        if (name[0] == '.' || capitals == "dicomdir" || !entry.is_regular_file(failed)) continue;
        names.push_back(name);
    }
    std::sort(names.begin(), names.end());
    std::vector<std::string> files;
    for (const auto& name : names) files.push_back((fs::u8path(folder) / fs::u8path(name)).u8string());
    return files;
}

std::string examples(const std::vector<std::string>& paths) {
    std::string text;
    for (std::size_t i = 0; i < paths.size() && i < 3; ++i) text += (i == 0 ? "" : ", ") + name_of(paths[i]);
    return paths.size() > 3 ? text + ", ..." : text;
}

std::string suffix_of(const std::string& path) { return fs::u8path(path).extension().u8string(); }

std::string described(const std::string& uid, const Heads& heads) {
    std::string text = (uid.empty() ? "(no UID)" : uid) + ", " + std::to_string(heads.size()) + " image(s)";
    for (const std::string& word : {heads[0].second.modality, heads[0].second.description}) {
        if (!word.empty()) text += ", " + word;
    }
    return text;
}

// The series that is meant, and what to say about the others
std::string choose(const std::string& folder, const std::string& uid,
                   const std::vector<std::pair<std::string, Heads>>& found, std::vector<std::string>* notes) {
    std::string listing;
    for (const auto& [id, heads] : found) listing += (listing.empty() ? "  " : "\n  ") + described(id, heads);
    if (!uid.empty()) {
        for (const auto& entry : found) {
            if (entry.first == uid) return uid;
        }
        throw ImageError(folder + " holds no series " + uid + ", expected one of:\n" + listing);
    }
    std::vector<std::string> volumes, scouts;
    for (const auto& [id, heads] : found) {
        if (!std::all_of(heads.begin(), heads.end(), [](const auto& slice) { return slice.second.is_localizer(); })) {
            volumes.push_back(id);
        }
    }
    if (found.size() > 1 && volumes.size() != 1) {
        throw ImageError(folder + " holds " + std::to_string(found.size()) + " DICOM series, expected one:\n" +
                         listing + "\npredict one with -i FOLDER --series UID, or give each a folder of its own");
    }
    if (found.size() == 1) return found[0].first;
    for (const auto& [id, heads] : found) {
        for (const auto& slice : heads) {
            if (id != volumes[0]) scouts.push_back(slice.first);
        }
    }
    notes->push_back("left out " + std::to_string(found.size() - 1) + " series of scouts only (" + examples(scouts) +
                     ")");
    return volumes[0];
}

// Whether a file without a DICOM header may have lost it: named as slices are, empty, or begun as they are
bool may_be_a_slice(const std::string& path, const std::string& suffix) {
    File file(path);
    const auto begin = file.read(0, 128);
    const bool is_empty = std::all_of(begin.begin(), begin.end(), [](std::uint8_t byte) { return byte == 0; });
    return is_empty || (!suffix.empty() && suffix_of(path) == suffix);
}

// A series without a slice that cannot be read would be another image.
void refuse_damaged(const std::string& folder, const std::vector<std::pair<std::string, std::optional<DicomHead>>>& all,
                    const Heads& slices) {
    const std::string suffix = suffix_of(slices[0].first), storage_class = slices[0].second.storage_class;
    std::vector<std::string> lost;
    for (const auto& [path, head] : all) {
        bool is_lost = !head && may_be_a_slice(path, suffix);
        if (head && !head->is_image()) is_lost = head->storage_class.empty() || head->storage_class == storage_class;
        if (head && head->pixel_bytes > 0) {
            is_lost = is_lost || std::max<std::int64_t>(0, head->pixels_at) + head->pixel_bytes > File(path).size();
        }
        if (is_lost) lost.push_back(path);
    }
    std::error_code failed;
    for (const auto& entry : fs::directory_iterator(fs::u8path(folder), failed)) {
        // a link that leads nowhere (data not fetched yet) is a slice when it is called so
        const bool is_broken = entry.is_symlink(failed) && !fs::exists(entry.path(), failed);
        if (is_broken && !suffix.empty() && entry.path().extension().u8string() == suffix) {
            lost.push_back(entry.path().u8string());
        }
    }
    if (lost.empty()) return;
    throw ImageError(folder + ": " + std::to_string(lost.size()) + " file(s) cannot be read as DICOM (" +
                     examples(lost) + "); copy or export them again");
}

std::vector<std::uint8_t> pixels_of(const std::string& path, const DicomHead& head) {
    File file(path);
    const std::int64_t start = std::max<std::int64_t>(0, head.pixels_at);
    return file.read(start, static_cast<std::size_t>(std::max<std::int64_t>(0, file.size() - start)));
}

// Files that hold a slice a second time: same identity, place and pixels as one that comes first by name
std::set<std::string> copies_of(const std::string& folder, const Heads& slices) {
    using Identity = std::tuple<std::string, std::vector<double>, std::vector<double>, int, int>;
    Heads by_name = slices;  // `a.dcm` before `a (1).dcm` and `copy of a.dcm`
    std::sort(by_name.begin(), by_name.end(), [](const auto& a, const auto& b) {
        const std::string one = name_of(a.first), other = name_of(b.first);
        return std::make_pair(one.size(), one) < std::make_pair(other.size(), other);
    });
    std::map<Identity, std::pair<std::string, DicomHead>> first_of;
    std::set<std::string> copies;
    for (const auto& slice : by_name) {
        const DicomHead& head = slice.second;
        const auto [first, is_new] =
            first_of.insert({{head.sop_uid, head.position, head.orientation, head.rows, head.columns}, slice});
        if (is_new) continue;
        if (pixels_of(first->second.first, first->second.second) == pixels_of(slice.first, head)) {
            copies.insert(slice.first);
        } else if (!head.sop_uid.empty() && !head.position.empty()) {
            throw ImageError(folder + ": " + name_of(first->second.first) + " and " + name_of(slice.first) +
                             " are different slices with the same identity (SOPInstanceUID " + head.sop_uid +
                             ") and position; take the wrong one out of the folder");
        }
    }
    return copies;
}

bool all_close(const std::vector<double>& a, const std::vector<double>& b) {
    if (a.size() != b.size()) return false;
    for (std::size_t i = 0; i < a.size(); ++i) {
        if (!(std::fabs(a[i] - b[i]) <= 1e-8 + 1e-5 * std::fabs(b[i]))) return false;
    }
    return true;
}

// By their positions along the normal of the slices, or by their names where there is none
void put_in_order(Heads& slices) {
    const DicomHead& first = slices[0].second;
    for (const auto& slice : slices) {
        const DicomHead& head = slice.second;
        if (head.position.size() != 3 || head.orientation.size() != 6 ||
            !all_close(head.orientation, first.orientation)) {
            return;
        }
    }
    const auto& o = first.orientation;
    const double normal[3] = {o[1] * o[5] - o[2] * o[4], o[2] * o[3] - o[0] * o[5], o[0] * o[4] - o[1] * o[3]};
    const auto height = [&](const auto& slice) {
        const auto& p = slice.second.position;
        return p[0] * normal[0] + p[1] * normal[1] + p[2] * normal[2];
    };
    std::stable_sort(slices.begin(), slices.end(), [&](const auto& a, const auto& b) { return height(a) < height(b); });
}

}  // namespace

bool is_dicom_folder(const std::string& folder) {
    std::error_code failed;
    if (!fs::is_directory(fs::u8path(folder), failed)) return false;
    for (const std::string& file : files_of(folder)) {
        try {
            const auto head = read_dicom_head(file);
            if (head && (head->has_preamble || head->is_whole)) return true;
        } catch (const ImageError&) {  // said when the series is read that others make it part of
        }
    }
    return false;
}

DicomSlices find_slices(const std::string& folder, const std::string& uid) {
    std::vector<std::pair<std::string, std::optional<DicomHead>>> all;
    std::vector<std::pair<std::string, Heads>> found;  // in the order of their first files
    std::vector<std::string> others;
    for (const std::string& path : files_of(folder)) {
        all.emplace_back(path, read_dicom_head(path));
        const auto& head = all.back().second;
        if (!head) {
            others.push_back(path);
            continue;
        }
        if (head->transfer_syntax == kDeflated) {
            throw ImageError(path +
                             " is deflated DICOM, which this engine does not read; convert it first (gdcmconv --raw)");
        }
        // segmentations and registrations, radiotherapy objects: they refer to a series, and may lie beside it
        const bool refers = head->storage_class.rfind("1.2.840.10008.5.1.4.1.1.66.", 0) == 0 ||
                            head->storage_class.rfind("1.2.840.10008.5.1.4.1.1.481.", 0) == 0;
        if (!head->is_image() || refers) continue;
        auto series =
            std::find_if(found.begin(), found.end(), [&](const auto& s) { return s.first == head->series_uid; });
        if (series == found.end()) series = found.insert(found.end(), {head->series_uid, {}});
        series->second.emplace_back(path, *head);
    }
    if (found.empty()) {
        throw ImageError(folder + " holds no DICOM images that can be read; copy or export the series again");
    }
    DicomSlices out;
    const std::string chosen = choose(folder, uid, found, &out.notes);
    for (const auto& series : found) {
        if (series.first == chosen) out.slices = series.second;
    }
    refuse_damaged(folder, all, out.slices);
    const auto leave_out = [&](const auto& is_out, const char* what, const char* why) {
        std::vector<std::string> names;
        Heads kept;
        for (const auto& slice : out.slices) {
            if (is_out(slice)) {
                names.push_back(slice.first);
            } else {
                kept.push_back(slice);
            }
        }
        if (names.empty() || kept.empty()) return;
        out.slices = kept;
        out.notes.push_back("left out " + std::to_string(names.size()) + " " + what + why + " (" + examples(names) +
                            ")");
    };
    leave_out([](const auto& slice) { return slice.second.is_localizer(); }, "scout(s)", " among the slices");
    const auto copies = copies_of(folder, out.slices);
    leave_out([&](const auto& slice) { return copies.count(slice.first) > 0; }, "file(s)",
              " that hold a slice a second time");
    if (!others.empty()) {
        out.notes.push_back("passed over " + std::to_string(others.size()) + " other file(s): " + examples(others));
    }
    put_in_order(out.slices);
    return out;
}

}  // namespace fastnnunet::images
