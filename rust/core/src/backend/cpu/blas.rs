//! Dense products and triangular solves, and how results are cut for threads.

use faer::linalg::matmul::matmul;
use faer::linalg::triangular_solve;
use faer::{Accum, MatMut, MatRef, Par};

use super::team::Team;
use crate::backend::Triangle;
use crate::element::Real;

/// `out (+)= alpha a b`, cut along the longer side of `out`.
pub(super) fn gemm<T: Real>(
    team: &Team,
    out: MatMut<'_, T>,
    accumulate: Accum,
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
    alpha: T,
) {
    let flops = 2.0 * (out.nrows() * out.ncols()) as f64 * a.ncols() as f64;
    if out.nrows() >= out.ncols() {
        let blocks = split_rows(out, team.pieces(flops));
        team.run(blocks, |(start, block)| {
            let rows = a.subrows(start, block.nrows());
            matmul(block, accumulate, rows, b, alpha, Par::Seq);
        });
    } else {
        let blocks = split_columns(out, team.pieces(flops));
        team.run(blocks, |(start, block)| {
            let columns = b.subcols(start, block.ncols());
            matmul(block, accumulate, a, columns, alpha, Par::Seq);
        });
    }
}

/// Consecutive blocks of rows of about equal height, with the index of their first row.
pub(super) fn split_rows<T>(matrix: MatMut<'_, T>, pieces: usize) -> Vec<(usize, MatMut<'_, T>)> {
    let rows = matrix.nrows();
    let pieces = pieces.clamp(1, rows.max(1));
    let mut blocks = Vec::with_capacity(pieces);
    let (mut rest, mut start) = (matrix, 0);
    for piece in 1..=pieces {
        let end = rows * piece / pieces;
        let (block, below) = rest.split_at_row_mut(end - start);
        blocks.push((start, block));
        (rest, start) = (below, end);
    }
    blocks
}

/// Consecutive blocks of columns of about equal width, with the index of their first column.
pub(super) fn split_columns<T>(
    matrix: MatMut<'_, T>,
    pieces: usize,
) -> Vec<(usize, MatMut<'_, T>)> {
    split_rows(matrix.transpose_mut(), pieces)
        .into_iter()
        .map(|(start, block)| (start, block.transpose_mut()))
        .collect()
}

/// Blocks of this many rows, the last one maybe of fewer, with the index of their first row.
pub(super) fn cut_rows<T>(out: MatMut<'_, T>, height: usize) -> Vec<(usize, MatMut<'_, T>)> {
    let (mut blocks, mut rest, mut start) = (Vec::new(), out, 0);
    while rest.nrows() > 0 {
        let rows = height.min(rest.nrows());
        let (block, below) = rest.split_at_row_mut(rows);
        blocks.push((start, block));
        (rest, start) = (below, start + rows);
    }
    blocks
}

/// Overwrites `x` with the solution of a triangular system, cut along its columns.
pub(super) fn solve_triangular<T: Real>(
    team: &Team,
    l: MatRef<'_, T>,
    triangle: Triangle,
    x: MatMut<'_, T>,
) {
    let flops = (l.nrows() * l.ncols()) as f64 * x.ncols() as f64;
    let blocks = split_columns(x, team.pieces(flops));
    team.run(blocks, |(_, x)| match triangle {
        Triangle::Lower => triangular_solve::solve_lower_triangular_in_place(l, x, Par::Seq),
        Triangle::LowerTransposed => {
            triangular_solve::solve_upper_triangular_in_place(l.transpose(), x, Par::Seq);
        }
    });
}
