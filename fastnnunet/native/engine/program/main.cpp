// fastnnunet-engine: the engine's program.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "error.hpp"
#include "program/commands.hpp"

using namespace fastnnunet::engine;

// At once: nothing is left to be done, taking a backend down takes as long as loading a small model, and threads that
// still load one would find its libraries gone.
[[noreturn]] void leave(int status) { std::_Exit(std::fflush(nullptr) != 0 && status == 0 ? 1 : status); }

int main(int count, char** words) {
    const std::vector<std::string> given(words + 1, words + count);
    const std::string name = given.empty() ? "--help" : given.front();
    const std::vector<std::string> rest(given.begin() + (given.empty() ? 0 : 1), given.end());
    try {
        if (name == "--version") {
            std::printf("fastnnunet-engine %s\n", FASTNNUNET_VERSION);
            return 0;
        }
        if (name == "--help" || name == "-h") {
            std::fputs(usage().c_str(), stdout);
            return 0;
        }
        if (name != "predict" && name != "info" && name != "bench") {
            throw SpecError("fastnnunet-engine: " + name + " is none of its commands, expected predict, info or bench");
        }
        const Command command = name == "predict" ? Command::predict : name == "info" ? Command::info : Command::bench;
        for (const std::string& word : rest) {
            if (word != "--help" && word != "-h") continue;
            std::fputs(usage(command).c_str(), stdout);
            return 0;
        }
        const Arguments arguments = parse(command, rest);
        const int status = command == Command::predict ? predict(arguments)
                           : command == Command::info  ? info(arguments)
                                                       : bench(arguments);
        leave(status);
    } catch (const std::bad_alloc&) {
        std::fputs("error: not enough memory\nclose other programs, or crop the image\n", stderr);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "error: %s\n", printable(e.what()).c_str());
    }
    leave(2);
}
