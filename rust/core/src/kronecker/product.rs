//! What a sum of Kronecker products is to vectors and to other sums: products, forms, entries.

use super::sum::{KroneckerSum, check_like_v, check_stack};
use crate::backend::Backend;
use crate::backend::dispatch::on_device;
use crate::cancel::Cancel;
use crate::element::{Real, with_real};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Storage};
use crate::spectrum::Spectrum;
use crate::terms::{Group, Term};
use crate::view::{TensorView, TensorViewMut};

impl KroneckerSum<'_> {
    /// `out = sum_k G_k V A_k + damping * V` for V of shape `[D, K]` or `[S, D, K]`.
    pub fn product(
        &self,
        v: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        damping: f64,
        cancel: &Cancel,
    ) -> Result<()> {
        check_stack("v", v.shape(), self.outputs(), self.inputs())?;
        check_like_v(v.shape(), out.shape())?;
        self.check_dtypes(&[("v", v.dtype()), ("out", out.dtype())])?;
        on_device!(self.place(), backend => with_real!(self.dtype(), T => {
            let (v, mut out) = (backend.matrices::<T>(v)?, backend.matrices_mut::<T>(out)?);
            for group in self.by_group::<_, T>(backend)? {
                let v: Vec<_> = v.iter().map(|&v| group.of(v)).collect();
                let out = out.iter_mut().map(|out| group.of_mut(out.as_mut())).collect();
                backend.kronecker_product(&group.terms, &v, out, damping, cancel)?;
            }
            Ok(())
        }))
    }

    /// `sum_k <V, G_k V A_k>`, summed over the stack if V is `[S, D, K]`.
    pub fn quadratic(&self, v: &TensorView<'_>, cancel: &Cancel) -> Result<f64> {
        check_stack("v", v.shape(), self.outputs(), self.inputs())?;
        self.check_dtypes(&[("v", v.dtype())])?;
        on_device!(self.place(), backend => with_real!(self.dtype(), T => {
            let v = backend.matrices::<T>(v)?;
            let mut total = 0.0;
            for group in self.by_group::<_, T>(backend)? {
                for &v in &v {
                    total += quadratic(backend, &group.terms, group.of(v), cancel)?;
                }
            }
            Ok(total)
        }))
    }

    /// The Frobenius inner product with another sum of the same sizes.
    pub fn inner(&self, other: &KroneckerSum<'_>) -> Result<f64> {
        let sizes = |sum: &KroneckerSum<'_>| (sum.groups(), sum.outputs(), sum.inputs());
        if sizes(self) != sizes(other) {
            return Err(Error::Shape(format!(
                "both sums must have the same groups, D and K, got {:?} and {:?}",
                sizes(self),
                sizes(other)
            )));
        }
        self.check_dtypes(&[("the other sum", other.dtype())])?;
        on_device!(self.place(), backend => with_real!(self.dtype(), T => {
            let groups = self.by_group::<_, T>(backend)?;
            let others = other.by_group::<_, T>(backend)?;
            let pairs = groups.iter().zip(&others);
            pairs.map(|(group, other)| inner(backend, &group.terms, &other.terms)).sum()
        }))
    }

    /// The trace, `sum_k tr(A_k) tr(G_k)` of every group.
    pub fn trace(&self) -> Result<f64> {
        on_device!(self.place(), backend => with_real!(self.dtype(), T => {
            let traces = |x| -> Result<Vec<f64>> {
                let diagonals = backend.diagonals(&backend.matrices::<T>(x)?)?;
                Ok(diagonals.iter().map(|diagonal| diagonal.iter().sum()).collect())
            };
            let mut total = 0.0;
            for (a, g) in &self.terms {
                let pairs = traces(a)?.into_iter().zip(traces(g)?);
                total += pairs.map(|(a, g)| a * g).sum::<f64>();
            }
            Ok(total)
        }))
    }

    /// Writes the diagonal as a `[D, K]` matrix.
    pub fn diagonal(&self, out: &mut TensorViewMut<'_>) -> Result<()> {
        self.check_shape("out", out.shape(), [self.outputs(), self.inputs()])?;
        self.check_dtypes(&[("out", out.dtype())])?;
        on_device!(self.place(), backend => with_real!(self.dtype(), T => {
            let mut out = backend.matrix_mut::<T>(out)?;
            for group in self.by_group::<_, T>(backend)? {
                let terms = group.terms.iter();
                let pairs = terms.map(|&(a, g)| Ok((backend.diagonal(g)?, backend.diagonal(a)?)));
                let diagonal = Spectrum { constant: 0.0, pairs: pairs.collect::<Result<_>>()? };
                backend.write_spectrum(&diagonal, group.of_mut(out.as_mut()))?;
            }
            Ok(())
        }))
    }

    /// Writes the whole `[D K, D K]` matrix; row and column indices are `d * K + k`. It is zero
    /// between rows of different groups.
    pub fn dense(&self, out: &mut TensorViewMut<'_>) -> Result<()> {
        let size = self.outputs() * self.inputs();
        self.check_shape("out", out.shape(), [size, size])?;
        self.check_dtypes(&[("out", out.dtype())])?;
        on_device!(self.place(), backend => with_real!(self.dtype(), T => {
            let mut out = backend.matrix_mut::<T>(out)?;
            let groups = self.by_group::<_, T>(backend)?;
            if groups.len() > 1 {
                backend.write_spectrum(&Spectrum::default(), out.as_mut())?;
            }
            for Group { rows, terms } in groups {
                let (start, size) = (rows.start * self.inputs(), rows.len() * self.inputs());
                let block = out.as_mut().subrows(start, size).subcolumns(start, size);
                backend.dense_kronecker(&terms, block)?;
            }
            Ok(())
        }))
    }
}

fn quadratic<B: Backend, T: Real>(
    backend: &B,
    terms: &[Term<'_, T>],
    v: Matrix<'_, T>,
    cancel: &Cancel,
) -> Result<f64> {
    let mut product = backend.zeros::<T>(v.rows(), v.columns())?;
    backend.kronecker_product(terms, &[v], vec![product.view_mut()], 0.0, cancel)?;
    backend.dot(v, product.view())
}

fn inner<B: Backend, T: Real>(
    backend: &B,
    terms: &[Term<'_, T>],
    others: &[Term<'_, T>],
) -> Result<f64> {
    let product = |&(a, g): &Term<'_, T>, &(other_a, other_g): &Term<'_, T>| {
        Ok(backend.dot(a, other_a)? * backend.dot(g, other_g)?)
    };
    terms
        .iter()
        .flat_map(|term| others.iter().map(move |other| product(term, other)))
        .sum()
}
