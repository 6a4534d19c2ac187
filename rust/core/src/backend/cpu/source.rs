//! Units by features, wherever they lie, and how they are packed into lines.

use std::ops::Range;

use faer::{MatMut, MatRef};
use ndarray::{ArrayView, ArrayView2, ArrayView3, ArrayViewD, Axis, Dimension, Ix2, Ix3, s};

use super::host;
use super::simd::{self, Loop};
use super::syrk;
use super::team::Team;
use crate::cancel::Cancel;
use crate::element::{Element, Real};
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::units::name_in_units;
use crate::view::TensorView;

/// Where the units of a mini-batch come from.
pub(super) trait Source: Sync {
    /// (examples, locations, features).
    fn shape(&self) -> (usize, usize, usize);

    /// Adds every unit of these examples to `sums`, which has one entry per feature.
    fn add_sums(&self, examples: Range<usize>, sums: &mut [f64]);

    /// Writes these features of these units, minus their means: one line per feature, one column
    /// per unit from column `first` on. Features come in whole multiples of [`Self::quantum`].
    ///
    /// Must be `#[inline(always)]`, to be compiled for the vector instructions of the caller.
    fn pack<T: Real>(
        &self,
        units: Range<usize>,
        features: Range<usize>,
        lines: &mut Lines<'_, T>,
        first: usize,
        means: MeansOf<'_, T>,
    );

    /// How many consecutive features are packed together.
    fn quantum(&self) -> usize {
        1
    }

    /// Adds the squares of all units to the lower triangle of `out`, in a way of the source's own
    /// that does not pack them. Where there is none, or where it would cost digits, nothing is
    /// written, and false returned.
    fn add_total<T: Real>(&self, _out: MatMut<'_, T>, _total: &Total<'_>) -> Result<bool> {
        Ok(false)
    }

    /// A NaN or an infinity, and where it is.
    fn non_finite(&self) -> Option<(f64, String)>;
}

/// How the squares of all units are to be added.
pub(super) struct Total<'a> {
    pub(super) team: &'a Team,
    pub(super) weight: f64,
    /// What will be subtracted from the sum of squares of each feature, if anything.
    pub(super) centre: Option<Vec<f64>>,
    pub(super) cancel: &'a Cancel,
}

impl Total<'_> {
    /// Whether what is left when the centre is gone has nearly the digits of what it is taken from,
    /// for features with these sums of squares.
    pub(super) fn keeps_digits(&self, squares: impl FnOnce() -> Vec<f64>) -> bool {
        let kept = |(square, centre): (f64, &f64)| square <= DIGITS_LOST * (square - centre);
        match &self.centre {
            Some(centre) => squares().into_iter().zip(centre).all(kept),
            None => true,
        }
    }
}

/// How many times the sums of squares may be what is left of them without their centre: rounding
/// errors grow by as much.
const DIGITS_LOST: f64 = 8.0;

/// The locations of each example among these units, and how many units came before them.
#[inline(always)]
pub(super) fn runs(
    units: Range<usize>,
    locations: usize,
) -> impl Iterator<Item = (usize, Range<usize>, usize)> {
    let mut unit = units.start;
    std::iter::from_fn(move || {
        let (example, location) = (unit / locations, unit % locations);
        let count = (locations - location).min(units.end - unit);
        let before = unit - units.start;
        unit += count;
        (count > 0).then_some((example, location..location + count, before))
    })
}

/// A mean as a rounded part and what rounding left over: subtracting both keeps the precision of
/// the double in single-precision arithmetic.
pub(super) struct Means<T> {
    rounded: Vec<T>,
    rest: Vec<T>,
}

/// The rounded parts and the rests of some features.
pub(super) type MeansOf<'a, T> = (&'a [T], &'a [T]);

impl<T: Real> Means<T> {
    /// Splits means in double precision.
    pub(super) fn new(means: impl Iterator<Item = f64>) -> Self {
        let (rounded, rest) = means
            .map(|mean| {
                let rounded = T::from_f64(mean);
                (rounded, T::from_f64(mean - rounded.to_f64()))
            })
            .unzip();
        Self { rounded, rest }
    }

    /// Nothing to subtract.
    pub(super) fn zero(features: usize) -> Self {
        Self {
            rounded: vec![T::default(); features],
            rest: vec![T::default(); features],
        }
    }

    /// The means of these features.
    pub(super) fn part(&self, features: Range<usize>) -> MeansOf<'_, T> {
        (&self.rounded[features.clone()], &self.rest[features])
    }
}

/// Packed units: one line per feature, one column per unit.
pub(super) struct Lines<'a, T> {
    pub(super) data: &'a mut [T],
    pub(super) stride: usize,
}

impl<T> Lines<'_, T> {
    /// The line of a feature from this unit on.
    #[inline(always)]
    pub(super) fn line(&mut self, feature: usize, unit: usize) -> &mut [T] {
        &mut self.data[feature * self.stride + unit..(feature + 1) * self.stride]
    }
}

