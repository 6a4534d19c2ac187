//! What a device must be able to do.
//!
//! Matrix views are pointer, shape and strides; on a backend other than the CPU the pointer is the
//! device's and nothing outside the backend may follow it. Operations on a GPU are queued on a
//! stream, and need not be done when they return.

use std::ops::Deref;

use faer::{MatMut, MatRef};

use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::gram::{GramTask, Units};
use crate::kronecker::Group;
use crate::view::{Device, Place, Real, TensorView, TensorViewMut};

pub mod cpu;
pub mod cuda;

/// A matrix that a backend allocated.
pub trait Storage<T: Real> {
    /// Borrows the matrix.
    fn view(&self) -> MatRef<'_, T>;
    /// Borrows the matrix to write to it.
    fn view_mut(&mut self) -> MatMut<'_, T>;
}

/// Which operand of a triangular solve is meant: `L` or its transpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Triangle {
    /// The lower triangle as stored.
    Lower,
    /// The transpose of the lower triangle.
    LowerTransposed,
}

/// Entry (i, j) is `constant + sum_k left_k[i] * right_k[j]`: the spectrum of a sum of Kronecker
/// products in a basis that diagonalises all of them.
#[derive(Debug, Clone, Default)]
pub struct Spectrum {
    /// Added to every entry.
    pub constant: f64,
    /// Pairs of (row values, column values).
    pub pairs: Vec<(Vec<f64>, Vec<f64>)>,
}

impl Spectrum {
    /// The entry in row `i` and column `j`.
    pub fn at(&self, i: usize, j: usize) -> f64 {
        let products = self.pairs.iter().map(|(left, right)| left[i] * right[j]);
        self.constant + products.sum::<f64>()
    }
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

