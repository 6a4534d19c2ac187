//! A square root of a sum of Kronecker products, to draw samples with it as covariance.

use super::decomposition::{decompose, widen};
use super::kept::{Keep, Kept};
use super::sum::KroneckerSum;
use crate::backend::Backend;
use crate::backend::dispatch::on_device;
use crate::cancel::Cancel;
use crate::element::{Real, with_real};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, MatrixMut, Storage};
use crate::spectrum::Spectrum;
use crate::view::{TensorView, TensorViewMut};

/// Symmetric roots of all factors: one independent draw of noise per term goes through them, and
/// the sum over terms has covariance `sum_k G_k (x) A_k`.
pub struct KroneckerRoot {
    terms: usize,
    inputs: usize,
    outputs: usize,
    roots: Kept<(), ()>,
}

impl KroneckerRoot {
    /// Takes the roots.
    ///
    /// # Errors
    ///
    /// [`Error::Numerical`] if a factor has an eigenvalue negative beyond rounding.
    pub fn new(sum: &KroneckerSum<'_>, cancel: &Cancel) -> Result<Self> {
        let roots = on_device!(sum.place(), backend => with_real!(sum.dtype(), T => {
            Roots::<_, T>::take(backend, sum, cancel)
        }))?;
        Ok(Self {
            terms: sum.len(),
            inputs: sum.inputs(),
            outputs: sum.outputs(),
            roots,
        })
    }

    /// Number of terms.
    pub fn len(&self) -> usize {
        self.terms
    }

    /// Whether there is no term; never true.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Maps standard normal `noise` of shape `[n, terms, D, K]` to samples `[n, D, K]`.
    pub fn apply(
        &self,
        noise: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        cancel: &Cancel,
    ) -> Result<()> {
        let (terms, outputs, inputs) = (self.len(), self.outputs, self.inputs);
        let samples = noise.shape().first().copied().unwrap_or(0);
        if noise.shape() != [samples, terms, outputs, inputs] {
            return Err(Error::Shape(format!(
                "noise must be [n, {terms}, {outputs}, {inputs}], got shape {:?}",
                noise.shape()
            )));
        }
        if out.shape() != [samples, outputs, inputs] {
            return Err(Error::Shape(format!(
                "out must be [{samples}, {outputs}, {inputs}], got shape {:?}",
                out.shape()
            )));
        }
        self.roots.apply(noise, out, (), cancel)
    }
}

/// Roots of a term (A, G).
type Root<B, T> = (<B as Backend>::Matrix<T>, <B as Backend>::Matrix<T>);

/// Roots of the terms of each group.
struct Roots<B: Backend, T: Real> {
    groups: Vec<Vec<Root<B, T>>>,
}

impl<B: Backend + 'static, T: Real> Roots<B, T> {
    fn take(backend: &B, sum: &KroneckerSum<'_>, cancel: &Cancel) -> Result<Kept<(), ()>> {
        let mut groups = Vec::with_capacity(sum.groups());
        for (index, group) in sum.finite_by_group::<B, T>(backend)?.iter().enumerate() {
            let place = sum.name_of_group(index);
            let of_term = |(term, &(a, g))| {
                cancel.check()?;
                let root_a = root(backend, a, &format!("A of term {term}{place}"))?;
                Ok((
                    root_a,
                    root(backend, g, &format!("G of term {term}{place}"))?,
                ))
            };
            let roots = group.terms.iter().enumerate().map(of_term);
            groups.push(roots.collect::<Result<_>>()?);
        }
        Kept::new(Self { groups }, backend, sum.place())
    }
}

impl<B: Backend + 'static, T: Real> Keep for Roots<B, T> {
    type On = B;
    type Task = ();
    type Answer = ();

    fn apply(
        &self,
        backend: &B,
        noise: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        (): (),
        cancel: &Cancel,
    ) -> Result<()> {
        let noise = backend.matrices::<T>(noise)?;
        let out = backend.matrices_mut::<T>(out)?;
        let mut draws = noise.chunks(self.groups[0].len()).zip(out);
        draws.try_for_each(|(noise, out)| self.apply_once(backend, noise, out, cancel))
    }
}

impl<B: Backend, T: Real> Roots<B, T> {
    /// One sample, from noise for each term.
    fn apply_once(
        &self,
        backend: &B,
        noise: &[Matrix<'_, T>],
        mut out: MatrixMut<'_, T>,
        cancel: &Cancel,
    ) -> Result<()> {
        let height = out.rows() / self.groups.len();
        let mut half = backend.zeros::<T>(height, out.columns())?;
        for (group, roots) in self.groups.iter().enumerate() {
            cancel.check()?;
            let start = group * height;
            let mut out = out.as_mut().subrows(start, height);
            for (index, (noise, (a, g))) in noise.iter().zip(roots).enumerate() {
                let noise = noise.subrows(start, height);
                backend.gemm(half.view_mut(), false, g.view(), noise, 1.0)?;
                backend.gemm(out.as_mut(), index > 0, half.view(), a.view(), 1.0)?;
            }
        }
        Ok(())
    }
}

/// The symmetric root: unlike eigenvectors it does not depend on signs or on the order within
/// equal eigenvalues, so equal noise gives equal samples everywhere.
fn root<B: Backend, T: Real>(backend: &B, x: Matrix<'_, T>, name: &str) -> Result<B::Matrix<T>> {
    let size = x.rows();
    let wide = widen(backend, x)?;
    let (values, mut vectors) = decompose(backend, wide.view())?;
    let (smallest, largest) = (values[0], values[size - 1].abs());
    if smallest < -T::EPSILON * size.max(100) as f64 * largest {
        return Err(Error::Numerical(format!(
            "{name} is not positive semi-definite: its eigenvalues reach from {smallest:.3e} to \
             {largest:.3e}"
        )));
    }
    let fourth_roots: Vec<f64> = values
        .iter()
        .map(|value| value.max(0.0).powf(0.25))
        .collect();
    let scale = Spectrum {
        constant: 0.0,
        pairs: vec![(vec![1.0; size], fourth_roots)],
    };
    backend.scale_by_spectrum(vectors.view_mut(), &scale, 1.0)?;
    let mut root = backend.zeros::<f64>(size, size)?;
    let scaled = vectors.view();
    backend.gemm(root.view_mut(), false, scaled, scaled.transpose(), 1.0)?;
    let mut narrow = backend.zeros::<T>(size, size)?;
    backend.copy(root.view(), narrow.view_mut())?;
    Ok(narrow)
}
