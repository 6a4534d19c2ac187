// cuSOLVER, emulated: eigendecompositions of symmetric matrices and Cholesky factors.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <set>
#include <vector>

#include "emulator.h"

namespace {

enum : int {
    CUSOLVER_STATUS_SUCCESS = 0,
    CUSOLVER_STATUS_NOT_INITIALIZED = 1,
    CUSOLVER_STATUS_INVALID_VALUE = 3,
};

enum : int { CUBLAS_FILL_MODE_LOWER = 0, CUBLAS_FILL_MODE_UPPER = 1 };
enum : int { CUSOLVER_EIG_MODE_NOVECTOR = 0, CUSOLVER_EIG_MODE_VECTOR = 1 };
enum : int { CUDA_R_32F = 0, CUDA_R_64F = 1 };

struct Handle {};
struct Parameters {};
struct Rotations {};

std::mutex handles_mutex;
std::set<Handle*> handles;

#define RETURN_FAILURE(check)                                          \
    do {                                                               \
        if (const int failure = (check); failure != 0) return failure; \
    } while (false)
#define REQUIRE(condition)                                      \
    do {                                                        \
        if (!(condition)) return CUSOLVER_STATUS_INVALID_VALUE; \
    } while (false)

int check_handle(Handle* handle) {
    std::lock_guard<std::mutex> lock(handles_mutex);
    return handles.count(handle) == 1 ? CUSOLVER_STATUS_SUCCESS : CUSOLVER_STATUS_NOT_INITIALIZED;
}

// What a caller has to bring, on the device and on the host. The values mean nothing.
struct Workspace {
    std::size_t device_bytes;
    std::size_t host_bytes;
};

Workspace eigen_workspace(std::int64_t n, std::int64_t count) {
    return {static_cast<std::size_t>(512 + 8 * n * count), static_cast<std::size_t>(64 + n)};
}

Workspace cholesky_workspace(std::int64_t n) {
    return {static_cast<std::size_t>(256 + 8 * n), 32};
}

int report_workspace(Workspace workspace, std::size_t* device_bytes, std::size_t* host_bytes) {
    REQUIRE(device_bytes != nullptr && host_bytes != nullptr);
    *device_bytes = workspace.device_bytes;
    *host_bytes = workspace.host_bytes;
    return CUSOLVER_STATUS_SUCCESS;
}

// Uses all of the workspace, so that one that is too small or in use elsewhere shows.
int use_workspace(Workspace needed, void* device, std::size_t device_bytes, void* host,
                  std::size_t host_bytes) {
    REQUIRE(device != nullptr && device_bytes >= needed.device_bytes);
    REQUIRE(host != nullptr && host_bytes >= needed.host_bytes);
    std::memset(device, 0xa5, device_bytes);
    std::memset(host, 0x5a, host_bytes);
    return CUSOLVER_STATUS_SUCCESS;
}

int check_eigen(Handle* handle, Parameters* parameters, int mode, int fill, std::int64_t n,
                int type_a, const void* a, std::int64_t lda, int type_w, const void* w,
                int type_compute, std::int64_t count) {
    RETURN_FAILURE(check_handle(handle));
    REQUIRE(parameters != nullptr);
    REQUIRE(mode == CUSOLVER_EIG_MODE_NOVECTOR || mode == CUSOLVER_EIG_MODE_VECTOR);
    REQUIRE(fill == CUBLAS_FILL_MODE_LOWER || fill == CUBLAS_FILL_MODE_UPPER);
    REQUIRE(n >= 0 && count >= 0 && lda >= std::max<std::int64_t>(1, n));
    REQUIRE(type_a == CUDA_R_32F || type_a == CUDA_R_64F);
    REQUIRE(type_w == type_a && type_compute == type_a);
    REQUIRE(n == 0 || count == 0 || (a != nullptr && w != nullptr));
    return CUSOLVER_STATUS_SUCCESS;
}

double dot(const double* first, const double* second, std::int64_t count) {
    return std::inner_product(first, first + count, second, 0.0);
}

// target += factor * source
template <typename Real>
void add(Real* target, Real factor, const Real* source, std::int64_t count) {
    for (std::int64_t index = 0; index < count; ++index) target[index] += factor * source[index];
}

// The symmetric eigenproblem in double: Householder reflections to a tridiagonal matrix, then
// implicit QL with shifts. `matrix` is full, n by n; it becomes the eigenvectors, one a column.
// Returns whether every eigenvalue converged.
class Eigen {
public:
    Eigen(std::vector<double>& matrix, std::int64_t n)
        : values(static_cast<std::size_t>(n)),
          n_(n),
          matrix_(matrix),
          off_diagonal_(values.size()) {}

