//! The sums of squares and products of patches by the offsets of kernel positions (see
//! [`crate::offsets`]): neighbouring offsets are one matrix whose rows overlap.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::{ArrayView5, s};

use super::blas::split_columns;
use super::simd::{self, Loop};
use super::source::{Lines, Means, TILE, Total, pack_run};
use super::team::Team;
use crate::element::{Element, Real};
use crate::error::Result;
use crate::geometry::Slide;
use crate::offsets::{Block, Plan, Product, Strip};

/// Elements of the images that are copied at a time: they stay in the cache.
const CHUNK_ELEMENTS: usize = 1 << 20;

/// Elements of an image with its gaps, above which patches are unfolded bit by bit instead.
const LARGEST_IMAGE: usize = 1 << 23;

/// What putting the products of a pair of positions together takes, in multiplications of a product.
const COST_OF_PAIRS: f64 = 200.0;

/// Parts of the work per thread: more even out a thread that starts late.
const TASKS_PER_THREAD: usize = 4;

/// The plan for these patches, where it takes less work than the patches themselves.
pub(super) fn plan(slides: &[Slide; 3], examples: usize, channels: usize) -> Option<Plan> {
    let plan = Plan::worthwhile(slides, examples, channels, COST_OF_PAIRS)?;
    let fits = plan.rows() * channels <= LARGEST_IMAGE;
    fits.then_some(plan)
}

/// Adds the squares of all patches of `x`, as [`Source::add_total`] is to.
///
/// [`Source::add_total`]: super::source::Source::add_total
pub(super) fn add_squares<S: Element, T: Real>(
    x: &ArrayView5<'_, S>,
    plan: &Plan,
    out: MatMut<'_, T>,
    total: &Total<'_>,
) -> Result<bool> {
    let &Total {
        team,
        weight,
        cancel,
        ..
    } = total;
    let (examples, channels, rows) = (x.dim().0, plan.channels, plan.rows());
    let images = (CHUNK_ELEMENTS / (rows * channels)).clamp(1, examples);
    let copied = (images * rows + plan.reach()) * channels;
    let sums = plan.blocks() * channels * channels;
    team.scratch::<T>().with(copied + sums, |memory| {
        memory.fill(T::default());
        let (copy, sums) = memory.split_at_mut(copied);
        for first in (0..examples).step_by(images) {
            cancel.check()?;
            let chunk = first..(first + images).min(examples);
            let targets = copy.chunks_mut(rows * channels).zip(chunk.clone());
            team.run(targets.collect(), |(target, example)| {
                simd::run(Fill {
                    plan,
                    x,
                    example,
                    target,
                });
            });
            let images = chunk.len();
            let copy = &*copy;
            team.run(plan.tasks(team, sums), |task| {
                if !cancel.is_cancelled() {
                    plan.work(team, copy, images, task);
                }
            });
        }
        cancel.check()?;
        let sums = Sums { plan, sums };
        if !total.keeps_digits(|| sums.diagonal()) {
            return Ok(false);
        }
        sums.add_to(team, out, T::from_f64(weight));
        Ok(true)
    })
}

/// Copies an example, channels innermost, into what is zero elsewhere.
struct Fill<'a, 'x, S, T> {
    plan: &'a Plan,
    x: &'a ArrayView5<'x, S>,
    example: usize,
    target: &'a mut [T],
}

impl<S: Element, T: Real> Loop for Fill<'_, '_, S, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let (plan, channels) = (self.plan, self.plan.channels);
        let [deep, high, wide] = plan.slides.map(|slide| slide.input);
        let zero = Means::zero(wide);
        for z in 0..deep {
            for y in 0..high {
                // What the other sources have for units and features are channels and columns here.
                let row = self.x.slice(s![self.example, .., z, y, ..]);
                let start = plan.row_of([z, y, 0]) * channels;
                let mut lines = Lines {
                    data: &mut self.target[start..start + wide * channels],
                    stride: channels,
                };
                pack_run(row, &mut lines, 0, zero.part(0..wide));
            }
        }
    }
}

