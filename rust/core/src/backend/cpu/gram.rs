//! Strata of a mini-batch on the CPU: sums, then one packed (centred) buffer at a time.

use std::ops::Range;

use faer::{MatMut, MatRef};

use super::patches::Patches;
use super::simd::{self, Loop};
use super::source::{COST_OF_READING, Dense, Lines, Means, Source, Total, chunks, runs};
use super::syrk;
use super::team::Team;
use crate::cancel::Cancel;
use crate::element::{Element, Reader, Real};
use crate::error::{Error, Result};
use crate::strata::Stratum;
use crate::units::{StratumWeight, Units};

/// What is to be added: the weighted sum of squares and products of each stratum, to the lower
/// triangles of its outputs, one for each group of consecutive features.
pub(super) struct Squares<'a, 'x, T: 'static> {
    pub(super) team: &'a Team,
    pub(super) units: &'a Units<'x>,
    pub(super) strata: &'a [StratumWeight],
    pub(super) append_one: bool,
    pub(super) out: Vec<Vec<MatMut<'a, T>>>,
    pub(super) cancel: &'a Cancel,
}

impl<T: Real> Reader for Squares<'_, '_, T> {
    type Output = ();

    fn read<S: Element>(self) -> Result<()> {
        match self.units {
            Units::Dense(x) => self.add(&Dense::<S>::new(x)?),
            Units::Patches(x, geometry) => self.add(&Patches::<S>::new(x, geometry)?),
        }
    }
}

impl<T: Real> Squares<'_, '_, T> {
    fn add<S: Source>(self, source: &S) -> Result<()> {
        let Self {
            append_one, cancel, ..
        } = self;
        let batch = SummedBatch::new(self.team, source, self.strata, cancel)?;
        for (out, weighted) in self.out.into_iter().zip(self.strata) {
            let stratum = if batch.locations == 1 {
                weighted.stratum.with_one_location()
            } else {
                Some(weighted.stratum)
            };
            let weight = weighted.weight;
            match stratum.filter(|_| weight != 0.0) {
                Some(Stratum::Mean) if weighted.as_root => batch.add_root(out, weight, append_one),
                Some(stratum) => batch.add_stratum(out, stratum, weight, append_one, cancel)?,
                None => {}
            }
        }
        Ok(())
    }
}

/// A mini-batch with the sums its strata need.
struct SummedBatch<'a, S> {
    team: &'a Team,
    source: &'a S,
    examples: usize,
    locations: usize,
    features: usize,
    /// Sum over all units, per feature.
    sums: Vec<f64>,
    /// Sum over the locations of each example, `[examples, features]`; only where a stratum tells
    /// examples of more than one location apart.
    example_sums: Vec<f64>,
}

impl<'a, S: Source> SummedBatch<'a, S> {
    /// Takes the sums; a sum of finite numbers is finite, so they also show NaN and infinity.
    fn new(
        team: &'a Team,
        source: &'a S,
        strata: &[StratumWeight],
        cancel: &Cancel,
    ) -> Result<Self> {
        let (examples, locations, features) = source.shape();
        let pieces = team.pieces(COST_OF_READING * (examples * locations * features) as f64);
        let apart = |weight: &StratumWeight| weight.stratum.tells_examples_apart();
        let example_sums = if locations > 1 && strata.iter().any(apart) {
            sums_of(team, source, examples, pieces, cancel)
        } else {
            Vec::new()
        };
        let partial;
        let parts = if example_sums.is_empty() {
            partial = sums_of(team, source, pieces, pieces, cancel);
            &partial
        } else {
            &example_sums
        };
        let mut sums = vec![0.0; features];
        for part in parts.chunks_exact(features) {
            add(&mut sums, part);
        }
        cancel.check()?;
        check_finite(source, &sums)?;
        Ok(Self {
            team,
            source,
            examples,
            locations,
            features,
            sums,
            example_sums,
        })
    }

    fn units(&self) -> usize {
        self.examples * self.locations
    }

    /// Adds the root of the mean's stratum to a row for each group.
    fn add_root<T: Real>(&self, out: Vec<MatMut<'_, T>>, weight: f64, append_one: bool) {
        let weight = (weight / self.units() as f64).sqrt();
        let groups = self.sums.chunks_exact(self.features / out.len());
        for (mut out, sums) in out.into_iter().zip(groups) {
            for (feature, sum) in sums.iter().enumerate() {
                out[(0, feature)] += T::from_f64(weight * sum);
            }
            if append_one {
                out[(0, sums.len())] += T::from_f64(weight * self.units() as f64);
            }
        }
    }

