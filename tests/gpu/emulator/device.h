// The part of CUDA C++ that kernels may use, for g++. Prepended to every kernel's source. It
// includes no header, and kernels are compiled without any: NVRTC has none to offer either.

#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __CUDA_ARCH__ 900

#define __device__
#define __host__
#define __constant__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#ifdef EMULATOR_SCAN
// The first pass only preprocesses: these words mark the kernels in its output.
#define __global__ emulator_kernel
#define __launch_bounds__(...) emulator_bounds(__VA_ARGS__)
#else
#define __global__
#define __launch_bounds__(...)
#endif

typedef decltype(sizeof(0)) size_t;
typedef decltype(static_cast<char*>(nullptr) - static_cast<char*>(nullptr)) ptrdiff_t;

namespace emulator {

static Launch launch;
alignas(128) static unsigned char dynamic_shared[dynamic_shared_limit];

template <int... indices>
struct Indices {};

template <typename Type>
struct Unqualified { using type = Type; };
template <typename Type>
struct Unqualified<const Type> { using type = Type; };

// Reads every argument through its pointer, with the type that the kernel declares.
template <typename... Parameters, int... indices>
inline __attribute__((always_inline)) void call(void (*kernel)(Parameters...), void** arguments,
                                                Indices<indices...>) {
    kernel(*static_cast<typename Unqualified<Parameters>::type*>(arguments[indices])...);
}

template <typename... Parameters>
inline __attribute__((always_inline)) void call(void (*kernel)(Parameters...), void** arguments) {
    call(kernel, arguments, Indices<__integer_pack(sizeof...(Parameters))...>());
}

// The threads per block of `__launch_bounds__`, which may also name blocks per multiprocessor.
template <typename... Rest>
constexpr unsigned int first(unsigned int threads, Rest...) {
    return threads;
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) emulator::Launch* emulator_launch() {
    return &emulator::launch;
}

static const uint3& threadIdx = emulator::launch.thread;
static const uint3& blockIdx = emulator::launch.block;
static const dim3& blockDim = emulator::launch.block_size;
static const dim3& gridDim = emulator::launch.grid_size;

inline void __syncthreads() { emulator::launch.barrier(); }
// One thread runs at a time, so every write is seen at once.
inline void __threadfence() {}
inline void __threadfence_block() {}

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// Bits.
#define EMULATOR_BITS(name, From, To)               \
    inline To name(From value) {                    \
        To bits;                                    \
        __builtin_memcpy(&bits, &value, sizeof(To)); \
        return bits;                                \
    }
EMULATOR_BITS(__float_as_uint, float, unsigned int)
EMULATOR_BITS(__uint_as_float, unsigned int, float)
EMULATOR_BITS(__float_as_int, float, int)
EMULATOR_BITS(__int_as_float, int, float)
EMULATOR_BITS(__double_as_longlong, double, long long)
EMULATOR_BITS(__longlong_as_double, long long, double)

// Atomics, for the types that CUDA has them for: not minimum and maximum of floats.
#define EMULATOR_ATOMIC(name, Type, expression)   \
    inline Type name(Type* address, Type value) { \
        const Type old = *address;                \
        *address = expression;                    \
        return old;                               \
    }
#define EMULATOR_ATOMIC_INTEGER(Type)                                   \
    EMULATOR_ATOMIC(atomicAdd, Type, old + value)                       \
    EMULATOR_ATOMIC(atomicMin, Type, (value < old ? value : old))       \
    EMULATOR_ATOMIC(atomicMax, Type, (value > old ? value : old))       \
    EMULATOR_ATOMIC(atomicExch, Type, value)                            \
    EMULATOR_ATOMIC(atomicOr, Type, (old | value))                      \
    EMULATOR_ATOMIC(atomicAnd, Type, (old & value))                     \
    inline Type atomicCAS(Type* address, Type compare, Type value) {    \
        const Type old = *address;                                      \
        if (old == compare) *address = value;                           \
        return old;                                                     \
    }
EMULATOR_ATOMIC_INTEGER(int)
EMULATOR_ATOMIC_INTEGER(unsigned int)
EMULATOR_ATOMIC_INTEGER(unsigned long long)
EMULATOR_ATOMIC(atomicAdd, float, old + value)
EMULATOR_ATOMIC(atomicAdd, double, old + value)
EMULATOR_ATOMIC(atomicExch, float, value)
EMULATOR_ATOMIC(atomicMin, long long, (value < old ? value : old))
EMULATOR_ATOMIC(atomicMax, long long, (value > old ? value : old))

template <typename Type>
inline Type __ldg(const Type* address) {
    return *address;
}

// Mathematics: for each function the C names (sqrt, sqrtf) and an overload of sqrt for float.
#define EMULATOR_UNARY(name)                    \
    extern "C" double name(double) noexcept;    \
    extern "C" float name##f(float) noexcept;   \
    inline float name(float value) { return name##f(value); }
#define EMULATOR_BINARY(name)                          \
    extern "C" double name(double, double) noexcept;   \
    extern "C" float name##f(float, float) noexcept;   \
    inline float name(float first, float second) { return name##f(first, second); }
EMULATOR_UNARY(sqrt)
EMULATOR_UNARY(cbrt)
EMULATOR_UNARY(exp)
EMULATOR_UNARY(exp2)
EMULATOR_UNARY(expm1)
EMULATOR_UNARY(log)
EMULATOR_UNARY(log2)
EMULATOR_UNARY(log10)
EMULATOR_UNARY(log1p)
EMULATOR_UNARY(sin)
EMULATOR_UNARY(cos)
EMULATOR_UNARY(tan)
EMULATOR_UNARY(tanh)
EMULATOR_UNARY(erf)
EMULATOR_UNARY(fabs)
EMULATOR_UNARY(floor)
EMULATOR_UNARY(ceil)
EMULATOR_UNARY(trunc)
EMULATOR_UNARY(round)
EMULATOR_UNARY(rint)
EMULATOR_BINARY(pow)
EMULATOR_BINARY(hypot)
EMULATOR_BINARY(fmin)
EMULATOR_BINARY(fmax)
EMULATOR_BINARY(fmod)
EMULATOR_BINARY(atan2)
EMULATOR_BINARY(copysign)

extern "C" double fma(double, double, double) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
inline float fma(float first, float second, float third) { return fmaf(first, second, third); }
inline double pow(double base, int exponent) { return pow(base, static_cast<double>(exponent)); }
inline double rsqrt(double value) { return 1.0 / sqrt(value); }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float rsqrt(float value) { return rsqrtf(value); }

extern "C" int abs(int) noexcept;
inline long long abs(long long value) { return value < 0 ? -value : value; }
inline float abs(float value) { return fabsf(value); }
inline double abs(double value) { return fabs(value); }

inline bool isfinite(float value) { return __builtin_isfinite(value); }
inline bool isfinite(double value) { return __builtin_isfinite(value); }
inline bool isnan(float value) { return __builtin_isnan(value); }
inline bool isnan(double value) { return __builtin_isnan(value); }
inline bool isinf(float value) { return __builtin_isinf(value); }
inline bool isinf(double value) { return __builtin_isinf(value); }

// Like CUDA's, min and max of a NaN and a number are the number.
template <typename First, typename Second>
inline auto min(First first, Second second) -> decltype(first + second) {
    using Common = decltype(first + second);
    const Common left = first, right = second;
    return right < left || left != left ? right : left;
}
template <typename First, typename Second>
inline auto max(First first, Second second) -> decltype(first + second) {
    using Common = decltype(first + second);
    const Common left = first, right = second;
    return left < right || left != left ? right : left;
}
