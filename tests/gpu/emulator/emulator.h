// What the four emulated libraries share: exported names, counted calls and injected faults.
#pragma once

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#define EMULATOR_API extern "C" __attribute__((visibility("default")))

namespace emulator {

// Looks up NAME=NUMBER, or NAME=NUMBER! where a value is asked for, in EKFAC_EMULATOR_FAULT.
// The environment is read at every call: a test may change it between two calls.
inline std::optional<long> setting(const std::string& name, bool is_value) {
    const char* position = std::getenv("EKFAC_EMULATOR_FAULT");
    while (position != nullptr && *position != '\0') {
        const std::size_t length = std::strcspn(position, ",");
        const std::string entry(position, length);
        position += length;
        position += *position == ',';
        const std::size_t equals = entry.find('=');
        if (equals == std::string::npos || entry.compare(0, equals, name) != 0) continue;
        if ((entry.back() == '!') == is_value) {
            return std::strtol(entry.c_str() + equals + 1, nullptr, 10);
        }
    }
    return std::nullopt;
}

// The value a function is told to report instead of its own.
inline std::optional<long> injected_value(const std::string& name) { return setting(name, true); }

struct Calls {
    std::mutex mutex;
    std::map<std::string, long> counts;
};

inline Calls& calls() {
    static Calls instance;
    return instance;
}

// Counts a call; the status that the function is told to return, if any.
inline std::optional<int> enter(const char* name) {
    {
        std::lock_guard<std::mutex> lock(calls().mutex);
        ++calls().counts[name];
    }
    const std::optional<long> status = setting(name, false);
    if (!status) return std::nullopt;
    return static_cast<int>(*status);
}

}  // namespace emulator

// The first line of every emulated function.
#define RETURN_INJECTED_FAULT()                                            \
    do {                                                                   \
        if (const auto status = emulator::enter(__func__)) return *status; \
    } while (false)

// How often this process has called a function of this library.
EMULATOR_API long emulator_calls(const char* name) {
    std::lock_guard<std::mutex> lock(emulator::calls().mutex);
    const auto found = emulator::calls().counts.find(name);
    return found == emulator::calls().counts.end() ? 0 : found->second;
}