    fn add_stratum<T: Real>(
        &self,
        out: Vec<MatMut<'_, T>>,
        stratum: Stratum,
        weight: f64,
        append_one: bool,
        cancel: &Cancel,
    ) -> Result<()> {
        let size = self.features / out.len();
        let mut inners = Vec::with_capacity(out.len());
        let mut borders = Vec::with_capacity(out.len());
        for out in out {
            let (inner, border) = split_border(out, size);
            inners.push(inner);
            borders.push(border);
        }
        let border = match stratum {
            Stratum::Total => {
                self.add_squares(inners, &Rows::Units(Centre::Nothing), weight, cancel)?;
                Border::new(weight, 1.0, self.units())
            }
            Stratum::WithinBatch => {
                let means = self.sums.iter().map(|sum| sum / self.units() as f64);
                let centre = Centre::Batch(Means::new(means));
                return self.add_squares(inners, &Rows::Units(centre), weight, cancel);
            }
            Stratum::WithinExample => {
                return self.add_squares(inners, &Rows::Units(Centre::Example), weight, cancel);
            }
            Stratum::ExampleTotals => {
                let rows = Rows::ExampleSums(vec![0.0; self.features]);
                self.add_squares(inners, &rows, weight, cancel)?;
                // The appended coordinate sums to the number of locations.
                Border::new(weight, self.locations as f64, self.examples)
            }
            Stratum::BetweenExamples => {
                let means = self.sums.iter().map(|sum| sum / self.examples as f64);
                let rows = Rows::ExampleSums(means.collect());
                let weight = weight / self.locations as f64;
                return self.add_squares(inners, &rows, weight, cancel);
            }
            Stratum::Mean => {
                let weight = weight / self.units() as f64;
                for (inner, sums) in inners.iter_mut().zip(self.sums.chunks_exact(size)) {
                    add_outer(inner, sums, weight);
                }
                Border::new(weight, self.units() as f64, 1)
            }
        };
        if append_one {
            for (out, sums) in borders.into_iter().zip(self.sums.chunks_exact(size)) {
                border.add(out, sums);
            }
        }
        Ok(())
    }

    /// Adds the squares of these rows to the lower triangle of each group: threads share the groups
    /// where there are enough of them, and otherwise the work on each.
    fn add_squares<T: Real>(
        &self,
        mut out: Vec<MatMut<'_, T>>,
        rows: &Rows<T>,
        weight: f64,
        cancel: &Cancel,
    ) -> Result<()> {
        let groups = out.len();
        if groups >= GROUPS_PER_THREAD * self.team.threads() {
            self.share_groups(out, rows, weight, cancel);
            return cancel.check();
        }
        if let (Rows::Units(centre), [out]) = (rows, &mut out[..])
            && self.add_total(out.as_mut(), centre, weight, cancel)?
        {
            return Ok(());
        }
        let size = self.features / groups;
        for (group, mut out) in out.into_iter().enumerate() {
            let features = group * size..(group + 1) * size;
            if syrk::is_tall(size, self.count(rows)) {
                self.add_own_chunks(out, rows, features, weight, cancel);
            } else {
                self.add_chunks(out.as_mut(), rows, features, weight, cancel)?;
            }
            cancel.check()?;
        }
        Ok(())
    }

    /// How many rows there are.
    fn count<T>(&self, rows: &Rows<T>) -> usize {
        match rows {
            Rows::Units(_) => self.units(),
            Rows::ExampleSums(_) => self.examples,
        }
    }

    /// Adds the squares of the units as they are, in the source's own way, and subtracts those of
    /// the centre; false, and nothing done, where packing what is left takes less or keeps digits.
    fn add_total<T: Real>(
        &self,
        mut out: MatMut<'_, T>,
        centre: &Centre<T>,
        weight: f64,
        cancel: &Cancel,
    ) -> Result<bool> {
        let count = match centre {
            Centre::Example if self.locations < FEWEST_LOCATIONS => return Ok(false),
            Centre::Example => self.locations as f64,
            _ => self.units() as f64,
        };
        let rows = match centre {
            Centre::Example => &self.example_sums,
            _ => &self.sums,
        };
        let subtracted = || {
            let mut squares = vec![0.0; self.features];
            for row in rows.chunks_exact(self.features) {
                let sums = squares.iter_mut().zip(row);
                sums.for_each(|(square, sum)| *square += sum * sum / count);
            }
            squares
        };
        let total = Total {
            team: self.team,
            weight,
            centre: (!matches!(centre, Centre::Nothing)).then(subtracted),
            cancel,
        };
        if !self.source.add_total(out.as_mut(), &total)? {
            return Ok(false);
        }
        match centre {
            Centre::Nothing => {}
            Centre::Batch(_) => add_outer(&mut out, &self.sums, -weight / count),
            Centre::Example => {
                let rows = Rows::ExampleSums(vec![0.0; self.features]);
                self.add_squares(vec![out], &rows, -weight / count, cancel)?;
            }
        }
        Ok(true)
    }

