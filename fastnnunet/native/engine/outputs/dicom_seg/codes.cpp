#include "outputs/dicom_seg/codes.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

namespace fastnnunet::dicom_seg {
namespace {

using Words = std::vector<std::string>;

bool is_small(char c) { return c >= 'a' && c <= 'z'; }
bool is_capital(char c) { return c >= 'A' && c <= 'Z'; }

// Small letters: `Kidney_Left`, `kidneyLeft` and `left kidney` have the same two.
Words words_of(const std::string& name) {
    Words words(1);
    char last = 0;
    for (const char c : name) {
        const bool is_digit = c >= '0' && c <= '9';
        const bool is_inside = is_small(c) || is_capital(c) || is_digit;
        if (!is_inside || (is_capital(c) && is_small(last))) words.emplace_back();
        if (is_inside) words.back() += is_capital(c) ? static_cast<char>(c - 'A' + 'a') : c;
        last = c;
    }
    words.erase(std::remove(words.begin(), words.end(), ""), words.end());
    return words;
}

std::string joined(const Words& words, const char* between) {
    std::string text;
    for (const std::string& word : words) text += (text.empty() ? "" : between) + word;
    return text;
}

Words without(const Words& words, const std::string& one) {
    Words others;
    std::copy_if(words.begin(), words.end(), std::back_inserter(others), [&](const auto& word) { return word != one; });
    return others;
}

const Concept* look_up(const Words& words) {
    if (const Concept* alias = kAliases.find(joined(words, " "))) return alias;
    std::string key = joined(words, "");
    if (const Concept* found = kConcepts.find(key)) return found;
    if (!key.empty() && key.back() == 's') key.pop_back();
    return kConcepts.find(key);
}

// What it is, and its side where that is not in the name of what it is
std::pair<const Concept*, const Concept*> anatomy(const Words& words) {
    if (const Concept* found = look_up(words)) return {found, nullptr};
    Words sides;
    for (const std::string& word : words) {
        if (word == "left" || word == "right") sides.push_back(word);
    }
    if (sides.empty() && !words.empty()) {
        for (const std::string& word : {words.front(), words.back()}) {
            if (kSides.find(word) != nullptr) sides.push_back(word);
        }
    }
    if (sides.empty() || std::any_of(sides.begin(), sides.end(), [&](const auto& s) { return s != sides[0]; }))
        return {};
    const Concept* found = look_up(without(words, sides[0]));
    return {found, found == nullptr ? nullptr : kSides.find(sides[0])};
}

Code code_of(const Concept* found) { return found == nullptr ? Code{} : Code{found->value, "SCT", found->meaning}; }

}  // namespace

const Concept* Table::find(const std::string& key) const {
    const Concept* end = rows + count;
    const Concept* found =
        std::lower_bound(rows, end, key, [](const Concept& row, const std::string& k) { return k > row.key; });
    return found != end && key == found->key ? found : nullptr;
}

Codes codes_of_name(const std::string& name) {
    const Words words = words_of(name);
    const Concept* finding = nullptr;
    Words others;
    for (const std::string& word : words) {
        const Concept* found = kFindings.find(word);
        if (found == nullptr) others.push_back(word);
        if (finding == nullptr) finding = found;
    }
    const auto [what, side] = anatomy(others);
    const auto category = [](int number) { return code_of(kCategories.rows + number); };
    if (finding != nullptr) return {category(kAbnormal), code_of(finding), code_of(side), code_of(what)};
    if (what == nullptr) return {category(kStructure), category(kStructure), {}, {}};
    return {category(what->category), code_of(what), code_of(side), {}};
}

}  // namespace fastnnunet::dicom_seg
