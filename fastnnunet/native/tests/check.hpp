// What the tests need of doctest, which takes its place where it is installed.
#pragma once

#if __has_include(<doctest/doctest.h>)
#include <doctest/doctest.h>
#else

#include <cstdio>
#include <exception>
#include <vector>

namespace check {

struct Case {
    const char* name;
    void (*body)();
};

inline std::vector<Case> cases;
inline int checks = 0, failures = 0;

inline int add(const char* name, void (*body)()) {
    cases.push_back({name, body});
    return 0;
}

inline void expect(bool holds, const char* what, const char* file, int line) {
    ++checks;
    if (holds) return;
    ++failures;
    std::printf("%s:%d: not so: %s\n", file, line, what);
}

}  // namespace check

#define CHECK_JOIN_(a, b) a##b
#define CHECK_JOIN(a, b) CHECK_JOIN_(a, b)
#define CHECK_CASE(name, body)                                                \
    static void body();                                                       \
    static const int CHECK_JOIN(body, _added) = check::add(name, body);       \
    static void body()
#define TEST_CASE(name) CHECK_CASE(name, CHECK_JOIN(case_, __LINE__))
#define CHECK(...) check::expect(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
#define CHECK_THROWS_AS(expression, type)                                     \
    do {                                                                      \
        bool thrown = false;                                                  \
        try {                                                                 \
            (void)(expression);                                               \
        } catch (const type&) {                                               \
            thrown = true;                                                    \
        }                                                                     \
        check::expect(thrown, #expression " throws " #type, __FILE__, __LINE__); \
    } while (false)
#endif
