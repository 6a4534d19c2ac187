//! Dense algebra to compare with, written without regard to speed.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use ekfac_core::element::Element;
use ekfac_core::view::{TensorView, TensorViewMut};
use ndarray::{Array, Array1, Array2, ArrayBase, ArrayView, ArrayViewMut, Data, Dimension};

pub mod strata;

/// Deterministic standard normal numbers.
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d)
    }

    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    pub fn array<D: Dimension>(
        &mut self,
        shape: impl ndarray::ShapeBuilder<Dim = D>,
    ) -> Array<f64, D> {
        Array::from_shape_simple_fn(shape, || self.normal())
    }

    /// A random positive semi-definite matrix of this rank.
    pub fn psd(&mut self, size: usize, rank: usize) -> Array2<f64> {
        let root = self.array((size, rank));
        root.dot(&root.t()) / rank.max(1) as f64
    }
}

pub fn view<T: Element, D: Dimension>(array: ArrayView<'_, T, D>) -> TensorView<'_> {
    TensorView::new(array).unwrap()
}

pub fn view_mut<T: Element, D: Dimension>(array: ArrayViewMut<'_, T, D>) -> TensorViewMut<'_> {
    TensorViewMut::new(array).unwrap()
}

/// The matrix of `V -> G V A` on row-major vectors.
pub fn kronecker(g: &Array2<f64>, a: &Array2<f64>) -> Array2<f64> {
    let (d, k) = (g.nrows(), a.nrows());
    Array2::from_shape_fn((d * k, d * k), |(i, j)| {
        g[(i / k, j / k)] * a[(i % k, j % k)]
    })
}

pub fn norm<S: Data<Elem = f64>, D: Dimension>(x: &ArrayBase<S, D>) -> f64 {
    x.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// Distance relative to the length of `expected`, absolute where that is zero.
pub fn error<D: Dimension>(got: &Array<f64, D>, expected: &Array<f64, D>) -> f64 {
    let length = norm(expected);
    norm(&(got - expected)) / if length > 0.0 { length } else { 1.0 }
}

/// Solves by elimination with pivoting and returns the logarithm of |det| along with it.
pub fn solve(matrix: &Array2<f64>, right: &Array1<f64>) -> (Array1<f64>, f64) {
    let (mut m, mut x, size) = (matrix.clone(), right.clone(), right.len());
    let mut logdet = 0.0;
    for column in 0..size {
        let pivot = (column..size)
            .max_by(|&i, &j| m[(i, column)].abs().total_cmp(&m[(j, column)].abs()))
            .unwrap();
        x.swap(column, pivot);
        for j in 0..size {
            m.swap((column, j), (pivot, j));
        }
        logdet += m[(column, column)].abs().ln();
        for row in column + 1..size {
            let factor = m[(row, column)] / m[(column, column)];
            for j in column..size {
                m[(row, j)] -= factor * m[(column, j)];
            }
            x[row] -= factor * x[column];
        }
    }
    for row in (0..size).rev() {
        let known: f64 = (row + 1..size).map(|j| m[(row, j)] * x[j]).sum();
        x[row] = (x[row] - known) / m[(row, row)];
    }
    (x, logdet)
}

/// The lower triangle mirrored to the upper one.
pub fn mirrored(lower: &Array2<f64>) -> Array2<f64> {
    Array2::from_shape_fn(lower.dim(), |(i, j)| lower[(i.max(j), i.min(j))])
}