    std::vector<double> values;

    bool solve() {
        for (const double value : matrix_) {
            if (!std::isfinite(value)) return false;
        }
        reduce();
        return iterate();
    }

private:
    const std::int64_t n_;
    std::vector<double>& matrix_;
    std::vector<double> off_diagonal_;

    double* column(std::int64_t index) { return matrix_.data() + index * n_; }

    // A = Q T Q^T; T goes to `values` and `off_diagonal_`, Q to `matrix_`.
    void reduce() {
        std::vector<double> scales(values.size(), 0.0);
        std::vector<double> product(values.size());
        for (std::int64_t step = 0; step + 1 < n_; ++step) {
            // The reflection I - scale v v^T maps the column below its diagonal to one number.
            const std::int64_t size = n_ - step - 1;
            double* const v = column(step) + step + 1;
            const double largest =
                std::abs(*std::max_element(v, v + size, [](double first, double second) {
                    return std::abs(first) < std::abs(second);
                }));
            values[step] = column(step)[step];
            off_diagonal_[step] = v[0];
            if (size == 1 || largest == 0.0) continue;
            for (std::int64_t row = 0; row < size; ++row) v[row] /= largest;
            const double norm = std::copysign(std::sqrt(dot(v, v, size)), v[0]);
            v[0] += norm;
            scales[step] = 1.0 / (norm * v[0]);
            off_diagonal_[step] = -norm * largest;

            // Both sides of what remains: A -= v w^T + w v^T.
            double* const w = product.data();
            std::fill(w, w + size, 0.0);
            for (std::int64_t index = 0; index < size; ++index) {
                add(w, scales[step] * v[index], column(step + 1 + index) + step + 1, size);
            }
            add(w, -0.5 * scales[step] * dot(v, w, size), v, size);
            for (std::int64_t index = 0; index < size; ++index) {
                double* const target = column(step + 1 + index) + step + 1;
                add(target, -w[index], v, size);
                add(target, -v[index], w, size);
            }
        }
        if (n_ > 0) values[n_ - 1] = column(n_ - 1)[n_ - 1];

        // Q is the product of the reflections, built from the last: step k touches only what
        // lies below and right of k, and its vector is in column k, which Q does not hold yet.
        std::vector<double> v(values.size());
        for (std::int64_t step = n_ - 1; step >= 0; --step) {
            const std::int64_t size = n_ - step - 1;
            std::copy(column(step) + step + 1, column(step) + n_, v.begin());
            for (std::int64_t index = step + 1; index < n_ && scales[step] != 0.0; ++index) {
                double* const target = column(index) + step + 1;
                add(target, -scales[step] * dot(v.data(), target, size), v.data(), size);
            }
            std::fill(column(step), column(step) + n_, 0.0);
            column(step)[step] = 1.0;
            // Row `step` of the columns to the right is zero in Q so far.
            for (std::int64_t index = step + 1; index < n_; ++index) column(index)[step] = 0.0;
        }
    }

    bool iterate() {
        constexpr double epsilon = std::numeric_limits<double>::epsilon();
        std::vector<double>& d = values;
        std::vector<double>& e = off_diagonal_;
        double norm = 0.0;
        for (std::int64_t index = 0; index < n_; ++index) {
            norm = std::max({norm, std::abs(d[index]), std::abs(e[index])});
        }
        if (n_ > 0) e[n_ - 1] = 0.0;
        for (std::int64_t low = 0; low < n_; ++low) {
            for (int iteration = 0;; ++iteration) {
                std::int64_t high = low;
                while (high + 1 < n_) {
                    const double scale = std::abs(d[high]) + std::abs(d[high + 1]);
                    const double small = epsilon * std::max(scale, epsilon * norm);
                    if (std::abs(e[high]) <= small) break;
                    ++high;
                }
                if (high == low) break;
                if (iteration == 100) return false;
                sweep(low, high);
            }
        }
        return true;
    }

