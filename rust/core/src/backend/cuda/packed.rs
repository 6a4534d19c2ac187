//! A sum of Kronecker products packed for many products, in two kinds of calls of cuBLAS.
//!
//! For each group the products `V A_k` of all terms are stacked on top of one another, and
//! `[G_1 .. G_n]` times the stack is the result: the sum over terms happens inside one product.
//! The stack is written in memory of its own, so that a product allocates nothing and a CUDA graph
//! may capture it.

use std::sync::{Mutex, PoisonError};

use super::blas::{Strided, lies_well};
use super::elements::blocks;
use super::memory::DeviceMatrix;
use super::queue::Cuda;
use crate::element::Real;
use crate::error::Result;
use crate::matrix::{Matrix, MatrixMut, Storage};
use crate::terms::Group;

/// Copies of the factors of all groups.
pub struct Packed<T> {
    groups: usize,
    terms: usize,
    /// Rows of each group, and columns of V.
    height: usize,
    inputs: usize,
    /// The stream it was packed on.
    home: usize,
    factors: Factors<T>,
}

enum Factors<T> {
    /// A_k on top of one another, `[groups, terms, K, K]`; G_k side by side, `[groups, height,
    /// terms, height]`; room for `V A_k`, `[groups, terms, height, K]`.
    Terms {
        right: DeviceMatrix<T>,
        left: DeviceMatrix<T>,
        stack: Mutex<DeviceMatrix<T>>,
    },
    /// Where groups are single rows, `sum_k G_k A_k`, `[groups, K, K]`.
    Rows(DeviceMatrix<T>),
}

