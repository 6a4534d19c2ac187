//! Element by element: copies, sums and inner products, spectra.

use faer::{MatMut, MatRef};

use super::blas::cut_rows;
use super::simd;
use super::team::Team;
use crate::element::Real;
use crate::spectrum::Spectrum;

/// Copies, rounding or widening where the types differ.
pub(super) fn copy<S: Real, T: Real>(from: MatRef<'_, S>, to: MatMut<'_, T>) {
    zip_elements(to, from, |to, from| *to = T::from_element(from));
}

/// `y += alpha * x`.
pub(super) fn add_scaled<T: Real>(alpha: f64, x: MatRef<'_, T>, y: MatMut<'_, T>) {
    let alpha = T::from_f64(alpha);
    zip_elements(y, x, |y, x| *y += alpha * x);
}

/// Multiplies each element by the matching entry of the spectrum to the given power.
pub(super) fn scale_by_spectrum<T: Real>(mut x: MatMut<'_, T>, spectrum: &Spectrum, power: f64) {
    for j in 0..x.ncols() {
        for i in 0..x.nrows() {
            let entry = spectrum.at(i, j);
            let factor = if power == -1.0 {
                entry.recip()
            } else {
                entry.powf(power)
            };
            x[(i, j)] *= T::from_f64(factor);
        }
    }
}

/// Writes the entries of the spectrum.
pub(super) fn write_spectrum<T: Real>(spectrum: &Spectrum, mut out: MatMut<'_, T>) {
    for i in 0..out.nrows() {
        for j in 0..out.ncols() {
            out[(i, j)] = T::from_f64(spectrum.at(i, j));
        }
    }
}

/// The first NaN or infinity, with its row and column.
pub(super) fn first_non_finite<T: Real>(x: MatRef<'_, T>) -> Option<(f64, usize, usize)> {
    let places = (0..x.nrows()).flat_map(|i| (0..x.ncols()).map(move |j| (i, j)));
    let mut values = places.map(|(i, j)| (x[(i, j)].to_f64(), i, j));
    values.find(|(value, ..)| !value.is_finite())
}

/// What moving an element costs, in flops of a product.
const COST_OF_MOVING: f64 = 16.0;

/// Divides the lower triangle of each matrix and copies it to the upper one.
pub(super) fn symmetrize<T: Real>(team: &Team, x: Vec<MatMut<'_, T>>, divisor: T) {
    const WIDTH: usize = 64;
    let elements: usize = x.iter().map(|x| x.nrows() * x.ncols()).sum();
    let mut strips = Vec::new();
    for mut rest in x {
        // Peel off a block of columns (lower part) and the matching block of rows (upper part).
        while rest.nrows() > 0 {
            let width = WIDTH.min(rest.nrows());
            let (corner, upper, lower, below) = rest.split_at_mut(width, width);
            strips.push((corner, upper, lower));
            rest = below;
        }
    }
    let work = |(corner, upper, lower)| {
        symmetrize_corner(corner, divisor);
        divide_and_transpose(lower, upper, divisor);
    };
    if team.pieces(COST_OF_MOVING * elements as f64) > 1 {
        team.run(strips, work);
    } else {
        strips.into_iter().for_each(work);
    }
}

fn symmetrize_corner<T: Real>(mut x: MatMut<'_, T>, divisor: T) {
    for i in 0..x.nrows() {
        for j in 0..=i {
            let value = x[(i, j)] / divisor;
            x[(i, j)] = value;
            x[(j, i)] = value;
        }
    }
}

/// Divides the one matrix and writes its transpose into the other, some rows at a time: they fill
/// whole cache lines of the other.
fn divide_and_transpose<T: Real>(lower: MatMut<'_, T>, mut upper: MatMut<'_, T>, divisor: T) {
    const HEIGHT: usize = 16;
    for (start, mut rows) in cut_rows(lower, HEIGHT) {
        let mut columns = upper.as_mut().subcols_mut(start, rows.nrows());
        for i in 0..rows.nrows() {
            let row = rows.as_mut().row_mut(i).iter_mut();
            row.for_each(|value| *value /= divisor);
        }
        for j in 0..rows.ncols() {
            let pairs = columns.as_mut().row_mut(j).iter_mut();
            pairs
                .zip(rows.as_ref().col(j).iter())
                .for_each(|(to, from)| *to = *from);
        }
    }
}

/// The sum of the elementwise product, accumulated in double precision.
pub(super) fn dot<T: Real>(a: MatRef<'_, T>, b: MatRef<'_, T>) -> f64 {
    let (a, b) = row_major_if_possible(a, b);
    (0..a.nrows())
        .map(|i| {
            let (left, right) = (a.row(i), b.row(i));
            match (
                left.try_as_row_major().map(|row| row.as_slice()),
                right.try_as_row_major().map(|row| row.as_slice()),
            ) {
                (Some(left), Some(right)) => simd::run(simd::Dot(left, right)),
                _ => (0..a.ncols())
                    .map(|j| left[j].to_f64() * right[j].to_f64())
                    .sum(),
            }
        })
        .sum()
}

/// Transposes both views if that makes the rows of the first one contiguous.
fn row_major_if_possible<'a, S, T>(
    a: MatRef<'a, S>,
    b: MatRef<'a, T>,
) -> (MatRef<'a, S>, MatRef<'a, T>) {
    if a.row_stride() == 1 && a.col_stride() != 1 {
        (a.transpose(), b.transpose())
    } else {
        (a, b)
    }
}

/// Applies `f` to every pair of elements, along rows of `to` where they are contiguous.
pub(super) fn zip_elements<S: Real, T: Real>(
    to: MatMut<'_, T>,
    from: MatRef<'_, S>,
    f: impl Fn(&mut T, S),
) {
    let (mut to, from) = if to.row_stride() == 1 && to.col_stride() != 1 {
        (to.transpose_mut(), from.transpose())
    } else {
        (to, from)
    };
    for i in 0..to.nrows() {
        let (mut target, source) = (to.as_mut().row_mut(i), from.row(i));
        let contiguous = source.try_as_row_major().map(|row| row.as_slice());
        let target_slice = target
            .as_mut()
            .try_as_row_major_mut()
            .map(|row| row.as_slice_mut());
        if let (Some(target), Some(source)) = (target_slice, contiguous) {
            for (target, &source) in target.iter_mut().zip(source) {
                f(target, source);
            }
            continue;
        }
        for j in 0..source.ncols() {
            f(&mut target[j], source[j]);
        }
    }
}
