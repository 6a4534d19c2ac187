//! Moments of BatchNorms' inputs, and weights merged with BatchNorms, on the threads of the team.

use std::sync::Arc;

use faer::{MatMut, MatRef};
use ndarray::{ArrayView3, ArrayViewMut3, Axis};

use super::blas::cut_rows;
use super::host;
use super::simd::{self, Loop};
use super::source::dimensions;
use super::team::Team;
use crate::element::{Element, Reader, Real};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, MatrixMut};
use crate::merging::{Deviation, Map, MapGradient, Moments, MomentsGradient};

/// Elements that a thread takes at a time: read twice, they are in its cache the second time.
const ELEMENTS: usize = 1 << 15;

/// What reading an element costs, in flops of a product.
const COST_OF_READING: f64 = 4.0;

/// Does the tasks on as many threads as their elements deserve.
fn share<I: Send>(team: &Team, elements: usize, tasks: Vec<I>, work: impl Fn(I) + Sync) {
    if team.pieces(COST_OF_READING * elements as f64) > 1 {
        team.run(tasks, work);
    } else {
        tasks.into_iter().for_each(work);
    }
}

// --- moments ------------------------------------------------------------------------------------

/// Writes the moments of inputs of one type.
pub(super) fn moments<T: Real>(team: &Team, tasks: Vec<Moments<'_, T>>) -> Result<()> {
    let inputs = tasks.iter().map(|task| dimensions(task.x.array::<T>()?));
    let inputs: Vec<ArrayView3<'_, T>> = inputs.collect::<Result<_>>()?;
    let mut partial: Vec<Vec<Partial>> = inputs.iter().map(parts_of).collect();
    let elements = inputs.iter().map(|x| x.len()).sum();
    let parts = inputs.iter().zip(&mut partial);
    let parts = parts.flat_map(|(x, parts)| parts.iter_mut().map(move |part| (x, part)));
    share(team, elements, parts.collect(), |(x, part)| {
        let x = x.slice_axis(Axis(0), part.examples.clone().into());
        simd::run(TakeMoments { x, part });
    });
    for (task, parts) in tasks.into_iter().zip(partial) {
        let nothing = Partial {
            examples: 0..0,
            count: 0.0,
            mean: vec![f64::NAN; task.mean.columns()],
            squares: vec![f64::NAN; task.mean.columns()],
        };
        let whole = parts.into_iter().reduce(Partial::and).unwrap_or(nothing);
        write_row(task.mean, whole.mean.iter().copied())?;
        let variance = whole.squares.iter().map(|square| square / whole.count);
        write_row(task.variance, variance)?;
    }
    Ok(())
}

/// Moments of some examples.
struct Partial {
    examples: std::ops::Range<usize>,
    count: f64,
    /// By channel.
    mean: Vec<f64>,
    /// Sums of squared distances from the mean.
    squares: Vec<f64>,
}

/// The examples in parts, of which nothing is known yet.
fn parts_of<T>(x: &ArrayView3<'_, T>) -> Vec<Partial> {
    let (examples, channels, places) = x.dim();
    let height = height(channels * places);
    let part = |first: usize| {
        let examples = first..(first + height).min(examples);
        Partial {
            count: (examples.len() * places) as f64,
            examples,
            mean: vec![0.0; channels],
            squares: vec![0.0; channels],
        }
    };
    (0..examples).step_by(height).map(part).collect()
}

impl Partial {
    /// Those of both (Chan et al. 1983).
    fn and(mut self, other: Self) -> Self {
        let count = self.count + other.count;
        let share = other.count / count;
        let means = self.mean.iter_mut().zip(&other.mean);
        let squares = self.squares.iter_mut().zip(&other.squares);
        for ((mean, theirs), (square, their_square)) in means.zip(squares) {
            let shift = theirs - *mean;
            *mean += shift * share;
            *square += their_square + shift * shift * share * self.count;
        }
        self.count = count;
        self
    }
}

struct TakeMoments<'a, 'p, T> {
    x: ArrayView3<'a, T>,
    part: &'p mut Partial,
}

