//! Dense products and triangular solves through cuBLAS.
//!
//! cuBLAS reads matrices column by column. A matrix that lies row by row is the transpose of one
//! that lies column by column, so every call here is turned into one on such transposes, and
//! nothing is copied unless a matrix lies in neither way.

use std::ffi::c_void;

use super::calls::failed;
use super::queue::Cuda;
use crate::backend::Triangle;
use crate::element::{Dtype, Real};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, MatrixMut, Storage};
use crate::units::Precision;
use cudarc::cublas::sys::{
    self, cublasComputeType_t, cublasDiagType_t, cublasFillMode_t, cublasGemmAlgo_t,
    cublasOperation_t, cublasSideMode_t, cudaDataType_t,
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

/// Rows of a Gram matrix at a time: enough for products to run at full speed, and few enough that
/// little is computed above the diagonal. cuBLAS' own routine for one triangle uses no tensor cores.
const BLOCK: usize = 512;

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

impl Strided {
    /// A product alone.
    pub(super) const ONE: Self = Self {
        count: 1,
        strides: [0; 3],
    };
}

/// Rows in device memory, in the type in which they are multiplied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub(super) address: u64,
    pub(super) dtype: Dtype,
    pub(super) count: usize,
    /// Elements from each row to the next one.
    pub(super) step: usize,
}

impl Rows {
    /// The rows without their first elements.
    pub(super) fn starting_at(self, first: usize) -> Self {
        Self {
            address: self.address + (first * self.dtype.size()) as u64,
            ..self
        }
    }

    fn data_type(self) -> cudaDataType_t {
        match self.dtype {
            Dtype::Float16 => cudaDataType_t::CUDA_R_16F,
            Dtype::BFloat16 => cudaDataType_t::CUDA_R_16BF,
            Dtype::Float32 => cudaDataType_t::CUDA_R_32F,
            Dtype::Float64 => cudaDataType_t::CUDA_R_64F,
        }
    }
}

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
        self.multiply_stack(out, keep, a, b, alpha, Strided::ONE)
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
        let status = match (T::DTYPE, self.precision) {
            (Dtype::Float32, Precision::Ieee) => call!(
                f32,
                sys::cublasSgemm_v2_64,
                sys::cublasSgemmStridedBatched_64
            ),
            (Dtype::Float32, Precision::Tf32 | Precision::Bf16) => {
                let (alpha, beta) = (alpha as f32, beta as f32);
                // SAFETY: as in `call`.
                unsafe {
                    sys::cublasGemmStridedBatchedEx_64(
                        handles.cublas,
                        right.transposing(),
                        left.transposing(),
                        m,
                        n,
                        k,
                        (&raw const alpha).cast(),
                        b as *const c_void,
                        cudaDataType_t::CUDA_R_32F,
                        right.leading,
                        b_step,
                        a as *const c_void,
                        cudaDataType_t::CUDA_R_32F,
                        left.leading,
                        a_step,
                        (&raw const beta).cast(),
                        c as *mut c_void,
                        cudaDataType_t::CUDA_R_32F,
                        target.leading,
                        out_step,
                        count,
                        cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
                        cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                    )
                }
            }
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

    /// Adds `weight * x^T x` to the lower triangle of `out`; what is above is left undefined. For a
    /// stack of which these are the first matrices, each result lies row by row or column by column.
    pub(super) fn add_squares<T: Real>(
        &self,
        mut out: MatrixMut<'_, T>,
        x: Rows,
        weight: f64,
        precision: Precision,
        batch: Strided,
    ) -> Result<()> {
        let size = out.rows();
        if !lies_well(out.as_ref()) {
            let mut squares = self.zeroed::<T>(size, size)?;
            self.add_squares(squares.view_mut(), x, weight, precision, batch)?;
            return self.add_multiple(1.0, squares.view(), out);
        }
        let blocks = size.div_ceil(BLOCK);
        for block in 0..blocks {
            let (start, end) = (size * block / blocks, size * (block + 1) / blocks);
            let part = out.as_mut().subrows(start, end - start);
            let (part, left) = (part.subcolumns(0, end), x.starting_at(start));
            self.add_product_of_rows(part, left, x, weight, precision, batch)?;
        }
        Ok(())
    }

    /// `out += weight * left^T right` for rows of one type, as many of them as `out` has rows and
    /// columns; of a stack, these are the first ones.
    pub(super) fn add_product_of_rows<T: Real>(
        &self,
        out: MatrixMut<'_, T>,
        left: Rows,
        right: Rows,
        weight: f64,
        precision: Precision,
        batch: Strided,
    ) -> Result<()> {
        use sys::cublasComputeType_t::{
            CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_COMPUTE_64F,
        };
        let Some(target) = Lying::of(out.as_ref()) else {
            return Err(Error::Internal(
                "a product of rows needs a matrix by rows or by columns".to_owned(),
            ));
        };
        // Rows are the columns of what cuBLAS sees; what lies row by row is seen as its transpose,
        // right^T left.
        let (m, n) = (out.rows() as i64, out.columns() as i64);
        let [of_left, of_right, of_out] = batch.strides.map(|step| step as i64);
        let (m, n, a, b, steps) = if target.transposed {
            (n, m, right, left, [of_right, of_left, of_out])
        } else {
            (m, n, left, right, [of_left, of_right, of_out])
        };
        let k = left.count as i64;
        let wide = T::DTYPE == Dtype::Float64;
        let compute = match (left.dtype, precision) {
            (Dtype::Float64, _) => CUBLAS_COMPUTE_64F,
            (Dtype::Float32, Precision::Tf32 | Precision::Bf16) => CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => CUBLAS_COMPUTE_32F,
        };
        let of_target = if wide {
            cudaDataType_t::CUDA_R_64F
        } else {
            cudaDataType_t::CUDA_R_32F
        };
        // Factors are of the type that is computed in.
        let (narrow, in_double) = ([weight as f32, 1.0], [weight, 1.0]);
        let [alpha, beta]: [*const c_void; 2] = if wide {
            [&raw const in_double[0], &raw const in_double[1]].map(<*const f64>::cast)
        } else {
            [&raw const narrow[0], &raw const narrow[1]].map(<*const f32>::cast)
        };
        let c = self.address(out.as_ref())? as *mut c_void;
        let handles = self.handles()?;
        // SAFETY: extents, steps and leading dimensions are those of rows and matrices on this
        // device that outlive the queued work (see memory.rs); the factors live until the call,
        // which reads them, returns.
        let status = unsafe {
            sys::cublasGemmStridedBatchedEx_64(
                handles.cublas,
                cublasOperation_t::CUBLAS_OP_N,
                cublasOperation_t::CUBLAS_OP_T,
                m,
                n,
                k,
                alpha,
                a.address as *const c_void,
                a.data_type(),
                a.step as i64,
                steps[0],
                b.address as *const c_void,
                b.data_type(),
                b.step as i64,
                steps[1],
                beta,
                c,
                of_target,
                target.leading,
                steps[2],
                batch.count as i64,
                compute,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        status
            .result()
            .map_err(|error| failed("cublas gemm", error.0))
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
