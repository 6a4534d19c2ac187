//! Strata of a mini-batch on the CPU: sums, then one packed (centred) buffer at a time.

use std::ops::Range;

use faer::{MatMut, MatRef};
use ndarray::{ArrayView, ArrayView2, ArrayView3, ArrayViewD, Axis, Dimension, Ix2, Ix3, s};

use super::simd::{self, Loop};
use super::{Cpu, syrk};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::gram::StratumWeight;
use crate::strata::Stratum;
use crate::view::{Element, Real, TensorView};

/// Adds the weighted sum of squares and products of each stratum to the lower triangle of its
/// output.
pub(super) fn accumulate<S: Element, T: Real>(
    cpu: &Cpu,
    x: &TensorView<'_>,
    out: Vec<MatMut<'_, T>>,
    strata: &[StratumWeight],
    append_one: bool,
    cancel: &Cancel,
) -> Result<()> {
    let flat = match x.flatten_units() {
        Some(flat) => Some(dimensions::<S, Ix2>(flat.array()?)?),
        None => None,
    };
    // Narrow input of the right type is squared where it lies; wider input gains from packing.
    let in_place = x
        .flatten_units()
        .filter(|flat| flat.shape()[1] <= WIDEST_IN_PLACE)
        .and_then(|flat| flat.matrix::<T>().ok());
    let batch = Batch::new(cpu, dimensions::<S, Ix3>(x.array()?)?, flat, cancel)?;
    for (out, &StratumWeight { stratum, weight }) in out.into_iter().zip(strata) {
        let stratum = if batch.locations() == 1 {
            stratum.with_one_location()
        } else {
            Some(stratum)
        };
        if let Some(stratum) = stratum.filter(|_| weight != 0.0) {
            batch.add_stratum(out, stratum, weight, append_one, in_place, cancel)?;
        }
    }
    Ok(())
}

fn dimensions<S, D: Dimension>(array: ArrayViewD<'_, S>) -> Result<ArrayView<'_, S, D>> {
    array
        .into_dimensionality()
        .map_err(|error| Error::Shape(format!("x must be [N, T, K]: {error}")))
}

/// A mini-batch with the sums its strata need.
struct Batch<'a, S> {
    cpu: &'a Cpu,
    /// `[examples, locations, features]`.
    x: ArrayView3<'a, S>,
    /// `[examples * locations, features]`, where the strides allow it.
    flat: Option<ArrayView2<'a, S>>,
    /// Sum over all units, per feature.
    sums: Vec<f64>,
    /// Sum over the locations of each example, `[examples, features]`; only where there is more
    /// than one location.
    example_sums: Vec<f64>,
}

impl<'a, S: Element> Batch<'a, S> {
    /// Takes the sums; a sum of finite numbers is finite, so they also show NaN and infinity.
    fn new(
        cpu: &'a Cpu,
        x: ArrayView3<'a, S>,
        flat: Option<ArrayView2<'a, S>>,
        cancel: &Cancel,
    ) -> Result<Self> {
        let (examples, locations, features) = x.dim();
        let mut batch = Self {
            cpu,
            x,
            flat,
            sums: vec![0.0; features],
            example_sums: Vec::new(),
        };
        let pieces = cpu.pieces(COST_OF_READING * x.len() as f64);
        if locations == 1 {
            batch.sums = batch.sum_of_units(pieces);
        } else {
            let mut sums = vec![0.0; examples * features];
            let share = examples.div_ceil(pieces);
            let tasks = sums.chunks_mut(share * features).enumerate().collect();
            cpu.run(tasks, |(piece, sums)| {
                for (offset, sums) in sums.chunks_exact_mut(features).enumerate() {
                    if !cancel.is_cancelled() {
                        let example = piece * share + offset;
                        add_units(batch.x.index_axis(Axis(0), example), sums);
                    }
                }
            });
            for sums in sums.chunks_exact(features) {
                add(&mut batch.sums, sums);
            }
            batch.example_sums = sums;
        }
        cancel.check()?;
        batch.check_finite()?;
        Ok(batch)
    }

    fn locations(&self) -> usize {
        self.x.dim().1
    }

    fn features(&self) -> usize {
        self.x.dim().2
    }

    fn units(&self) -> usize {
        self.x.dim().0 * self.x.dim().1
    }

