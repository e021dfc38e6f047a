// The fields of bundle.json: their types, as specs/load.py tells what is wrong with them.
#pragma once

#include <string>
#include <vector>

#include "bundle/json.hpp"

namespace fastnnunet::engine {

using Problems = std::vector<std::string>;

// Raises CorruptError listing every unknown, missing or mistyped field. Adds defaults where fields are missing, and
// makes floats of integers where a float is meant.
void check_fields(Json& raw, const std::string& where);

// Python's `shown`: printable on any terminal, and short. `as_tuple`: lists of the spec are tuples.
std::string shown(const Json& value);
std::string shown_tuple(const Json& list);
std::string shown_text(const std::string& text);

bool is_integer(const Json& value, std::int64_t low = INT64_MIN, std::int64_t high = INT64_MAX);
bool is_number(const Json& value);
bool is_list(const Json* value, std::size_t length);

// What is wrong with the architecture of a bundle, as specs/checks/architecture.py tells; checked for patches of that
// size.
Problems architecture_problems(const Json& architecture, std::size_t dims);
// Axes that the strides of a U-Net do not divide. `architecture` is checked.
Problems unet_problems(const Json& architecture, const Json& sizes, const std::string& what);

}  // namespace fastnnunet::engine
