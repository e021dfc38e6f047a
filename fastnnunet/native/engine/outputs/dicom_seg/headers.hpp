// The headers of a series as a segmentation may refer to them: mended, or refused where nothing can stand for them. As
// fastnnunet/outputs/dicom/headers.py.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "outputs/dicom_seg/dcmtk.hpp"
#include "outputs/dicom_seg/plugin.h"

namespace fastnnunet::dicom_seg {

// What a user can mend, in the Python runtime's words
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// How attributes were mended, in the order in which that was found
class Notes {
public:
    void add(const std::string& name, const std::string& what);  // the first one of a name stands
    void set(const std::string& name, const std::string& what);
    void erase(const std::string& name);
    std::string text() const;

private:
    std::vector<std::pair<std::string, std::string>> notes_;
};

struct Headers {
    DcmItem patient_and_study;                 // what the segmentation takes over, UTF-8
    DcmItem equipment;                         // that took the images; empty where its maker is not known
    std::vector<std::string> storage_classes;  // of the slices
    std::string study_uid, series_uid, frame_uid;
    int series_number = 0;
    double thickness_mm = 0, spacing_mm = 0;
    Notes notes;
};

// Throws Refused.
Headers read_headers(const fastnnunet_seg& segmentation);

// A UID of the form 2.25.NUMBER of the first 16 bytes of a digest in hexadecimal digits, or of 16 random ones.
std::string uid_of_digest(const std::string& hex);
std::string new_uid();

// Sets an attribute; throws Refused.
void put(DcmItem& item, const DcmTagKey& tag, const std::string& value);
// Another item at the end of a sequence
DcmItem& add_item(DcmItem& item, const DcmTagKey& sequence);

}  // namespace fastnnunet::dicom_seg