    /// Adds the squares of rows that are packed chunk by chunk. Long contiguous lines, one per
    /// feature, are what the products read fastest.
    fn add_chunks<T: Real>(
        &self,
        mut out: MatMut<'_, T>,
        rows: &Rows<T>,
        features: Range<usize>,
        weight: f64,
        cancel: &Cancel,
    ) -> Result<()> {
        for chunk in chunks(self.count(rows), features.len()) {
            cancel.check()?;
            let stride = stride_of(chunk.len());
            let scratch = self.team.scratch::<T>();
            scratch.with(features.len() * stride, |packed| {
                let work = COST_OF_READING * (chunk.len() * features.len()) as f64;
                let share = features.len().div_ceil(self.team.pieces(work));
                let share = share.next_multiple_of(self.source.quantum());
                let tasks = packed.chunks_mut(share * stride).enumerate().collect();
                self.team.run(tasks, |(piece, data)| {
                    let first = features.start + piece * share;
                    let part = first..(first + share).min(features.end);
                    self.pack(rows, chunk.clone(), part, Lines { data, stride });
                });
                let packed = MatRef::from_row_major_slice(packed, features.len(), stride);
                let packed = packed.subcols(0, chunk.len());
                syrk::add_lower(self.team, out.as_mut(), &[packed], weight, cancel)
            })?;
        }
        Ok(())
    }

    /// As [`Self::add_chunks`], each thread packing and squaring chunks of its own that stay in its
    /// cache.
    fn add_own_chunks<T: Real>(
        &self,
        out: MatMut<'_, T>,
        rows: &Rows<T>,
        features: Range<usize>,
        weight: f64,
        cancel: &Cancel,
    ) {
        let height = (OWN_ELEMENTS / features.len()).max(features.len() / 2);
        syrk::add_split_over_depth(self.team, out, self.count(rows), |part, target| {
            let mut groups = [target];
            self.add_alone(
                &mut groups,
                rows,
                part,
                features.clone(),
                height,
                weight,
                cancel,
            );
        });
    }

