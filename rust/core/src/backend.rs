//! What a device must be able to do.
//!
//! Matrix views are pointer, shape and strides; on a backend other than the CPU the pointer is the
//! device's and nothing outside the backend may follow it.

use faer::{MatMut, MatRef};

use crate::cancel::Cancel;
use crate::error::Result;
use crate::gram::{StratumWeight, Units};
use crate::view::Real;

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
pub trait Backend: Sync {
    /// Memory of this device.
    type Matrix<T: Real>: Storage<T> + Send + Sync;

    /// A matrix of zeros.
    fn zeros<T: Real>(&self, rows: usize, columns: usize) -> Self::Matrix<T>;

    /// Copies a matrix from host memory.
    fn upload<T: Real>(&self, host: MatRef<'_, T>) -> Self::Matrix<T>;

    /// Copies, rounding or widening where the types differ.
    fn copy<S: Real, T: Real>(&self, from: MatRef<'_, S>, to: MatMut<'_, T>);

    /// For each stratum, adds its weighted sums of squares and products to the lower triangles of
    /// the matching outputs, one for each group of consecutive features. Non-finite input is
    /// reported before any output changes.
    fn accumulate_gram<T: Real>(
        &self,
        units: &Units<'_>,
        out: Vec<Vec<MatMut<'_, T>>>,
        strata: &[StratumWeight],
        append_one: bool,
        cancel: &Cancel,
    ) -> Result<()>;

    /// Copies the lower triangle to the upper one.
    fn symmetrize<T: Real>(&self, x: MatMut<'_, T>);

    /// Eigenvalues in ascending order and eigenvectors as columns; reads the lower triangle only.
    fn eigh<T: Real>(&self, x: MatRef<'_, T>, vectors: MatMut<'_, T>) -> Result<Vec<f64>>;

    /// Replaces the lower triangle by its Cholesky factor and zeroes the strict upper one; the
    /// error is the index of the first pivot that is not positive.
    fn cholesky<T: Real>(&self, x: MatMut<'_, T>) -> Result<(), usize>;

    /// Overwrites `x` with the solution of a triangular system.
    fn solve_triangular<T: Real>(&self, l: MatRef<'_, T>, triangle: Triangle, x: MatMut<'_, T>);

    /// `out = keep * out + alpha * a * b`, where `keep` is 1 or 0.
    fn gemm<T: Real>(
        &self,
        out: MatMut<'_, T>,
        keep: bool,
        a: MatRef<'_, T>,
        b: MatRef<'_, T>,
        alpha: f64,
    );

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

    /// The sum of the elementwise product, accumulated in double precision.
    fn dot<T: Real>(&self, a: MatRef<'_, T>, b: MatRef<'_, T>) -> f64;

    /// `y += alpha * x`.
    fn add_scaled<T: Real>(&self, alpha: f64, x: MatRef<'_, T>, y: MatMut<'_, T>);

    /// Multiplies each element by the matching entry of the spectrum to the given power.
    fn scale_by_spectrum<T: Real>(&self, x: MatMut<'_, T>, spectrum: &Spectrum, power: f64);

    /// The diagonal, on the host.
    fn diagonal<T: Real>(&self, x: MatRef<'_, T>) -> Vec<f64>;

    /// Writes the sum of the Kronecker products `G_k (x) A_k`.
    fn dense_kronecker<T: Real>(
        &self,
        terms: &[(MatRef<'_, T>, MatRef<'_, T>)],
        out: MatMut<'_, T>,
    );

    /// Writes the entries of the spectrum.
    fn write_spectrum<T: Real>(&self, spectrum: &Spectrum, out: MatMut<'_, T>);

    /// [`crate::Error::NonFinite`] naming `what` if any element is NaN or infinite.
    fn check_finite<T: Real>(&self, x: MatRef<'_, T>, what: &str) -> Result<()>;
}
