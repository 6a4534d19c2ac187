//! Units that are patches of images, gathered when they are packed.
//!
//! A few channels at a time are copied into planes with their zero padding. In a padded plane a
//! kernel position is nothing but a shift, so each line of features is made of runs copied from
//! rows of the plane.

use std::ops::Range;

use faer::MatMut;
use ndarray::{ArrayView5, Axis, Ix5, s};

use super::offsets;
use super::simd::{self, Loop};
use super::source::{
    Lines, Means, MeansOf, Source, TILE, Total, dimensions, first_non_finite, pack_run, runs,
};
use crate::element::{Element, Real};
use crate::error::Result;
use crate::geometry::{Geometry, Slide};
use crate::units::name_in_image;
use crate::view::TensorView;

/// The patches of every channel at every output location; the features of a channel are
/// consecutive, its kernel positions in row-major order.
pub(super) struct Patches<'a, S> {
    /// `[examples, channels, depth, height, width]`.
    x: ArrayView5<'a, S>,
    /// How many spatial dimensions there are, of these three.
    dimensions: usize,
    slides: [Slide; 3],
}

impl<'a, S: Element> Patches<'a, S> {
    /// The patches of `[examples, channels, *spatial]`.
    pub(super) fn new(x: &TensorView<'a>, geometry: &Geometry) -> Result<Self> {
        let slides = geometry.slides(&x.shape()[2..])?;
        let mut array = x.array::<S>()?;
        while array.ndim() < 5 {
            array = array.insert_axis(Axis(2));
        }
        let x = dimensions::<S, Ix5>(array)?;
        let dimensions = geometry.kernel.len();
        Ok(Self {
            x,
            dimensions,
            slides,
        })
    }

    fn locations(&self) -> usize {
        self.slides.iter().map(|slide| slide.outputs).product()
    }

    fn positions(&self) -> usize {
        self.slides.iter().map(|slide| slide.kernel).product()
    }

    /// Copies these channels of what a slab covers into planes that are zero elsewhere.
    #[inline(always)]
    fn fill<T: Real>(
        &self,
        example: usize,
        channels: Range<usize>,
        slab: &Slab,
        planes: &mut Lines<'_, T>,
        zero: &Means<T>,
    ) {
        let [deep, high, wide] = &self.slides;
        let columns = inside(wide, &(0..slab.width));
        if columns.is_empty() {
            // What is seen ends before the input begins: there is no place for it in the planes.
            return;
        }
        let left = columns.start + wide.before;
        for z in inside(deep, &slab.depth) {
            for y in inside(high, &slab.height) {
                let row = s![example, channels.clone(), z, y, columns.clone()];
                let row = self.x.slice(row).reversed_axes();
                let place = slab.place(z + deep.before, y + high.before) + left;
                pack_run(row, planes, place, zero.part(0..channels.len()));
            }
        }
    }
}

/// The input locations in this range of the padded input.
fn inside(slide: &Slide, padded: &Range<usize>) -> Range<usize> {
    let end = padded.end.saturating_sub(slide.before).min(slide.input);
    padded.start.saturating_sub(slide.before).min(end)..end
}

/// The part of a padded plane that some output locations see.
struct Slab {
    depth: Range<usize>,
    height: Range<usize>,
    width: usize,
}

impl Slab {
    fn new([deep, high, wide]: &[Slide; 3], locations: Range<usize>) -> Self {
        let plane = high.outputs * wide.outputs;
        let last = locations.end - 1;
        let depths = locations.start / plane..last / plane + 1;
        let rows = if depths.len() == 1 {
            locations.start % plane / wide.outputs..last % plane / wide.outputs + 1
        } else {
            0..high.outputs
        };
        Self {
            depth: deep.reach(depths),
            height: high.reach(rows),
            width: wide.reach(0..wide.outputs).end,
        }
    }

    /// Number of elements.
    fn size(&self) -> usize {
        self.depth.len() * self.height.len() * self.width
    }

    /// Where a row of the padded plane begins.
    fn place(&self, z: usize, y: usize) -> usize {
        ((z - self.depth.start) * self.height.len() + (y - self.height.start)) * self.width
    }

    /// What each kernel position adds to a place, in row-major order.
    fn shifts(&self, [deep, high, wide]: &[Slide; 3]) -> Vec<usize> {
        let along = |slide: &Slide| {
            let dilation = slide.dilation;
            (0..slide.kernel).map(move |position| position * dilation)
        };
        let row = move |z: usize, y: usize| (z * self.height.len() + y) * self.width;
        along(deep)
            .flat_map(|z| along(high).map(move |y| row(z, y)))
            .flat_map(|row| along(wide).map(move |x| row + x))
            .collect()
    }

    /// Where the first kernel position begins for each row of these outputs, and the columns of a
    /// line that the row fills.
    fn windows(
        &self,
        [deep, high, wide]: &[Slide; 3],
        locations: Range<usize>,
    ) -> Vec<(usize, Range<usize>)> {
        let window = |(row, columns, before): (usize, Range<usize>, usize)| {
            let z = row / high.outputs * deep.stride;
            let y = row % high.outputs * high.stride;
            let start = self.place(z, y) + columns.start * wide.stride;
            (start, before..before + columns.len())
        };
        runs(locations, wide.outputs).map(window).collect()
    }
}

/// How many channels have their planes of this size made at once: where channels are the innermost
/// dimension, a tile of them shares a cache line; but the planes must stay in the cache.
fn block_of(channels: usize, size: usize) -> usize {
    const ELEMENTS: usize = 1 << 17;
    (ELEMENTS / size).clamp(1, TILE.min(channels))
}

