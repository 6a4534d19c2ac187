//! What a device must be able to do.
//!
//! Matrices come as where they are ([`Matrix`]): only the backend of their place can read them.
//! Operations on a GPU are queued on a stream, and need not be done when they return.

use std::ops::Deref;

use crate::cancel::Cancel;
use crate::element::Real;
use crate::error::{Error, Result};
use crate::matrix::{HostMatrix, Matrix, MatrixMut, Storage};
use crate::merging::{Deviation, MapGradient, MomentsGradient};
use crate::place::{Device, Place};
use crate::spectrum::Spectrum;
use crate::terms::{FactoredTerm, Group, Multiplied, Term};
use crate::units::{GramTask, Precision, Units};
use crate::view::{TensorView, TensorViewMut};

pub mod cpu;
pub mod cuda;
pub(crate) mod dispatch;

/// Which operand of a triangular solve is meant: `L` or its transpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Triangle {
    /// The lower triangle as stored.
    Lower,
    /// The transpose of the lower triangle.
    LowerTransposed,
}

/// The operations every device offers; the mathematics above them is written once.
pub trait Backend: Sized + Sync {
    /// Memory of this device.
    type Matrix<T: Real>: Storage<T> + Send + Sync;

    /// A sum of Kronecker products made ready for many products with it.
    type Packed<T: Real>: Send + Sync;

    /// How a backend is held.
    type Handle: Deref<Target = Self>;

    /// The backend for tensors at this place.
    fn at(place: Place) -> Result<Self::Handle>;

    /// As [`Self::at`], for products with packed sums alone, which a CUDA graph may capture.
    fn at_for_packed(place: Place) -> Result<Self::Handle> {
        Self::at(place)
    }

    /// Where this backend computes.
    fn device(&self) -> Device;

    /// Lets no work queued after this on `home` reuse memory that was made there before the work
    /// queued here so far is done: for objects that outlive the call that made them.
    fn hold_for(&self, _home: Place) -> Result<()> {
        Ok(())
    }

    /// Waits for the work queued so far: for objects that may be used on any stream from now on.
    fn settle(&self) -> Result<()> {
        Ok(())
    }

