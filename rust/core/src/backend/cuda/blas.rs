//! Dense products and triangular solves through cuBLAS.
//!
//! cuBLAS reads matrices column by column. A matrix that lies row by row is the transpose of one
//! that lies column by column, so every call here is turned into one on such transposes, and
//! nothing is copied unless a matrix lies in neither way.

use super::calls::failed;
use super::queue::Cuda;
use crate::backend::Triangle;
use crate::element::{Dtype, Real};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, MatrixMut, Storage};
use cudarc::cublas::sys::{
    self, cublasDiagType_t, cublasFillMode_t, cublasOperation_t, cublasSideMode_t,
};

/// A matrix as cuBLAS sees it: read column by column, either the matrix itself or its transpose.
#[derive(Debug, Clone, Copy)]
struct Lying {
    /// Distance between neighbouring columns (of what is seen).
    leading: i64,
    /// Whether the transpose is what is seen: the matrix lies row by row.
    transposed: bool,
}

impl Lying {
    /// How a matrix lies, if row by row or column by column.
    fn of<T>(x: Matrix<'_, T>) -> Option<Self> {
        let (rows, columns) = (x.rows() as isize, x.columns() as isize);
        let (down, across) = (x.row_stride(), x.column_stride());
        let lying = |leading: isize, transposed| Self {
            leading: leading as i64,
            transposed,
        };
        if (across == 1 || columns <= 1) && (down >= columns.max(1) || rows <= 1) {
            Some(lying(if rows <= 1 { columns.max(1) } else { down }, true))
        } else if (down == 1 || rows <= 1) && (across >= rows.max(1) || columns <= 1) {
            Some(lying(
                if columns <= 1 { rows.max(1) } else { across },
                false,
            ))
        } else {
            None
        }
    }

    /// The operation that gives the transpose of the matrix.
    fn transposing(self) -> cublasOperation_t {
        if self.transposed {
            cublasOperation_t::CUBLAS_OP_N
        } else {
            cublasOperation_t::CUBLAS_OP_T
        }
    }
}

/// Size of a Gram matrix from which cuBLAS is asked for one triangle only. For narrow and tall x
/// its general product cuts the long sum between multiprocessors, which makes up for the other
/// triangle. (Not measured yet: see docs/benchmarks.md.)
const SYRK_FROM: usize = 1024;

/// Whether a matrix lies row by row or column by column.
pub(super) fn lies_well<T>(x: Matrix<'_, T>) -> bool {
    Lying::of(x).is_some()
}

/// A stack of products; strides of zero repeat a matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Strided {
    /// Number of products.
    pub(super) count: usize,
    /// Elements from each a, b and out to the next one.
    pub(super) strides: [usize; 3],
}

const ONE: Strided = Strided {
    count: 1,
    strides: [0; 3],
};

impl Cuda {
    /// `out = keep * out + alpha * a * b` for matrices of any strides.
    pub(super) fn multiply<T: Real>(
        &self,
        out: MatrixMut<'_, T>,
        keep: bool,
        a: Matrix<'_, T>,
        b: Matrix<'_, T>,
        alpha: f64,
    ) -> Result<()> {
        if !lies_well(out.as_ref()) {
            let mut product = self.matrix_of::<T>(out.rows(), out.columns())?;
            self.multiply(product.view_mut(), false, a, b, alpha)?;
            return if keep {
                self.add_multiple(1.0, product.view(), out)
            } else {
                self.convert(product.view(), out)
            };
        }
        if !lies_well(a) {
            return self.multiply(out, keep, self.copied(a)?.view(), b, alpha);
        }
        if !lies_well(b) {
            return self.multiply(out, keep, a, self.copied(b)?.view(), alpha);
        }
        self.multiply_stack(out, keep, a, b, alpha, ONE)
    }

    /// As [`Self::multiply`] for stacks of which these are the first matrices; each lies row by
    /// row or column by column.
    pub(super) fn multiply_stack<T: Real>(
        &self,
        out: MatrixMut<'_, T>,
        keep: bool,
        a: Matrix<'_, T>,
        b: Matrix<'_, T>,
        alpha: f64,
        batch: Strided,
    ) -> Result<()> {
        let (rows, columns, depth) = (out.rows(), out.columns(), a.columns());
        if rows == 0 || columns == 0 || batch.count == 0 {
            return Ok(());
        }
        let (Some(target), Some(left), Some(right)) =
            (Lying::of(out.as_ref()), Lying::of(a), Lying::of(b))
        else {
            return Err(Error::Internal(
                "a stack of products needs matrices by rows or by columns".to_owned(),
            ));
        };
        if !target.transposed {
            // The same product, transposed, lies row by row.
            let [a_step, b_step, out_step] = batch.strides;
            let strides = [b_step, a_step, out_step];
            let batch = Strided { strides, ..batch };
            let (a, b) = (b.transpose(), a.transpose());
            return self.multiply_stack(out.transpose(), keep, a, b, alpha, batch);
        }
        // out^T = b^T a^T, column by column.
        let [a_step, b_step, out_step] = batch.strides.map(|step| step as i64);
        let (m, n, k) = (columns as i64, rows as i64, depth as i64);
        let count = batch.count as i64;
        let beta = f64::from(u8::from(keep));
        let (a, b) = (self.address(a)?, self.address(b)?);
        let c = self.address(out.as_ref())?;
        let handles = self.handles()?;
        macro_rules! call {
            ($type:ty, $one:path, $many:path) => {{
                let (alpha, beta) = (alpha as $type, beta as $type);
                let (a, b) = (a as *const $type, b as *const $type);
                let c = c as *mut $type;
                let (transpose_a, transpose_b) = (left.transposing(), right.transposing());
                let (lda, ldb, ldc) = (left.leading, right.leading, target.leading);
                // SAFETY: extents, strides and leading dimensions are those of matrices on this
                // device that outlive the queued work (see memory.rs); alpha and beta are read
                // before the call returns.
                unsafe {
                    if count == 1 {
                        $one(
                            handles.cublas,
                            transpose_b,
                            transpose_a,
                            m,
                            n,
                            k,
                            &alpha,
                            b,
                            ldb,
                            a,
                            lda,
                            &beta,
                            c,
                            ldc,
                        )
                    } else {
                        $many(
                            handles.cublas,
                            transpose_b,
                            transpose_a,
                            m,
                            n,
                            k,
                            &alpha,
                            b,
                            ldb,
                            b_step,
                            a,
                            lda,
                            a_step,
                            &beta,
                            c,
                            ldc,
                            out_step,
                            count,
                        )
                    }
                }
            }};
        }
        let status = match T::DTYPE {
            Dtype::Float32 => call!(
                f32,
                sys::cublasSgemm_v2_64,
                sys::cublasSgemmStridedBatched_64
            ),
            _ => call!(
                f64,
                sys::cublasDgemm_v2_64,
                sys::cublasDgemmStridedBatched_64
            ),
        };
        status
            .result()
            .map_err(|error| failed("cublas gemm", error.0))
    }

