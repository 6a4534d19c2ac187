//! The nearest sum of fewer Kronecker products.

use super::decomposition::decompose;
use super::sum::KroneckerSum;
use crate::backend::Backend;
use crate::backend::dispatch::{host, on_device};
use crate::element::{Real, with_real};
use crate::error::{Error, Result};
use crate::matrix::{HostMatrix, Matrix, MatrixMut, Storage};
use crate::spectrum::Spectrum;
use crate::terms::Term;
use crate::view::TensorViewMut;

impl KroneckerSum<'_> {
    /// Writes the sum of `out.len()` Kronecker products nearest in Frobenius norm and returns the
    /// relative error left.
    ///
    /// Rearranged, `sum_k vec(G_k) vec(A_k)^T` is a matrix of rank at most the number of terms,
    /// and its truncated singular value decomposition (Van Loan and Pitsianis 1993) is the
    /// optimum; it lives in the span of the factors, so only matrices of the number of terms are
    /// decomposed. The first product is positive semi-definite if all terms are; **later ones may
    /// be indefinite**. Products beyond the number of terms are zero. Groups are independent of one
    /// another.
    pub fn compress(&self, out: &mut [(TensorViewMut<'_>, TensorViewMut<'_>)]) -> Result<f64> {
        if out.is_empty() {
            return Err(Error::Option(
                "compression needs at least one term to write to".to_owned(),
            ));
        }
        for (index, (a, g)) in out.iter().enumerate() {
            let (term_a, term_g) = &self.terms[0];
            for (name, factor, like) in [("A", a, term_a), ("G", g, term_g)] {
                let name = format!("{name} of output {index}");
                if factor.shape() != like.shape() {
                    return Err(Error::Shape(format!(
                        "{name} must be {:?}, got shape {:?}",
                        like.shape(),
                        factor.shape()
                    )));
                }
                self.check_dtypes(&[(&name, factor.dtype())])?;
            }
        }
        on_device!(self.place(), backend => with_real!(self.dtype(), T => {
            let groups = self.finite_by_group::<_, T>(backend)?;
            let truncations = groups.iter().map(|group| truncate(backend, &group.terms));
            let truncations = truncations.collect::<Result<Vec<_>>>()?;
            for (index, (a, g)) in out.iter_mut().enumerate() {
                let targets_a = backend.matrices_mut::<T>(a)?.into_iter();
                let targets = targets_a.zip(backend.matrices_mut::<T>(g)?);
                for ((group, truncation), (a, g)) in groups.iter().zip(&truncations).zip(targets) {
                    truncation.write(backend, &group.terms, index, a, g)?;
                }
            }
            Ok(relative_error(&truncations, out.len()))
        }))
    }
}

/// Singular triplets of the rearranged sum, in coordinates of the given factors.
struct Truncation {
    /// In descending order.
    singular: Vec<f64>,
    /// `left[i][k]`: the part of `G_k` in product i; `right` likewise for `A_k`.
    left: Vec<Vec<f64>>,
    right: Vec<Vec<f64>>,
}