    /// The matrices of a tensor on this device.
    fn matrices<'a, T: Real>(&self, x: &TensorView<'a>) -> Result<Vec<Matrix<'a, T>>> {
        x.place().device.expect(self.device())?;
        Matrix::stack_of(x)
    }

    /// The matrices of a tensor on this device, to be written to.
    fn matrices_mut<'a, T: Real>(
        &self,
        x: &'a mut TensorViewMut<'_>,
    ) -> Result<Vec<MatrixMut<'a, T>>> {
        x.place().device.expect(self.device())?;
        MatrixMut::stack_of(x)
    }

    /// A tensor of two dimensions as a matrix.
    fn matrix<'a, T: Real>(&self, x: &TensorView<'a>) -> Result<Matrix<'a, T>> {
        expect_single(self.matrices(x)?, x.shape())
    }

    /// A tensor of two dimensions as a matrix, to be written to.
    fn matrix_mut<'a, T: Real>(&self, x: &'a mut TensorViewMut<'_>) -> Result<MatrixMut<'a, T>> {
        let shape = x.shape().to_vec();
        expect_single(self.matrices_mut(x)?, &shape)
    }

    /// A matrix of zeros.
    fn zeros<T: Real>(&self, rows: usize, columns: usize) -> Result<Self::Matrix<T>>;

    /// Copies a matrix from host memory.
    fn upload<T: Real>(&self, host: &HostMatrix<T>) -> Result<Self::Matrix<T>>;

    /// Copies, rounding or widening where the types differ.
    fn copy<S: Real, T: Real>(&self, from: Matrix<'_, S>, to: MatrixMut<'_, T>) -> Result<()>;

    /// For each stratum, adds its weighted sums of squares and products to the lower triangles of
    /// the matching outputs, one for each group of consecutive features; what is above them is
    /// left undefined. Non-finite input is reported before any output changes.
    fn accumulate_gram<T: Real>(
        &self,
        units: &Units<'_>,
        out: Vec<Vec<MatrixMut<'_, T>>>,
        task: &GramTask,
        cancel: &Cancel,
    ) -> Result<()>;

    /// Divides the lower triangle of each matrix and copies it to the upper one.
    fn symmetrize<T: Real>(&self, x: Vec<MatrixMut<'_, T>>, divisor: f64) -> Result<()>;

    /// For each of these matrices of one size, eigenvalues in ascending order and eigenvectors as
    /// columns; reads the lower triangles only.
    fn eigh<T: Real>(
        &self,
        x: &[Matrix<'_, T>],
        vectors: Vec<MatrixMut<'_, T>>,
    ) -> Result<Vec<Vec<f64>>>;

    /// Replaces the lower triangle by its Cholesky factor and zeroes the strict upper one, or
    /// returns the index of the first pivot that is not positive.
    fn cholesky<T: Real>(&self, x: MatrixMut<'_, T>) -> Result<Option<usize>>;

    /// Overwrites `x` with the solution of a triangular system.
    fn solve_triangular<T: Real>(
        &self,
        l: Matrix<'_, T>,
        triangle: Triangle,
        x: MatrixMut<'_, T>,
    ) -> Result<()>;

    /// `out = keep * out + alpha * a * b`, where `keep` is 1 or 0.
    fn gemm<T: Real>(
        &self,
        out: MatrixMut<'_, T>,
        keep: bool,
        a: Matrix<'_, T>,
        b: Matrix<'_, T>,
        alpha: f64,
    ) -> Result<()>;

    /// `out_s = sum_k G_k V_s A_k + damping * V_s` for every matrix of the stack; terms are
    /// (A, G).
    fn kronecker_product<T: Real>(
        &self,
        terms: &[Term<'_, T>],
        v: &[Matrix<'_, T>],
        out: Vec<MatrixMut<'_, T>>,
        damping: f64,
        cancel: &Cancel,
    ) -> Result<()>;

    /// Packs the terms of all groups, for products in this precision.
    fn pack<T: Real>(
        &self,
        groups: &[Group<'_, T>],
        precision: Precision,
    ) -> Result<Self::Packed<T>>;

    /// Packs terms, for V of this size, whose factors may be known by their roots; each has a way
    /// to its product.
    fn pack_factors<T: Real>(
        &self,
        size: [usize; 2],
        terms: &[FactoredTerm<'_, T>],
        precision: Precision,
    ) -> Result<Self::Packed<T>>;

    /// Writes the product with V.
    fn apply_packed<T: Real>(
        &self,
        packed: &Self::Packed<T>,
        v: Matrix<'_, T>,
        out: MatrixMut<'_, T>,
    ) -> Result<()>;

    /// Writes what is wanted of the product of each packed sum with a V of its own.
    fn apply_all_packed<T: Real>(
        &self,
        products: Vec<(&Self::Packed<T>, Multiplied<'_, T>)>,
    ) -> Result<()>;

    /// Writes what the gradients of moments become in their input.
    fn moments_backward<T: Real>(&self, gradient: MomentsGradient<'_, T>) -> Result<()>;

    /// Writes how far merged weights are from anchors.
    fn merge<T: Real>(&self, layers: Vec<Deviation<'_, T>>) -> Result<()>;

    /// Writes what the gradients of merged weights become.
    fn merge_backward<T: Real>(&self, layers: Vec<MapGradient<'_, T>>) -> Result<()>;

    /// Floating-point operations of one product with a packed sum.
    fn packed_flops<T: Real>(packed: &Self::Packed<T>) -> usize;

    /// The sum of the elementwise product, accumulated in double precision.
    fn dot<T: Real>(&self, a: Matrix<'_, T>, b: Matrix<'_, T>) -> Result<f64>;

    /// The inner product of each column of one matrix with that of the other.
    fn column_dots<T: Real>(&self, a: Matrix<'_, T>, b: Matrix<'_, T>) -> Result<Vec<f64>>;

    /// `y += alpha * x`.
    fn add_scaled<T: Real>(&self, alpha: f64, x: Matrix<'_, T>, y: MatrixMut<'_, T>) -> Result<()>;

    /// Multiplies each element by the matching entry of the spectrum to the given power.
    fn scale_by_spectrum<T: Real>(
        &self,
        x: MatrixMut<'_, T>,
        spectrum: &Spectrum,
        power: f64,
    ) -> Result<()>;

    /// The diagonal of each of these matrices of one size, on the host.
    fn diagonals<T: Real>(&self, x: &[Matrix<'_, T>]) -> Result<Vec<Vec<f64>>>;

    /// The diagonal, on the host.
    fn diagonal<T: Real>(&self, x: Matrix<'_, T>) -> Result<Vec<f64>> {
        Ok(self.diagonals(&[x])?.into_iter().flatten().collect())
    }

    /// Writes the sum of the Kronecker products `G_k (x) A_k`.
    fn dense_kronecker<T: Real>(&self, terms: &[Term<'_, T>], out: MatrixMut<'_, T>) -> Result<()>;

    /// Writes the entries of the spectrum.
    fn write_spectrum<T: Real>(&self, spectrum: &Spectrum, out: MatrixMut<'_, T>) -> Result<()>;

    /// [`Error::NonFinite`] if any element of these matrices of one size is NaN or infinite, with
    /// the name of its matrix.
    fn check_finite<T: Real>(
        &self,
        x: &[Matrix<'_, T>],
        name: &dyn Fn(usize) -> String,
    ) -> Result<()>;
}

fn expect_single<M>(mut matrices: Vec<M>, shape: &[usize]) -> Result<M> {
    match (shape.len(), matrices.pop()) {
        (2, Some(matrix)) => Ok(matrix),
        _ => Err(Error::Shape(format!(
            "expected a matrix, got shape {shape:?}"
        ))),
    }
}
