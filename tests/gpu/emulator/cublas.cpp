// cuBLAS, emulated: column-major products and triangular solves, in the type of their operands.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <set>
#include <vector>

#include "emulator.h"

namespace {

enum : int {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_INVALID_VALUE = 7,
};

enum : int { CUBLAS_FILL_MODE_LOWER = 0, CUBLAS_FILL_MODE_UPPER = 1 };
enum : int { CUBLAS_DIAG_NON_UNIT = 0, CUBLAS_DIAG_UNIT = 1 };
enum : int { CUBLAS_SIDE_LEFT = 0, CUBLAS_SIDE_RIGHT = 1 };
enum : int { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1, CUBLAS_OP_C = 2 };

struct StatusText {
    int status;
    const char* name;
    const char* text;
};

const StatusText status_texts[] = {
    {0, "CUBLAS_STATUS_SUCCESS", "success"},
    {1, "CUBLAS_STATUS_NOT_INITIALIZED", "the library was not initialized"},
    {3, "CUBLAS_STATUS_ALLOC_FAILED", "the resource allocation failed"},
    {7, "CUBLAS_STATUS_INVALID_VALUE",
     "an unsupported value or parameter was passed to the function"},
    {8, "CUBLAS_STATUS_ARCH_MISMATCH",
     "the requested functionality requires some feature absent from the device architecture"},
    {11, "CUBLAS_STATUS_MAPPING_ERROR", "an access to GPU memory space failed"},
    {13, "CUBLAS_STATUS_EXECUTION_FAILED", "the GPU program failed to execute"},
    {14, "CUBLAS_STATUS_INTERNAL_ERROR", "an internal operation failed"},
    {15, "CUBLAS_STATUS_NOT_SUPPORTED", "the functionality requested is not supported"},
    {16, "CUBLAS_STATUS_LICENSE_ERROR", "the functionality requested requires a license"},
};

struct Handle {
    void* workspace = nullptr;
    std::size_t workspace_bytes = 0;
};

std::mutex handles_mutex;
std::set<Handle*> handles;

int check_handle(Handle* handle) {
    std::lock_guard<std::mutex> lock(handles_mutex);
    return handles.count(handle) == 1 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_INITIALIZED;
}

#define RETURN_FAILURE(check)                                          \
    do {                                                               \
        if (const int failure = (check); failure != 0) return failure; \
    } while (false)
#define REQUIRE(condition)                                    \
    do {                                                      \
        if (!(condition)) return CUBLAS_STATUS_INVALID_VALUE; \
    } while (false)

// The real library may write to its workspace in any call; a workspace that is gone must show.
void scribble(Handle* handle) {
    if (handle->workspace == nullptr) return;
    std::memset(handle->workspace, 0xa5, std::min<std::size_t>(handle->workspace_bytes, 4096));
}

bool is_operation(int operation) { return operation >= CUBLAS_OP_N && operation <= CUBLAS_OP_C; }
bool is_fill_mode(int fill) {
    return fill == CUBLAS_FILL_MODE_LOWER || fill == CUBLAS_FILL_MODE_UPPER;
}
bool is_leading(std::int64_t leading, std::int64_t rows) {
    return leading >= std::max<std::int64_t>(1, rows);
}

// Whether no two results of a stack share an element: they follow one another, or their columns do.
bool are_apart(std::int64_t m, std::int64_t n, std::int64_t ldc, std::int64_t stride,
               std::int64_t count) {
    const std::int64_t step = std::abs(stride);
    return count == 1 || step >= ldc * (n - 1) + m || (step >= m && step * (count - 1) + m <= ldc);
}

// A matrix whose columns lie one after another in memory: the operand itself or a transposed copy.
template <typename Real>
struct Columns {
    const Real* data;
    std::int64_t leading;
    std::vector<Real> copy;