/// A part of the work on a chunk of images.
enum Task<'a, T> {
    /// Some columns of a product's sums, from this one on.
    Columns {
        shift: usize,
        first: usize,
        out: MatMut<'a, T>,
    },
    Strip {
        strip: &'a Strip,
        out: MatMut<'a, T>,
    },
}

impl Plan {
    /// The work on a chunk, a few tasks per thread, each with its own part of the sums.
    fn tasks<'a, T: Real>(&'a self, team: &Team, sums: &'a mut [T]) -> Vec<Task<'a, T>> {
        let channels = self.channels;
        let widths: usize = self.products.iter().map(|product| product.width).sum();
        let share = (widths * channels).div_ceil(TASKS_PER_THREAD * team.threads());
        let mut tasks = Vec::new();
        let mut rest = sums;
        for product in &self.products {
            let columns = product.width * channels;
            let (own, others) = rest.split_at_mut(columns * channels);
            rest = others;
            let out = MatMut::from_row_major_slice_mut(own, channels, columns);
            let shift = product.shift;
            let parts = split_columns(out, columns.div_ceil(share)).into_iter();
            tasks.extend(parts.map(|(first, out)| Task::Columns { shift, first, out }));
        }
        let own = rest.chunks_exact_mut(channels * channels).zip(&self.strips);
        tasks.extend(own.map(|(own, strip)| {
            let out = MatMut::from_row_major_slice_mut(own, channels, channels);
            Task::Strip { strip, out }
        }));
        tasks
    }

    fn work<T: Real>(&self, team: &Team, copy: &[T], images: usize, task: Task<'_, T>) {
        let channels = self.channels;
        let one = T::from_f64(1.0);
        match task {
            Task::Columns { shift, first, out } => {
                let rows = images * self.rows();
                let left = MatRef::from_row_major_slice(&copy[..rows * channels], rows, channels);
                let right = overlapping(&copy[shift * channels + first..], rows, channels, &out);
                matmul(out, Accum::Add, left.transpose(), right, one, Par::Seq);
            }
            Task::Strip { strip, out } => {
                let rows = images * strip.size();
                team.scratch::<T>().with(2 * rows * channels, |gathered| {
                    let (left, right) = gathered.split_at_mut(rows * channels);
                    self.gather(copy, images, strip, 0, left);
                    self.gather(copy, images, strip, strip.shift, right);
                    let left = MatRef::from_row_major_slice(left, rows, channels);
                    let right = MatRef::from_row_major_slice(right, rows, channels);
                    matmul(out, Accum::Add, left.transpose(), right, one, Par::Seq);
                });
            }
        }
    }

    /// Copies the rows of a strip, so many rows further on.
    fn gather<T: Real>(
        &self,
        copy: &[T],
        images: usize,
        strip: &Strip,
        shift: usize,
        target: &mut [T],
    ) {
        let [deep, high, wide] = strip.ranges.map(|(start, end)| start..end);
        let length = wide.len() * self.channels;
        let starts = (0..images).flat_map(|image| {
            let (high, left) = (high.clone(), wide.start);
            let row = move |z, y| image * self.rows() + self.row_of([z, y, left]);
            let depths = deep.clone();
            depths.flat_map(move |z| high.clone().map(move |y| row(z, y)))
        });
        for (target, start) in target.chunks_exact_mut(length).zip(starts) {
            let start = (start + shift) * self.channels;
            target.copy_from_slice(&copy[start..start + length]);
        }
    }
}