    /// Each thread packs and squares a few groups at a time: as many as make the rows worth
    /// reading.
    fn share_groups<T: Real>(
        &self,
        mut out: Vec<MatMut<'_, T>>,
        rows: &Rows<T>,
        weight: f64,
        cancel: &Cancel,
    ) {
        const QUANTA: usize = 16;
        let count = self.count(rows);
        let size = self.features / out.len();
        let pieces = self
            .team
            .pieces(COST_OF_READING * (count * self.features) as f64);
        let block = (QUANTA * self.source.quantum()).div_ceil(size);
        let block = block.min(out.len().div_ceil(GROUPS_PER_THREAD * pieces));
        let height = (OWN_ELEMENTS / (block * size)).max(size / 2);
        let work = |(index, groups): (usize, &mut [MatMut<'_, T>])| {
            let first = index * block * size;
            let features = first..first + groups.len() * size;
            self.add_alone(groups, rows, 0..count, features, height, weight, cancel);
        };
        let tasks = out.chunks_mut(block).enumerate();
        if pieces == 1 {
            tasks.for_each(work);
        } else {
            self.team.run(tasks.collect(), work);
        }
    }

    /// Packs and squares chunks of this height on this thread, until cancelled.
    #[expect(
        clippy::too_many_arguments,
        reason = "one place for the innermost loop"
    )]
    fn add_alone<T: Real>(
        &self,
        groups: &mut [MatMut<'_, T>],
        rows: &Rows<T>,
        part: Range<usize>,
        features: Range<usize>,
        height: usize,
        weight: f64,
        cancel: &Cancel,
    ) {
        let weight = T::from_f64(weight);
        let size = features.len() / groups.len();
        let stride = stride_of(height.min(part.len()));
        let scratch = self.team.scratch::<T>();
        scratch.with(features.len() * stride, |packed| {
            for start in part.clone().step_by(height) {
                if cancel.is_cancelled() {
                    return;
                }
                let chunk = start..(start + height).min(part.end);
                let data = &mut *packed;
                self.pack(
                    rows,
                    chunk.clone(),
                    features.clone(),
                    Lines { data, stride },
                );
                let lines = MatRef::from_row_major_slice(packed, features.len(), stride);
                let lines = lines.subcols(0, chunk.len());
                for (group, out) in groups.iter_mut().enumerate() {
                    let own = lines.subrows(group * size, size);
                    syrk::add_triangle(out.as_mut(), own, weight);
                }
            }
        });
    }

    /// Writes these features of these rows.
    fn pack<T: Real>(
        &self,
        rows: &Rows<T>,
        chunk: Range<usize>,
        features: Range<usize>,
        mut lines: Lines<'_, T>,
    ) {
        match rows {
            Rows::Units(centre) => simd::run(Pack {
                batch: self,
                units: chunk,
                features,
                lines,
                centre,
            }),
            Rows::ExampleSums(means) => {
                for feature in features.clone() {
                    let line = lines.line(feature - features.start, 0);
                    for (value, example) in line.iter_mut().zip(chunk.clone()) {
                        let sum = self.example_sums[example * self.features + feature];
                        *value = T::from_f64(sum - means[feature]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn example_means<T: Real>(&self, example: usize, features: Range<usize>) -> Means<T> {
        let start = example * self.features;
        let sums = &self.example_sums[start + features.start..start + features.end];
        Means::new(sums.iter().map(|sum| sum / self.locations as f64))
    }
}

/// The sums over the units of `parts` ranges of examples, `[parts, features]`, unless cancelled.
fn sums_of<S: Source>(
    team: &Team,
    source: &S,
    parts: usize,
    pieces: usize,
    cancel: &Cancel,
) -> Vec<f64> {
    let (examples, _, features) = source.shape();
    let mut sums = vec![0.0; parts * features];
    let share = parts.div_ceil(pieces);
    let tasks = sums.chunks_mut(share * features).enumerate().collect();
    team.run(tasks, |(piece, sums)| {
        for (index, sums) in sums.chunks_exact_mut(features).enumerate() {
            let part = piece * share + index;
            if !cancel.is_cancelled() {
                let range = examples * part / parts..examples * (part + 1) / parts;
                source.add_sums(range, sums);
            }
        }
    });
    sums
}

fn check_finite<S: Source>(source: &S, sums: &[f64]) -> Result<()> {
    if sums.iter().all(|sum| sum.is_finite()) {
        return Ok(());
    }
    Err(match source.non_finite() {
        Some((value, place)) => Error::NonFinite(format!("x contains {value} at {place}")),
        None => Error::Numerical("the sum of x over its units overflows".to_owned()),
    })
}

/// Locations from which the squares of the means of examples are few beside those of their units.
const FEWEST_LOCATIONS: usize = 16;

/// Groups per thread from which each thread takes groups of its own.
const GROUPS_PER_THREAD: usize = 4;

/// Packed elements that a thread works on alone: they stay in its cache.
const OWN_ELEMENTS: usize = 1 << 18;

/// The rows whose squares make up a stratum.
enum Rows<T> {
    /// The units.
    Units(Centre<T>),
    /// The sums of the examples, minus these.
    ExampleSums(Vec<f64>),
}

/// What is subtracted from a unit before it is squared.
enum Centre<T> {
    Nothing,
    Batch(Means<T>),
    Example,
}

/// Writes these features of these units, minus their centre.
struct Pack<'a, 'b, S, T> {
    batch: &'a SummedBatch<'a, S>,
    units: Range<usize>,
    features: Range<usize>,
    lines: Lines<'b, T>,
    centre: &'a Centre<T>,
}

impl<S: Source, T: Real> Loop for Pack<'_, '_, S, T> {
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
        let count = features.len();
        if matches!(centre, Centre::Example) {
            for (example, locations, before) in runs(units, batch.locations) {
                let first = example * batch.locations;
                let run = first + locations.start..first + locations.end;
                let means = batch.example_means(example, features.clone());
                let means = means.part(0..count);
                batch
                    .source
                    .pack(run, features.clone(), &mut lines, before, means);
            }
            return;
        }
        let nothing;
        let means = match centre {
            Centre::Batch(means) => means.part(features.clone()),
            _ => {
                nothing = Means::zero(count);
                nothing.part(0..count)
            }
        };
        batch.source.pack(units, features, &mut lines, 0, means);
    }
}

/// The length of a line with room for this many units: a cache line more than a round number keeps
/// neighbouring features out of the same cache set.
fn stride_of(units: usize) -> usize {
    units.next_multiple_of(16) + 16
}

fn add(sums: &mut [f64], values: &[f64]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += value;
    }
}

/// The leading block, and the last row from below it to the corner where a one is appended.
fn split_border<T>(out: MatMut<'_, T>, features: usize) -> (MatMut<'_, T>, MatMut<'_, T>) {
    let (above, border) = out.split_at_row_mut(features);
    (above.split_at_col_mut(features).0, border)
}

/// What the appended coordinate adds to the last row.
struct Border {
    /// Times the sums.
    sums: f64,
    corner: f64,
}

impl Border {
    /// For `count` rows in which the appended coordinate has this value.
    fn new(weight: f64, value: f64, count: usize) -> Self {
        Self {
            sums: weight * value,
            corner: weight * value * value * count as f64,
        }
    }

    fn add<T: Real>(&self, mut out: MatMut<'_, T>, sums: &[f64]) {
        for (feature, sum) in sums.iter().enumerate() {
            out[(0, feature)] += T::from_f64(self.sums * sum);
        }
        out[(0, sums.len())] += T::from_f64(self.corner);
    }
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
