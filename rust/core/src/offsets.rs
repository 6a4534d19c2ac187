//! How the sums of squares and products of patches come together from those of the image with
//! itself, shifted: without unfolding the patches.
//!
//! Under stride 1 the kernel positions p and p' of a patch at u see the input at u + p and u + p'.
//! Summed over all of the image, the products of what is at q and at q + p' - p depend on the
//! offset p' - p alone: one product of channels with channels for each offset, however many pairs
//! of positions have it. A pair counts q only in its own window; what is outside of it are strips
//! along the border, most of them padding and hence nothing, which are subtracted.
//!
//! The input is copied once, channels innermost, with a gap of zeros behind each row, each plane
//! and each example: a shift by an offset is then a shift of the row index. The last rows of an
//! image, as many as any shift, are zeros.

use std::collections::BTreeMap;

use crate::geometry::Slide;

/// Below so many channels products of theirs are too small to be fast.
const FEWEST_CHANNELS: usize = 16;

/// Above so many kernel positions there are too many strips to look at.
const MOST_POSITIONS: usize = 64;

/// What a multiplication for a strip takes, which is copied before, in those of a whole product.
const COST_OF_STRIPS: f64 = 2.0;

/// The share of the multiplications for unfolded patches that is worth another way.
const WORTH_IT: f64 = 0.8;

/// A place in a padded image, or the difference of two, along each dimension.
pub(crate) type Place = [usize; 3];

/// Which products make up the block of each pair of kernel positions.
pub(crate) struct Plan {
    pub(crate) slides: [Slide; 3],
    pub(crate) channels: usize,
    /// Extents of an image with its gaps.
    pub(crate) extents: Place,
    pub(crate) products: Vec<Product>,
    pub(crate) strips: Vec<Strip>,
    /// For each pair of positions, the second not before the first: signed blocks, where true stands
    /// for what is subtracted.
    pub(crate) pairs: Vec<Vec<(bool, Block)>>,
}

/// The products for `width` offsets that follow one another, over the whole image.
pub(crate) struct Product {
    /// Rows from one factor to the other at the first offset.
    pub(crate) shift: usize,
    pub(crate) width: usize,
}

/// The product for one offset over a box.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Strip {
    pub(crate) ranges: [(usize, usize); 3],
    pub(crate) shift: usize,
}

impl Strip {
    pub(crate) fn size(&self) -> usize {
        let extents = self.ranges.iter().map(|(start, end)| end - start);
        extents.product()
    }
}

/// Where a product of channels with channels is found.
#[derive(Clone, Copy)]
pub(crate) enum Block {
    Product { index: usize, offset: usize },
    Strip(usize),
}

impl Plan {
    /// The plan, where it takes less work than the patches themselves; to put the products of a pair
    /// of positions together takes so many multiplications.
    pub(crate) fn worthwhile(
        slides: &[Slide; 3],
        examples: usize,
        channels: usize,
        cost_of_pairs: f64,
    ) -> Option<Self> {
        let positions: usize = slides.iter().map(|slide| slide.kernel).product();
        if positions == 1 || positions > MOST_POSITIONS || channels < FEWEST_CHANNELS {
            return None;
        }
        let plan = Self::of(slides, channels)?;
        let locations: usize = slides.iter().map(|slide| slide.outputs).product();
        let pairs = plan.pairs.len();
        let unfolded = (examples * locations * pairs) as f64;
        let (products, strips) = plan.multiplications();
        let each = products as f64 + COST_OF_STRIPS * strips as f64;
        let work = examples as f64 * each + cost_of_pairs * pairs as f64;
        (work <= WORTH_IT * unfolded && plan.blocks() <= pairs).then_some(plan)
    }

    /// The plan, whatever it costs; nothing unless the stride is 1.
    pub(crate) fn of(slides: &[Slide; 3], channels: usize) -> Option<Self> {
        if slides.iter().any(|slide| slide.stride != 1) {
            return None;
        }
        let extents = slides.map(|slide| slide.input + (slide.kernel - 1) * slide.dilation);
        let mut plan = Self {
            slides: *slides,
            channels,
            extents,
            products: Vec::new(),
            strips: Vec::new(),
            pairs: Vec::new(),
        };
        let offsets = plan.add_products();
        plan.add_pairs(&offsets);
        Some(plan)
    }

