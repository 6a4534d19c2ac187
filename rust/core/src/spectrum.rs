//! Spectra of sums of Kronecker products whose terms are diagonal in one basis.

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