    // One implicit QL step on the unreduced block from `low` to `high`.
    void sweep(std::int64_t low, std::int64_t high) {
        std::vector<double>& d = values;
        std::vector<double>& e = off_diagonal_;
        const double half = (d[low + 1] - d[low]) / (2.0 * e[low]);
        const double shift = d[low] - e[low] / (half + std::copysign(std::hypot(half, 1.0), half));
        double bulge = d[high] - shift, sine = 1.0, cosine = 1.0, correction = 0.0;
        for (std::int64_t index = high - 1; index >= low; --index) {
            const double f = sine * e[index], b = cosine * e[index];
            const double r = std::hypot(f, bulge);
            e[index + 1] = r;
            if (r == 0.0) {
                // The block falls apart here: the next sweep takes the smaller one.
                d[index + 1] -= correction;
                e[high] = 0.0;
                return;
            }
            sine = f / r;
            cosine = bulge / r;
            const double rest = d[index + 1] - correction;
            const double t = (d[index] - rest) * sine + 2.0 * cosine * b;
            correction = sine * t;
            d[index + 1] = rest + correction;
            bulge = cosine * t - b;
            double* const left = column(index);
            double* const right = column(index + 1);
            for (std::int64_t row = 0; row < n_; ++row) {
                const double old = right[row];
                right[row] = sine * left[row] + cosine * old;
                left[row] = cosine * left[row] - sine * old;
            }
        }
        d[low] -= correction;
        e[low] = bulge;
        e[high] = 0.0;
    }
};

// Returns `info`: zero, or one where the iteration did not converge (the outputs are then NaN).
template <typename Real>
int eigen(int mode, int fill, std::int64_t n, Real* a, std::int64_t lda, Real* w) {
    std::vector<double> matrix(static_cast<std::size_t>(n * n));
    for (std::int64_t column = 0; column < n; ++column) {
        for (std::int64_t row = column; row < n; ++row) {
            const bool is_lower = fill == CUBLAS_FILL_MODE_LOWER;
            const double value = is_lower ? a[row + column * lda] : a[column + row * lda];
            matrix[row + column * n] = matrix[column + row * n] = value;
        }
    }
    Eigen eigen(matrix, n);
    const bool has_converged = eigen.solve();
    std::vector<std::int64_t> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), std::int64_t(0));
    if (has_converged) {
        std::stable_sort(order.begin(), order.end(), [&](std::int64_t first, std::int64_t second) {
            return eigen.values[first] < eigen.values[second];
        });
    }
    const bool keeps_vectors = has_converged && mode == CUSOLVER_EIG_MODE_VECTOR;
    constexpr Real nan = std::numeric_limits<Real>::quiet_NaN();
    for (std::int64_t column = 0; column < n; ++column) {
        const double* const vector = matrix.data() + order[column] * n;
        w[column] = has_converged ? static_cast<Real>(eigen.values[order[column]]) : nan;
        // Without vectors the matrix is still overwritten.
        for (std::int64_t row = 0; row < n; ++row) {
            a[row + column * lda] = keeps_vectors ? static_cast<Real>(vector[row]) : nan;
        }
    }
    return has_converged ? 0 : 1;
}

int eigen_any(int mode, int fill, std::int64_t n, int type, void* a, std::int64_t lda, void* w,
              std::int64_t index) {
    if (type == CUDA_R_32F) {
        return eigen(mode, fill, n, static_cast<float*>(a) + index * lda * n, lda,
                     static_cast<float*>(w) + index * n);
    }
    return eigen(mode, fill, n, static_cast<double*>(a) + index * lda * n, lda,
                 static_cast<double*>(w) + index * n);
}