    /// Number of kernel positions.
    pub(crate) fn positions(&self) -> usize {
        self.slides.iter().map(|slide| slide.kernel).product()
    }

    /// The kernel position in the middle, which sees the most of the input.
    pub(crate) fn middle(&self) -> usize {
        let kernels = self.slides.iter().map(|slide| slide.kernel);
        kernels.fold(0, |position, kernel| position * kernel + kernel / 2)
    }

    /// Rows of an image with its gaps.
    pub(crate) fn rows(&self) -> usize {
        self.extents.iter().product()
    }

    /// Multiplications for each example and pair of channels: of products and of strips.
    fn multiplications(&self) -> (usize, usize) {
        let widths: usize = self.products.iter().map(|product| product.width).sum();
        (widths * self.rows(), self.places_of_strips())
    }

    /// Places of all strips together.
    pub(crate) fn places_of_strips(&self) -> usize {
        self.strips.iter().map(Strip::size).sum()
    }

    /// Products of channels with channels that are kept.
    pub(crate) fn blocks(&self) -> usize {
        let widths: usize = self.products.iter().map(|product| product.width).sum();
        widths + self.strips.len()
    }

    /// Rows behind the last image that a product reaches.
    pub(crate) fn reach(&self) -> usize {
        let reaches = self.products.iter().map(|p| p.shift + p.width - 1);
        reaches.max().unwrap_or(0)
    }

    pub(crate) fn row_of(&self, [z, y, x]: Place) -> usize {
        (z * self.extents[1] + y) * self.extents[2] + x
    }

    /// Makes the products of all offsets that are not before zero; returns where each is found.
    fn add_products(&mut self) -> BTreeMap<[isize; 3], Block> {
        let [deep, high, wide] = self.slides;
        let mut offsets = BTreeMap::new();
        for z in 0..deep.kernel as isize {
            let lowest = if z == 0 { 0 } else { 1 - high.kernel as isize };
            for y in lowest..high.kernel as isize {
                let leftmost = if (z, y) == (0, 0) {
                    0
                } else {
                    1 - wide.kernel as isize
                };
                for x in leftmost..wide.kernel as isize {
                    let offset = if wide.dilation == 1 { x - leftmost } else { 0 };
                    if offset == 0 {
                        let shift = self.shift([z, y, x]);
                        self.products.push(Product { shift, width: 0 });
                    }
                    let index = self.products.len() - 1;
                    self.products[index].width += 1;
                    let offset = offset as usize;
                    offsets.insert([z, y, x], Block::Product { index, offset });
                }
            }
        }
        offsets
    }

    /// Rows from one kernel position to another that is not before it: gaps are as wide as the
    /// kernel reaches, so that this is never negative.
    fn shift(&self, offset: [isize; 3]) -> usize {
        let mut shift = 0;
        for (dimension, extent) in self.extents.iter().enumerate() {
            let dilation = self.slides[dimension].dilation as isize;
            shift = shift * *extent as isize + offset[dimension] * dilation;
        }
        shift as usize
    }

    fn add_pairs(&mut self, offsets: &BTreeMap<[isize; 3], Block>) {
        let [deep, high, wide] = self.slides.map(|slide| slide.kernel);
        let along = |kernel: usize| 0..kernel;
        let positions: Vec<Place> = along(deep)
            .flat_map(|z| along(high).map(move |y| [z, y]))
            .flat_map(|[z, y]| along(wide).map(move |x| [z, y, x]))
            .collect();
        let mut known = BTreeMap::new();
        for (i, from) in positions.iter().enumerate() {
            for to in &positions[i..] {
                let offset: [isize; 3] = std::array::from_fn(|d| to[d] as isize - from[d] as isize);
                let pair = self.pair(from, offset, offsets[&offset], &mut known);
                self.pairs.push(pair);
            }
        }
    }

