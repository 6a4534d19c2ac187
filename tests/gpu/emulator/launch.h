// What a compiled module and the driver that launches its kernels agree on. Prepended to every
// kernel's source, so it includes nothing.

struct uint3 {
    unsigned int x, y, z;
};

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

// The driver writes it before it calls a kernel for one thread.
struct Launch {
    uint3 thread;
    uint3 block;
    dim3 block_size;
    dim3 grid_size;
    void (*barrier)();
};

// Dynamic shared memory of a block; more needs an opt-in that the emulator does not have.
constexpr unsigned int dynamic_shared_limit = 48 * 1024;

}  // namespace emulator