/// So many rows, each beginning one row of channels after the one before and as wide as `like`: a
/// row and the beginning of those behind it.
fn overlapping<'a, T>(
    copy: &'a [T],
    rows: usize,
    channels: usize,
    like: &MatMut<'_, T>,
) -> MatRef<'a, T> {
    let columns = like.ncols();
    assert!(rows > 0 && (rows - 1) * channels + columns <= copy.len());
    // SAFETY: by the assertion the last element is among those of the slice, which are only read
    // while the matrix lives.
    unsafe { MatRef::from_raw_parts(copy.as_ptr(), rows, columns, channels as isize, 1) }
}

/// The products of a plan.
struct Sums<'a, T> {
    plan: &'a Plan,
    sums: &'a [T],
}

impl<T: Real> Sums<'_, T> {
    /// The product of channels with channels: its elements, and how far apart its rows are.
    fn block(&self, block: Block) -> (&[T], usize) {
        let (products, channels) = (&self.plan.products, self.plan.channels);
        let area = channels * channels;
        let before = |index: usize| {
            products[..index]
                .iter()
                .map(|p: &Product| p.width)
                .sum::<usize>()
        };
        match block {
            Block::Product { index, offset } => {
                let start = before(index) * area + offset * channels;
                (&self.sums[start..], products[index].width * channels)
            }
            Block::Strip(index) => {
                let start = (before(products.len()) + index) * area;
                (&self.sums[start..start + area], channels)
            }
        }
    }

    fn positions(&self) -> usize {
        self.plan.positions()
    }

    /// The sums of squares of the features.
    fn diagonal(&self) -> Vec<f64> {
        let positions = self.positions();
        let mut diagonal = vec![0.0; self.plan.channels * positions];
        for position in 0..positions {
            for &(subtracted, block) in self.plan.pair_of(position, position) {
                let (values, stride) = self.block(block);
                let squares = values.iter().step_by(stride + 1);
                let own = diagonal[position..].iter_mut().step_by(positions);
                for (sum, square) in own.zip(squares) {
                    let square = square.to_f64();
                    *sum += if subtracted { -square } else { square };
                }
            }
        }
        diagonal
    }

    /// Adds to the lower triangle; undefined above it, in the rows of a channel.
    fn add_to(&self, team: &Team, out: MatMut<'_, T>, weight: T) {
        let (positions, channels) = (self.positions(), self.plan.channels);
        let mut blocks = Vec::new();
        let mut rest = out;
        for first in (0..channels).step_by(TILE) {
            let height = TILE.min(channels - first);
            let (block, below) = rest.split_at_row_mut(height * positions);
            blocks.push((first..first + height, block));
            rest = below;
        }
        // The longest rows first, so that threads finish together.
        blocks.reverse();
        team.run(blocks, |(rows, block)| {
            simd::run(AddRows {
                sums: self,
                rows,
                out: block,
                weight,
            });
        });
    }
}

/// Adds the rows of some channels.
struct AddRows<'a, 'b, T> {
    sums: &'a Sums<'a, T>,
    rows: Range<usize>,
    out: MatMut<'b, T>,
    weight: T,
}