    /// As [`Self::at`], for [`Self::apply_packed`] alone, which a CUDA graph may capture.
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
    fn matrices<'a, T: Real>(&self, x: &TensorView<'a>) -> Result<Vec<MatRef<'a, T>>> {
        x.layout().expect_device(self.device())?;
        x.matrices()
    }

    /// The matrices of a tensor on this device, to be written to.
    fn matrices_mut<'a, T: Real>(
        &self,
        x: &'a mut TensorViewMut<'_>,
    ) -> Result<Vec<MatMut<'a, T>>> {
        x.layout().expect_device(self.device())?;
        x.matrices()
    }

    /// A tensor of two dimensions as a matrix.
    fn matrix<'a, T: Real>(&self, x: &TensorView<'a>) -> Result<MatRef<'a, T>> {
        expect_single(self.matrices(x)?, x.shape())
    }

    /// A tensor of two dimensions as a matrix, to be written to.
    fn matrix_mut<'a, T: Real>(&self, x: &'a mut TensorViewMut<'_>) -> Result<MatMut<'a, T>> {
        let shape = x.shape().to_vec();
        expect_single(self.matrices_mut(x)?, &shape)
    }

    /// A matrix of zeros.
    fn zeros<T: Real>(&self, rows: usize, columns: usize) -> Result<Self::Matrix<T>>;

    /// Copies a matrix from host memory.
    fn upload<T: Real>(&self, host: MatRef<'_, T>) -> Result<Self::Matrix<T>>;

    /// Copies, rounding or widening where the types differ.
    fn copy<S: Real, T: Real>(&self, from: MatRef<'_, S>, to: MatMut<'_, T>) -> Result<()>;

    /// For each stratum, adds its weighted sums of squares and products to the lower triangles of
    /// the matching outputs, one for each group of consecutive features; what is above them is
    /// left undefined. Non-finite input is reported before any output changes.
    fn accumulate_gram<T: Real>(
        &self,
        units: &Units<'_>,
        out: Vec<Vec<MatMut<'_, T>>>,
        task: &GramTask,
        cancel: &Cancel,
    ) -> Result<()>;

    /// Copies the lower triangle of each matrix to the upper one.
    fn symmetrize<T: Real>(&self, x: Vec<MatMut<'_, T>>) -> Result<()>;

    /// For each of these matrices of one size, eigenvalues in ascending order and eigenvectors as
    /// columns; reads the lower triangles only.
    fn eigh<T: Real>(
        &self,
        x: &[MatRef<'_, T>],
        vectors: Vec<MatMut<'_, T>>,
    ) -> Result<Vec<Vec<f64>>>;

    /// Replaces the lower triangle by its Cholesky factor and zeroes the strict upper one, or
    /// returns the index of the first pivot that is not positive.
    fn cholesky<T: Real>(&self, x: MatMut<'_, T>) -> Result<Option<usize>>;

    /// Overwrites `x` with the solution of a triangular system.
    fn solve_triangular<T: Real>(
        &self,
        l: MatRef<'_, T>,
        triangle: Triangle,
        x: MatMut<'_, T>,
    ) -> Result<()>;

    /// `out = keep * out + alpha * a * b`, where `keep` is 1 or 0.
    fn gemm<T: Real>(
        &self,
        out: MatMut<'_, T>,
        keep: bool,
        a: MatRef<'_, T>,
        b: MatRef<'_, T>,
        alpha: f64,
    ) -> Result<()>;

    /// `out_s = sum_k G_k V_s A_k + damping * V_s` for every matrix of the stack; terms are
    /// (A, G).
    fn kronecker_product<T: Real>(
        &self,
        terms: &[(MatRef<'_, T>, MatRef<'_, T>)],
        v: &[MatRef<'_, T>],
        out: Vec<MatMut<'_, T>>,
        damping: f64,
        cancel: &Cancel,
    ) -> Result<()>;

    /// Packs the terms of all groups.
    fn pack<T: Real>(&self, groups: &[Group<'_, T>]) -> Result<Self::Packed<T>>;

    /// Writes the product with V; returns its inner product with V where that is at hand, and
    /// nothing where it would have to be waited for.
    fn apply_packed<T: Real>(
        &self,
        packed: &Self::Packed<T>,
        v: MatRef<'_, T>,
        out: MatMut<'_, T>,
    ) -> Result<Option<f64>>;

    /// Floating-point operations of one product with a packed sum.
    fn packed_flops<T: Real>(packed: &Self::Packed<T>) -> usize;

    /// The sum of the elementwise product, accumulated in double precision.
    fn dot<T: Real>(&self, a: MatRef<'_, T>, b: MatRef<'_, T>) -> Result<f64>;

    /// The inner product of each column of one matrix with that of the other.
    fn column_dots<T: Real>(&self, a: MatRef<'_, T>, b: MatRef<'_, T>) -> Result<Vec<f64>>;

    /// `y += alpha * x`.
    fn add_scaled<T: Real>(&self, alpha: f64, x: MatRef<'_, T>, y: MatMut<'_, T>) -> Result<()>;

    /// Multiplies each element by the matching entry of the spectrum to the given power.
    fn scale_by_spectrum<T: Real>(
        &self,
        x: MatMut<'_, T>,
        spectrum: &Spectrum,
        power: f64,
    ) -> Result<()>;

    /// The diagonal of each of these matrices of one size, on the host.
    fn diagonals<T: Real>(&self, x: &[MatRef<'_, T>]) -> Result<Vec<Vec<f64>>>;

    /// The diagonal, on the host.
    fn diagonal<T: Real>(&self, x: MatRef<'_, T>) -> Result<Vec<f64>> {
        Ok(self.diagonals(&[x])?.into_iter().flatten().collect())
    }

    /// Writes the sum of the Kronecker products `G_k (x) A_k`.
    fn dense_kronecker<T: Real>(
        &self,
        terms: &[(MatRef<'_, T>, MatRef<'_, T>)],
        out: MatMut<'_, T>,
    ) -> Result<()>;

    /// Writes the entries of the spectrum.
    fn write_spectrum<T: Real>(&self, spectrum: &Spectrum, out: MatMut<'_, T>) -> Result<()>;

    /// [`Error::NonFinite`] if any element of these matrices of one size is NaN or infinite, with
    /// the name of its matrix.
    fn check_finite<T: Real>(
        &self,
        x: &[MatRef<'_, T>],
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

/// Runs a body with the backend for tensors at this place.
macro_rules! on_device {
    ($place:expr, $backend:ident => $body:expr) => {{
        let place: $crate::view::Place = $place;
        match place.device {
            $crate::view::Device::Cpu => {
                let handle = <$crate::backend::cpu::Cpu as $crate::backend::Backend>::at(place)?;
                let $backend = &*handle;
                $body
            }
            $crate::view::Device::Cuda(_) => {
                let handle = <$crate::backend::cuda::Cuda as $crate::backend::Backend>::at(place)?;
                let $backend = &*handle;
                $body
            }
        }
    }};
}
pub(crate) use on_device;