/// Units whose features are stored one by one.
pub(super) struct Dense<'a, S> {
    /// `[examples, locations, features]`.
    x: ArrayView3<'a, S>,
    /// `[examples * locations, features]`, where the strides allow it.
    flat: Option<(ArrayView2<'a, S>, TensorView<'a>)>,
    /// `x` again.
    view: TensorView<'a>,
}

/// Number of features up to which packing costs more than the product gains from it.
const WIDEST_IN_PLACE: usize = 256;

/// Locations of an example from which lines of theirs, one per feature, are long enough as they are.
const SHORTEST_IN_PLACE: usize = 128;

impl<'a, S: Element> Dense<'a, S> {
    /// The units of `[examples, locations, features]`.
    pub(super) fn new(x: &TensorView<'a>) -> Result<Self> {
        let flat = match x.flatten_units() {
            Some(flat) => Some((dimensions::<S, Ix2>(flat.array()?)?, flat)),
            None => None,
        };
        let view = x.clone();
        let x = dimensions::<S, Ix3>(x.array()?)?;
        Ok(Self { x, flat, view })
    }

    /// The units as matrices, one row each, where they are best squared where they lie.
    fn in_place<T: Real>(&self) -> Option<Vec<MatRef<'_, T>>> {
        let (_, locations, features) = self.x.dim();
        // Of the right type; one by one only where they are narrow: wider ones gain from packing.
        let by_example = self.x.strides()[1] == 1 && locations >= SHORTEST_IN_PLACE;
        let x = match &self.flat {
            Some((_, flat)) if features <= WIDEST_IN_PLACE => flat,
            _ if by_example => &self.view,
            _ => return None,
        };
        let matrices = Matrix::stack_of(x).ok()?.into_iter();
        matrices.map(|matrix| host::read(matrix).ok()).collect()
    }
}

/// The array with this many dimensions.
pub(super) fn dimensions<S, D: Dimension>(array: ArrayViewD<'_, S>) -> Result<ArrayView<'_, S, D>> {
    array
        .into_dimensionality()
        .map_err(|error| Error::Shape(format!("x has the wrong number of dimensions: {error}")))
}

impl<S: Element> Source for Dense<'_, S> {
    fn shape(&self) -> (usize, usize, usize) {
        self.x.dim()
    }

    fn add_sums(&self, examples: Range<usize>, sums: &mut [f64]) {
        match &self.flat {
            Some((flat, _)) => {
                let locations = self.x.dim().1;
                let units = examples.start * locations..examples.end * locations;
                add_units(flat.slice(s![units, ..]), sums);
            }
            None => {
                for example in examples {
                    add_units(self.x.index_axis(Axis(0), example), sums);
                }
            }
        }
    }

    #[inline(always)]
    fn pack<T: Real>(
        &self,
        units: Range<usize>,
        features: Range<usize>,
        lines: &mut Lines<'_, T>,
        first: usize,
        means: MeansOf<'_, T>,
    ) {
        if let Some((flat, _)) = &self.flat {
            pack_run(flat.slice(s![units, features]), lines, first, means);
            return;
        }
        for (example, locations, before) in runs(units, self.x.dim().1) {
            let run = self.x.slice(s![example, locations, features.clone()]);
            pack_run(run, lines, first + before, means);
        }
    }

    fn add_total<T: Real>(&self, mut out: MatMut<'_, T>, total: &Total<'_>) -> Result<bool> {
        let Some(units) = self.in_place::<T>() else {
            return Ok(false);
        };
        let parts: Vec<_> = units
            .iter()
            .flat_map(|units| {
                let parts = chunks(units.nrows(), units.ncols());
                parts.map(|part| units.subrows(part.start, part.len()).transpose())
            })
            .collect();
        let &Total {
            team,
            weight,
            cancel,
            ..
        } = total;
        if total.centre.is_none() {
            syrk::add_lower(team, out, &parts, weight, cancel)?;
            return Ok(true);
        }
        // Apart at first: its diagonal tells whether it may be used.
        let size = out.nrows();
        team.scratch::<T>().with(size * size, |sums| {
            sums.fill(T::default());
            let mut sums = MatMut::from_row_major_slice_mut(sums, size, size);
            syrk::add_lower(team, sums.as_mut(), &parts, 1.0, cancel)?;
            let diagonal = || (0..size).map(|i| sums[(i, i)].to_f64()).collect();
            if !total.keeps_digits(diagonal) {
                return Ok(false);
            }
            let weight = T::from_f64(weight);
            for i in 0..size {
                for j in 0..=i {
                    out[(i, j)] += weight * sums[(i, j)];
                }
            }
            Ok(true)
        })
    }

    fn non_finite(&self) -> Option<(f64, String)> {
        first_non_finite(&self.x).map(|((example, location, feature), value)| {
            (value, name_in_units(example, location, feature))
        })
    }
}

/// The first NaN or infinity of an array, with its index.
pub(super) fn first_non_finite<S: Element, D: Dimension>(
    x: &ArrayView<'_, S, D>,
) -> Option<(D::Pattern, f64)> {
    x.indexed_iter()
        .map(|(index, value)| (index, value.to_f64()))
        .find(|(_, value)| !value.is_finite())
}

