// Attributes of DICOM headers as PACS and anonymisers leave them, made legal: as fastnnunet/outputs/dicom/values.py.
// Texts are UTF-8; lengths count characters.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fastnnunet::dicom_seg {

// Values, and what was done to them ("" for nothing)
using Mended = std::pair<std::vector<std::string>, std::string>;

bool is_text_kind(const std::string& vr);

// Legal values of an attribute of this kind. `text` has a backslash between values; `single`: there may be but one.
Mended mended(const std::string& vr, const std::string& text, bool single);

// PatientSex: M, F, O or nothing.
std::pair<std::string, std::string> mended_sex(const std::string& text);

// The first value of an attribute as a number above 0; none where it is no such number.
std::optional<double> positive(const std::string& text);

// A text of our own as a value of kind LO: no control characters, no backslash, at most 64 characters.
std::string one_line(const std::string& text);

// A number as a decimal string, of at most 16 characters.
std::string decimal_string(double number);

// Without spaces and null characters at its ends.
std::string stripped(const std::string& text);

bool is_ascii(const std::string& text);

}  // namespace fastnnunet::dicom_seg
