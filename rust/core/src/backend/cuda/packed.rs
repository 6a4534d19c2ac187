//! A sum of Kronecker products packed for many products, in two kinds of calls of cuBLAS.
//!
//! For each group the products `V A_k` of all terms are stacked on top of one another, and
//! `[G_1 .. G_n]` times the stack is the result: the sum over terms happens inside one product.
//! The stack is written in memory of its own, so that a product allocates nothing and a CUDA graph
//! may capture it.
//!
//! Of terms whose factors are known by their roots, those that go through the same side have their
//! roots side by side: a product with all of them before and after what is done for each.

use std::sync::{Mutex, PoisonError};

use super::blas::{Strided, lies_well};
use super::elements::blocks;
use super::memory::DeviceMatrix;
use super::queue::Cuda;
use crate::element::Real;
use crate::error::Result;
use crate::matrix::{Matrix, MatrixMut, Storage};
use crate::terms::{Factor, FactoredTerm, Group, Way};
use crate::units::Precision;

/// Copies of the factors of all groups.
pub struct Packed<T> {
    groups: usize,
    terms: usize,
    /// Rows of each group, and columns of V.
    height: usize,
    inputs: usize,
    /// The stream it was packed on.
    home: usize,
    /// Of its products.
    precision: Precision,
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
    /// Where factors may be known by their roots; of one group.
    Roots {
        /// (A, G).
        whole: Vec<(DeviceMatrix<T>, DeviceMatrix<T>)>,
        through_g: Roots<T>,
        through_a: Roots<T>,
    },
}

/// Thin roots of one side of some terms, and the terms' other factors.
struct Roots<T> {
    /// Side by side, `[n, columns]`.
    roots: DeviceMatrix<T>,
    /// How many columns each has, and what their product with V is multiplied by.
    others: Vec<(usize, Factor<DeviceMatrix<T>>)>,
}