impl<T: Real> Loop for AddRows<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            sums,
            rows,
            mut out,
            weight,
        } = self;
        let (positions, columns) = (sums.positions(), rows.end);
        let area = rows.len() * columns;
        let mut memory = vec![T::default(); positions * area];
        for position in 0..positions {
            memory.fill(T::default());
            for (other, tile) in memory.chunks_exact_mut(area).enumerate() {
                let (first, second) = (position.min(other), position.max(other));
                for &(subtracted, block) in sums.plan.pair_of(first, second) {
                    let signed = if subtracted { -weight } else { weight };
                    let (values, stride) = sums.block(block);
                    for (row, line) in rows.clone().zip(tile.chunks_exact_mut(columns)) {
                        if position <= other {
                            let values = &values[row * stride..row * stride + columns];
                            for (target, &value) in line.iter_mut().zip(values) {
                                *target += signed * value;
                            }
                        } else {
                            let values = values[row..].iter().step_by(stride);
                            for (target, &value) in line.iter_mut().zip(values) {
                                *target += signed * value;
                            }
                        }
                    }
                }
            }
            for row in 0..rows.len() {
                let lines = memory.chunks_exact(area);
                let lines = lines.map(|tile| &tile[row * columns..(row + 1) * columns]);
                let mut target = out.as_mut().row_mut(row * positions + position);
                match target.as_mut().try_as_row_major_mut() {
                    Some(target) => {
                        let target = target.as_slice_mut();
                        for (other, line) in lines.enumerate() {
                            let target = target[other..].iter_mut().step_by(positions);
                            for (target, &value) in target.zip(line) {
                                *target += value;
                            }
                        }
                    }
                    None => {
                        for (other, line) in lines.enumerate() {
                            for (column, &value) in line.iter().enumerate() {
                                target[column * positions + other] += value;
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::cancel::Cancel;
    use crate::geometry::Geometry;
    use crate::offsets::Place;
    use faer::Mat;
    use ndarray::{Array2, Array5};
    use proptest::prelude::*;

    /// Input extent, kernel, dilation, padding.
    type Dimension = (usize, usize, usize, (usize, usize));

    fn dimension() -> impl Strategy<Value = Dimension> {
        (1usize..7, 1usize..5, 1usize..4, (0usize..4, 0usize..4)).prop_filter(
            "an output location",
            |&(input, kernel, dilation, (before, after))| {
                input + before + after > dilation * (kernel - 1)
            },
        )
    }

    fn slides_of(dimensions: &[Dimension]) -> [Slide; 3] {
        let geometry = Geometry {
            kernel: dimensions.iter().map(|d| d.1).collect(),
            stride: vec![1; dimensions.len()],
            dilation: dimensions.iter().map(|d| d.2).collect(),
            padding: dimensions.iter().map(|d| d.3).collect(),
        };
        let inputs: Vec<_> = dimensions.iter().map(|d| d.0).collect();
        geometry.slides(&inputs).unwrap()
    }

    fn image(seed: u64, examples: usize, channels: usize, slides: &[Slide; 3]) -> Array5<f64> {
        let [deep, high, wide] = slides.map(|slide| slide.input);
        let mut state = seed;
        Array5::from_shape_simple_fn((examples, channels, deep, high, wide), || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 11) as f64 / (1u64 << 52) as f64 - 0.5
        })
    }

    /// One row for each unit, one column for each feature.
    fn unfolded(x: &Array5<f64>, slides: &[Slide; 3]) -> Array2<f64> {
        let (examples, channels, ..) = x.dim();
        let [outputs, kernel] = [slides.map(|s| s.outputs), slides.map(|s| s.kernel)];
        let unravel = |number: usize, [_, high, wide]: Place| {
            [number / (high * wide), number / wide % high, number % wide]
        };
        let [locations, positions] =
            [outputs, kernel].map(|extents| extents.iter().product::<usize>());
        let shape = (examples * locations, channels * positions);
        Array2::from_shape_fn(shape, |(unit, feature)| {
            let location = unravel(unit % locations, outputs);
            let position = unravel(feature % positions, kernel);
            let place: [Option<usize>; 3] = std::array::from_fn(|d| {
                let place = location[d] + position[d] * slides[d].dilation;
                place
                    .checked_sub(slides[d].before)
                    .filter(|&place| place < slides[d].input)
            });
            match place {
                [Some(z), Some(y), Some(x_)] => {
                    x[(unit / locations, feature / positions, z, y, x_)]
                }
                _ => 0.0,
            }
        })
    }

    /// The lower triangle of twice the sums of squares, as the offsets have them, upon ones.
    fn by_offsets<T: Real>(x: &Array5<f64>, slides: &[Slide; 3]) -> Array2<f64> {
        let plan = Plan::of(slides, x.dim().1).unwrap();
        let positions: usize = slides.iter().map(|slide| slide.kernel).product();
        let size = x.dim().1 * positions;
        let mut out = Mat::<T>::from_fn(size, size, |_, _| T::from_f64(1.0));
        let (team, cancel) = (Team::current(), Cancel::new());
        let total = Total {
            team: &team,
            weight: 2.0,
            centre: None,
            cancel: &cancel,
        };
        assert!(add_squares(&x.view(), &plan, out.as_mut(), &total).unwrap());
        Array2::from_shape_fn((size, size), |(i, j)| {
            out[(i.max(j), i.min(j))].to_f64() - 1.0
        })
    }

    fn largest(x: &Array2<f64>) -> f64 {
        x.iter()
            .fold(0.0, |largest, value| largest.max(value.abs()))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn offsets_give_the_squares_of_the_patches(
            seed: u64, examples in 1usize..4, channels in 1usize..20,
            dimensions in proptest::collection::vec(dimension(), 1..3),
        ) {
            let slides = slides_of(&dimensions);
            let x = image(seed, examples, channels, &slides);
            let units = unfolded(&x, &slides);
            let expected = units.t().dot(&units) * 2.0;
            let scale = largest(&expected).max(1.0);
            let double = by_offsets::<f64>(&x, &slides);
            prop_assert!(largest(&(double - &expected)) < 1e-13 * scale);
            let single = by_offsets::<f32>(&x, &slides);
            prop_assert!(largest(&(single - &expected)) < 1e-5 * scale);
        }

        #[test]
        fn offsets_work_in_three_dimensions(
            seed: u64, examples in 1usize..3, channels in 1usize..4,
            dimensions in proptest::collection::vec((1usize..5, 1usize..4, 1usize..3, (0usize..3, 1usize..4)), 3),
        ) {
            let fits = dimensions.iter().all(|d| d.0 + d.3.0 + d.3.1 > d.2 * (d.1 - 1));
            prop_assume!(fits);
            let slides = slides_of(&dimensions);
            let x = image(seed, examples, channels, &slides);
            let units = unfolded(&x, &slides);
            let expected = units.t().dot(&units) * 2.0;
            let scale = largest(&expected).max(1.0);
            prop_assert!(largest(&(by_offsets::<f64>(&x, &slides) - &expected)) < 1e-13 * scale);
        }
    }

    #[test]
    fn nothing_is_written_where_digits_would_be_lost() {
        let slides = slides_of(&[(5, 3, 1, (1, 1)), (6, 3, 1, (1, 1))]);
        let x = image(3, 2, 4, &slides);
        let plan = Plan::of(&slides, 4).unwrap();
        let mut out = Mat::<f64>::zeros(36, 36);
        let (team, cancel) = (Team::current(), Cancel::new());
        let total = Total {
            team: &team,
            weight: 1.0,
            centre: Some(vec![1e9; 36]),
            cancel: &cancel,
        };
        assert!(!add_squares(&x.view(), &plan, out.as_mut(), &total).unwrap());
        assert_eq!(out, Mat::<f64>::zeros(36, 36));
    }

    #[test]
    fn offsets_are_taken_where_they_pay() {
        let square =
            |input, kernel, padding| slides_of(&[(input, kernel, 1, (padding, padding)); 2]);
        assert!(plan(&square(32, 3, 1), 8, 64).is_some());
        assert!(plan(&square(14, 3, 1), 8, 256).is_some());
        // Small images, few channels, single positions, strides.
        assert!(plan(&square(4, 3, 1), 128, 512).is_none());
        assert!(plan(&square(7, 3, 1), 8, 512).is_none());
        assert!(plan(&square(32, 3, 1), 8, 3).is_none());
        assert!(plan(&square(32, 1, 0), 8, 64).is_none());
        let mut strided = square(32, 3, 1);
        strided[2].stride = 2;
        assert!(plan(&strided, 8, 64).is_none());
    }
}