    Columns(const Real* source, std::int64_t source_leading, int operation, std::int64_t rows,
            std::int64_t columns)
        : data(source), leading(source_leading) {
        if (operation == CUBLAS_OP_N) return;
        leading = std::max<std::int64_t>(1, rows);
        copy.resize(static_cast<std::size_t>(rows * columns));
        for (std::int64_t row = 0; row < rows; ++row) {
            for (std::int64_t column = 0; column < columns; ++column) {
                copy[row + column * leading] = source[column + row * source_leading];
            }
        }
        data = copy.data();
    }

    const Real* column(std::int64_t index) const { return data + index * leading; }
};

// Rows `first` to `last` of one column of alpha A B + beta C. The sums over the inner dimension
// grow in `Real`, four terms at a time.
template <typename Real>
void product_column(const Columns<Real>& a, const Real* b, std::int64_t inner, Real alpha,
                    Real beta, Real* c, std::int64_t first, std::int64_t last) {
    constexpr std::int64_t block_rows = 512;
    Real sums[block_rows];
    for (std::int64_t start = first; start < last; start += block_rows) {
        const std::int64_t rows = std::min(block_rows, last - start);
        std::fill(sums, sums + rows, Real(0));
        std::int64_t index = 0;
        for (; index + 4 <= inner; index += 4) {
            const Real* const a0 = a.column(index) + start;
            const Real* const a1 = a.column(index + 1) + start;
            const Real* const a2 = a.column(index + 2) + start;
            const Real* const a3 = a.column(index + 3) + start;
            const Real b0 = b[index], b1 = b[index + 1], b2 = b[index + 2], b3 = b[index + 3];
            for (std::int64_t row = 0; row < rows; ++row) {
                sums[row] += (a0[row] * b0 + a1[row] * b1) + (a2[row] * b2 + a3[row] * b3);
            }
        }
        for (; index < inner; ++index) {
            const Real* const a0 = a.column(index) + start;
            for (std::int64_t row = 0; row < rows; ++row) sums[row] += a0[row] * b[index];
        }
        Real* const target = c + start;
        for (std::int64_t row = 0; row < rows; ++row) {
            // C may hold anything, also NaN, where beta is zero.
            const Real old = beta == Real(0) ? Real(0) : beta * target[row];
            target[row] = alpha * sums[row] + old;
        }
    }
}

template <typename Real>
void gemm_unchecked(int operation_a, int operation_b, std::int64_t m, std::int64_t n,
                    std::int64_t k, Real alpha, const Real* a, std::int64_t lda, const Real* b,
                    std::int64_t ldb, Real beta, Real* c, std::int64_t ldc) {
    // With alpha zero the operands are not read.
    if (alpha == Real(0)) k = 0;
    const Columns<Real> left(a, lda, operation_a, m, k);
    const Columns<Real> right(b, ldb, operation_b, k, n);
    for (std::int64_t column = 0; column < n; ++column) {
        product_column(left, right.column(column), k, alpha, beta, c + column * ldc,
                       std::int64_t(0), m);
    }
}

template <typename Real>
int gemm(Handle* handle, int operation_a, int operation_b, std::int64_t m, std::int64_t n,
         std::int64_t k, const Real* alpha, const Real* a, std::int64_t lda, std::int64_t stride_a,
         const Real* b, std::int64_t ldb, std::int64_t stride_b, const Real* beta, Real* c,
         std::int64_t ldc, std::int64_t stride_c, std::int64_t count) {
    RETURN_FAILURE(check_handle(handle));
    REQUIRE(is_operation(operation_a) && is_operation(operation_b));
    REQUIRE(m >= 0 && n >= 0 && k >= 0 && count >= 0);
    REQUIRE(is_leading(lda, operation_a == CUBLAS_OP_N ? m : k));
    REQUIRE(is_leading(ldb, operation_b == CUBLAS_OP_N ? k : n));
    REQUIRE(is_leading(ldc, m));
    if (m == 0 || n == 0 || count == 0) return CUBLAS_STATUS_SUCCESS;
    REQUIRE(alpha != nullptr && beta != nullptr && c != nullptr);
    REQUIRE(k == 0 || *alpha == Real(0) || (a != nullptr && b != nullptr));
    // Results of one batch must not overlap: the real library writes them at the same time.
    REQUIRE(are_apart(m, n, ldc, stride_c, count));
    scribble(handle);
    for (std::int64_t index = 0; index < count; ++index) {
        gemm_unchecked(operation_a, operation_b, m, n, k, *alpha, a + index * stride_a, lda,
                       b + index * stride_b, ldb, *beta, c + index * stride_c, ldc);
    }
    return CUBLAS_STATUS_SUCCESS;
}

// Types by their numbers in library_types.h.
enum : int { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
enum : int { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_64F = 70, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 };
enum : int { CUBLAS_GEMM_DEFAULT = -1 };

float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

float from_bfloat16(std::uint16_t bits) { return from_bits(std::uint32_t(bits) << 16); }

float from_half(std::uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const int fraction = bits & 1023;
    float value;
    if (exponent == 31) {
        value = from_bits(0x7f800000u | std::uint32_t(fraction) << 13);
    } else if (exponent == 0) {
        value = std::ldexp(float(fraction), -24);
    } else {
        value = std::ldexp(float(fraction + 1024), exponent - 25);
    }
    return bits & 0x8000 ? -value : value;
}

// Rounds to a mantissa of ten bits, to the nearest and then to even, as tensor cores are given it.
float to_tf32(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0xfffu + (bits >> 13 & 1u);
    return from_bits(bits & ~0x1fffu);
}

// The columns of an operand in single precision, as a product with sums in single precision reads
// them.
std::vector<float> widened(const void* source, int type, bool tf32, std::int64_t leading,
                           std::int64_t rows, std::int64_t columns) {
    const std::int64_t length = columns == 0 ? 0 : leading * (columns - 1) + rows;
    std::vector<float> values(static_cast<std::size_t>(length));
    // What lies between columns may be anything: it is not read.
    for (std::int64_t column = 0; column < columns; ++column) {
        for (std::int64_t row = 0; row < rows; ++row) {
            const std::int64_t index = row + column * leading;
            float value;
            if (type == CUDA_R_32F) {
                value = static_cast<const float*>(source)[index];
            } else {
                const std::uint16_t bits = static_cast<const std::uint16_t*>(source)[index];
                value = type == CUDA_R_16F ? from_half(bits) : from_bfloat16(bits);
            }
            values[index] = tf32 ? to_tf32(value) : value;
        }
    }
    return values;
}

std::int64_t size_of(int type) {
    return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2;
}

// What products ask for: floating-point operations by what operands are rounded to, and the bytes of
// their operands and results, each counted once where matrices of a stack share them.
std::mutex asked_mutex;
std::map<std::string, double> asked;

double reach(double elements, long long stride, std::int64_t count) {
    const double step = std::min(elements, static_cast<double>(std::abs(stride)));
    return elements + step * static_cast<double>(count - 1);
}

void count_products(int type, int type_c, int compute, double m, double n, double k,
                    long long stride_a, long long stride_b, long long stride_c,
                    std::int64_t count) {
    if (count == 0) return;
    const char* name = compute == CUBLAS_COMPUTE_64F             ? "float64"
                       : type == CUDA_R_16F                      ? "float16"
                       : type == CUDA_R_16BF                     ? "bfloat16"
                       : compute == CUBLAS_COMPUTE_32F_FAST_TF32 ? "tf32"
                                                                 : "float32";
    std::lock_guard<std::mutex> lock(asked_mutex);
    asked[name] += 2.0 * static_cast<double>(count) * m * n * k;
    asked["bytes"] += static_cast<double>(size_of(type)) *
                          (reach(m * k, stride_a, count) + reach(k * n, stride_b, count)) +
                      static_cast<double>(size_of(type_c)) * reach(m * n, stride_c, count);
}

template <typename Real>
void count_products(double m, double n, double k, long long stride_a, long long stride_b,
                    long long stride_c, std::int64_t count) {
    const int type = sizeof(Real) == 8 ? CUDA_R_64F : CUDA_R_32F;
    const int compute = sizeof(Real) == 8 ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
    count_products(type, type, compute, m, n, k, stride_a, stride_b, stride_c, count);
}

// target -= factor * source
template <typename Real>
void subtract(Real* target, Real factor, const Real* source, std::int64_t count) {
    for (std::int64_t index = 0; index < count; ++index) target[index] -= factor * source[index];
}

template <typename Real>
int trsm(Handle* handle, int side, int fill, int operation, int diagonal, std::int64_t m,
         std::int64_t n, const Real* alpha, const Real* a, std::int64_t lda, Real* b,
         std::int64_t ldb) {
    RETURN_FAILURE(check_handle(handle));
    REQUIRE(side == CUBLAS_SIDE_LEFT || side == CUBLAS_SIDE_RIGHT);
    REQUIRE(is_fill_mode(fill) && is_operation(operation));
    REQUIRE(diagonal == CUBLAS_DIAG_NON_UNIT || diagonal == CUBLAS_DIAG_UNIT);
    REQUIRE(m >= 0 && n >= 0);
    const std::int64_t order = side == CUBLAS_SIDE_LEFT ? m : n;
    REQUIRE(is_leading(lda, order) && is_leading(ldb, m));
    if (m == 0 || n == 0) return CUBLAS_STATUS_SUCCESS;
    REQUIRE(alpha != nullptr && b != nullptr && (*alpha == Real(0) || a != nullptr));
    scribble(handle);
    for (std::int64_t column = 0; column < n; ++column) {
        for (std::int64_t row = 0; row < m; ++row) {
            Real& value = b[row + column * ldb];
            value = *alpha == Real(0) ? Real(0) : *alpha * value;
        }
    }
    if (*alpha == Real(0)) return CUBLAS_STATUS_SUCCESS;

    // op(A), dense: only the named triangle of A is read, and no diagonal of ones.
    std::vector<Real> triangle(static_cast<std::size_t>(order * order), Real(0));
    for (std::int64_t column = 0; column < order; ++column) {
        const std::int64_t first = fill == CUBLAS_FILL_MODE_LOWER ? column : 0;
        const std::int64_t last = fill == CUBLAS_FILL_MODE_LOWER ? order : column + 1;
        for (std::int64_t row = first; row < last; ++row) {
            const bool is_one = row == column && diagonal == CUBLAS_DIAG_UNIT;
            const Real value = is_one ? Real(1) : a[row + column * lda];
            const bool is_same = operation == CUBLAS_OP_N;
            triangle[is_same ? row + column * order : column + row * order] = value;
        }
    }
    const bool is_lower = (fill == CUBLAS_FILL_MODE_LOWER) == (operation == CUBLAS_OP_N);
    if (side == CUBLAS_SIDE_LEFT) {
        for (std::int64_t column = 0; column < n; ++column) {
            Real* const x = b + column * ldb;
            for (std::int64_t step = 0; step < order; ++step) {
                const std::int64_t pivot = is_lower ? step : order - 1 - step;
                const Real* const t = &triangle[pivot * order];
                x[pivot] /= t[pivot];
                const std::int64_t first = is_lower ? pivot + 1 : 0;
                subtract(x + first, x[pivot], t + first, order - 1 - step);
            }
        }
    } else {
        for (std::int64_t step = 0; step < order; ++step) {
            const std::int64_t column = is_lower ? order - 1 - step : step;
            Real* const x = b + column * ldb;
            const Real* const t = &triangle[column * order];
            const std::int64_t first = is_lower ? column + 1 : 0;
            for (std::int64_t other = first; other < first + step; ++other) {
                subtract(x, t[other], b + other * ldb, m);
            }
            for (std::int64_t row = 0; row < m; ++row) x[row] /= t[column];
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

EMULATOR_API int cublasCreate_v2(Handle** handle) {
    RETURN_INJECTED_FAULT();
    REQUIRE(handle != nullptr);
    std::lock_guard<std::mutex> lock(handles_mutex);
    *handle = new Handle;
    handles.insert(*handle);
    return CUBLAS_STATUS_SUCCESS;
}

EMULATOR_API int cublasDestroy_v2(Handle* handle) {
    RETURN_INJECTED_FAULT();
    std::lock_guard<std::mutex> lock(handles_mutex);
    if (handles.erase(handle) == 0) return CUBLAS_STATUS_NOT_INITIALIZED;
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

EMULATOR_API int cublasSetStream_v2(Handle* handle, void*) {
    RETURN_INJECTED_FAULT();
    RETURN_FAILURE(check_handle(handle));
    // As documented: a new stream takes the caller's workspace away.
    *handle = Handle{};
    return CUBLAS_STATUS_SUCCESS;
}

EMULATOR_API int cublasSetWorkspace_v2(Handle* handle, void* workspace, std::size_t bytes) {
    RETURN_INJECTED_FAULT();
    RETURN_FAILURE(check_handle(handle));
    REQUIRE(reinterpret_cast<std::uintptr_t>(workspace) % 256 == 0);
    *handle = Handle{workspace, bytes};
    return CUBLAS_STATUS_SUCCESS;
}

EMULATOR_API int cublasGetVersion_v2(Handle*, int* version) {
    RETURN_INJECTED_FAULT();
    REQUIRE(version != nullptr);
    *version = static_cast<int>(emulator::injected_value("cublasGetVersion_v2").value_or(130000));
    return CUBLAS_STATUS_SUCCESS;
}

EMULATOR_API const char* cublasGetStatusName(int status) {
    for (const StatusText& known : status_texts) {
        if (known.status == status) return known.name;
    }
    return "unknown cublasStatus_t";
}

EMULATOR_API const char* cublasGetStatusString(int status) {
    for (const StatusText& known : status_texts) {
        if (known.status == status) return known.text;
    }
    return "unknown cublasStatus_t";
}

// Every routine for both types, with 32-bit and with 64-bit sizes.
#define EMULATE_ROUTINES(letter, Real, suffix, batched_suffix, Integer)                            \
    EMULATOR_API int cublas##letter##gemm##suffix(                                                 \
        Handle* handle, int operation_a, int operation_b, Integer m, Integer n, Integer k,         \
        const Real* alpha, const Real* a, Integer lda, const Real* b, Integer ldb,                 \
        const Real* beta, Real* c, Integer ldc) {                                                  \
        RETURN_INJECTED_FAULT();                                                                   \
        count_products<Real>(m, n, k, 0, 0, 0, 1);                                                 \
        return gemm<Real>(handle, operation_a, operation_b, m, n, k, alpha, a, lda, 0, b, ldb, 0,  \
                          beta, c, ldc, 0, 1);                                                     \
    }                                                                                              \
    EMULATOR_API int cublas##letter##gemmStridedBatched##batched_suffix(                           \
        Handle* handle, int operation_a, int operation_b, Integer m, Integer n, Integer k,         \
        const Real* alpha, const Real* a, Integer lda, long long stride_a, const Real* b,          \
        Integer ldb, long long stride_b, const Real* beta, Real* c, Integer ldc,                   \
        long long stride_c, Integer count) {                                                       \
        RETURN_INJECTED_FAULT();                                                                   \
        count_products<Real>(m, n, k, stride_a, stride_b, stride_c, count);                        \
        return gemm<Real>(handle, operation_a, operation_b, m, n, k, alpha, a, lda, stride_a, b,   \
                          ldb, stride_b, beta, c, ldc, stride_c, count);                           \
    }                                                                                              \
    EMULATOR_API int cublas##letter##trsm##suffix(                                               \
        Handle* handle, int side, int fill, int operation, int diagonal, Integer m, Integer n,   \
        const Real* alpha, const Real* a, Integer lda, Real* b, Integer ldb) {                   \
        RETURN_INJECTED_FAULT();                                                                 \
        return trsm<Real>(handle, side, fill, operation, diagonal, m, n, alpha, a, lda, b, ldb); \
    }

EMULATE_ROUTINES(S, float, _v2, , int)
EMULATE_ROUTINES(D, double, _v2, , int)
EMULATE_ROUTINES(S, float, _v2_64, _64, std::int64_t)
EMULATE_ROUTINES(D, double, _v2_64, _64, std::int64_t)

EMULATOR_API int cublasGemmStridedBatchedEx_64(
    Handle* handle, int operation_a, int operation_b, std::int64_t m, std::int64_t n,
    std::int64_t k, const void* alpha, const void* a, int type_a, std::int64_t lda,
    long long stride_a, const void* b, int type_b, std::int64_t ldb, long long stride_b,
    const void* beta, void* c, int type_c, std::int64_t ldc, long long stride_c,
    std::int64_t count, int compute, int algorithm) {
    RETURN_INJECTED_FAULT();
    // The combinations that are documented, of the types that are used here.
    REQUIRE(algorithm == CUBLAS_GEMM_DEFAULT && type_a == type_b);
    count_products(type_a, type_c, compute, m, n, k, stride_a, stride_b, stride_c, count);
    if (compute == CUBLAS_COMPUTE_64F) {
        REQUIRE(type_a == CUDA_R_64F && type_c == CUDA_R_64F);
        return gemm<double>(handle, operation_a, operation_b, m, n, k,
                            static_cast<const double*>(alpha), static_cast<const double*>(a), lda,
                            stride_a, static_cast<const double*>(b), ldb, stride_b,
                            static_cast<const double*>(beta), static_cast<double*>(c), ldc,
                            stride_c, count);
    }
    const bool tf32 = compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    REQUIRE(tf32 || compute == CUBLAS_COMPUTE_32F);
    REQUIRE(type_a == CUDA_R_32F || (!tf32 && (type_a == CUDA_R_16F || type_a == CUDA_R_16BF)));
    REQUIRE(type_c == CUDA_R_32F && is_operation(operation_a) && is_operation(operation_b));
    REQUIRE(m >= 0 && n >= 0 && k >= 0 && count >= 0);
    const bool plain_a = operation_a == CUBLAS_OP_N, plain_b = operation_b == CUBLAS_OP_N;
    REQUIRE(is_leading(lda, plain_a ? m : k) && is_leading(ldb, plain_b ? k : n));
    // Results of one batch must not overlap: the real library writes them at the same time.
    REQUIRE(are_apart(m, n, ldc, stride_c, count));
    for (std::int64_t index = 0; index < count; ++index) {
        const char* const own_a = static_cast<const char*>(a) + index * stride_a * size_of(type_a);
        const char* const own_b = static_cast<const char*>(b) + index * stride_b * size_of(type_b);
        const std::vector<float> wide_a =
            widened(own_a, type_a, tf32, lda, plain_a ? m : k, plain_a ? k : m);
        const std::vector<float> wide_b =
            widened(own_b, type_b, tf32, ldb, plain_b ? k : n, plain_b ? n : k);
        RETURN_FAILURE(gemm<float>(handle, operation_a, operation_b, m, n, k,
                                   static_cast<const float*>(alpha), wide_a.data(), lda, 0,
                                   wide_b.data(), ldb, 0, static_cast<const float*>(beta),
                                   static_cast<float*>(c) + index * stride_c, ldc, 0, 1));
    }
    return CUBLAS_STATUS_SUCCESS;
}

// Floating-point operations of this process's products whose operands are rounded to this type, or the
// "bytes" of operands and results.
EMULATOR_API double emulator_asked(const char* what) {
    std::lock_guard<std::mutex> lock(asked_mutex);
    const auto found = asked.find(what);
    return found == asked.end() ? 0.0 : found->second;
}