int check_cholesky(Handle* handle, Parameters* parameters, int fill, std::int64_t n, int type_a,
                   const void* a, std::int64_t lda, int type_compute) {
    RETURN_FAILURE(check_handle(handle));
    REQUIRE(parameters != nullptr);
    REQUIRE(fill == CUBLAS_FILL_MODE_LOWER || fill == CUBLAS_FILL_MODE_UPPER);
    REQUIRE(n >= 0 && lda >= std::max<std::int64_t>(1, n));
    REQUIRE((type_a == CUDA_R_32F || type_a == CUDA_R_64F) && type_compute == type_a);
    REQUIRE(n == 0 || a != nullptr);
    return CUSOLVER_STATUS_SUCCESS;
}

// Returns `info`: zero, or the number (from one) of the first pivot that is not positive.
template <typename Real>
int cholesky(int fill, std::int64_t n, Real* a, std::int64_t lda) {
    if (fill == CUBLAS_FILL_MODE_LOWER) {
        for (std::int64_t step = 0; step < n; ++step) {
            Real* const pivot = a + step + step * lda;
            if (!(*pivot > Real(0))) return static_cast<int>(step + 1);
            *pivot = std::sqrt(*pivot);
            for (std::int64_t below = 1; below < n - step; ++below) pivot[below] /= *pivot;
            for (std::int64_t column = step + 1; column < n; ++column) {
                add(a + column + column * lda, -pivot[column - step], pivot + column - step,
                    n - column);
            }
        }
        return 0;
    }
    for (std::int64_t column = 0; column < n; ++column) {
        Real* const target = a + column * lda;
        for (std::int64_t row = 0; row <= column; ++row) {
            const Real* const other = a + row * lda;
            Real value = target[row];
            for (std::int64_t index = 0; index < row; ++index) {
                value -= target[index] * other[index];
            }
            if (row < column) {
                target[row] = value / other[row];
            } else {
                if (!(value > Real(0))) return static_cast<int>(column + 1);
                target[row] = std::sqrt(value);
            }
        }
    }
    return 0;
}

// Elements of what the rotations of many matrices work in.
int rotations_elements(int n, int count) { return 64 + n * count; }

int check_rotations(Handle* handle, int mode, int fill, int n, int type, const void* a, int lda,
                    const void* w, Rotations* rotations, int count) {
    REQUIRE(rotations != nullptr);
    // The library takes small ones only.
    REQUIRE(n <= 32);
    Parameters parameters;
    return check_eigen(handle, &parameters, mode, fill, n, type, a, lda, type, w, type, count);
}

int rotations_workspace(Handle* handle, int mode, int fill, int n, int type, const void* a,
                        int lda, const void* w, int* elements, Rotations* rotations, int count) {
    RETURN_FAILURE(check_rotations(handle, mode, fill, n, type, a, lda, w, rotations, count));
    REQUIRE(elements != nullptr);
    *elements = rotations_elements(n, count);
    return CUSOLVER_STATUS_SUCCESS;
}

int rotate(Handle* handle, int mode, int fill, int n, int type, void* a, int lda, void* w,
           void* work, int elements, int* info, Rotations* rotations, int count) {
    RETURN_FAILURE(check_rotations(handle, mode, fill, n, type, a, lda, w, rotations, count));
    REQUIRE(info != nullptr && work != nullptr && elements >= rotations_elements(n, count));
    std::memset(work, 0xa5, static_cast<std::size_t>(elements) * (type == CUDA_R_32F ? 4 : 8));
    for (std::int64_t index = 0; index < count; ++index) {
        info[index] = eigen_any(mode, fill, n, type, a, lda, w, index);
        info[index] =
            static_cast<int>(emulator::injected_value("syevjBatched.info").value_or(info[index]));
    }
    return CUSOLVER_STATUS_SUCCESS;
}

}  // namespace

EMULATOR_API int cusolverGetVersion(int* version) {
    RETURN_INJECTED_FAULT();
    REQUIRE(version != nullptr);
    *version = static_cast<int>(emulator::injected_value("cusolverGetVersion").value_or(12000));
    return CUSOLVER_STATUS_SUCCESS;
}

