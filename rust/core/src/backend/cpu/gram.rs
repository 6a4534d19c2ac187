//! Strata of a mini-batch on the CPU: sums, then one packed (centred) buffer at a time.

use std::ops::Range;

use faer::{MatMut, MatRef};
use ndarray::{ArrayView3, Ix3, s};

use super::{Cpu, split_rows, syrk};
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
    let units = into_three(x.array::<S>()?)?;
    let batch = Batch::new(cpu, units, cancel)?;
    for (out, &StratumWeight { stratum, weight }) in out.into_iter().zip(strata) {
        let stratum = if batch.locations() == 1 {
            stratum.with_one_location()
        } else {
            Some(stratum)
        };
        let Some(stratum) = stratum.filter(|_| weight != 0.0) else {
            continue;
        };
        let direct = match stratum {
            Stratum::Total => x.flatten_units().and_then(|flat| flat.matrix::<T>().ok()),
            _ => None,
        };
        batch.add_stratum(out, stratum, weight, append_one, direct, cancel)?;
    }
    Ok(())
}

fn into_three<S>(array: ndarray::ArrayViewD<'_, S>) -> Result<ArrayView3<'_, S>> {
    array
        .into_dimensionality::<Ix3>()
        .map_err(|error| Error::Shape(format!("x must be [N, T, K]: {error}")))
}

/// A mini-batch with the sums its strata need.
struct Batch<'a, S> {
    cpu: &'a Cpu,
    /// `[examples, locations, features]`.
    x: ArrayView3<'a, S>,
    /// Sum over all units, per feature.
    sums: Vec<f64>,
    /// Sum over the locations of each example, `[examples, features]`; only where there is more
    /// than one location.
    example_sums: Vec<f64>,
}