    /// Adds `weight * x^T x` to the lower triangle of `out`, for x row by row; what is above is
    /// left undefined.
    pub(super) fn add_squares<T: Real>(
        &self,
        mut out: MatrixMut<'_, T>,
        x: Matrix<'_, T>,
        weight: f64,
    ) -> Result<()> {
        let size = out.rows();
        if size < SYRK_FROM {
            return self.multiply(out, true, x.transpose(), x, weight);
        }
        let Some(units) = Lying::of(x) else {
            return self.add_squares(out, self.copied(x)?.view(), weight);
        };
        let Some(target) = Lying::of(out.as_ref()) else {
            let mut squares = self.zeroed::<T>(size, size)?;
            self.add_squares(squares.view_mut(), x, weight)?;
            return self.add_multiple(1.0, squares.view(), out.as_mut());
        };
        let triangle = if target.transposed {
            cublasFillMode_t::CUBLAS_FILL_MODE_UPPER
        } else {
            cublasFillMode_t::CUBLAS_FILL_MODE_LOWER
        };
        let (n, k) = (size as i64, x.rows() as i64);
        let (x, c) = (self.address(x)?, self.address(out.as_ref())?);
        let handles = self.handles()?;
        macro_rules! call {
            ($type:ty, $function:path) => {{
                let (alpha, beta) = (weight as $type, 1.0);
                // SAFETY: as in `multiply_stack`.
                unsafe {
                    $function(
                        handles.cublas,
                        triangle,
                        units.transposing(),
                        n,
                        k,
                        &alpha,
                        x as *const $type,
                        units.leading,
                        &beta,
                        c as *mut $type,
                        target.leading,
                    )
                }
            }};
        }
        let status = match T::DTYPE {
            Dtype::Float32 => call!(f32, sys::cublasSsyrk_v2_64),
            _ => call!(f64, sys::cublasDsyrk_v2_64),
        };
        status
            .result()
            .map_err(|error| failed("cublas syrk", error.0))
    }

    /// Overwrites `x` with the solution of a triangular system.
    pub(super) fn solve_lower<T: Real>(
        &self,
        l: Matrix<'_, T>,
        triangle: Triangle,
        mut x: MatrixMut<'_, T>,
    ) -> Result<()> {
        let (Some(factor), Some(target)) = (Lying::of(l), Lying::of(x.as_ref())) else {
            let l = self.copied(l)?;
            let mut solution = self.copied(x.as_ref())?;
            self.solve_lower(l.view(), triangle, solution.view_mut())?;
            return self.convert(solution.view(), x.as_mut());
        };
        let (rows, columns) = (x.rows() as i64, x.columns() as i64);
        if rows == 0 || columns == 0 {
            return Ok(());
        }
        // What cuBLAS sees is L or its transpose, and X or its transpose.
        let uplo = if factor.transposed {
            cublasFillMode_t::CUBLAS_FILL_MODE_UPPER
        } else {
            cublasFillMode_t::CUBLAS_FILL_MODE_LOWER
        };
        let (side, m, n) = if target.transposed {
            (cublasSideMode_t::CUBLAS_SIDE_RIGHT, columns, rows)
        } else {
            (cublasSideMode_t::CUBLAS_SIDE_LEFT, rows, columns)
        };
        // A system on the right is the transposed one: L X = B is X^T L^T = B^T.
        let wants_transpose = (triangle == Triangle::LowerTransposed) != target.transposed;
        let operation = if wants_transpose != factor.transposed {
            cublasOperation_t::CUBLAS_OP_T
        } else {
            cublasOperation_t::CUBLAS_OP_N
        };
        let (l, x) = (self.address(l)?, self.address(x.as_ref())?);
        let handles = self.handles()?;
        macro_rules! call {
            ($type:ty, $function:path) => {{
                let one: $type = 1.0;
                // SAFETY: as in `multiply_stack`.
                unsafe {
                    $function(
                        handles.cublas,
                        side,
                        uplo,
                        operation,
                        cublasDiagType_t::CUBLAS_DIAG_NON_UNIT,
                        m,
                        n,
                        &one,
                        l as *const $type,
                        factor.leading,
                        x as *mut $type,
                        target.leading,
                    )
                }
            }};
        }
        let status = match T::DTYPE {
            Dtype::Float32 => call!(f32, sys::cublasStrsm_v2_64),
            _ => call!(f64, sys::cublasDtrsm_v2_64),
        };
        status
            .result()
            .map_err(|error| failed("cublas trsm", error.0))
    }
}