    fn sum_of_units(&self, pieces: usize) -> Vec<f64> {
        let (examples, features) = (self.x.dim().0, self.features());
        let units = self.x.index_axis(Axis(1), 0);
        let mut partial = vec![0.0; pieces * features];
        let tasks = partial.chunks_exact_mut(features).enumerate().collect();
        self.cpu.run(tasks, |(piece, sums)| {
            let share = examples * piece / pieces..examples * (piece + 1) / pieces;
            add_units(units.slice(s![share, ..]), sums);
        });
        let mut total = partial.split_off(0);
        let rest = total.split_off(features);
        for sums in rest.chunks_exact(features) {
            add(&mut total, sums);
        }
        total
    }

    fn check_finite(&self) -> Result<()> {
        if self.sums.iter().all(|sum| sum.is_finite()) {
            return Ok(());
        }
        let culprit = self
            .x
            .indexed_iter()
            .map(|(index, value)| (index, value.to_f64()))
            .find(|(_, value)| !value.is_finite());
        Err(match culprit {
            Some(((example, location, feature), value)) => Error::NonFinite(format!(
                "x contains {value} at example {example}, location {location}, feature {feature}"
            )),
            None => Error::Numerical("the sum of x over its units overflows".to_owned()),
        })
    }

    fn add_stratum<T: Real>(
        &self,
        out: MatMut<'_, T>,
        stratum: Stratum,
        weight: f64,
        append_one: bool,
        in_place: Option<MatRef<'_, T>>,
        cancel: &Cancel,
    ) -> Result<()> {
        let (units, features, locations) = (self.units(), self.features(), self.locations());
        let (mut inner, mut border, mut corner) = split_border(out, features);
        match stratum {
            Stratum::Total => {
                match in_place {
                    Some(units) => self.add_in_place(inner, weight, units, cancel)?,
                    None => self.add_units(inner, weight, &Centre::Nothing, cancel)?,
                }
                if append_one {
                    let total = weight * units as f64;
                    add_border(&mut border, &mut corner, &self.sums, weight, total);
                }
            }
            Stratum::WithinBatch => {
                let means = self.sums.iter().map(|sum| sum / units as f64);
                let centre = Centre::Batch(split_means(means));
                self.add_units(inner, weight, &centre, cancel)?;
            }
            Stratum::WithinExample => self.add_units(inner, weight, &Centre::Example, cancel)?,
            Stratum::ExampleTotals => {
                let zero = vec![0.0; features];
                self.add_examples(inner, weight, &zero, cancel)?;
                if append_one {
                    // The appended coordinate sums to the number of locations.
                    let ones = locations as f64;
                    let total = weight * ones * ones * self.x.dim().0 as f64;
                    add_border(&mut border, &mut corner, &self.sums, weight * ones, total);
                }
            }
            Stratum::BetweenExamples => {
                let examples = self.x.dim().0 as f64;
                let means: Vec<f64> = self.sums.iter().map(|sum| sum / examples).collect();
                self.add_examples(inner, weight / locations as f64, &means, cancel)?;
            }
            Stratum::Mean => {
                let weight = weight / units as f64;
                add_outer(&mut inner, &self.sums, weight);
                if append_one {
                    let ones = units as f64;
                    let total = weight * ones * ones;
                    add_border(&mut border, &mut corner, &self.sums, weight * ones, total);
                }
            }
        }
        Ok(())
    }

    /// Squares the units, centred, one packed chunk after the other.
    fn add_units<T: Real>(
        &self,
        out: MatMut<'_, T>,
        weight: f64,
        centre: &Centre<T>,
        cancel: &Cancel,
    ) -> Result<()> {
        self.add_chunks(
            self.units(),
            out,
            weight,
            cancel,
            |units, features, block| {
                simd::run(Pack {
                    batch: self,
                    units,
                    features,
                    lines: block,
                    centre,
                });
            },
        )
    }

    /// Squares the units where they lie.
    fn add_in_place<T: Real>(
        &self,
        mut out: MatMut<'_, T>,
        weight: f64,
        units: MatRef<'_, T>,
        cancel: &Cancel,
    ) -> Result<()> {
        for rows in chunks(units.nrows(), units.ncols()) {
            cancel.check()?;
            let part = units.subrows(rows.start, rows.len()).transpose();
            syrk::add_lower(self.cpu, out.as_mut(), part, weight, cancel)?;
        }
        Ok(())
    }

    /// Squares the sums of the examples minus `means`.
    fn add_examples<T: Real>(
        &self,
        out: MatMut<'_, T>,
        weight: f64,
        means: &[f64],
        cancel: &Cancel,
    ) -> Result<()> {
        let examples = self.x.dim().0;
        self.add_chunks(
            examples,
            out,
            weight,
            cancel,
            |rows, features, mut block| {
                for feature in features.clone() {
                    let line = block.line(feature - features.start, 0);
                    for (value, row) in line.iter_mut().zip(rows.clone()) {
                        let sum = self.example_sums[row * self.features() + feature];
                        *value = T::from_f64(sum - means[feature]);
                    }
                }
            },
        )
    }

