// NVRTC, emulated: g++ compiles a kernel's source to a shared library, and the "CUBIN" names it.

#include <cctype>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "emulator.h"

// The text that comes before every kernel's source, kept inside this library.
asm(".pushsection .rodata\n"
    ".hidden emulator_prelude\n"
    ".hidden emulator_prelude_end\n"
    ".global emulator_prelude\n"
    ".global emulator_prelude_end\n"
    "emulator_prelude:\n"
    ".incbin \"launch.h\"\n"
    ".incbin \"device.h\"\n"
    "emulator_prelude_end:\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) const char emulator_prelude[];
extern "C" __attribute__((visibility("hidden"))) const char emulator_prelude_end[];

extern char** environ;

namespace {

namespace filesystem = std::filesystem;

enum : int {
    NVRTC_SUCCESS = 0,
    NVRTC_ERROR_INVALID_INPUT = 3,
    NVRTC_ERROR_INVALID_PROGRAM = 4,
    NVRTC_ERROR_INVALID_OPTION = 5,
    NVRTC_ERROR_COMPILATION = 6,
    NVRTC_ERROR_INTERNAL_ERROR = 11,
};

// The first line of a compiled image; the path of the shared library is the second.
const std::string image_magic = "// emulated image\n";

struct Program {
    std::string source;
    std::string name;
    std::string log;
    std::string image;
    // Like NVRTC: an image for a real architecture (sm_90), not for a virtual one (compute_90).
    bool has_cubin = false;
};

// A new folder; the last six letters of the name, all X, are replaced.
filesystem::path make_directory(const filesystem::path& pattern) {
    std::string name = pattern.string();
    if (mkdtemp(name.data()) == nullptr) {
        throw std::runtime_error("could not create " + name + ": " + std::strerror(errno));
    }
    return name;
}

// Where compiled modules lie; processes that are given the same folder share them.
filesystem::path cache_directory() {
    if (const char* directory = std::getenv("EKFAC_EMULATOR_CACHE")) {
        filesystem::create_directories(directory);
        return filesystem::absolute(directory);
    }
    struct Temporary {
        filesystem::path path;
        pid_t owner = getpid();
        Temporary() {
            path = make_directory(filesystem::temp_directory_path() / "emulated-cuda-XXXXXX");
        }
        ~Temporary() {
            // A forked child also runs this at its exit; the folder is its parent's.
            std::error_code ignored;
            if (getpid() == owner) filesystem::remove_all(path, ignored);
        }
    };
    static const Temporary temporary;
    return temporary.path;
}

std::string read(const filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

void write(const filesystem::path& path, const std::string& text) {
    std::ofstream file(path, std::ios::binary);
    file << text;
    file.close();
    if (!file) throw std::runtime_error("could not write " + path.string());
}

// 128 bits of FNV-1a, so that two modules do not meet in the cache by accident.
std::string hash(const std::string& text) {
    char name[33];
    std::uint64_t words[2] = {0xcbf29ce484222325u, 0x84222325cbf29ce4u};
    for (const unsigned char byte : text) {
        words[0] = (words[0] ^ byte) * 0x100000001b3u;
        words[1] = (words[1] ^ (byte + 0x9eu)) * 0x100000001b3u;
    }
    std::snprintf(name, sizeof name, "%016llx%016llx", static_cast<unsigned long long>(words[0]),
                  static_cast<unsigned long long>(words[1]));
    return name;
}

// Runs g++; what it says on its error stream is appended to `log`.
bool run_compiler(std::vector<std::string> arguments, const filesystem::path& folder,
                  std::string& log) {
    arguments.insert(arguments.begin(), "g++");
    std::vector<char*> pointers;
    for (std::string& argument : arguments) pointers.push_back(argument.data());
    pointers.push_back(nullptr);

    const filesystem::path errors = folder / "errors";
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, errors.c_str(),
                                     O_WRONLY | O_CREAT | O_TRUNC, 0600);
    pid_t process = 0;
    const int failure =
        posix_spawnp(&process, "g++", &actions, nullptr, pointers.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    if (failure != 0) {
        log += std::string("cannot run g++: ") + std::strerror(failure) + "\n";
        return false;
    }
    int status = 0;
    while (waitpid(process, &status, 0) < 0 && errno == EINTR) {}
    log += read(errors);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

bool is_name_character(char character) {
    return std::isalnum(static_cast<unsigned char>(character)) || character == '_';
}

bool is_space(char character) { return std::isspace(static_cast<unsigned char>(character)) != 0; }

// Moves `position` past `word`, and past space before it, if that is what follows.
bool skip(const std::string& text, const std::string& word, std::size_t& position) {
    std::size_t start = position;
    while (start < text.size() && is_space(text[start])) ++start;
    if (text.compare(start, word.size(), word) != 0) return false;
    position = start + word.size();
    return true;
}

// Dynamic shared memory is an array without a size; here it is one buffer of the module, so
// `extern __shared__ T name[];` becomes a pointer to it.
std::string replace_dynamic_shared(std::string text) {
    std::size_t start = 0;
    for (; (start = text.find("extern", start)) != std::string::npos; ++start) {
        std::size_t position = start + std::strlen("extern");
        if (!skip(text, "__shared__", position)) continue;
        if (skip(text, "__align__", position)) position = text.find(')', position) + 1;
        const std::size_t bracket = text.find_first_of("[;", position);
        std::size_t end = bracket;
        if (!skip(text, "[", end) || !skip(text, "]", end) || !skip(text, ";", end)) continue;
        std::size_t name = bracket;
        while (is_space(text[name - 1])) --name;
        while (is_name_character(text[name - 1])) --name;
        const std::string pointer = text.substr(position, name - position) + "*";
        const std::string variable = text.substr(name, bracket - name);
        text.replace(start, end - start, pointer + " " + variable + " = reinterpret_cast<" +
                                             pointer + ">(emulator::dynamic_shared);");
    }
    return text;
}

// One thunk, and one limit of threads per block, for every kernel in preprocessed text.
std::string thunks(const std::string& text) {
    static const std::string marker = "emulator_kernel", bounds = "emulator_bounds";
    std::ostringstream result;
    std::set<std::string> seen;
    for (std::size_t found = 0; (found = text.find("extern", found)) != std::string::npos;) {
        found += std::strlen("extern");
        std::size_t start = found;
        if (!skip(text, "\"C\"", start)) continue;
        std::string head = text.substr(start, text.find_first_of(";{", start) - start);
        if (head.find(marker) == std::string::npos) continue;
        std::string limit = "1024";
        const std::size_t bounded = head.find(bounds);
        if (bounded != std::string::npos) {
            const std::size_t open = head.find('(', bounded);
            std::size_t close = open;
            for (int depth = 0; close < head.size(); ++close) {
                depth += (head[close] == '(') - (head[close] == ')');
                if (depth == 0) break;
            }
            limit = head.substr(open + 1, close - open - 1);
            head.erase(bounded, close + 1 - bounded);
        }
        std::size_t last = head.find('(');
        if (last == std::string::npos) continue;
        while (last > 0 && !is_name_character(head[last - 1])) --last;
        std::size_t first = last;
        while (first > 0 && is_name_character(head[first - 1])) --first;
        const std::string name = head.substr(first, last - first);
        if (!seen.insert(name).second) continue;
        const std::string exported = "extern \"C\" __attribute__((visibility(\"default\"))) ";
        result << exported << "void " << name << "__thunk(void** arguments) { emulator::call("
               << name << ", arguments); }\n"
               << exported << "unsigned int " << name << "__limit() { return emulator::first("
               << limit << "); }\n";
    }
    return result.str();
}

// The options that g++ has to see; false if NVRTC would not know one of them.
bool translate(const std::vector<std::string>& options, Program& program,
               std::vector<std::string>& translated) {
    static const char* const without_effect[] = {
        "-std=",       "--std=",          "-use_fast_math",       "--use_fast_math",
        "-fmad=",      "--fmad=",         "-ftz=",                "--ftz=",
        "-prec-",      "--prec-",         "-default-device",      "--device-as-default-",
        "-lineinfo",   "--generate-line", "-G",                   "--device-debug",
        "-w",          "--disable-warn",  "-maxrregcount=",       "--maxrregcount=",
        "-dopt",       "--dopt",          "-extra-device-vector", "--extra-device-vector",
        "-restrict",   "--restrict",      "-minimal",             "--minimal",
    };
    const auto starts = [](const std::string& text, const char* prefix) {
        return text.rfind(prefix, 0) == 0;
    };
    for (std::size_t index = 0; index < options.size(); ++index) {
        const std::string& option = options[index];
        if (option == "-D" && index + 1 < options.size()) {
            translated.push_back("-D" + options[++index]);
        } else if (starts(option, "-D")) {
            translated.push_back(option);
        } else if (starts(option, "--define-macro=")) {
            translated.push_back("-D" + option.substr(std::strlen("--define-macro=")));
        } else if (starts(option, "-arch=") || starts(option, "--gpu-architecture=")) {
            program.has_cubin = starts(option.substr(option.find('=') + 1), "sm_");
        } else {
            bool known = false;
            for (const char* const prefix : without_effect) known |= starts(option, prefix);
            if (!known) {
                program.log = "nvrtc: error: unrecognized option " + option + " found\n";
                return false;
            }
        }
    }
    return true;
}

int compile(Program& program, const std::vector<std::string>& options) {
    std::vector<std::string> arguments;
    if (!translate(options, program, arguments)) return NVRTC_ERROR_INVALID_OPTION;
    arguments.insert(arguments.end(), {"-std=c++17", "-x", "c++", "-nostdinc", "-w"});

    const std::string text = std::string(emulator_prelude, emulator_prelude_end) + "#line 1 \"" +
                             program.name + "\"\n" + replace_dynamic_shared(program.source) + "\n";

    std::string key = text;
    for (const std::string& argument : arguments) key += '\0' + argument;
    const filesystem::path cache = cache_directory();
    const filesystem::path library = cache / (hash(key) + ".so");
    if (!filesystem::exists(library)) {
        const filesystem::path folder = make_directory(cache / "build-XXXXXX");
        const filesystem::path file = folder / "module.cpp";
        write(file, text);

        std::vector<std::string> scan = arguments;
        const filesystem::path scanned = folder / "scanned.cpp";
        scan.insert(scan.end(), {"-DEMULATOR_SCAN", "-E", "-P", file, "-o", scanned});
        bool compiled = run_compiler(scan, folder, program.log);
        if (compiled) {
            write(file, text + "#line 1 \"thunks\"\n" + thunks(read(scanned)));
            const filesystem::path output = folder / "module.so";
            arguments.insert(arguments.end(),
                             {"-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique",
                              "-fno-exceptions", "-fno-rtti", file, "-o", output});
            compiled = run_compiler(arguments, folder, program.log);
            // A rename is atomic: another process sees the whole library or none.
            if (compiled) filesystem::rename(output, library);
        }
        filesystem::remove_all(folder);
        if (!compiled) return NVRTC_ERROR_COMPILATION;
    }
    program.image = image_magic + library.string() + '\n';
    return NVRTC_SUCCESS;
}

// Sizes count the terminating zero.
int report_size(const std::string& text, std::size_t* size) {
    if (size == nullptr) return NVRTC_ERROR_INVALID_INPUT;
    *size = text.size() + 1;
    return NVRTC_SUCCESS;
}

int report(const std::string& text, char* target) {
    if (target == nullptr) return NVRTC_ERROR_INVALID_INPUT;
    std::memcpy(target, text.c_str(), text.size() + 1);
    return NVRTC_SUCCESS;
}

}  // namespace

EMULATOR_API int nvrtcVersion(int* major, int* minor) {
    RETURN_INJECTED_FAULT();
    if (major == nullptr || minor == nullptr) return NVRTC_ERROR_INVALID_INPUT;
    const long version = emulator::injected_value("nvrtcVersion").value_or(13000);
    *major = static_cast<int>(version / 1000);
    *minor = static_cast<int>(version % 1000 / 10);
    return NVRTC_SUCCESS;
}

EMULATOR_API int nvrtcCreateProgram(Program** program, const char* source, const char* name,
                                    int header_count, const char* const*, const char* const*) {
    RETURN_INJECTED_FAULT();
    // Headers of the caller are not emulated.
    if (program == nullptr || source == nullptr || header_count != 0) {
        return NVRTC_ERROR_INVALID_INPUT;
    }
    *program = new Program;
    (*program)->source = source;
    (*program)->name = name == nullptr || *name == '\0' ? "default_program" : name;
    return NVRTC_SUCCESS;
}

EMULATOR_API int nvrtcDestroyProgram(Program** program) {
    RETURN_INJECTED_FAULT();
    if (program == nullptr || *program == nullptr) return NVRTC_ERROR_INVALID_PROGRAM;
    delete *program;
    *program = nullptr;
    return NVRTC_SUCCESS;
}

EMULATOR_API int nvrtcCompileProgram(Program* program, int option_count,
                                     const char* const* options) {
    if (program == nullptr) return NVRTC_ERROR_INVALID_PROGRAM;
    program->log.clear();
    program->image.clear();
    program->has_cubin = false;
    if (const auto status = emulator::enter(__func__)) {
        program->log = "injected fault";
        return *status;
    }
    try {
        return compile(*program, std::vector<std::string>(options, options + option_count));
    } catch (const std::exception& error) {
        program->log += error.what();
        return NVRTC_ERROR_INTERNAL_ERROR;
    }
}

EMULATOR_API int nvrtcGetProgramLogSize(Program* program, std::size_t* size) {
    RETURN_INJECTED_FAULT();
    if (program == nullptr) return NVRTC_ERROR_INVALID_PROGRAM;
    return report_size(program->log, size);
}

EMULATOR_API int nvrtcGetProgramLog(Program* program, char* log) {
    RETURN_INJECTED_FAULT();
    if (program == nullptr) return NVRTC_ERROR_INVALID_PROGRAM;
    return report(program->log, log);
}

EMULATOR_API int nvrtcGetCUBINSize(Program* program, std::size_t* size) {
    RETURN_INJECTED_FAULT();
    if (program == nullptr || program->image.empty()) return NVRTC_ERROR_INVALID_PROGRAM;
    if (program->has_cubin) return report_size(program->image, size);
    if (size == nullptr) return NVRTC_ERROR_INVALID_INPUT;
    *size = 0;
    return NVRTC_SUCCESS;
}

EMULATOR_API int nvrtcGetCUBIN(Program* program, char* image) {
    RETURN_INJECTED_FAULT();
    if (program == nullptr || !program->has_cubin || program->image.empty()) {
        return NVRTC_ERROR_INVALID_PROGRAM;
    }
    return report(program->image, image);
}

EMULATOR_API int nvrtcGetPTXSize(Program* program, std::size_t* size) {
    RETURN_INJECTED_FAULT();
    if (program == nullptr || program->image.empty()) return NVRTC_ERROR_INVALID_PROGRAM;
    return report_size(program->image, size);
}

EMULATOR_API int nvrtcGetPTX(Program* program, char* image) {
    RETURN_INJECTED_FAULT();
    if (program == nullptr || program->image.empty()) return NVRTC_ERROR_INVALID_PROGRAM;
    return report(program->image, image);
}

EMULATOR_API const char* nvrtcGetErrorString(int result) {
    static const char* const names[] = {
        "NVRTC_SUCCESS",
        "NVRTC_ERROR_OUT_OF_MEMORY",
        "NVRTC_ERROR_PROGRAM_CREATION_FAILURE",
        "NVRTC_ERROR_INVALID_INPUT",
        "NVRTC_ERROR_INVALID_PROGRAM",
        "NVRTC_ERROR_INVALID_OPTION",
        "NVRTC_ERROR_COMPILATION",
        "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE",
        "NVRTC_ERROR_NO_NAME_EXPRESSIONS_AFTER_COMPILATION",
        "NVRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION",
        "NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID",
        "NVRTC_ERROR_INTERNAL_ERROR",
    };
    const bool known = result >= 0 && result < static_cast<int>(sizeof names / sizeof *names);
    return known ? names[result] : "NVRTC_ERROR unknown";
}