impl<T: Real> Loop for TakeMoments<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { x, part } = self;
        let Partial {
            count,
            mean,
            squares,
            ..
        } = part;
        let reciprocal = count.recip();
        if x.strides()[1] == 1 {
            for lines in x.outer_iter() {
                for line in lines.lanes(Axis(0)) {
                    if let Some(line) = line.to_slice() {
                        add(mean, line);
                    }
                }
            }
            mean.iter_mut().for_each(|mean| *mean *= reciprocal);
            for lines in x.outer_iter() {
                for line in lines.lanes(Axis(0)) {
                    if let Some(line) = line.to_slice() {
                        add_squares(squares, line, mean);
                    }
                }
            }
            return;
        }
        for ((values, mean), square) in x.axis_iter(Axis(1)).zip(mean).zip(squares) {
            for line in values.outer_iter() {
                *mean += match line.to_slice() {
                    Some(line) => simd::sum(line),
                    None => line.iter().map(|value| value.to_f64()).sum(),
                };
            }
            *mean *= reciprocal;
            for line in values.outer_iter() {
                *square += match line.to_slice() {
                    Some(line) => simd::squares_about(line, *mean),
                    None => {
                        let distances = line.iter().map(|value| value.to_f64() - *mean);
                        distances.map(|distance| distance * distance).sum()
                    }
                };
            }
        }
    }
}

#[inline(always)]
fn add<T: Real>(sums: &mut [f64], values: &[T]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += value.to_f64();
    }
}

#[inline(always)]
fn add_squares<T: Real>(sums: &mut [f64], values: &[T], means: &[f64]) {
    for ((sum, value), mean) in sums.iter_mut().zip(values).zip(means) {
        let distance = value.to_f64() - mean;
        *sum += distance * distance;
    }
}

fn write_row<T: Real>(row: MatrixMut<'_, T>, values: impl Iterator<Item = f64>) -> Result<()> {
    let mut row = host::write(row)?;
    for (index, value) in values.enumerate() {
        row[(0, index)] = T::from_f64(value);
    }
    Ok(())
}

/// Writes what the gradients of moments become in their input.
pub(super) fn moments_backward<T: Real>(
    team: &Team,
    gradient: MomentsGradient<'_, T>,
) -> Result<()> {
    T::read(gradient.x.dtype(), MoveMomentsBack { team, gradient })
}

struct MoveMomentsBack<'a, 't, T> {
    team: &'t Team,
    gradient: MomentsGradient<'a, T>,
}

impl<T: Real> Reader for MoveMomentsBack<'_, '_, T> {
    type Output = ();

    fn read<S: Element>(self) -> Result<()> {
        let MomentsGradient {
            x,
            mean,
            of_mean,
            of_variance,
            keep,
            mut out,
        } = self.gradient;
        let x: ArrayView3<'_, S> = dimensions(x.array()?)?;
        let (_, channels, places) = x.dim();
        let reciprocal = ((x.len() / channels.max(1)) as f64).recip();
        let scaled = |row: Option<Matrix<'_, T>>, factor: f64| -> Result<Vec<T>> {
            let Some(row) = row else {
                return Ok(vec![T::default(); channels]);
            };
            let row = host::read(row)?;
            let each = (0..channels).map(|c| T::from_f64(factor * row[(0, c)].to_f64()));
            Ok(each.collect())
        };
        let affine = Affine {
            mean: scaled(Some(mean), 1.0)?,
            constant: scaled(of_mean, reciprocal)?,
            slope: scaled(of_variance, 2.0 * reciprocal)?,
            keep,
        };
        let mut out: ArrayViewMut3<'_, S> = out
            .array_mut()?
            .into_dimensionality()
            .map_err(|error| Error::Shape(error.to_string()))?;
        let (elements, height) = (x.len(), height(channels * places));
        let parts = x
            .axis_chunks_iter(Axis(0), height)
            .zip(out.axis_chunks_iter_mut(Axis(0), height));
        share(self.team, elements, parts.collect(), |(x, out)| {
            simd::run(WriteAffine {
                x,
                out,
                affine: &affine,
            });
        });
        Ok(())
    }
}

/// By channel: `slope (x - mean) + constant`.
struct Affine<T> {
    mean: Vec<T>,
    slope: Vec<T>,
    constant: Vec<T>,
    /// Whether it is added to what is there.
    keep: bool,
}

struct WriteAffine<'a, 'o, T, S> {
    x: ArrayView3<'a, S>,
    out: ArrayViewMut3<'o, S>,
    affine: &'a Affine<T>,
}