fn truncate<B: Backend, T: Real>(backend: &B, pairs: &[Term<'_, T>]) -> Result<Truncation> {
    let count = pairs.len();
    // Terms of unit length each side, so that weak terms do not drown in the rounding of strong
    // ones; the lengths go back in at the end.
    let length = |x| -> Result<f64> { Ok(backend.dot(x, x)?.sqrt()) };
    let lengths = pairs.iter().map(|&(a, g)| Ok([length(a)?, length(g)?]));
    let lengths: Vec<[f64; 2]> = lengths.collect::<Result<_>>()?;
    let unit = |length: f64| if length > 0.0 { length.recip() } else { 0.0 };
    let gram = |factors: &[Matrix<'_, T>], which: usize| -> Result<HostMatrix<f64>> {
        let mut gram = HostMatrix::zeros(count, count);
        for k in 0..count {
            for l in 0..count {
                let scale = unit(lengths[k][which]) * unit(lengths[l][which]);
                gram[(k, l)] = backend.dot(factors[k], factors[l])? * scale;
            }
        }
        Ok(gram)
    };
    // Weights of the normalised terms, moved into the side of G.
    let weights: Vec<f64> = lengths.iter().map(|[a, g]| a * g).collect();
    let (factors_a, factors_g): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
    let gram_a = gram(&factors_a, 0)?;
    let gram_g = gram(&factors_g, 1)?;
    let gram_g = HostMatrix::from_fn(count, count, |k, l| {
        weights[k] * gram_g[(k, l)] * weights[l]
    });

    // With gram_a = U diag(s) U^T, the columns of [vec A] U diag(s)^-1/2 are orthonormal.
    let host = host();
    let (s, u) = decompose(&*host, gram_a.view())?;
    let floor = f64::EPSILON * count as f64 * s[count - 1].max(0.0);
    let kept: Vec<usize> = (0..count).filter(|&index| s[index] > floor).collect();
    let root = HostMatrix::from_fn(count, kept.len(), |k, j| {
        u[(k, kept[j])] * s[kept[j]].sqrt()
    });
    let mut half = HostMatrix::<f64>::zeros(count, kept.len());
    let mut small = HostMatrix::<f64>::zeros(kept.len(), kept.len());
    host.gemm(half.view_mut(), false, gram_g.view(), root.view(), 1.0)?;
    host.gemm(
        small.view_mut(),
        false,
        root.view().transpose(),
        half.view(),
        1.0,
    )?;
    let (squares, w) = if kept.is_empty() {
        (Vec::new(), small)
    } else {
        decompose(&*host, small.view())?
    };

    let mut truncation = Truncation {
        singular: Vec::new(),
        left: Vec::new(),
        right: Vec::new(),
    };
    for index in (0..kept.len()).rev() {
        let coordinates = |k: usize, power: f64| -> f64 {
            let sum = kept.iter().enumerate();
            sum.map(|(j, &column)| u[(k, column)] * s[column].powf(power) * w[(j, index)])
                .sum()
        };
        let left = (0..count).map(|k| coordinates(k, 0.5) * lengths[k][0]);
        let right = (0..count).map(|k| coordinates(k, -0.5) * unit(lengths[k][0]));
        truncation.singular.push(squares[index].max(0.0).sqrt());
        truncation.left.push(left.collect());
        truncation.right.push(right.collect());
    }
    Ok(truncation)
}

impl Truncation {
    /// Writes product `index`, its weight shared equally by both factors and the trace of A not
    /// negative.
    fn write<B: Backend, T: Real>(
        &self,
        backend: &B,
        pairs: &[Term<'_, T>],
        index: usize,
        mut a: MatrixMut<'_, T>,
        mut g: MatrixMut<'_, T>,
    ) -> Result<()> {
        backend.write_spectrum(&Spectrum::default(), a.as_mut())?;
        backend.write_spectrum(&Spectrum::default(), g.as_mut())?;
        let Some(&singular) = self.singular.get(index).filter(|&&singular| singular > 0.0) else {
            return Ok(());
        };
        let (left, right) = (&self.left[index], &self.right[index]);
        let mut trace = 0.0;
        for (&(a, _), part) in pairs.iter().zip(right) {
            trace += part * backend.diagonal(a)?.iter().sum::<f64>();
        }
        let share = singular.sqrt() * if trace < 0.0 { -1.0 } else { 1.0 };
        for (k, &(term_a, term_g)) in pairs.iter().enumerate() {
            backend.add_scaled(right[k] * share, term_a, a.as_mut())?;
            backend.add_scaled(left[k] / share, term_g, g.as_mut())?;
        }
        Ok(())
    }
}

/// The error of keeping this many products of every group, relative to the whole.
fn relative_error(groups: &[Truncation], kept: usize) -> f64 {
    let square = |values: &[f64]| values.iter().fold(0.0, |sum, value| sum + value * value);
    let (mut left_out, mut whole) = (0.0, 0.0);
    for Truncation { singular, .. } in groups {
        left_out += square(&singular[kept.min(singular.len())..]);
        whole += square(singular);
    }
    if whole == 0.0 {
        0.0
    } else {
        (left_out / whole).sqrt()
    }
}