/// Writes the transpose of `x` (units by features) minus the means, from column `first` on.
#[inline(always)]
pub(super) fn pack_run<S: Element, T: Real>(
    x: ArrayView2<'_, S>,
    lines: &mut Lines<'_, T>,
    first: usize,
    (rounded, rest): MeansOf<'_, T>,
) {
    let (units, features) = x.dim();
    if x.strides()[1] != 1 {
        for (feature, source) in x.columns().into_iter().enumerate() {
            let (rounded, rest) = (rounded[feature], rest[feature]);
            let target = lines.line(feature, first).iter_mut();
            match source.to_slice() {
                Some(source) => {
                    for (target, &value) in target.zip(source) {
                        *target = T::from_element(value) - rounded - rest;
                    }
                }
                None => {
                    for (target, &value) in target.zip(source) {
                        *target = T::from_element(value) - rounded - rest;
                    }
                }
            }
        }
        return;
    }
    // Centre along the rows and transpose in small tiles, so that both sides are read and written
    // a cache line at a time.
    let rows: Vec<&[S]> = x
        .rows()
        .into_iter()
        .filter_map(|row| row.to_slice())
        .collect();
    let mut tile = [[T::default(); TILE]; TILE];
    for unit in (0..units).step_by(TILE) {
        let rows = &rows[unit..(unit + TILE).min(units)];
        for feature in (0..features).step_by(TILE) {
            let width = TILE.min(features - feature);
            let part = feature..feature + width;
            for (centred, row) in tile.iter_mut().zip(rows) {
                centre_row(
                    centred,
                    &row[part.clone()],
                    &rounded[part.clone()],
                    &rest[part.clone()],
                );
            }
            for column in 0..width {
                let target = lines.line(feature + column, first + unit);
                if let (Some(target), TILE) = (target.first_chunk_mut::<TILE>(), rows.len()) {
                    for unit in 0..TILE {
                        target[unit] = tile[unit][column];
                    }
                } else {
                    for (target, centred) in target.iter_mut().zip(&tile[..rows.len()]) {
                        *target = centred[column];
                    }
                }
            }
        }
    }
}

/// Units and features of a tile: one cache line of single-precision numbers each.
pub(super) const TILE: usize = 16;

#[inline(always)]
fn centre_row<S: Element, T: Real>(centred: &mut [T; TILE], row: &[S], rounded: &[T], rest: &[T]) {
    // The fixed length is what lets the compiler keep a whole row in one register.
    if let (Ok(row), Ok(rounded), Ok(rest)) = (
        <&[S; TILE]>::try_from(row),
        <&[T; TILE]>::try_from(rounded),
        <&[T; TILE]>::try_from(rest),
    ) {
        for i in 0..TILE {
            centred[i] = T::from_element(row[i]) - rounded[i] - rest[i];
        }
    } else {
        for (i, &value) in row.iter().enumerate() {
            centred[i] = T::from_element(value) - rounded[i] - rest[i];
        }
    }
}

/// Adds every unit (row) to `sums`.
fn add_units<S: Element>(units: ArrayView2<'_, S>, sums: &mut [f64]) {
    if units.strides()[1] == 1 {
        let rows: Vec<&[S]> = units
            .axis_iter(Axis(0))
            .filter_map(|row| row.to_slice())
            .collect();
        simd::run(AddRows { rows: &rows, sums });
    } else {
        // Feature by feature: then the inner loop runs along whatever is contiguous.
        for (sum, values) in sums.iter_mut().zip(units.axis_iter(Axis(1))) {
            *sum += match values.to_slice() {
                Some(values) => simd::run(simd::Sum(values)),
                None => values.fold(0.0, |sum, value| sum + value.to_f64()),
            };
        }
    }
}

/// What reading an element, converting it and writing it costs, in flops of a product.
pub(super) const COST_OF_READING: f64 = 30.0;

/// Ranges of rows that keep the packed buffer within a few megabytes, tall enough that writing the
/// output once per chunk costs little.
pub(super) fn chunks(rows: usize, features: usize) -> impl Iterator<Item = Range<usize>> {
    const ELEMENTS: usize = 1 << 22;
    let height = (ELEMENTS / features).clamp(2048, 8192);
    (0..rows)
        .step_by(height)
        .map(move |start| start..(start + height).min(rows))
}

/// Adds rows to the sums, four at a time: the sums are read and written once per group.
struct AddRows<'a, S> {
    rows: &'a [&'a [S]],
    sums: &'a mut [f64],
}

impl<S: Element> Loop for AddRows<'_, S> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let (groups, rest) = self.rows.as_chunks::<4>();
        for &[a, b, c, d] in groups {
            let values = a.iter().zip(b).zip(c.iter().zip(d));
            for (sum, ((a, b), (c, d))) in self.sums.iter_mut().zip(values) {
                *sum += (a.to_f64() + b.to_f64()) + (c.to_f64() + d.to_f64());
            }
        }
        for row in rest {
            for (sum, value) in self.sums.iter_mut().zip(*row) {
                *sum += value.to_f64();
            }
        }
    }
}