    /// Adds the squares of `count` rows that `pack` writes, chunk by chunk: its arguments are the
    /// rows and features wanted and where to put them. Long contiguous lines, one per feature, are
    /// what the products read fastest.
    fn add_chunks<T: Real>(
        &self,
        count: usize,
        mut out: MatMut<'_, T>,
        weight: f64,
        cancel: &Cancel,
        pack: impl Fn(Range<usize>, Range<usize>, Lines<'_, T>) + Sync,
    ) -> Result<()> {
        let features = self.features();
        if syrk::is_tall(features, count) {
            self.add_own_chunks(count, out, weight, cancel, pack);
            return cancel.check();
        }
        for rows in chunks(count, features) {
            cancel.check()?;
            let stride = stride_of(rows.len());
            let scratch = self.cpu.scratch.of::<T>();
            scratch.with(features * stride, |packed| {
                let work = COST_OF_READING * (rows.len() * features) as f64;
                let share = features.div_ceil(self.cpu.pieces(work));
                let tasks = packed.chunks_mut(share * stride).enumerate().collect();
                self.cpu.run(tasks, |(piece, data)| {
                    let first = piece * share;
                    let part = first..(first + share).min(features);
                    pack(rows.clone(), part, Lines { data, stride });
                });
                let packed = MatRef::from_row_major_slice(packed, features, stride);
                let packed = packed.subcols(0, rows.len());
                syrk::add_lower(self.cpu, out.as_mut(), packed, weight, cancel)
            })?;
        }
        Ok(())
    }

    /// As [`Self::add_chunks`], each thread packing and squaring chunks of its own that stay in its
    /// cache.
    fn add_own_chunks<T: Real>(
        &self,
        count: usize,
        out: MatMut<'_, T>,
        weight: f64,
        cancel: &Cancel,
        pack: impl Fn(Range<usize>, Range<usize>, Lines<'_, T>) + Sync,
    ) {
        const ELEMENTS: usize = 1 << 18;
        let features = self.features();
        let height = (ELEMENTS / features).max(features / 2).min(count);
        let stride = stride_of(height);
        syrk::add_split_over_depth(self.cpu, out, count, |part, mut target| {
            let scratch = self.cpu.scratch.of::<T>();
            scratch.with(features * stride, |packed| {
                for start in part.clone().step_by(height) {
                    if cancel.is_cancelled() {
                        return;
                    }
                    let rows = start..(start + height).min(part.end);
                    let data = &mut *packed;
                    pack(rows.clone(), 0..features, Lines { data, stride });
                    let lines = MatRef::from_row_major_slice(packed, features, stride);
                    let lines = lines.subcols(0, rows.len());
                    syrk::add_triangle(target.as_mut(), lines, T::from_f64(weight));
                }
            });
        });
    }

    #[inline(always)]
    fn example_means<T: Real>(&self, example: usize, features: Range<usize>) -> Means<T> {
        let start = example * self.features();
        let sums = &self.example_sums[start + features.start..start + features.end];
        split_means(sums.iter().map(|sum| sum / self.locations() as f64))
    }
}

/// Number of features up to which packing costs more than the product gains from it.
const WIDEST_IN_PLACE: usize = 256;

/// What reading an element, converting it and writing it costs, in flops of a product.
const COST_OF_READING: f64 = 30.0;

/// What is subtracted from a unit before it is squared.
enum Centre<T> {
    Nothing,
    Batch(Means<T>),
    Example,
}

/// A mean as a rounded part and what rounding left over: subtracting both keeps the precision of
/// the double in single-precision arithmetic.
struct Means<T> {
    rounded: Vec<T>,
    rest: Vec<T>,
}

impl<T> Means<T> {
    fn part(&self, features: Range<usize>) -> (&[T], &[T]) {
        (&self.rounded[features.clone()], &self.rest[features])
    }
}

fn split_means<T: Real>(means: impl Iterator<Item = f64>) -> Means<T> {
    let (rounded, rest) = means
        .map(|mean| {
            let rounded = T::from_f64(mean);
            (rounded, T::from_f64(mean - rounded.to_f64()))
        })
        .unzip();
    Means { rounded, rest }
}

/// Writes these features of these units, minus their centre.
struct Pack<'a, 'x, 'b, S, T> {
    batch: &'a Batch<'x, S>,
    units: Range<usize>,
    features: Range<usize>,
    lines: Lines<'b, T>,
    centre: &'a Centre<T>,
}

impl<S: Element, T: Real> Loop for Pack<'_, '_, '_, S, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            batch,
            units,
            features,
            mut lines,
            centre,
        } = self;
        let nothing;
        let common = match centre {
            Centre::Batch(means) => means.part(features.clone()),
            _ => {
                nothing = vec![T::default(); features.len()];
                (&nothing[..], &nothing[..])
            }
        };
        if let (Some(flat), Centre::Nothing | Centre::Batch(_)) = (&batch.flat, centre) {
            pack_run(flat.slice(s![units, features]), &mut lines, 0, common);
            return;
        }
        let locations = batch.locations();
        let mut unit = units.start;
        while unit < units.end {
            let (example, location) = (unit / locations, unit % locations);
            let count = (locations - location).min(units.end - unit);
            let run = s![example, location..location + count, features.clone()];
            let own;
            let means = match centre {
                Centre::Example => {
                    own = batch.example_means(example, features.clone());
                    own.part(0..features.len())
                }
                _ => common,
            };
            pack_run(batch.x.slice(run), &mut lines, unit - units.start, means);
            unit += count;
        }
    }
}

