//! A borrowed, checked sum of Kronecker products.

use crate::backend::Backend;
use crate::element::{Dtype, Real};
use crate::error::{Error, Result};
use crate::place::Place;
use crate::terms::Group;
use crate::view::TensorView;

/// A borrowed, checked sum of Kronecker products.
#[derive(Debug, Clone)]
pub struct KroneckerSum<'a> {
    pub(super) terms: Vec<(TensorView<'a>, TensorView<'a>)>,
    groups: usize,
    inputs: usize,
    outputs: usize,
    dtype: Dtype,
    place: Place,
}

impl<'a> KroneckerSum<'a> {
    /// Checks that all terms (A, G) agree in shape, dtype and device.
    pub fn new(terms: Vec<(TensorView<'a>, TensorView<'a>)>) -> Result<Self> {
        let Some((first_a, first_g)) = terms.first() else {
            return Err(Error::Option(
                "a sum of Kronecker products needs at least one term".to_owned(),
            ));
        };
        let (groups, inputs) = first_a.layout().expect_squares("A of term 0")?;
        let (groups_g, outputs) = first_g.layout().expect_squares("G of term 0")?;
        if groups != groups_g || first_a.shape().len() != first_g.shape().len() {
            return Err(Error::Shape(format!(
                "A and G must have the same groups, got shapes {:?} and {:?}",
                first_a.shape(),
                first_g.shape()
            )));
        }
        let dtype = first_a.dtype();
        for (index, (a, g)) in terms.iter().enumerate() {
            for (name, factor, first) in [("A", a, first_a), ("G", g, first_g)] {
                if factor.shape() != first.shape() {
                    return Err(Error::Shape(format!(
                        "{name} of term {index} must be {:?} like that of term 0, got shape {:?}",
                        first.shape(),
                        factor.shape()
                    )));
                }
                if factor.dtype() != dtype {
                    return Err(Error::Dtype(format!(
                        "{name} of term {index} must be {dtype} like the first factor, got {}",
                        factor.dtype()
                    )));
                }
                factor.place().device.expect(first_a.place().device)?;
            }
        }
        Ok(Self {
            groups,
            inputs,
            outputs: groups * outputs,
            dtype,
            place: first_a.place(),
            terms,
        })
    }

    /// Number of terms.
    pub fn len(&self) -> usize {
        self.terms.len()
    }

    /// Whether there is no term; never true of a checked sum.
    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    /// Number of groups of rows of V; 1 where all rows share their terms.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// K, the size of every A.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// D, the size of every G times the number of groups.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// The element type of the factors.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Device and stream of the factors.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Floating-point operations of one product with a single V.
    pub fn flops(&self) -> f64 {
        let (inputs, outputs) = (self.inputs as f64, self.outputs as f64);
        2.0 * inputs * outputs * (inputs + outputs / self.groups as f64) * self.len() as f64
    }

    /// The terms of each group.
    pub(super) fn by_group<B: Backend, T: Real>(&self, backend: &B) -> Result<Vec<Group<'a, T>>> {
        let height = self.outputs / self.groups;
        let group = |index: usize| Group {
            rows: index * height..(index + 1) * height,
            terms: Vec::with_capacity(self.len()),
        };
        let mut groups: Vec<_> = (0..self.groups).map(group).collect();
        for (a, g) in &self.terms {
            let pairs = backend
                .matrices::<T>(a)?
                .into_iter()
                .zip(backend.matrices::<T>(g)?);
            for (group, pair) in groups.iter_mut().zip(pairs) {
                group.terms.push(pair);
            }
        }
        Ok(groups)
    }

    /// The terms, after making sure that decompositions will not meet NaN or infinity.
    pub(super) fn finite_by_group<B: Backend, T: Real>(
        &self,
        backend: &B,
    ) -> Result<Vec<Group<'a, T>>> {
        for (term, (a, g)) in self.terms.iter().enumerate() {
            for (factor, name) in [(a, "A"), (g, "G")] {
                backend.check_finite::<T>(&backend.matrices(factor)?, &|group| {
                    format!("{name} of term {term}{}", self.name_of_group(group))
                })?;
            }
        }
        self.by_group(backend)
    }

    /// What error messages add to say which group is meant.
    pub(super) fn name_of_group(&self, group: usize) -> String {
        if self.groups == 1 {
            String::new()
        } else {
            format!(" of group {group}")
        }
    }

    /// Fails unless a matrix has this shape.
    pub(super) fn check_shape(
        &self,
        name: &str,
        shape: &[usize],
        expected: [usize; 2],
    ) -> Result<()> {
        if shape == expected {
            Ok(())
        } else {
            Err(Error::Shape(format!(
                "{name} must be {expected:?}, got shape {shape:?}"
            )))
        }
    }

    /// Fails unless these have the dtype of the terms.
    pub(super) fn check_dtypes(&self, given: &[(&str, Dtype)]) -> Result<()> {
        match given.iter().find(|(_, dtype)| *dtype != self.dtype) {
            None => Ok(()),
            Some((name, dtype)) => Err(Error::Dtype(format!(
                "{name} must be {} like the terms, got {dtype}",
                self.dtype
            ))),
        }
    }
}

/// Fails unless this is the shape of V, or of a stack of them.
pub(super) fn check_stack(
    name: &str,
    shape: &[usize],
    outputs: usize,
    inputs: usize,
) -> Result<()> {
    match shape {
        [.., rows, columns] if shape.len() <= 3 && (*rows, *columns) == (outputs, inputs) => Ok(()),
        _ => Err(Error::Shape(format!(
            "{name} must be [{outputs}, {inputs}] or [S, {outputs}, {inputs}], got shape {shape:?}"
        ))),
    }
}

/// Fails unless the result has the shape of V.
pub(super) fn check_like_v(v: &[usize], out: &[usize]) -> Result<()> {
    if v == out {
        Ok(())
    } else {
        Err(Error::Shape(format!(
            "out must have the shape of v, {v:?}, got shape {out:?}"
        )))
    }
}
