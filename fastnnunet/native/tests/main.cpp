#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "check.hpp"

#ifndef DOCTEST_VERSION
int main() {
    for (const check::Case& test : check::cases) {
        const int before = check::failures;
        try {
            test.body();
        } catch (const std::exception& error) {
            check::expect(false, error.what(), test.name, 0);
        }
        if (check::failures > before) std::printf("FAILED: %s\n", test.name);
    }
    std::printf("%zu cases, %d checks, %d failed\n", check::cases.size(), check::checks, check::failures);
    return check::failures > 0 || check::checks == 0 ? 1 : 0;
}
#endif