/// Packed units: one line per feature, one column per unit.
struct Lines<'a, T> {
    data: &'a mut [T],
    stride: usize,
}

impl<T> Lines<'_, T> {
    /// The line of a feature from this unit on.
    #[inline(always)]
    fn line(&mut self, feature: usize, unit: usize) -> &mut [T] {
        &mut self.data[feature * self.stride + unit..(feature + 1) * self.stride]
    }
}

/// Writes the transpose of `x` (units by features) minus the means, from column `first` on.
#[inline(always)]
fn pack_run<S: Element, T: Real>(
    x: ArrayView2<'_, S>,
    lines: &mut Lines<'_, T>,
    first: usize,
    (rounded, rest): (&[T], &[T]),
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
            for offset in 0..width {
                let target = lines.line(feature + offset, first + unit);
                if let (Some(target), TILE) = (target.first_chunk_mut::<TILE>(), rows.len()) {
                    for unit in 0..TILE {
                        target[unit] = tile[unit][offset];
                    }
                } else {
                    for (target, centred) in target.iter_mut().zip(&tile[..rows.len()]) {
                        *target = centred[offset];
                    }
                }
            }
        }
    }
}

/// Units and features of a tile: one cache line of single-precision numbers each.
const TILE: usize = 16;

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

/// The length of a line with room for this many units: a cache line more than a round number keeps
/// neighbouring features out of the same cache set.
fn stride_of(units: usize) -> usize {
    units.next_multiple_of(16) + 16
}

/// Ranges of rows that keep the packed buffer within a few megabytes, tall enough that writing the
/// output once per chunk costs little.
fn chunks(rows: usize, features: usize) -> impl Iterator<Item = Range<usize>> {
    const ELEMENTS: usize = 1 << 22;
    let height = (ELEMENTS / features).clamp(2048, 8192);
    (0..rows)
        .step_by(height)
        .map(move |start| start..(start + height).min(rows))
}

fn add(sums: &mut [f64], values: &[f64]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += value;
    }
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

/// The leading block, the part of the last row below it, and the corner.
fn split_border<T>(
    out: MatMut<'_, T>,
    features: usize,
) -> (MatMut<'_, T>, MatMut<'_, T>, MatMut<'_, T>) {
    let (inner, _, border, corner) = out.split_at_mut(features, features);
    (inner, border, corner)
}

fn add_border<T: Real>(
    border: &mut MatMut<'_, T>,
    corner: &mut MatMut<'_, T>,
    sums: &[f64],
    weight: f64,
    total: f64,
) {
    for (feature, sum) in sums.iter().enumerate() {
        border[(0, feature)] += T::from_f64(weight * sum);
    }
    corner[(0, 0)] += T::from_f64(total);
}

fn add_outer<T: Real>(out: &mut MatMut<'_, T>, sums: &[f64], weight: f64) {
    let row: Vec<T> = sums.iter().map(|&sum| T::from_f64(sum)).collect();
    for (i, &sum) in sums.iter().enumerate() {
        let factor = T::from_f64(weight * sum);
        let target = out
            .as_mut()
            .subrows_mut(i, 1)
            .subcols_mut(0, i + 1)
            .row_mut(0);
        match target.try_as_row_major_mut() {
            Some(target) => {
                for (target, &value) in target.as_slice_mut().iter_mut().zip(&row) {
                    *target += factor * value;
                }
            }
            None => {
                for (j, &value) in row[..=i].iter().enumerate() {
                    out[(i, j)] += factor * value;
                }
            }
        }
    }
}
