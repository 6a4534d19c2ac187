//! Symmetric rank-k updates: only the lower triangle is computed.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, MatMut, MatRef, Par};

use super::blas::split_rows;
use super::simd::{self, Loop};
use super::team::Team;
use crate::cancel::Cancel;
use crate::element::Real;
use crate::error::Result;

/// Adds the sum of `weight * p p^T` over the parts p to the lower triangle of `out`.
pub(super) fn add_lower<T: Real>(
    team: &Team,
    mut out: MatMut<'_, T>,
    parts: &[MatRef<'_, T>],
    weight: f64,
    cancel: &Cancel,
) -> Result<()> {
    let (size, depth) = (out.nrows(), parts.iter().map(|p| p.ncols()).sum());
    let weight = T::from_f64(weight);
    let add = |target: &mut MatMut<'_, T>, p: MatRef<'_, T>| {
        if !cancel.is_cancelled() {
            add_triangle(target.as_mut(), p, weight);
        }
    };
    if team.pieces(flops(size, depth)) == 1 {
        parts.iter().for_each(|&p| add(&mut out, p));
    } else if is_tall(size, depth) {
        add_split_over_depth(team, out, depth, |range, mut target| {
            let mut before = 0;
            for p in parts {
                let start = range.start.clamp(before, before + p.ncols()) - before;
                let end = range.end.clamp(before, before + p.ncols()) - before;
                if start < end {
                    add(&mut target, p.subcols(start, end - start));
                }
                before += p.ncols();
            }
        });
    } else {
        add_tiles(team, out, parts, weight, cancel);
    }
    cancel.check()
}

fn flops(size: usize, depth: usize) -> f64 {
    depth as f64 * (size as f64).powi(2)
}

/// Whether an accumulator per thread costs little beside the work.
pub(super) fn is_tall(size: usize, depth: usize) -> bool {
    depth >= 4 * size
}

/// Each thread adds the squares of its own range of the depth to an accumulator of its own, and
/// the accumulators to `out` in the end: nothing is read by two threads.
pub(super) fn add_split_over_depth<T: Real>(
    team: &Team,
    mut out: MatMut<'_, T>,
    depth: usize,
    add: impl Fn(Range<usize>, MatMut<'_, T>) + Sync,
) {
    let size = out.nrows();
    let pieces = team.pieces(flops(size, depth));
    let scratch = team.scratch::<T>();
    scratch.with((pieces - 1) * size * size, |accumulators| {
        let own = accumulators.chunks_exact_mut(size * size).map(|own| {
            own.fill(T::default());
            MatMut::from_row_major_slice_mut(own, size, size)
        });
        let mut tasks: Vec<_> = own.enumerate().collect();
        tasks.push((pieces - 1, out.as_mut()));
        team.run(tasks, |(piece, target)| {
            let part = depth * piece / pieces..depth * (piece + 1) / pieces;
            add(part, target);
        });
        team.run(split_rows(out, pieces), |(start, mut block)| {
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

/// A piece of the lower triangle: a triangle on the diagonal, or a rectangle below it.
enum Tile<'a, T> {
    Triangle {
        start: usize,
        out: MatMut<'a, T>,
    },
    Rectangle {
        row: usize,
        column: usize,
        out: MatMut<'a, T>,
    },
}

/// Halves the triangle again and again until there are a few pieces of equal area per thread;
/// halving reads the parts less often than strips do.
fn add_tiles<T: Real>(
    team: &Team,
    out: MatMut<'_, T>,
    parts: &[MatRef<'_, T>],
    weight: T,
    cancel: &Cancel,
) {
    let area = out.nrows() * out.nrows() / 2;
    let mut tiles = Vec::new();
    cut_triangle(
        &mut tiles,
        out,
        0,
        area.div_ceil(TILES_PER_THREAD * team.threads()),
    );
    team.run(tiles, |tile| match tile {
        Tile::Triangle { start, mut out } => {
            for p in parts.iter().take_while(|_| !cancel.is_cancelled()) {
                let own = p.subrows(start, out.nrows());
                add_triangle(out.as_mut(), own, weight);
            }
        }
        Tile::Rectangle {
            row,
            column,
            mut out,
        } => {
            for p in parts.iter().take_while(|_| !cancel.is_cancelled()) {
                let left = p.subrows(row, out.nrows());
                let right = p.subrows(column, out.ncols()).transpose();
                matmul(out.as_mut(), Accum::Add, left, right, weight, Par::Seq);
            }
        }
    });
}

/// Pieces per thread: more even out a thread that starts late, fewer read less.
const TILES_PER_THREAD: usize = 2;

fn cut_triangle<'a, T>(
    tiles: &mut Vec<Tile<'a, T>>,
    out: MatMut<'a, T>,
    start: usize,
    area: usize,
) {
    let size = out.nrows();
    if size * size / 2 <= area || size < 32 {
        tiles.push(Tile::Triangle { start, out });
        return;
    }
    let half = (size / 2).next_multiple_of(16);
    let (upper, _, square, lower) = out.split_at_mut(half, half);
    let pieces = (square.nrows() * square.ncols()).div_ceil(area.max(1));
    for (below, out) in split_rows(square, pieces) {
        let (row, column) = (start + half + below, start);
        tiles.push(Tile::Rectangle { row, column, out });
    }
    cut_triangle(tiles, upper, start, area);
    cut_triangle(tiles, lower, start + half, area);
}

/// Adds `weight * p p^T` to the lower triangle on this thread.
pub(super) fn add_triangle<T: Real>(out: MatMut<'_, T>, p: MatRef<'_, T>, weight: T) {
    if p.nrows() <= SMALL && p.col_stride() == 1 {
        let line = |i| p.row(i).try_as_row_major().map(|row| row.as_slice());
        let lines: Vec<_> = (0..p.nrows()).filter_map(line).collect();
        let lines = &lines;
        simd::run(SmallTriangle { out, lines, weight });
        return;
    }
    triangular::matmul(
        out,
        BlockStructure::TriangularLower,
        Accum::Add,
        p,
        BlockStructure::Rectangular,
        p.transpose(),
        BlockStructure::Rectangular,
        weight,
        Par::Seq,
    );
}

/// Sizes up to which the general product spends more on preparations than on arithmetic.
const SMALL: usize = 32;

/// The product of a few long lines with one another.
struct SmallTriangle<'a, T> {
    out: MatMut<'a, T>,
    lines: &'a [&'a [T]],
    weight: T,
}

impl<T: Real> Loop for SmallTriangle<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            mut out,
            lines,
            weight,
        } = self;
        let (blocks, rest) = lines.as_chunks::<BLOCK>();
        for (i, left) in blocks.iter().enumerate() {
            for (j, right) in blocks[..=i].iter().enumerate() {
                add_tile(&mut out, [i * BLOCK, j * BLOCK], left, right, weight);
            }
        }
        let first = blocks.len() * BLOCK;
        for (i, &left) in rest.iter().enumerate() {
            for (j, right) in blocks.iter().enumerate() {
                add_tile(&mut out, [first + i, j * BLOCK], &[left], right, weight);
            }
            for (j, &right) in rest[..=i].iter().enumerate() {
                add_tile(&mut out, [first + i, first + j], &[left], &[right], weight);
            }
        }
    }
}

/// Lines that are multiplied with one another at a time: their sums stay in registers.
const BLOCK: usize = 3;

/// Independent partial sums of a product.
const LANES: usize = 8;

/// Adds the products of some lines with others to the lower triangle.
#[inline(always)]
fn add_tile<T: Real, const R: usize, const C: usize>(
    out: &mut MatMut<'_, T>,
    [row, column]: [usize; 2],
    left: &[&[T]; R],
    right: &[&[T]; C],
    weight: T,
) {
    let length = left[0].len();
    let (whole, rest) = (length / LANES * LANES, length % LANES);
    let mut sums = [[[T::default(); LANES]; C]; R];
    for start in (0..whole).step_by(LANES) {
        let (left, right) = (chunks_at(left, start), chunks_at(right, start));
        for i in 0..R {
            for j in 0..C {
                for lane in 0..LANES {
                    sums[i][j][lane] += left[i][lane] * right[j][lane];
                }
            }
        }
    }
    for i in 0..R {
        for j in 0..C {
            if row + i >= column + j {
                let mut sum = T::default();
                for &partial in &sums[i][j] {
                    sum += partial;
                }
                for k in whole..whole + rest {
                    sum += left[i][k] * right[j][k];
                }
                out[(row + i, column + j)] += weight * sum;
            }
        }
    }
}

/// The same few elements of each line.
#[inline(always)]
fn chunks_at<T: Real, const N: usize>(lines: &[&[T]; N], start: usize) -> [[T; LANES]; N] {
    lines.map(|line| {
        let mut chunk = [T::default(); LANES];
        chunk.copy_from_slice(&line[start..start + LANES]);
        chunk
    })
}