impl<'a, S: Element> Batch<'a, S> {
    /// Takes the sums; a sum of finite numbers is finite, so they also show NaN and infinity.
    fn new(cpu: &'a Cpu, x: ArrayView3<'a, S>, cancel: &Cancel) -> Result<Self> {
        let (examples, locations, features) = x.dim();
        let mut batch = Self {
            cpu,
            x,
            sums: vec![0.0; features],
            example_sums: Vec::new(),
        };
        let elements = (examples * locations * features) as f64;
        if locations == 1 {
            batch.sums = batch.sum_of_units(cpu.pieces(4.0 * elements));
        } else {
            let mut sums = vec![0.0; examples * features];
            let rows = MatMut::from_row_major_slice_mut(&mut sums, examples, features);
            let pieces = split_rows(rows, cpu.pieces(4.0 * elements));
            cpu.run(pieces, |(start, mut block)| {
                for i in 0..block.nrows() {
                    if cancel.is_cancelled() {
                        return;
                    }
                    let example = start + i;
                    let row = block.as_mut().row_mut(i).try_as_row_major_mut();
                    if let Some(row) = row {
                        batch.add_units(example..example + 1, row.as_slice_mut());
                    }
                }
            });
            for row in sums.chunks_exact(features) {
                add(&mut batch.sums, row);
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
        let mut partial = vec![0.0; pieces * features];
        let tasks: Vec<_> = partial.chunks_exact_mut(features).enumerate().collect();
        self.cpu.run(tasks, |(piece, sums)| {
            let share = examples * piece / pieces..examples * (piece + 1) / pieces;
            self.add_units(share, sums);
        });
        let mut total = vec![0.0; features];
        for sums in partial.chunks_exact(features) {
            add(&mut total, sums);
        }
        total
    }

    /// Adds every unit of these examples to `sums`.
    fn add_units(&self, examples: Range<usize>, sums: &mut [f64]) {
        let part = self.x.slice(s![examples, .., ..]);
        if self.rows_are_contiguous() {
            let rows: Vec<&[S]> = part
                .rows()
                .into_iter()
                .filter_map(|row| row.to_slice())
                .collect();
            add_rows(&rows, sums);
        } else {
            // Feature by feature: then the inner loop runs along whatever is contiguous.
            for (sum, values) in sums.iter_mut().zip(part.axis_iter(ndarray::Axis(2))) {
                *sum += values.fold(0.0, |sum, value| sum + value.to_f64());
            }
        }
    }

    fn rows_are_contiguous(&self) -> bool {
        self.x.strides()[2] == 1 || self.features() == 1
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
        direct: Option<MatRef<'_, T>>,
        cancel: &Cancel,
    ) -> Result<()> {
        let (units, features, locations) = (self.units(), self.features(), self.locations());
        let (mut inner, mut border, mut corner) = split_border(out, features);
        match stratum {
            Stratum::Total => {
                match direct {
                    Some(x) => self.add_direct(inner, x, weight, cancel)?,
                    None => self.add_packed(inner, weight, &Centre::Nothing, cancel)?,
                }
                if append_one {
                    let total = weight * units as f64;
                    add_border(&mut border, &mut corner, &self.sums, weight, total);
                }
            }
            Stratum::WithinBatch => {
                let means = self.sums.iter().map(|sum| sum / units as f64);
                let centre = Centre::Batch(split_means(means));
                self.add_packed(inner, weight, &centre, cancel)?;
            }
            Stratum::WithinExample => self.add_packed(inner, weight, &Centre::Example, cancel)?,
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

    /// Squares the units where they lie.
    fn add_direct<T: Real>(
        &self,
        mut out: MatMut<'_, T>,
        x: MatRef<'_, T>,
        weight: f64,
        cancel: &Cancel,
    ) -> Result<()> {
        for rows in chunks(x.nrows(), x.ncols()) {
            cancel.check()?;
            let part = x.subrows(rows.start, rows.len());
            syrk::add_lower(self.cpu, out.as_mut(), part, weight, cancel)?;
        }
        Ok(())
    }

    /// Squares the units, centred, one packed chunk after the other.
    fn add_packed<T: Real>(
        &self,
        mut out: MatMut<'_, T>,
        weight: f64,
        centre: &Centre<T>,
        cancel: &Cancel,
    ) -> Result<()> {
        let features = self.features();
        for rows in chunks(self.units(), features) {
            cancel.check()?;
            let scratch = self.cpu.scratch.of::<T>();
            scratch.with(rows.len() * features, |packed| {
                let matrix = MatMut::from_row_major_slice_mut(packed, rows.len(), features);
                let pieces = self.cpu.pieces(4.0 * (rows.len() * features) as f64);
                self.cpu.run(split_rows(matrix, pieces), |(start, block)| {
                    self.pack(rows.start + start, block, centre);
                });
                let packed = MatRef::from_row_major_slice(packed, rows.len(), features);
                syrk::add_lower(self.cpu, out.as_mut(), packed, weight, cancel)
            })?;
        }
        Ok(())
    }

    /// Squares the sums of the examples minus `means`.
    fn add_examples<T: Real>(
        &self,
        mut out: MatMut<'_, T>,
        weight: f64,
        means: &[f64],
        cancel: &Cancel,
    ) -> Result<()> {
        let features = self.features();
        for rows in chunks(self.x.dim().0, features) {
            cancel.check()?;
            let sums = &self.example_sums[rows.start * features..rows.end * features];
            let scratch = self.cpu.scratch.of::<T>();
            scratch.with(rows.len() * features, |packed| {
                for (row, sums) in packed
                    .chunks_exact_mut(features)
                    .zip(sums.chunks_exact(features))
                {
                    for ((value, &sum), &mean) in row.iter_mut().zip(sums).zip(means) {
                        *value = T::from_f64(sum - mean);
                    }
                }
                let packed = MatRef::from_row_major_slice(packed, rows.len(), features);
                syrk::add_lower(self.cpu, out.as_mut(), packed, weight, cancel)
            })?;
        }
        Ok(())
    }

    /// Writes units `first..` into the rows of `block`.
    fn pack<T: Real>(&self, first: usize, mut block: MatMut<'_, T>, centre: &Centre<T>) {
        let locations = self.locations();
        let mut row = 0;
        while row < block.nrows() {
            let (example, location) = ((first + row) / locations, (first + row) % locations);
            let count = if locations == 1 && !matches!(centre, Centre::Example) {
                block.nrows() - row
            } else {
                (locations - location).min(block.nrows() - row)
            };
            let own;
            let means = match centre {
                Centre::Nothing => None,
                Centre::Batch(means) => Some(means),
                Centre::Example => {
                    own = self.example_means(example);
                    Some(&own)
                }
            };
            let part = if locations == 1 {
                self.x.slice(s![example..example + count, 0, ..])
            } else {
                self.x.slice(s![example, location..location + count, ..])
            };
            pack_rows(part, block.as_mut().subrows_mut(row, count), means);
            row += count;
        }
    }

    fn example_means<T: Real>(&self, example: usize) -> Means<T> {
        let (locations, features) = (self.locations() as f64, self.features());
        let sums = &self.example_sums[example * features..(example + 1) * features];
        split_means(sums.iter().map(|sum| sum / locations))
    }
}

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

fn split_means<T: Real>(means: impl Iterator<Item = f64>) -> Means<T> {
    let (rounded, rest) = means
        .map(|mean| {
            let rounded = T::from_f64(mean);
            (rounded, T::from_f64(mean - rounded.to_f64()))
        })
        .unzip();
    Means { rounded, rest }
}

fn pack_rows<S: Element, T: Real>(
    x: ndarray::ArrayView2<'_, S>,
    mut block: MatMut<'_, T>,
    means: Option<&Means<T>>,
) {
    const TILE: usize = 32;
    let (rows, features) = x.dim();
    if x.strides()[1] == 1 || features == 1 {
        for (i, source) in x.rows().into_iter().enumerate() {
            let target = block.as_mut().row_mut(i).try_as_row_major_mut();
            if let (Some(target), Some(source)) = (target, source.to_slice()) {
                pack_row(source, target.as_slice_mut(), means);
            }
        }
        return;
    }
    // Transpose in tiles, so that neither side strides through memory for long.
    for row in (0..rows).step_by(TILE) {
        for feature in (0..features).step_by(TILE) {
            for k in feature..(feature + TILE).min(features) {
                for u in row..(row + TILE).min(rows) {
                    let value = T::from_element(x[(u, k)]);
                    block[(u, k)] = match means {
                        Some(means) => value - means.rounded[k] - means.rest[k],
                        None => value,
                    };
                }
            }
        }
    }
}

fn pack_row<S: Element, T: Real>(source: &[S], target: &mut [T], means: Option<&Means<T>>) {
    match means {
        None => {
            for (target, &source) in target.iter_mut().zip(source) {
                *target = T::from_element(source);
            }
        }
        Some(Means { rounded, rest }) => {
            let means = rounded.iter().zip(rest);
            for ((target, &source), (&rounded, &rest)) in target.iter_mut().zip(source).zip(means) {
                *target = T::from_element(source) - rounded - rest;
            }
        }
    }
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

/// Adds rows four at a time: the sums are read and written once per group.
fn add_rows<S: Element>(rows: &[&[S]], sums: &mut [f64]) {
    let (groups, rest) = rows.as_chunks::<4>();
    for &[a, b, c, d] in groups {
        let values = a.iter().zip(b).zip(c.iter().zip(d));
        for (sum, ((a, b), (c, d))) in sums.iter_mut().zip(values) {
            *sum += (a.to_f64() + b.to_f64()) + (c.to_f64() + d.to_f64());
        }
    }
    for row in rest {
        for (sum, value) in sums.iter_mut().zip(*row) {
            *sum += value.to_f64();
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
