// What a label is in the words of SNOMED CT, by its name: as fastnnunet/outputs/dicom/codes.py.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <vector>

namespace fastnnunet::dicom_seg {

struct Code {
    std::string value, scheme, meaning;

    bool is_none() const { return value.empty(); }
};

// `region`: where a finding is; `laterality`: the side of that or, without one, of the type. None where not known.
struct Codes {
    Code category, type, laterality, region;
};

// Of a name that says nothing known: a structure of the general code.
Codes codes_of_name(const std::string& name);

// A row of the tables in concepts.cpp: what is looked up, and the concept it stands for, of SNOMED CT
struct Concept {
    const char* key;
    const char* value;
    const char* meaning;
    int category;  // number of kCategories
};

struct Table {
    const Concept* rows;  // in the order of their keys
    std::size_t count;

    const Concept* find(const std::string& key) const;
};

extern const Table kAliases;   // by words with spaces between
extern const Table kConcepts;  // by letters alone
extern const Table kFindings;  // by a single word: what is abnormal
extern const Table kCategories, kSides;
constexpr int kAbnormal = 0, kStructure = 1;  // in kCategories

}  // namespace fastnnunet::dicom_seg
