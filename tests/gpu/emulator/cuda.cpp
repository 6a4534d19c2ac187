// The driver, emulated: device memory is host memory, streams do everything at once, and the
// threads of a kernel run one at a time.

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "emulator.h"
#include "launch.h"

namespace {

enum : int {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_CONTEXT_IS_DESTROYED = 709,
};

enum : int {
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
};

struct ErrorText {
    int status;
    const char* name;
    const char* text;
};

const ErrorText error_texts[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {34, "CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain."},
    {300, "CUDA_ERROR_INVALID_SOURCE", "device kernel image is invalid"},
    {301, "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {304, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
     "system has unsupported display driver / cuda driver combination"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

struct Context {
    int references = 0;
};

using Thunk = void (*)(void** arguments);

struct Function {
    std::string name;
    Thunk thunk;
    emulator::Launch* launch;
    unsigned int thread_limit;
};

struct Module {
    void* library;
    emulator::Launch* launch;
    std::vector<std::unique_ptr<Function>> functions;
};

constexpr int device_limit = 64;

// Guards what follows; launches hold it too, because a module has one copy of its shared memory.
std::mutex driver_mutex;
bool is_initialized = false;
Context contexts[device_limit];
std::set<Module*> modules;
std::set<Function*> functions;
thread_local Context* current_context = nullptr;

int device_count() {
    const char* text = std::getenv("EKFAC_EMULATOR_DEVICES");
    const long count = text == nullptr ? 1 : std::strtol(text, nullptr, 10);
    return static_cast<int>(std::clamp(count, 0L, static_cast<long>(device_limit)));
}

int check_device(int device) {
    if (!is_initialized) return CUDA_ERROR_NOT_INITIALIZED;
    return device >= 0 && device < device_count() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

int check_context() {
    if (!is_initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (current_context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    return current_context->references > 0 ? CUDA_SUCCESS : CUDA_ERROR_CONTEXT_IS_DESTROYED;
}

#define RETURN_FAILURE(check)                                          \
    do {                                                               \
        if (const int failure = (check); failure != 0) return failure; \
    } while (false)

// Runs the threads of one block. A fiber runs thread after thread until one of them waits at a
// barrier; then the next fiber goes on with the threads not yet begun. So a kernel without
// barriers is a plain loop on one fiber. Fibers are kept for later blocks; between them
// `_setjmp` and `_longjmp` switch, which unlike `swapcontext` make no system call.
class Block {
public:
    void run(const Function& function, void** arguments) {
        launch_ = function.launch;
        thunk_ = function.thunk;
        arguments_ = arguments;
        const dim3 size = launch_->block_size;
        thread_count_ = size.x * size.y * size.z;
        next_thread_ = 0;

        std::size_t used = 0;
        bool is_waiting = false;
        while (next_thread_ < thread_count_) {
            if (used == fibers_.size()) fibers_.push_back(create());
            is_waiting |= resume(*fibers_[used++]);
        }
        while (is_waiting) {
            is_waiting = false;
            for (std::size_t index = 0; index < used; ++index) {
                if (fibers_[index]->is_waiting) is_waiting |= resume(*fibers_[index]);
            }
        }
    }

    void barrier() {
        running_->is_waiting = true;
        leave();
    }

private:
    struct Fiber {
        ucontext_t entry;
        jmp_buf point;
        uint3 thread;
        bool is_started = false;
        bool is_waiting = false;
    };

    std::unique_ptr<Fiber> create();

    // Until the fiber waits at a barrier (true) or no thread is left for it (false).
    __attribute__((noinline)) bool resume(Fiber& fiber) {
        running_ = &fiber;
        fiber.is_waiting = false;
        launch_->thread = fiber.thread;
        if (_setjmp(scheduler_) == 0) {
            if (fiber.is_started) _longjmp(fiber.point, 1);
            fiber.is_started = true;
            setcontext(&fiber.entry);
        }
        return running_->is_waiting;
    }

    __attribute__((noinline)) void leave() {
        if (_setjmp(running_->point) == 0) _longjmp(scheduler_, 1);
    }

    void run_threads() {
        const dim3 size = launch_->block_size;
        while (next_thread_ < thread_count_) {
            const unsigned int index = next_thread_++;
            launch_->thread = {index % size.x, index / size.x % size.y, index / size.x / size.y};
            running_->thread = launch_->thread;
            thunk_(arguments_);
        }
    }

    static void main();

    std::vector<std::unique_ptr<Fiber>> fibers_;
    jmp_buf scheduler_;
    Fiber* running_ = nullptr;
    emulator::Launch* launch_ = nullptr;
    Thunk thunk_ = nullptr;
    void** arguments_ = nullptr;
    unsigned int thread_count_ = 0;
    unsigned int next_thread_ = 0;
};

// Never destroyed: its fibers' stacks must outlive every launch.
Block& block = *new Block;

void Block::main() {
    for (;;) {
        block.run_threads();
        block.leave();
    }
}

std::unique_ptr<Block::Fiber> Block::create() {
    // Only the pages that a stack touches cost memory. Its lowest page is a guard.
    constexpr std::size_t stack_bytes = 256 * 1024;
    void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED) std::abort();
    mprotect(stack, static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
    auto fiber = std::make_unique<Fiber>();
    getcontext(&fiber->entry);
    fiber->entry.uc_stack.ss_sp = stack;
    fiber->entry.uc_stack.ss_size = stack_bytes;
    fiber->entry.uc_link = nullptr;
    makecontext(&fiber->entry, main, 0);
    return fiber;
}

}  // namespace

EMULATOR_API int cuInit(unsigned int flags) {
    RETURN_INJECTED_FAULT();
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (device_count() == 0) return CUDA_ERROR_NO_DEVICE;
    is_initialized = true;
    return CUDA_SUCCESS;
}

EMULATOR_API int cuDriverGetVersion(int* version) {
    RETURN_INJECTED_FAULT();
    if (version == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *version = static_cast<int>(emulator::injected_value("cuDriverGetVersion").value_or(13000));
    return CUDA_SUCCESS;
}

EMULATOR_API int cuDeviceGetCount(int* count) {
    RETURN_INJECTED_FAULT();
    if (!is_initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (count == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *count = static_cast<int>(
        emulator::injected_value("cuDeviceGetCount").value_or(device_count()));
    return CUDA_SUCCESS;
}

EMULATOR_API int cuDeviceGet(int* device, int ordinal) {
    RETURN_INJECTED_FAULT();
    if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
    RETURN_FAILURE(check_device(ordinal));
    *device = ordinal;
    return CUDA_SUCCESS;
}

EMULATOR_API int cuDeviceGetAttribute(int* value, int attribute, int device) {
    RETURN_INJECTED_FAULT();
    if (value == nullptr) return CUDA_ERROR_INVALID_VALUE;
    RETURN_FAILURE(check_device(device));
    long reported = 1;
    if (attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) reported = 4;
    if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) reported = 9;
    if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) reported = 0;
    const std::string name = "cuDeviceGetAttribute." + std::to_string(attribute);
    *value = static_cast<int>(emulator::injected_value(name).value_or(reported));
    return CUDA_SUCCESS;
}

EMULATOR_API int cuDeviceGetName(char* name, int length, int device) {
    RETURN_INJECTED_FAULT();
    if (name == nullptr || length <= 0) return CUDA_ERROR_INVALID_VALUE;
    RETURN_FAILURE(check_device(device));
    std::strncpy(name, "emulated device", static_cast<std::size_t>(length));
    name[length - 1] = '\0';
    return CUDA_SUCCESS;
}

EMULATOR_API int cuDevicePrimaryCtxRetain(Context** context, int device) {
    RETURN_INJECTED_FAULT();
    if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
    RETURN_FAILURE(check_device(device));
    std::lock_guard<std::mutex> lock(driver_mutex);
    ++contexts[device].references;
    *context = &contexts[device];
    return CUDA_SUCCESS;
}

EMULATOR_API int cuDevicePrimaryCtxRelease_v2(int device) {
    RETURN_INJECTED_FAULT();
    RETURN_FAILURE(check_device(device));
    std::lock_guard<std::mutex> lock(driver_mutex);
    if (contexts[device].references == 0) return CUDA_ERROR_INVALID_CONTEXT;
    --contexts[device].references;
    return CUDA_SUCCESS;
}

EMULATOR_API int cuCtxSetCurrent(Context* context) {
    RETURN_INJECTED_FAULT();
    if (!is_initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (context != nullptr) {
        const bool is_ours = std::any_of(std::begin(contexts), std::end(contexts),
                                         [&](const Context& known) { return &known == context; });
        if (!is_ours) return CUDA_ERROR_INVALID_CONTEXT;
        if (context->references == 0) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    }
    current_context = context;
    return CUDA_SUCCESS;
}

EMULATOR_API int cuCtxGetCurrent(Context** context) {
    RETURN_INJECTED_FAULT();
    if (!is_initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *context = current_context;
    return CUDA_SUCCESS;
}

namespace {

int copy(void* target, const void* source, std::size_t bytes) {
    RETURN_FAILURE(check_context());
    if (bytes == 0) return CUDA_SUCCESS;
    if (target == nullptr || source == nullptr) return CUDA_ERROR_INVALID_VALUE;
    std::memmove(target, source, bytes);
    return CUDA_SUCCESS;
}

void* pointer(unsigned long long address) { return reinterpret_cast<void*>(address); }

}  // namespace

EMULATOR_API int cuMemcpyHtoDAsync_v2(unsigned long long target, const void* source,
                                      std::size_t bytes, void*) {
    RETURN_INJECTED_FAULT();
    return copy(pointer(target), source, bytes);
}

EMULATOR_API int cuMemcpyDtoHAsync_v2(void* target, unsigned long long source, std::size_t bytes,
                                      void*) {
    RETURN_INJECTED_FAULT();
    return copy(target, pointer(source), bytes);
}

EMULATOR_API int cuMemcpyDtoDAsync_v2(unsigned long long target, unsigned long long source,
                                      std::size_t bytes, void*) {
    RETURN_INJECTED_FAULT();
    return copy(pointer(target), pointer(source), bytes);
}

EMULATOR_API int cuMemsetD8Async(unsigned long long target, unsigned char value, std::size_t count,
                                 void*) {
    RETURN_INJECTED_FAULT();
    RETURN_FAILURE(check_context());
    if (count == 0) return CUDA_SUCCESS;
    if (target == 0) return CUDA_ERROR_INVALID_VALUE;
    std::memset(pointer(target), value, count);
    return CUDA_SUCCESS;
}

EMULATOR_API int cuStreamSynchronize(void*) {
    RETURN_INJECTED_FAULT();
    return check_context();
}

// Everything is done when a call returns, so there is nothing for an event to wait for.
EMULATOR_API int cuEventCreate(void** event, unsigned) {
    RETURN_INJECTED_FAULT();
    if (event == nullptr) return CUDA_ERROR_INVALID_VALUE;
    RETURN_FAILURE(check_context());
    static char any_event;
    *event = &any_event;
    return CUDA_SUCCESS;
}

EMULATOR_API int cuEventRecord(void* event, void*) {
    RETURN_INJECTED_FAULT();
    return event == nullptr ? CUDA_ERROR_INVALID_VALUE : check_context();
}

EMULATOR_API int cuStreamWaitEvent(void*, void* event, unsigned) {
    RETURN_INJECTED_FAULT();
    return event == nullptr ? CUDA_ERROR_INVALID_VALUE : check_context();
}

EMULATOR_API int cuEventDestroy_v2(void* event) {
    RETURN_INJECTED_FAULT();
    return event == nullptr ? CUDA_ERROR_INVALID_VALUE : check_context();
}

EMULATOR_API int cuStreamIsCapturing(void*, int* status) {
    RETURN_INJECTED_FAULT();
    if (status == nullptr) return CUDA_ERROR_INVALID_VALUE;
    RETURN_FAILURE(check_context());
    *status = static_cast<int>(emulator::injected_value("cuStreamIsCapturing").value_or(0));
    return CUDA_SUCCESS;
}

EMULATOR_API int cuModuleLoadData(Module** module, const void* image) {
    RETURN_INJECTED_FAULT();
    if (module == nullptr || image == nullptr) return CUDA_ERROR_INVALID_VALUE;
    RETURN_FAILURE(check_context());
    const char* text = static_cast<const char*>(image);
    static const char magic[] = "// emulated image\n";
    if (std::strncmp(text, magic, std::strlen(magic)) != 0) return CUDA_ERROR_INVALID_IMAGE;
    text += std::strlen(magic);
    const std::string path(text, std::strcspn(text, "\n"));

    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return CUDA_ERROR_INVALID_IMAGE;
    const auto launch =
        reinterpret_cast<emulator::Launch* (*)()>(dlsym(library, "emulator_launch"));
    if (launch == nullptr) {
        dlclose(library);
        return CUDA_ERROR_INVALID_IMAGE;
    }
    std::lock_guard<std::mutex> lock(driver_mutex);
    *module = new Module{library, launch(), {}};
    (*module)->launch->barrier = [] { block.barrier(); };
    modules.insert(*module);
    return CUDA_SUCCESS;
}

EMULATOR_API int cuModuleUnload(Module* module) {
    RETURN_INJECTED_FAULT();
    RETURN_FAILURE(check_context());
    std::lock_guard<std::mutex> lock(driver_mutex);
    if (modules.erase(module) == 0) return CUDA_ERROR_INVALID_HANDLE;
    for (const auto& function : module->functions) functions.erase(function.get());
    dlclose(module->library);
    delete module;
    return CUDA_SUCCESS;
}

EMULATOR_API int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    RETURN_INJECTED_FAULT();
    if (function == nullptr || name == nullptr) return CUDA_ERROR_INVALID_VALUE;
    RETURN_FAILURE(check_context());
    std::lock_guard<std::mutex> lock(driver_mutex);
    if (modules.count(module) == 0) return CUDA_ERROR_INVALID_HANDLE;
    for (const auto& known : module->functions) {
        if (known->name != name) continue;
        *function = known.get();
        return CUDA_SUCCESS;
    }
    const std::string prefix = name;
    const auto thunk =
        reinterpret_cast<Thunk>(dlsym(module->library, (prefix + "__thunk").c_str()));
    const auto limit = reinterpret_cast<unsigned int (*)()>(
        dlsym(module->library, (prefix + "__limit").c_str()));
    if (thunk == nullptr || limit == nullptr) return CUDA_ERROR_NOT_FOUND;
    module->functions.push_back(
        std::make_unique<Function>(Function{prefix, thunk, module->launch, limit()}));
    *function = module->functions.back().get();
    functions.insert(*function);
    return CUDA_SUCCESS;
}

EMULATOR_API int cuLaunchKernel(Function* function, unsigned int grid_x, unsigned int grid_y,
                                unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                                unsigned int block_z, unsigned int shared_bytes, void*,
                                void** arguments, void** extra) {
    RETURN_INJECTED_FAULT();
    RETURN_FAILURE(check_context());
    std::lock_guard<std::mutex> lock(driver_mutex);
    if (functions.count(function) == 0) return CUDA_ERROR_INVALID_HANDLE;
    const bool is_grid_valid = grid_x > 0 && grid_x < (1u << 31) && grid_y > 0 &&
                               grid_y < (1u << 16) && grid_z > 0 && grid_z < (1u << 16);
    const bool is_block_valid = block_x > 0 && block_x <= 1024 && block_y > 0 && block_y <= 1024 &&
                                block_z > 0 && block_z <= 64 &&
                                block_x * block_y * block_z <= function->thread_limit;
    if (!is_grid_valid || !is_block_valid || shared_bytes > emulator::dynamic_shared_limit ||
        extra != nullptr) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    emulator::Launch& launch = *function->launch;
    launch.grid_size = dim3(grid_x, grid_y, grid_z);
    launch.block_size = dim3(block_x, block_y, block_z);
    for (unsigned int z = 0; z < grid_z; ++z) {
        for (unsigned int y = 0; y < grid_y; ++y) {
            for (unsigned int x = 0; x < grid_x; ++x) {
                launch.block = {x, y, z};
                block.run(*function, arguments);
            }
        }
    }
    return CUDA_SUCCESS;
}

namespace {

int report_error(int status, const char** target, const char* ErrorText::*member) {
    if (target == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *target = nullptr;
    for (const ErrorText& known : error_texts) {
        if (known.status == status) *target = known.*member;
    }
    return *target == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

}  // namespace

EMULATOR_API int cuGetErrorName(int status, const char** name) {
    RETURN_INJECTED_FAULT();
    return report_error(status, name, &ErrorText::name);
}

EMULATOR_API int cuGetErrorString(int status, const char** text) {
    RETURN_INJECTED_FAULT();
    return report_error(status, text, &ErrorText::text);
}