impl<T: Real, S: Element> Loop for WriteAffine<'_, '_, T, S> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { x, mut out, affine } = self;
        let keep = affine.keep;
        let all = affine.mean.iter().zip(&affine.slope).zip(&affine.constant);
        let by_channel = x.strides()[1] == 1 && out.strides()[1] == 1;
        for (x, mut out) in x.outer_iter().zip(out.outer_iter_mut()) {
            if by_channel {
                for (x, out) in x.lanes(Axis(0)).into_iter().zip(out.lanes_mut(Axis(0))) {
                    if let (Some(x), Some(out)) = (x.to_slice(), out.into_slice()) {
                        for ((out, &x), ((&mean, &slope), &constant)) in
                            out.iter_mut().zip(x).zip(all.clone())
                        {
                            write_affine(out, x, mean, slope, constant, keep);
                        }
                    }
                }
                continue;
            }
            for ((x, mut out), ((&mean, &slope), &constant)) in
                x.outer_iter().zip(out.outer_iter_mut()).zip(all.clone())
            {
                if let (Some(x), Some(out)) = (x.to_slice(), out.as_slice_mut()) {
                    for (out, &x) in out.iter_mut().zip(x) {
                        write_affine(out, x, mean, slope, constant, keep);
                    }
                } else {
                    for (out, &x) in out.iter_mut().zip(&x) {
                        write_affine(out, x, mean, slope, constant, keep);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn write_affine<T: Real, S: Element>(
    out: &mut S,
    x: S,
    mean: T,
    slope: T,
    constant: T,
    keep: bool,
) {
    let value = (T::from_element(x) - mean) * slope + constant;
    let kept = if keep {
        T::from_element(*out)
    } else {
        T::default()
    };
    *out = S::from_f64((kept + value).to_f64());
}

// --- merged weights -----------------------------------------------------------------------------

/// A map that can be read.
struct HostMap<'a, T> {
    weight: MatRef<'a, T>,
    bias: Option<MatRef<'a, T>>,
    gamma: Option<MatRef<'a, T>>,
    mean: MatRef<'a, T>,
    variance: MatRef<'a, T>,
    epsilon: f64,
}

impl<'a, T: Real> HostMap<'a, T> {
    fn read(map: &Map<'a, T>) -> Result<Self> {
        Ok(Self {
            weight: host::read(map.weight)?,
            bias: map.bias.map(host::read).transpose()?,
            gamma: map.gamma.map(host::read).transpose()?,
            mean: host::read(map.mean)?,
            variance: host::read(map.variance)?,
            epsilon: map.epsilon,
        })
    }

    /// One over the standard deviation, the scale, and the bias less the mean, of an output.
    fn numbers(&self, row: usize) -> (f64, f64, f64) {
        let at = |x: MatRef<'_, T>| x[(0, row)].to_f64();
        let inverse = (at(self.variance) + self.epsilon).sqrt().recip();
        let gamma = self.gamma.map_or(1.0, at);
        (inverse, gamma, self.bias.map_or(0.0, at) - at(self.mean))
    }
}

/// A row without gaps.
fn line<T: Real>(x: MatRef<'_, T>, row: usize) -> Result<&[T]> {
    let line = x.row(row).try_as_row_major().map(|row| row.as_slice());
    line.ok_or_else(with_gaps)
}

fn with_gaps() -> Error {
    Error::Internal("a row with gaps, which was looked for before".to_owned())
}

/// A row without gaps, to be written to.
fn line_mut<T: Real>(x: MatMut<'_, T>, row: usize) -> Result<&mut [T]> {
    let line = x.row_mut(row).try_as_row_major_mut();
    line.map(|row| row.as_slice_mut()).ok_or_else(with_gaps)
}

/// Rows that a thread takes at a time, of this width.
fn height(width: usize) -> usize {
    (ELEMENTS / width.max(1)).max(1)
}

/// Does work on blocks of the layers' rows, as many threads as they deserve.
fn share_rows<I: Send>(
    team: &Team,
    elements: usize,
    blocks: Vec<I>,
    work: impl Fn(I) -> Result<()> + Sync,
) -> Result<()> {
    let mut outcomes: Vec<Result<()>> = blocks.iter().map(|_| Ok(())).collect();
    let tasks = blocks.into_iter().zip(&mut outcomes).collect();
    share(team, elements, tasks, |(block, outcome)| {
        *outcome = work(block)
    });
    outcomes.into_iter().collect()
}

/// Writes how far merged weights are from anchors.
pub(super) fn merge<T: Real>(team: &Team, layers: Vec<Deviation<'_, T>>) -> Result<()> {
    let (mut elements, mut blocks) = (0, Vec::new());
    for layer in layers {
        let map = Arc::new(HostMap::read(&layer.map)?);
        let beta = layer.beta.map(host::read).transpose()?;
        let (anchor, out) = (host::read(layer.anchor)?, host::write(layer.out)?);
        elements += out.nrows() * out.ncols();
        let rows = cut_rows(out, height(anchor.ncols())).into_iter();
        blocks.extend(rows.map(|(first, out)| (Arc::clone(&map), beta, anchor, first, out)));
    }
    share_rows(
        team,
        elements,
        blocks,
        |(map, beta, anchor, first, mut out)| {
            for i in 0..out.nrows() {
                let row = first + i;
                let (inverse, gamma, centred) = map.numbers(row);
                let gain = gamma * inverse;
                let shift = beta.map_or(0.0, |beta| beta[(0, row)].to_f64()) + gain * centred;
                simd::run(MergeRow {
                    gain: T::from_f64(gain),
                    shift: T::from_f64(shift),
                    weight: line(map.weight, row)?,
                    anchor: line(anchor, row)?,
                    out: line_mut(out.as_mut(), i)?,
                });
            }
            Ok(())
        },
    )
}

struct MergeRow<'a, T> {
    gain: T,
    shift: T,
    weight: &'a [T],
    anchor: &'a [T],
    out: &'a mut [T],
}

impl<T: Real> Loop for MergeRow<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let values = self.out.iter_mut().zip(self.anchor);
        for ((out, &anchor), &weight) in values.zip(self.weight) {
            *out = self.gain * weight - anchor;
        }
        if let (Some(out), Some(&anchor)) = (self.out.last_mut(), self.anchor.last()) {
            *out = self.shift - anchor;
        }
    }
}