EMULATOR_API int cusolverDnCreate(Handle** handle) {
    RETURN_INJECTED_FAULT();
    REQUIRE(handle != nullptr);
    std::lock_guard<std::mutex> lock(handles_mutex);
    *handle = new Handle;
    handles.insert(*handle);
    return CUSOLVER_STATUS_SUCCESS;
}

EMULATOR_API int cusolverDnDestroy(Handle* handle) {
    RETURN_INJECTED_FAULT();
    std::lock_guard<std::mutex> lock(handles_mutex);
    if (handles.erase(handle) == 0) return CUSOLVER_STATUS_NOT_INITIALIZED;
    delete handle;
    return CUSOLVER_STATUS_SUCCESS;
}

EMULATOR_API int cusolverDnSetStream(Handle* handle, void*) {
    RETURN_INJECTED_FAULT();
    return check_handle(handle);
}

EMULATOR_API int cusolverDnCreateParams(Parameters** parameters) {
    RETURN_INJECTED_FAULT();
    REQUIRE(parameters != nullptr);
    *parameters = new Parameters;
    return CUSOLVER_STATUS_SUCCESS;
}

EMULATOR_API int cusolverDnDestroyParams(Parameters* parameters) {
    RETURN_INJECTED_FAULT();
    REQUIRE(parameters != nullptr);
    delete parameters;
    return CUSOLVER_STATUS_SUCCESS;
}

EMULATOR_API int cusolverDnXsyevd_bufferSize(Handle* handle, Parameters* parameters, int mode,
                                             int fill, std::int64_t n, int type_a, const void* a,
                                             std::int64_t lda, int type_w, const void* w,
                                             int type_compute, std::size_t* device_bytes,
                                             std::size_t* host_bytes) {
    RETURN_INJECTED_FAULT();
    RETURN_FAILURE(check_eigen(handle, parameters, mode, fill, n, type_a, a, lda, type_w, w,
                               type_compute, 1));
    return report_workspace(eigen_workspace(n, 1), device_bytes, host_bytes);
}

EMULATOR_API int cusolverDnXsyevd(Handle* handle, Parameters* parameters, int mode, int fill,
                                  std::int64_t n, int type_a, void* a, std::int64_t lda, int type_w,
                                  void* w, int type_compute, void* device,
                                  std::size_t device_bytes, void* host, std::size_t host_bytes,
                                  int* info) {
    RETURN_INJECTED_FAULT();
    RETURN_FAILURE(check_eigen(handle, parameters, mode, fill, n, type_a, a, lda, type_w, w,
                               type_compute, 1));
    REQUIRE(info != nullptr);
    RETURN_FAILURE(use_workspace(eigen_workspace(n, 1), device, device_bytes, host, host_bytes));
    *info = eigen_any(mode, fill, n, type_a, a, lda, w, 0);
    *info = static_cast<int>(emulator::injected_value("syevd.info").value_or(*info));
    return CUSOLVER_STATUS_SUCCESS;
}

EMULATOR_API int cusolverDnXsyevBatched_bufferSize(Handle* handle, Parameters* parameters, int mode,
                                                   int fill, std::int64_t n, int type_a,
                                                   const void* a, std::int64_t lda, int type_w,
                                                   const void* w, int type_compute,
                                                   std::size_t* device_bytes,
                                                   std::size_t* host_bytes, std::int64_t count) {
    RETURN_INJECTED_FAULT();
    RETURN_FAILURE(check_eigen(handle, parameters, mode, fill, n, type_a, a, lda, type_w, w,
                               type_compute, count));
    return report_workspace(eigen_workspace(n, count), device_bytes, host_bytes);
}

EMULATOR_API int cusolverDnXsyevBatched(Handle* handle, Parameters* parameters, int mode, int fill,
                                        std::int64_t n, int type_a, void* a, std::int64_t lda,
                                        int type_w, void* w, int type_compute, void* device,
                                        std::size_t device_bytes, void* host,
                                        std::size_t host_bytes, int* info, std::int64_t count) {
    RETURN_INJECTED_FAULT();
    RETURN_FAILURE(check_eigen(handle, parameters, mode, fill, n, type_a, a, lda, type_w, w,
                               type_compute, count));
    REQUIRE(info != nullptr);
    RETURN_FAILURE(
        use_workspace(eigen_workspace(n, count), device, device_bytes, host, host_bytes));
    for (std::int64_t index = 0; index < count; ++index) {
        info[index] = eigen_any(mode, fill, n, type_a, a, lda, w, index);
        info[index] =
            static_cast<int>(emulator::injected_value("syevBatched.info").value_or(info[index]));
    }
    return CUSOLVER_STATUS_SUCCESS;
}

