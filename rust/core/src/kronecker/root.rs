//! A square root of a sum of Kronecker products, to draw samples with it as covariance.

use super::{Group, KroneckerSum};
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, Storage};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::view::{Dtype, Real, TensorView, TensorViewMut};

/// Symmetric roots of all factors: one independent draw of noise per term goes through them, and
/// the sum over terms has covariance `sum_k G_k (x) A_k`.
pub struct KroneckerRoot {
    terms: usize,
    inputs: usize,
    outputs: usize,
    roots: Roots,
}

/// The roots of the terms of each group.
enum Roots {
    Single(Vec<Vec<Root<f32>>>),
    Double(Vec<Vec<Root<f64>>>),
}

/// Roots of (A, G).
type Root<T> = (<Cpu as Backend>::Matrix<T>, <Cpu as Backend>::Matrix<T>);

impl KroneckerRoot {
    /// Takes the roots of all factors, in double precision.
    ///
    /// # Errors
    ///
    /// [`Error::Numerical`] if a factor has an eigenvalue that is negative beyond rounding.
    pub fn new(sum: &KroneckerSum<'_>, cancel: &Cancel) -> Result<Self> {
        let cpu = Cpu::current();
        let roots = match sum.dtype {
            Dtype::Float32 => Roots::Single(roots(&cpu, sum, cancel)?),
            _ => Roots::Double(roots(&cpu, sum, cancel)?),
        };
        Ok(Self {
            terms: sum.len(),
            inputs: sum.inputs,
            outputs: sum.outputs,
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
        match &self.roots {
            Roots::Single(roots) => apply(&Cpu::current(), roots, noise, out, cancel),
            Roots::Double(roots) => apply(&Cpu::current(), roots, noise, out, cancel),
        }
    }
}

fn roots<T: Real>(cpu: &Cpu, sum: &KroneckerSum<'_>, cancel: &Cancel) -> Result<Vec<Vec<Root<T>>>> {
    let of_group = |(index, group): (usize, &Group<'_, T>)| {
        let place = sum.name_of_group(index);
        let of_term = |(term, &(a, g))| {
            cancel.check()?;
            let root_a = root(cpu, a, &format!("A of term {term}{place}"))?;
            Ok((root_a, root(cpu, g, &format!("G of term {term}{place}"))?))
        };
        group.terms.iter().enumerate().map(of_term).collect()
    };
    let groups = sum.finite_by_group::<T>(cpu)?;
    groups.iter().enumerate().map(of_group).collect()
}

/// The symmetric root: unlike eigenvectors it does not depend on signs or on the order within
/// equal eigenvalues, so equal noise gives equal samples everywhere.
fn root<B: Backend, T: Real>(
    backend: &B,
    x: faer::MatRef<'_, T>,
    name: &str,
) -> Result<B::Matrix<T>> {
    let size = x.nrows();
    let wide = super::widen(backend, x);
    let mut vectors = backend.zeros::<f64>(size, size);
    let values = backend.eigh(wide.view(), vectors.view_mut())?;
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
    let scale = crate::backend::Spectrum {
        constant: 0.0,
        pairs: vec![(vec![1.0; size], fourth_roots)],
    };
    backend.scale_by_spectrum(vectors.view_mut(), &scale, 1.0);
    let mut root = backend.zeros::<f64>(size, size);
    let scaled = vectors.view();
    backend.gemm(root.view_mut(), false, scaled, scaled.transpose(), 1.0);
    let mut narrow = backend.zeros::<T>(size, size);
    backend.copy(root.view(), narrow.view_mut());
    Ok(narrow)
}

fn apply<T: Real>(
    cpu: &Cpu,
    groups: &[Vec<Root<T>>],
    noise: &TensorView<'_>,
    out: &mut TensorViewMut<'_>,
    cancel: &Cancel,
) -> Result<()> {
    let noise = noise.matrices::<T>()?;
    let out = out.matrices::<T>()?;
    for (noise, mut out) in noise.chunks(groups[0].len()).zip(out) {
        let height = out.nrows() / groups.len();
        let mut half = cpu.zeros::<T>(height, out.ncols());
        for (group, roots) in groups.iter().enumerate() {
            cancel.check()?;
            let start = group * height;
            let mut out = out.as_mut().subrows_mut(start, height);
            for (index, (noise, (a, g))) in noise.iter().zip(roots).enumerate() {
                let noise = noise.subrows(start, height);
                cpu.gemm(half.view_mut(), false, g.view(), noise, 1.0);
                cpu.gemm(out.as_mut(), index > 0, half.view(), a.view(), 1.0);
            }
        }
    }
    Ok(())
}