    /// The blocks that make up the one of the position `from` and the one at this offset from it.
    fn pair(
        &mut self,
        from: &Place,
        offset: [isize; 3],
        product: Block,
        known: &mut BTreeMap<Strip, usize>,
    ) -> Vec<(bool, Block)> {
        let seen: [Seen; 3] = std::array::from_fn(|dimension| {
            Seen::new(&self.slides[dimension], from[dimension], offset[dimension])
        });
        let window = Strip {
            ranges: std::array::from_fn(|dimension| seen[dimension].window),
            shift: self.shift(offset),
        };
        if window.size() == 0 {
            return Vec::new();
        }
        // Each dimension is all there is minus what the window leaves out on either side: with
        // several dimensions, every combination of those.
        let mut left_out = Vec::new();
        for choice in 0..27 {
            let [z, y, x] = [choice / 9, choice / 3 % 3, choice % 3];
            let ranges = [seen[0].parts[z], seen[1].parts[y], seen[2].parts[x]];
            let strip = Strip { ranges, ..window };
            let subtracted = [z, y, x].iter().filter(|&&part| part != 0).count() % 2 == 1;
            if choice != 0 && strip.size() > 0 {
                left_out.push((subtracted, strip));
            }
        }
        let new = |strip: &Strip| {
            if known.contains_key(strip) {
                0
            } else {
                strip.size()
            }
        };
        let work: usize = left_out.iter().map(|(_, strip)| new(strip)).sum();
        let direct = new(&window) < work;
        let mut block_of = |strip: Strip| {
            let next = self.strips.len();
            let index = *known.entry(strip.clone()).or_insert(next);
            if index == next {
                self.strips.push(strip);
            }
            Block::Strip(index)
        };
        if direct {
            return vec![(false, block_of(window))];
        }
        let mut pair = vec![(false, product)];
        for (subtracted, strip) in left_out {
            pair.push((subtracted, block_of(strip)));
        }
        pair
    }

    /// Where in [`Self::pairs`] two positions are.
    pub(crate) fn pair_of(&self, first: usize, second: usize) -> &[(bool, Block)] {
        let positions = self.positions();
        // Those of earlier first positions come before: positions, positions - 1, ...
        let before = first * positions - first * (first + 1) / 2 + first;
        &self.pairs[before + second - first]
    }
}

/// Along one dimension, where a product at a kernel position and one at an offset from it is not
/// zero.
struct Seen {
    /// Everywhere; of that, what is before the window and what is behind it.
    parts: [(usize, usize); 3],
    /// Within the window of the position.
    window: (usize, usize),
}

impl Seen {
    fn new(slide: &Slide, from: usize, offset: isize) -> Self {
        let (input, reach) = (slide.input as isize, offset * slide.dilation as isize);
        let (first, last) = ((-reach).max(0), (input - reach).min(input));
        let start = (from * slide.dilation) as isize - slide.before as isize;
        let end = start + slide.outputs as isize;
        let between = |start: isize, end: isize| {
            let start = start.clamp(first, last.max(first));
            (start as usize, end.clamp(start, last.max(start)) as usize)
        };
        Self {
            parts: [
                between(first, last),
                between(first, start),
                between(end, last),
            ],
            window: between(start, end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Geometry;

    #[test]
    #[allow(clippy::unwrap_used)]
    fn equal_strips_are_computed_once() {
        let geometry = Geometry {
            kernel: vec![3; 2],
            stride: vec![1; 2],
            dilation: vec![1; 2],
            padding: vec![(1, 1); 2],
        };
        let slides = geometry.slides(&[8; 2]).unwrap();
        let plan = Plan::of(&slides, 64).unwrap();
        assert_eq!(
            plan.products.iter().map(|p| p.width).collect::<Vec<_>>(),
            [3, 5, 5]
        );
        // Two rows and two columns with three offsets each, and the four corners.
        assert_eq!(plan.strips.len(), 16);
        assert_eq!(plan.pairs.len(), 45);
    }
}
