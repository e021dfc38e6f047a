// What the program's commands do. Each returns its exit code and throws Error.
#pragma once

#include <string>

#include "program/arguments.hpp"

namespace fastnnunet::engine {

int predict(const Arguments& arguments);
int info(const Arguments& arguments);
int bench(const Arguments& arguments);

// A text as a terminal may be given it: control characters, which it would obey, escaped but line ends
std::string printable(const std::string& text);

}  // namespace fastnnunet::engine