impl<T: Real> Packed<T> {
    /// Packs the terms of all groups.
    pub(super) fn new(cuda: &Cuda, groups: &[Group<'_, T>], precision: Precision) -> Result<Self> {
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
            precision,
            factors,
        })
    }

    /// Packs terms of one group, for V of this size, whose factors may be known by their roots.
    pub(super) fn of_factors(
        cuda: &Cuda,
        [height, inputs]: [usize; 2],
        terms: &[FactoredTerm<'_, T>],
        precision: Precision,
    ) -> Result<Self> {
        drop(cuda.handles()?);
        let (mut whole, mut by_g, mut by_a) = (Vec::new(), Vec::new(), Vec::new());
        for &(a, g) in terms {
            match Way::of(a, g, [height, inputs], |x: &Matrix<'_, T>| x.columns())? {
                Way::Whole { a, g } => whole.push((cuda.copied(a)?, cuda.copied(g)?)),
                Way::ThroughG { root, other } => by_g.push((root, other)),
                Way::ThroughA { root, other } => by_a.push((root, other)),
            }
        }
        Ok(Self {
            groups: 1,
            terms: terms.len(),
            height,
            inputs,
            home: cuda.stream,
            precision,
            factors: Factors::Roots {
                whole,
                through_g: Roots::new(cuda, height, by_g)?,
                through_a: Roots::new(cuda, inputs, by_a)?,
            },
        })
    }

    /// Floating-point operations of one product.
    pub(super) fn flops(&self) -> usize {
        let (height, inputs) = (self.height, self.inputs);
        let each = match &self.factors {
            Factors::Terms { .. } => self.terms * (inputs + height),
            Factors::Rows(_) => inputs,
            Factors::Roots {
                whole,
                through_g,
                through_a,
            } => {
                let of_whole = 2 * height * inputs * (height + inputs) * whole.len();
                return of_whole + through_g.flops(inputs) + through_a.flops(height);
            }
        };
        2 * self.groups * height * inputs * each
    }

    /// Queues the product with V.
    pub(super) fn apply(&self, cuda: &Cuda, v: Matrix<'_, T>, out: MatrixMut<'_, T>) -> Result<()> {
        let Self {
            groups,
            terms,
            height,
            inputs,
            home,
            precision,
            ref factors,
        } = *self;
        let cuda = &cuda.with_precision(precision);
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
            Factors::Roots {
                whole,
                through_g,
                through_a,
            } => {
                let mut out = out;
                let mut keep = false;
                for (a, g) in whole {
                    let mut half = cuda.matrix_of::<T>(height, inputs)?;
                    cuda.multiply(half.view_mut(), false, v, a.view(), 1.0)?;
                    cuda.multiply(out.as_mut(), keep, g.view(), half.view(), 1.0)?;
                    keep = true;
                }
                if let Some(moved) = through_g.moved(cuda, v.transpose())? {
                    let (roots, moved) = (through_g.roots.view(), moved.view().transpose());
                    cuda.multiply(out.as_mut(), keep, roots, moved, 1.0)?;
                    keep = true;
                }
                if let Some(moved) = through_a.moved(cuda, v)? {
                    let roots = through_a.roots.view().transpose();
                    cuda.multiply(out, keep, moved.view(), roots, 1.0)?;
                }
                Ok(())
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

impl<T: Real> Roots<T> {
    /// Copies roots of `size` rows, and the factors beside them.
    fn new(
        cuda: &Cuda,
        size: usize,
        terms: Vec<(Matrix<'_, T>, Factor<Matrix<'_, T>>)>,
    ) -> Result<Self> {
        let columns = terms.iter().map(|(root, _)| root.columns()).sum();
        let mut roots = cuda.matrix_of::<T>(size, columns)?;
        let (mut start, mut others) = (0, Vec::with_capacity(terms.len()));
        for (root, other) in terms {
            let count = root.columns();
            cuda.convert(root, roots.view_mut().subcolumns(start, count))?;
            start += count;
            let other = match other {
                Factor::Whole(x) => Factor::Whole(cuda.copied(x)?),
                Factor::Rooted { root, shift } => {
                    let root = cuda.copied(root)?;
                    Factor::Rooted { root, shift }
                }
                Factor::Identity => Factor::Identity,
            };
            others.push((count, other));
        }
        Ok(Self { roots, others })
    }

    /// Floating-point operations of products with these roots and the factors of `size` beside them.
    fn flops(&self, size: usize) -> usize {
        let inside = self.others.iter().map(|(count, other)| match other {
            Factor::Whole(_) => count * size * size,
            Factor::Rooted { root, .. } => 2 * count * size * root.view().columns(),
            Factor::Identity => 0,
        });
        let roots = self.roots.view();
        4 * roots.rows() * roots.columns() * size + 2 * inside.sum::<usize>()
    }

    /// `V` times each root, then the factor beside it times that, side by side; nothing without
    /// roots.
    fn moved(&self, cuda: &Cuda, v: Matrix<'_, T>) -> Result<Option<DeviceMatrix<T>>> {
        if self.others.is_empty() {
            return Ok(None);
        }
        let (height, columns) = (v.rows(), self.roots.view().columns());
        let mut inside = cuda.matrix_of::<T>(height, columns)?;
        cuda.multiply(inside.view_mut(), false, v, self.roots.view(), 1.0)?;
        let mut moved = cuda.matrix_of::<T>(height, columns)?;
        let mut start = 0;
        for (count, other) in &self.others {
            let part = inside.view().subcolumns(start, *count);
            let mut target = moved.view_mut().subcolumns(start, *count);
            start += count;
            match other {
                Factor::Identity => cuda.convert(part, target)?,
                Factor::Whole(whole) => cuda.multiply(target, false, whole.view(), part, 1.0)?,
                Factor::Rooted { root, shift } => {
                    let mut middle = cuda.matrix_of::<T>(root.view().columns(), *count)?;
                    let turned = root.view().transpose();
                    cuda.multiply(middle.view_mut(), false, turned, part, 1.0)?;
                    cuda.multiply(target.as_mut(), false, root.view(), middle.view(), 1.0)?;
                    if *shift != 0.0 {
                        cuda.add_multiple(*shift, part, target)?;
                    }
                }
            }
        }
        Ok(Some(moved))
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