/// The channels in blocks.
fn blocks(channels: Range<usize>, block: usize) -> impl Iterator<Item = Range<usize>> {
    let end = channels.end;
    channels
        .step_by(block)
        .map(move |start| start..(start + block).min(end))
}

impl<S: Element> Source for Patches<'_, S> {
    fn shape(&self) -> (usize, usize, usize) {
        let (examples, channels, ..) = self.x.dim();
        (examples, self.locations(), channels * self.positions())
    }

    fn add_sums(&self, examples: Range<usize>, sums: &mut [f64]) {
        simd::run(AddSums {
            patches: self,
            examples,
            sums,
        });
    }

    #[inline(always)]
    fn pack<T: Real>(
        &self,
        units: Range<usize>,
        features: Range<usize>,
        lines: &mut Lines<'_, T>,
        first: usize,
        (rounded, rest): MeansOf<'_, T>,
    ) {
        let positions = self.positions();
        let channels = features.start / positions..features.end / positions;
        let step = self.slides[2].stride;
        let zero = Means::zero(TILE);
        let mut memory = Vec::new();
        for (example, locations, before) in runs(units, self.locations()) {
            let slab = Slab::new(&self.slides, locations.clone());
            let (shifts, windows) = (
                slab.shifts(&self.slides),
                slab.windows(&self.slides, locations),
            );
            let size = slab.size();
            let block = block_of(channels.len(), size);
            memory.clear();
            memory.resize(block * size, T::default());
            for block in blocks(channels.clone(), block) {
                let mut planes = Lines {
                    data: &mut memory,
                    stride: size,
                };
                self.fill(example, block.clone(), &slab, &mut planes, &zero);
                let from = (block.start - channels.start) * positions;
                let planes = memory.chunks_exact(size).take(block.len());
                for (plane, feature) in planes.zip((from..).step_by(positions)) {
                    for (&shift, feature) in shifts.iter().zip(feature..) {
                        let line = lines.line(feature, first + before);
                        let means = (rounded[feature], rest[feature]);
                        for (start, columns) in &windows {
                            let target = &mut line[columns.clone()];
                            centre_run(target, &plane[start + shift..], step, means);
                        }
                    }
                }
            }
        }
    }

    fn quantum(&self) -> usize {
        self.positions()
    }

    fn add_total<T: Real>(&self, out: MatMut<'_, T>, total: &Total<'_>) -> Result<bool> {
        let (examples, channels, ..) = self.x.dim();
        match offsets::plan(&self.slides, examples, channels) {
            Some(plan) => offsets::add_squares(&self.x, &plan, out, total),
            None => Ok(false),
        }
    }

    fn non_finite(&self) -> Option<(f64, String)> {
        first_non_finite(&self.x).map(|((example, channel, z, y, x), value)| {
            // Dimensions that were added in front have extent one.
            let location = &[z, y, x][3 - self.dimensions..];
            (value, name_in_image(example, channel, location))
        })
    }
}

/// Writes every `step`-th element of `source` minus its mean.
#[inline(always)]
fn centre_run<T: Real>(target: &mut [T], source: &[T], step: usize, (rounded, rest): (T, T)) {
    // A constant step lets the compiler use vectors.
    match step {
        1 => {
            for (target, &value) in target.iter_mut().zip(source) {
                *target = value - rounded - rest;
            }
        }
        2 => {
            for (target, &value) in target.iter_mut().zip(source.iter().step_by(2)) {
                *target = value - rounded - rest;
            }
        }
        _ => {
            for (target, &value) in target.iter_mut().zip(source.iter().step_by(step)) {
                *target = value - rounded - rest;
            }
        }
    }
}

/// The sum over the output locations of some examples, for each feature: rows of the padded plane
/// first, so that most of the work is shared by the kernel positions of a row.
struct AddSums<'a, 'x, S> {
    patches: &'a Patches<'x, S>,
    examples: Range<usize>,
    sums: &'a mut [f64],
}

impl<S: Element> Loop for AddSums<'_, '_, S> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            patches,
            examples,
            sums,
        } = self;
        let (slides, positions) = (&patches.slides, patches.positions());
        let [deep, high, wide] = slides;
        let channels = patches.x.dim().1;
        let slab = Slab::new(slides, 0..patches.locations());
        let size = slab.size();
        let block = block_of(channels, size);
        let zero = Means::zero(block);
        let mut memory = vec![0.0; block * size];
        let mut row_sums = vec![0.0; slab.width];
        let rows = |kernel: &[usize; 2]| {
            let [z, y] = [kernel[0] * deep.dilation, kernel[1] * high.dilation];
            let depths = (0..deep.outputs).map(move |output| output * deep.stride + z);
            depths.flat_map(move |z| {
                (0..high.outputs).map(move |output| [z, output * high.stride + y])
            })
        };
        for example in examples {
            for block in blocks(0..channels, block) {
                let mut planes = Lines {
                    data: &mut memory,
                    stride: size,
                };
                patches.fill(example, block.clone(), &slab, &mut planes, &zero);
                let sums = sums[block.start * positions..block.end * positions]
                    .chunks_exact_mut(positions);
                for (plane, sums) in memory.chunks_exact(size).zip(sums) {
                    for (kernel, sums) in sums.chunks_exact_mut(wide.kernel).enumerate() {
                        row_sums.fill(0.0);
                        for [z, y] in rows(&[kernel / high.kernel, kernel % high.kernel]) {
                            let row = &plane[slab.place(z, y)..];
                            for (sum, value) in row_sums.iter_mut().zip(row) {
                                *sum += value;
                            }
                        }
                        for (position, sum) in sums.iter_mut().enumerate() {
                            let row = row_sums[position * wide.dilation..].iter();
                            *sum += row.step_by(wide.stride).take(wide.outputs).sum::<f64>();
                        }
                    }
                }
            }
        }
    }
}
