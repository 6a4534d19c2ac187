//! `sum_k G_k V A_k`: the product every training step needs.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::blas::split_columns;
use super::elements::zip_elements;
use super::host::HostTerm;
use super::team::Team;
use crate::cancel::Cancel;
use crate::element::Real;
use crate::error::Result;

/// A block is not interrupted; this many flops take some tens of milliseconds.
const FLOPS_BETWEEN_CHECKS: f64 = 4e9;

/// Writes `sum_k G_k V_s A_k + damping * V_s` for every matrix of the stack.
pub(super) fn kronecker_product<T: Real>(
    team: &Team,
    terms: &[HostTerm<'_, T>],
    v: &[MatRef<'_, T>],
    out: Vec<MatMut<'_, T>>,
    damping: f64,
    cancel: &Cancel,
) -> Result<()> {
    let Some(first) = v.first() else {
        return Ok(());
    };
    let (rows, columns) = (first.nrows() as f64, first.ncols() as f64);
    // Cutting the longer side keeps the blocks square; the factors are symmetric, so the
    // transposed problem is the same one with the factors exchanged.
    let transposed = rows > columns;
    let flops = 2.0 * rows * columns * (rows + columns) * terms.len() as f64;
    let for_threads = team.pieces(flops * v.len() as f64).div_ceil(v.len());
    let pieces = for_threads.max((flops / FLOPS_BETWEEN_CHECKS) as usize);
    let mut blocks = Vec::with_capacity(pieces * v.len());
    for (v, out) in v.iter().zip(out) {
        let (v, out) = if transposed {
            (v.transpose(), out.transpose_mut())
        } else {
            (*v, out)
        };
        let split = split_columns(out, pieces).into_iter();
        blocks.extend(split.map(|(start, block)| (v, start, block)));
    }
    team.run(blocks, |(v, start, mut block)| {
        if cancel.is_cancelled() {
            return;
        }
        let (height, width) = (block.nrows(), block.ncols());
        team.scratch::<T>().with(height * width, |scratch| {
            let mut half = MatMut::from_row_major_slice_mut(scratch, height, width);
            start_with_damping(block.as_mut(), v.subcols(start, width), damping);
            let mut keep = if damping == 0.0 {
                Accum::Replace
            } else {
                Accum::Add
            };
            for &(a, g) in terms {
                let (left, right) = if transposed { (a, g) } else { (g, a) };
                let right = right.subcols(start, width);
                matmul(half.as_mut(), Accum::Replace, v, right, one(), Par::Seq);
                matmul(block.as_mut(), keep, left, half.as_ref(), one(), Par::Seq);
                keep = Accum::Add;
            }
        });
    });
    cancel.check()
}

fn one<T: Real>() -> T {
    T::from_f64(1.0)
}

fn start_with_damping<T: Real>(mut block: MatMut<'_, T>, v: MatRef<'_, T>, damping: f64) {
    if damping != 0.0 {
        let damping = T::from_f64(damping);
        zip_elements(block.as_mut(), v, |out, v| *out = damping * v);
    }
}

/// Writes the sum of the Kronecker products `G_k (x) A_k`.
pub(super) fn dense_kronecker<T: Real>(terms: &[HostTerm<'_, T>], mut out: MatMut<'_, T>) {
    let Some((first_a, _)) = terms.first() else {
        return;
    };
    let size = first_a.nrows();
    for row in 0..out.nrows() {
        for column in 0..out.ncols() {
            let (d, e, k, l) = (row / size, column / size, row % size, column % size);
            let entry: f64 = terms
                .iter()
                .map(|(a, g)| g[(d, e)].to_f64() * a[(k, l)].to_f64())
                .sum();
            out[(row, column)] = T::from_f64(entry);
        }
    }
}