/// Writes what the gradients of merged weights become.
pub(super) fn merge_backward<T: Real>(team: &Team, layers: Vec<MapGradient<'_, T>>) -> Result<()> {
    let (mut elements, mut blocks) = (0, Vec::new());
    for layer in layers {
        let map = Arc::new(HostMap::read(&layer.map)?);
        let gradient = host::read(layer.gradient)?;
        let (rows, width) = (gradient.nrows(), gradient.ncols());
        elements += rows * width;
        let height = height(width);
        let count = rows.div_ceil(height);
        let weights = match layer.weight {
            Some(weight) => some(cut_rows(host::write(weight)?, height)),
            None => none(count),
        };
        let mut vectors = Vec::with_capacity(layer.rows.len());
        for row in layer.rows {
            vectors.push(match row {
                Some(row) => some(cut_rows(host::write(row)?.transpose_mut(), height)),
                None => none(count),
            });
        }
        let mut vectors: Vec<_> = vectors.into_iter().map(Vec::into_iter).collect();
        for (block, weight) in weights.into_iter().enumerate() {
            let own: Vec<_> = vectors.iter_mut().filter_map(Iterator::next).collect();
            blocks.push((Arc::clone(&map), gradient, block * height, weight, own));
        }
    }
    share_rows(
        team,
        elements,
        blocks,
        |(map, gradient, first, mut weight, mut rows)| {
            let end = (first + height(gradient.ncols())).min(gradient.nrows());
            for row in first..end {
                let (inverse, gamma, centred) = map.numbers(row);
                let gain = gamma * inverse;
                let gradient = line(gradient, row)?;
                let Some((&of_shift, of_weight)) = gradient.split_last() else {
                    return Err(with_gaps());
                };
                let to_weight = match &mut weight {
                    Some(weight) => line_mut(weight.as_mut(), row - first)?,
                    None => &mut [],
                };
                let of_gain = simd::run(MoveBack {
                    gain: T::from_f64(gain),
                    gradient: of_weight,
                    weight: line(map.weight, row)?,
                    out: to_weight,
                }) + of_shift.to_f64() * centred;
                let through_gain = gain * of_shift.to_f64();
                let of_rows = [
                    through_gain,
                    inverse * of_gain,
                    of_shift.to_f64(),
                    -through_gain,
                    -0.5 * gain * inverse * inverse * of_gain,
                ];
                for (target, value) in rows.iter_mut().zip(of_rows) {
                    if let Some(target) = target {
                        target[(row - first, 0)] = T::from_f64(value);
                    }
                }
            }
            Ok(())
        },
    )
}

/// The blocks of a matrix that is there.
fn some<T>(blocks: Vec<(usize, MatMut<'_, T>)>) -> Vec<Option<MatMut<'_, T>>> {
    blocks.into_iter().map(|(_, block)| Some(block)).collect()
}

/// As many blocks of one that is not.
fn none<'a, T>(count: usize) -> Vec<Option<MatMut<'a, T>>> {
    (0..count).map(|_| None).collect()
}

/// Writes `gain * gradient`, where that is wanted; the result is the inner product with the weights.
struct MoveBack<'a, T> {
    gain: T,
    gradient: &'a [T],
    weight: &'a [T],
    out: &'a mut [T],
}

impl<T: Real> Loop for MoveBack<'_, T> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        for (out, &gradient) in self.out.iter_mut().zip(self.gradient) {
            *out = self.gain * gradient;
        }
        simd::dot(self.gradient, self.weight)
    }
}