impl<T: Real> Packed<T> {
    /// Packs the terms of all groups.
    pub(super) fn new(cuda: &Cuda, groups: &[Group<'_, T>]) -> Result<Self> {
        // A graph may be captured before the first product: library handles must be there by then.
        drop(cuda.handles()?);
        let terms = groups[0].terms.len();
        let (height, inputs) = (groups[0].rows.len(), groups[0].terms[0].0.rows());
        let factors = if height == 1 {
            Factors::Rows(sum_rows(cuda, groups, terms, inputs)?)
        } else {
            let mut right = cuda.matrix_of::<T>(groups.len() * terms * inputs, inputs)?;
            let mut left = cuda.matrix_of::<T>(groups.len() * height, terms * height)?;
            for k in 0..terms {
                let sources: Vec<_> = groups.iter().map(|group| group.terms[k].0).collect();
                let all = right.view_mut();
                let below = all.rows() - k * inputs;
                let targets = blocks(all.subrows(k * inputs, below), inputs, terms * inputs);
                cuda.copy_stack(&sources, targets)?;
                let sources: Vec<_> = groups.iter().map(|group| group.terms[k].1).collect();
                let side = left.view_mut().subcolumns(k * height, height);
                cuda.copy_stack(&sources, blocks(side, height, height))?;
            }
            let stack = cuda.matrix_of::<T>(groups.len() * terms * height, inputs)?;
            Factors::Terms {
                right,
                left,
                stack: Mutex::new(stack),
            }
        };
        Ok(Self {
            groups: groups.len(),
            terms,
            height,
            inputs,
            home: cuda.stream,
            factors,
        })
    }

    /// Floating-point operations of one product.
    pub(super) fn flops(&self) -> usize {
        let each = match self.factors {
            Factors::Terms { .. } => self.terms * (self.inputs + self.height),
            Factors::Rows(_) => self.inputs,
        };
        2 * self.groups * self.height * self.inputs * each
    }

    /// Queues the product with V.
    pub(super) fn apply(&self, cuda: &Cuda, v: Matrix<'_, T>, out: MatrixMut<'_, T>) -> Result<()> {
        let Self {
            groups,
            terms,
            height,
            inputs,
            home,
            ref factors,
        } = *self;
        if !lies_well(v) {
            return self.apply(cuda, cuda.copied(v)?.view(), out);
        }
        if !lies_well(out.as_ref()) {
            let mut product = cuda.matrix_of::<T>(out.rows(), out.columns())?;
            self.apply(cuda, v, product.view_mut())?;
            return cuda.convert(product.view(), out);
        }
        // Steps from group to group of V and of the result.
        let step = |x: Matrix<'_, T>| height * x.row_stride().unsigned_abs();
        let (v_step, out_step) = (step(v), step(out.as_ref()));
        let v = v.subrows(0, height);
        let out = out.subrows(0, height);
        match factors {
            Factors::Rows(matrices) => {
                let batch = Strided {
                    count: groups,
                    strides: [v_step, inputs * inputs, out_step],
                };
                let first = matrices.view().subrows(0, inputs);
                cuda.multiply_stack(out, false, v, first, 1.0, batch)
            }
            Factors::Terms { right, left, stack } => {
                // The lock is held until both kinds of products are queued. On another stream
                // nothing would order them after the last use of the stack, and a graph is
                // replayed beside other work.
                let mut own = stack.lock().unwrap_or_else(PoisonError::into_inner);
                let mut elsewhere = None;
                let stack = if cuda.stream == home && !cuda.capturing {
                    &mut *own
                } else {
                    elsewhere.insert(cuda.matrix_of::<T>(groups * terms * height, inputs)?)
                };
                let (a_size, half_size) = (inputs * inputs, height * inputs);
                if groups == 1 {
                    let batch = Strided {
                        count: terms,
                        strides: [0, a_size, half_size],
                    };
                    let a = right.view().subrows(0, inputs);
                    let half = stack.view_mut().subrows(0, height);
                    cuda.multiply_stack(half, false, v, a, 1.0, batch)?;
                } else {
                    for k in 0..terms {
                        let batch = Strided {
                            count: groups,
                            strides: [v_step, terms * a_size, terms * half_size],
                        };
                        let a = right.view().subrows(k * inputs, inputs);
                        let half = stack.view_mut().subrows(k * height, height);
                        cuda.multiply_stack(half, false, v, a, 1.0, batch)?;
                    }
                }
                let batch = Strided {
                    count: groups,
                    strides: [height * terms * height, terms * half_size, out_step],
                };
                let g = left.view().subrows(0, height);
                let halves = stack.view().subrows(0, terms * height);
                cuda.multiply_stack(out, false, g, halves, 1.0, batch)
            }
        }
    }
}

/// `sum_k G_k A_k` for groups of a single row, where each G_k is a number.
fn sum_rows<T: Real>(
    cuda: &Cuda,
    groups: &[Group<'_, T>],
    terms: usize,
    inputs: usize,
) -> Result<DeviceMatrix<T>> {
    let size = inputs * inputs;
    let mut sums = cuda.matrix_of::<T>(groups.len() * inputs, inputs)?;
    let mut matrices = cuda.matrix_of::<T>(groups.len() * inputs, inputs)?;
    let mut numbers = cuda.matrix_of::<T>(groups.len(), 1)?;
    for k in 0..terms {
        let sources: Vec<_> = groups.iter().map(|group| group.terms[k].0).collect();
        cuda.copy_stack(&sources, blocks(matrices.view_mut(), inputs, inputs))?;
        let sources: Vec<_> = groups.iter().map(|group| group.terms[k].1).collect();
        cuda.copy_stack(&sources, blocks(numbers.view_mut(), 1, 1))?;
        let batch = Strided {
            count: groups.len(),
            strides: [1, size, size],
        };
        let number = numbers.view().subrows(0, 1);
        let matrix = matrices.reshaped(groups.len(), size).subrows(0, 1);
        let sum = sums.reshaped_mut(groups.len(), size).subrows(0, 1);
        cuda.multiply_stack(sum, k > 0, number, matrix, 1.0, batch)?;
    }
    Ok(sums)
}
