//! Symmetric rank-k updates: only the lower triangle is computed.

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, MatMut, MatRef, Par};

use super::{Cpu, split_rows};
use crate::cancel::Cancel;
use crate::error::Result;
use crate::view::Real;

/// Adds `weight * x^T x` to the lower triangle of `out`.
pub(super) fn add_lower<T: Real>(
    cpu: &Cpu,
    out: MatMut<'_, T>,
    x: MatRef<'_, T>,
    weight: f64,
    cancel: &Cancel,
) -> Result<()> {
    let (rows, size) = (x.nrows(), x.ncols());
    let weight = T::from_f64(weight);
    let pieces = cpu.pieces(rows as f64 * (size as f64).powi(2));
    if pieces == 1 {
        add_triangle(out, x, weight);
    } else if rows >= 4 * size {
        add_split_over_rows(cpu, out, x, weight, pieces, cancel);
    } else {
        add_tiles(cpu, out, x, weight, cancel);
    }
    cancel.check()
}

/// Each thread squares its own rows into an accumulator of its own: no part of `x` is packed
/// twice, which pays as soon as `x` is much taller than the result.
fn add_split_over_rows<T: Real>(
    cpu: &Cpu,
    mut out: MatMut<'_, T>,
    x: MatRef<'_, T>,
    weight: T,
    pieces: usize,
    cancel: &Cancel,
) {
    let (rows, size) = (x.nrows(), x.ncols());
    cpu.scratch
        .of::<T>()
        .with((pieces - 1) * size * size, |accumulators| {
            let own = accumulators.chunks_exact_mut(size * size).map(|own| {
                own.fill(T::default());
                MatMut::from_row_major_slice_mut(own, size, size)
            });
            let mut tasks: Vec<_> = own.enumerate().collect();
            tasks.push((pieces - 1, out.as_mut()));
            cpu.run(tasks, |(piece, target)| {
                if !cancel.is_cancelled() {
                    let (start, end) = (rows * piece / pieces, rows * (piece + 1) / pieces);
                    add_triangle(target, x.subrows(start, end - start), weight);
                }
            });
            cpu.run(split_rows(out, pieces), |(start, mut block)| {
                for own in accumulators.chunks_exact(size * size) {
                    for i in 0..block.nrows() {
                        let row = start + i;
                        let values = &own[row * size..=row * size + row];
                        for (j, &value) in values.iter().enumerate() {
                            block[(i, j)] += value;
                        }
                    }
                }
            });
        });
}

/// Strips of rows of the lower triangle, largest first, taken by whichever thread is free.
fn add_tiles<T: Real>(cpu: &Cpu, out: MatMut<'_, T>, x: MatRef<'_, T>, weight: T, cancel: &Cancel) {
    let size = x.ncols();
    let height = size
        .div_ceil(4 * cpu.threads)
        .next_multiple_of(16)
        .clamp(64, 256);
    let mut strips = Vec::new();
    let (mut rest, mut start) = (out, 0);
    while start < size {
        let (strip, below) = rest.split_at_row_mut(height.min(size - start));
        let end = start + strip.nrows();
        let (left, diagonal) = strip.split_at_col_mut(start);
        let diagonal = diagonal.subcols_mut(0, end - start);
        strips.push((start, left, diagonal));
        (rest, start) = (below, end);
    }
    strips.reverse();
    cpu.run(strips, |(start, left, diagonal)| {
        if cancel.is_cancelled() {
            return;
        }
        let own = x.subcols(start, diagonal.nrows());
        matmul(
            left,
            Accum::Add,
            own.transpose(),
            x.subcols(0, start),
            weight,
            Par::Seq,
        );
        add_triangle(diagonal, own, weight);
    });
}

fn add_triangle<T: Real>(out: MatMut<'_, T>, x: MatRef<'_, T>, weight: T) {
    triangular::matmul(
        out,
        BlockStructure::TriangularLower,
        Accum::Add,
        x.transpose(),
        BlockStructure::Rectangular,
        x,
        BlockStructure::Rectangular,
        weight,
        Par::Seq,
    );
}
