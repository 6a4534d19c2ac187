//! Operators that are diagonal in a known basis, and functions of them.

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::matrix::Storage;
use crate::spectrum::Spectrum;

/// Which function of an operator is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Map {
    /// `H^-1`.
    Inverse,
    /// A root R of the inverse, `R R^T = H^-1`.
    InverseRoot,
}

/// An operator H with `P^T H P` diagonal, where `P = P_G (x) P_A`.
pub(super) struct DiagonalInBasis<B: Backend> {
    pub(super) basis_a: B::Matrix<f64>,
    pub(super) basis_g: B::Matrix<f64>,
    pub(super) spectrum: Spectrum,
    /// `log |det P_A|` and `log |det P_G|`.
    pub(super) log_volumes: [f64; 2],
}

impl<B: Backend> DiagonalInBasis<B> {
    /// An operator that is diagonal, or is to be treated as if it were, in an orthonormal basis.
    pub(super) fn orthonormal(
        basis_a: B::Matrix<f64>,
        basis_g: B::Matrix<f64>,
        spectrum: Spectrum,
    ) -> Self {
        Self {
            basis_a,
            basis_g,
            spectrum,
            log_volumes: [0.0; 2],
        }
    }

    /// (D, K).
    pub(super) fn size(&self) -> (usize, usize) {
        (self.basis_g.view().rows(), self.basis_a.view().rows())
    }

    fn entries(&self) -> impl Iterator<Item = f64> {
        let (outputs, inputs) = self.size();
        (0..outputs).flat_map(move |i| (0..inputs).map(move |j| self.spectrum.at(i, j)))
    }

    /// Fails unless every entry of the spectrum is positive beyond rounding.
    pub(super) fn expect_positive(&self) -> Result<()> {
        let (smallest, largest) = self
            .entries()
            .fold((f64::INFINITY, 0.0f64), |(smallest, largest), entry| {
                (smallest.min(entry), largest.max(entry.abs()))
            });
        let (outputs, inputs) = self.size();
        if smallest > f64::EPSILON * outputs.max(inputs) as f64 * largest {
            Ok(())
        } else {
            Err(Error::Numerical(format!(
                "the sum is singular or indefinite (eigenvalues in the diagonalising basis from \
                 {smallest:.3e} to {largest:.3e}): add damping"
            )))
        }
    }

    /// A new matrix, the function of the operator applied to V.
    pub(super) fn apply(
        &self,
        backend: &B,
        v: &B::Matrix<f64>,
        map: Map,
    ) -> Result<B::Matrix<f64>> {
        let (outputs, inputs) = self.size();
        let mut half = backend.zeros::<f64>(outputs, inputs)?;
        let mut full = backend.zeros::<f64>(outputs, inputs)?;
        let (a, g) = (self.basis_a.view(), self.basis_g.view());
        if map == Map::Inverse {
            backend.gemm(half.view_mut(), false, g.transpose(), v.view(), 1.0)?;
            backend.gemm(full.view_mut(), false, half.view(), a, 1.0)?;
            backend.scale_by_spectrum(full.view_mut(), &self.spectrum, -1.0)?;
        } else {
            backend.copy(v.view(), full.view_mut())?;
            backend.scale_by_spectrum(full.view_mut(), &self.spectrum, -0.5)?;
        }
        backend.gemm(half.view_mut(), false, g, full.view(), 1.0)?;
        backend.gemm(full.view_mut(), false, half.view(), a.transpose(), 1.0)?;
        Ok(full)
    }

    /// The natural logarithm of the determinant.
    pub(super) fn logdet(&self) -> f64 {
        let (outputs, inputs) = self.size();
        let [volume_a, volume_g] = self.log_volumes;
        let volumes = outputs as f64 * volume_a + inputs as f64 * volume_g;
        self.entries().map(f64::ln).sum::<f64>() - 2.0 * volumes
    }
}

/// Fails unless the damping is one.
pub(super) fn check_damping(damping: f64) -> Result<()> {
    if damping.is_finite() && damping >= 0.0 {
        Ok(())
    } else {
        Err(Error::Option(format!(
            "damping must be finite and not negative, got {damping}"
        )))
    }
}