EMULATOR_API int cusolverDnXpotrf_bufferSize(Handle* handle, Parameters* parameters, int fill,
                                             std::int64_t n, int type_a, const void* a,
                                             std::int64_t lda, int type_compute,
                                             std::size_t* device_bytes, std::size_t* host_bytes) {
    RETURN_INJECTED_FAULT();
    RETURN_FAILURE(check_cholesky(handle, parameters, fill, n, type_a, a, lda, type_compute));
    return report_workspace(cholesky_workspace(n), device_bytes, host_bytes);
}

EMULATOR_API int cusolverDnXpotrf(Handle* handle, Parameters* parameters, int fill, std::int64_t n,
                                  int type_a, void* a, std::int64_t lda, int type_compute,
                                  void* device, std::size_t device_bytes, void* host,
                                  std::size_t host_bytes, int* info) {
    RETURN_INJECTED_FAULT();
    RETURN_FAILURE(check_cholesky(handle, parameters, fill, n, type_a, a, lda, type_compute));
    REQUIRE(info != nullptr);
    RETURN_FAILURE(use_workspace(cholesky_workspace(n), device, device_bytes, host, host_bytes));
    *info = type_a == CUDA_R_32F ? cholesky(fill, n, static_cast<float*>(a), lda)
                                 : cholesky(fill, n, static_cast<double*>(a), lda);
    *info = static_cast<int>(emulator::injected_value("potrf.info").value_or(*info));
    return CUSOLVER_STATUS_SUCCESS;
}

// --- many small matrices, as by Jacobi's rotations ---

EMULATOR_API int cusolverDnCreateSyevjInfo(Rotations** rotations) {
    RETURN_INJECTED_FAULT();
    REQUIRE(rotations != nullptr);
    *rotations = new Rotations;
    return CUSOLVER_STATUS_SUCCESS;
}

EMULATOR_API int cusolverDnDestroySyevjInfo(Rotations* rotations) {
    RETURN_INJECTED_FAULT();
    REQUIRE(rotations != nullptr);
    delete rotations;
    return CUSOLVER_STATUS_SUCCESS;
}

EMULATOR_API int cusolverDnSsyevjBatched_bufferSize(Handle* handle, int mode, int fill, int n,
                                                    const float* a, int lda, const float* w,
                                                    int* elements, Rotations* rotations,
                                                    int count) {
    RETURN_INJECTED_FAULT();
    return rotations_workspace(handle, mode, fill, n, CUDA_R_32F, a, lda, w, elements, rotations,
                               count);
}

EMULATOR_API int cusolverDnDsyevjBatched_bufferSize(Handle* handle, int mode, int fill, int n,
                                                    const double* a, int lda, const double* w,
                                                    int* elements, Rotations* rotations,
                                                    int count) {
    RETURN_INJECTED_FAULT();
    return rotations_workspace(handle, mode, fill, n, CUDA_R_64F, a, lda, w, elements, rotations,
                               count);
}

EMULATOR_API int cusolverDnSsyevjBatched(Handle* handle, int mode, int fill, int n, float* a,
                                         int lda, float* w, float* work, int elements, int* info,
                                         Rotations* rotations, int count) {
    RETURN_INJECTED_FAULT();
    return rotate(handle, mode, fill, n, CUDA_R_32F, a, lda, w, work, elements, info, rotations,
                  count);
}

EMULATOR_API int cusolverDnDsyevjBatched(Handle* handle, int mode, int fill, int n, double* a,
                                         int lda, double* w, double* work, int elements, int* info,
                                         Rotations* rotations, int count) {
    RETURN_INJECTED_FAULT();
    return rotate(handle, mode, fill, n, CUDA_R_64F, a, lda, w, work, elements, info, rotations,
                  count);
}
