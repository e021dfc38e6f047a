// What a bundle.json says that cannot be, alone or together. As fastnnunet/specs/bundle.py and specs/locator.py.
#pragma once

#include <string>

#include "bundle/json.hpp"

namespace fastnnunet::engine {

// Throws CorruptError with all problems. `raw` has every field, see `check_fields`.
void check_spec(const Json& raw, const std::string& path);

}  // namespace fastnnunet::engine
