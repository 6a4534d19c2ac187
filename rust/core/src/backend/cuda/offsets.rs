//! The sums of squares and products of patches by the offsets of kernel positions (see
//! [`crate::offsets`]): a padded copy, one stack of products for each run of offsets and for all
//! strips of one size, and one kernel that puts them together.
//!
//! Patches less their mean `m` have no such copy: a feature's mean differs from one kernel position to
//! the next, and what is beyond the input is not zero. With `c` the mean at one of the positions, of each
//! channel, the copy holds the input less `c`, and zeros beyond. Of the patches less `c` it lacks `-c`
//! where they are beyond the input, which is made up for by sums over the border; and the squares
//! about `m` are those about `c` less those of the units' mean `m - c`, which is small where the border
//! is. Nothing large is subtracted from anything large: `c` is gone before anything is multiplied.

use super::blas::{Rows, Strided};
use super::kernels::Argument::{Number, Pointer, Words};
use super::memory::{Buffer, DeviceMatrix};
use super::queue::{Cuda, count, strides};
use super::source::{Centre, PACKED_BYTES, Source, Squares, sums_at_border, sums_of_units};
use crate::cancel::Cancel;
use crate::element::{Dtype, Real};
use crate::error::Result;
use crate::matrix::{MatrixMut, Storage};
use crate::offsets::{Block, Plan, Strip};
use crate::units::Precision;

/// Strips that one launch gathers, and words of each; as in kernels.cu.
const GATHERED: usize = 32;
const WORDS_OF_STRIP: usize = 8;

/// Words that tell which products a pair of positions is made of, with so many numbers in each; as
/// in kernels.cu.
const WORDS_OF_PAIRS: usize = 256;
const NUMBERS_IN_WORD: usize = 4;

/// What is subtracted is marked by this bit.
const SUBTRACTED: u64 = 1 << 15;

/// Strips move in pieces of so many bytes.
const PIECE: usize = 4;

/// Rows that a product adds up in single precision, unless one image has more: about as many as a
/// tile of unfolded patches.
const LONGEST_SUM: usize = 1 << 14;

/// A plan whose strips lie by their sizes, and what its kernel is told of pairs of positions.
pub(super) struct Ready {
    plan: Plan,
    pairs: Vec<u64>,
    /// Places of all strips together.
    strips: usize,
}

/// The products for the patches of a source, where they are less work than unfolding them.
pub(super) fn plan(source: &Source) -> Option<Ready> {
    let slides = source.slides.as_ref()?;
    let positions: usize = slides.iter().map(|slide| slide.kernel).product();
    let channels = source.features / positions;
    // Rows of half precision are whole pieces, too.
    if channels % 2 == 1 {
        return None;
    }
    let mut plan = Plan::worthwhile(slides, source.examples, channels, 0.0)?;
    sort_strips(&mut plan);
    let pairs = packed(&numbers_of(&plan)?);
    let strips = plan.places_of_strips();
    Some(Ready {
        plan,
        pairs,
        strips,
    })
}

/// Puts strips of one size beside each other.
fn sort_strips(plan: &mut Plan) {
    let mut order: Vec<usize> = (0..plan.strips.len()).collect();
    order.sort_by_key(|&index| plan.strips[index].size());
    let mut rank = vec![0; order.len()];
    for (new, &old) in order.iter().enumerate() {
        rank[old] = new;
    }
    plan.strips = order
        .iter()
        .map(|&index| plan.strips[index].clone())
        .collect();
    for (_, block) in plan.pairs.iter_mut().flatten() {
        if let Block::Strip(index) = block {
            *index = rank[*index];
        }
    }
}

/// For each pair of positions where its blocks begin in what follows, where the last ones end, and
/// the numbers of all blocks; nothing where that is too much for a kernel's arguments.
fn numbers_of(plan: &Plan) -> Option<Vec<u64>> {
    let before = |index: usize| -> usize { plan.products[..index].iter().map(|p| p.width).sum() };
    let starts = plan.pairs.len() + 1;
    let mut numbers = vec![0; starts];
    for (pair, blocks) in plan.pairs.iter().enumerate() {
        for &(subtracted, block) in blocks {
            let number = match block {
                Block::Product { index, offset } => before(index) + offset,
                Block::Strip(index) => before(plan.products.len()) + index,
            };
            let sign = if subtracted { SUBTRACTED } else { 0 };
            numbers.push(number as u64 | sign);
        }
        numbers[pair + 1] = (numbers.len() - starts) as u64;
    }
    let fits = numbers.len() <= WORDS_OF_PAIRS * NUMBERS_IN_WORD;
    (fits && plan.blocks() < SUBTRACTED as usize).then_some(numbers)
}

/// Several numbers in each word.
fn packed(numbers: &[u64]) -> Vec<u64> {
    let bits = 64 / NUMBERS_IN_WORD;
    let word = |numbers: &[u64]| {
        let each = numbers.iter().enumerate();
        each.fold(0, |word, (place, number)| word | number << (bits * place))
    };
    let mut words: Vec<u64> = numbers.chunks(NUMBERS_IN_WORD).map(word).collect();
    words.resize(WORDS_OF_PAIRS, 0);
    words
}

/// Adds the squares of all patches of a source to the lower triangle of `out`, by its plan.
pub(super) fn add_squares<T: Real>(
    cuda: &Cuda,
    patches: &Source,
    ready: &Ready,
    squares: &Squares<'_>,
    out: MatrixMut<'_, T>,
    cancel: &Cancel,
) -> Result<()> {
    let Ready {
        plan,
        pairs,
        strips,
    } = ready;
    let by_offsets = ByOffsets {
        cuda,
        plan,
        strips: *strips,
        squares,
        tile: squares.tile::<T>(),
        images: images_at_a_time(plan, squares.tile::<T>(), patches.examples),
    };
    let mut blocks = cuda.zeroed::<T>(plan.blocks() * plan.channels, plan.channels)?;
    let copy = cuda.buffer(by_offsets.images * plan.rows() * by_offsets.row_bytes())?;
    let gathered = cuda.buffer(2 * by_offsets.images * strips * by_offsets.row_bytes())?;
    for first in (0..patches.examples).step_by(by_offsets.images) {
        cancel.check()?;
        let images = by_offsets.images.min(patches.examples - first);
        by_offsets.copy::<T>(patches, first, images, &copy)?;
        let all = blocks.view_mut();
        by_offsets.add_products(images, copy.address(), all)?;
        by_offsets.gather(images, copy.address(), gathered.address())?;
        by_offsets.add_strips(images, gathered.address(), blocks.view_mut())?;
    }
    let border = match squares.centre {
        Some(centre) => Some(squares.products_at_border::<T>(cuda, patches, plan, centre)?),
        None => None,
    };
    let sums = match squares.constant {
        Some(_) => Some(sums_of_units(cuda, patches, 1, None)?),
        None => None,
    };
    let size = out.rows();
    let mut arguments = vec![Pointer(blocks.address()), Words(pairs.clone())];
    arguments.extend([plan.pairs.len(), plan.positions(), plan.channels].map(count));
    arguments.push(Number(squares.weight));
    arguments.push(Pointer(
        border.as_ref().map_or(0, |border| border.address()),
    ));
    arguments.push(Pointer(sums.as_ref().map_or(0, |sums| sums.address())));
    arguments.push(Number(patches.units() as f64));
    arguments.extend([count(size), Pointer(cuda.address(out.as_ref())?)]);
    arguments.extend(strides(out.as_ref()));
    // SAFETY: there is a block for each number, a sum for each feature, and a place in the lower
    // triangle, and one of the border, for each pair of features.
    unsafe { cuda.launch([T::DTYPE; 2], "add_offsets", 1, size, size, arguments)? };
    match squares.centre {
        Some(centre) => squares.subtract_means(cuda, patches, plan, centre, out, cancel),
        None => Ok(()),
    }
}

impl Squares<'_> {
    /// What the copy lacks: a matrix whose sum with its transpose is to be subtracted, in single
    /// precision at most of what is small: the border.
    fn products_at_border<T: Real>(
        &self,
        cuda: &Cuda,
        patches: &Source,
        plan: &Plan,
        centre: Centre<'_>,
    ) -> Result<DeviceMatrix<T>> {
        let (positions, channels) = (plan.positions(), plan.channels);
        let (examples, features) = (patches.examples, patches.features);
        let of_channels = centre.of_channels(plan);
        let sums = sums_at_border::<T>(cuda, patches, positions, of_channels)?;
        // What was subtracted, for each example; its factor comes with the product.
        let subtracted = cuda.matrix_of::<T>(examples, channels)?;
        let table = Squares {
            rows: &of_channels.rows(examples, channels),
            note: None,
            centre: None,
            constant: None,
            ..*self
        };
        let types = [T::DTYPE; 2];
        table.pack(
            cuda,
            subtracted.buffer(),
            types,
            0,
            [examples, channels],
            channels,
        )?;
        let mut border = cuda.matrix_of::<T>(channels, positions * features)?;
        // Of each position, every row of so many: the features of a channel follow one another.
        let batch = Strided {
            count: positions,
            strides: [0, examples * features, features],
        };
        let out = border.view_mut().subcolumns(0, features);
        let of_position = sums.view().subrows(0, examples);
        let subtracted = subtracted.view().transpose();
        cuda.multiply_stack(out, false, subtracted, of_position, centre.factor, batch)?;
        Ok(border)
    }

    /// Subtracts the squares of means that are left about the channels' centres.
    fn subtract_means<T: Real>(
        &self,
        cuda: &Cuda,
        patches: &Source,
        plan: &Plan,
        centre: Centre<'_>,
        out: MatrixMut<'_, T>,
        cancel: &Cancel,
    ) -> Result<()> {
        let (means, units) = if centre.by_example {
            (patches.examples, patches.locations)
        } else {
            (1, patches.units())
        };
        let of_channels = Centre {
            // Every feature's sum, less that of its channel.
            group: plan.positions(),
            factor: 1.0,
            ..centre.of_channels(plan)
        };
        let left = Squares {
            rows: &Source::rows(centre.sums.address(), means, patches.features),
            note: None,
            centre: Some(of_channels),
            constant: None,
            weight: -self.weight / units as f64,
            precision: Precision::Ieee,
        };
        left.add(cuda, vec![out], cancel)
    }
}

/// Images whose copy takes no more memory than units that are packed at a time.
fn images_at_a_time(plan: &Plan, tile: Dtype, examples: usize) -> usize {
    let bytes = plan.rows() * plan.channels * tile.size();
    let most = (PACKED_BYTES / bytes).min(LONGEST_SUM / plan.rows());
    most.clamp(1, examples.max(1))
}

struct ByOffsets<'a> {
    cuda: &'a Cuda,
    plan: &'a Plan,
    /// Places of all strips together.
    strips: usize,
    squares: &'a Squares<'a>,
    /// The type in which images are copied and multiplied.
    tile: Dtype,
    /// Images at a time, at most.
    images: usize,
}

impl ByOffsets<'_> {
    /// Bytes of the channels of one place.
    fn row_bytes(&self) -> usize {
        self.plan.channels * self.tile.size()
    }

    fn rows_at(&self, address: u64, first: usize, rows: usize) -> Rows {
        Rows {
            address: address + (first * self.row_bytes()) as u64,
            dtype: self.tile,
            count: rows,
            step: self.plan.channels,
        }
    }

    /// Copies images, channels innermost, with their gaps: patches of one place, beyond the input
    /// as far as the gap goes.
    fn copy<T: Real>(
        &self,
        patches: &Source,
        first: usize,
        images: usize,
        copy: &Buffer,
    ) -> Result<()> {
        let (plan, rows) = (self.plan, self.plan.rows());
        let places = patches.places(plan);
        let centre = self.squares.centre;
        let squares = Squares {
            rows: &places,
            constant: None,
            centre: centre.map(|centre| centre.of_channels(plan)),
            ..*self.squares
        };
        let shape = [images * rows, plan.channels];
        squares.pack(
            self.cuda,
            copy,
            [self.tile, T::DTYPE],
            first * rows,
            shape,
            plan.channels,
        )
    }

    /// The products for all offsets. The last rows, as many as any shift, are zeros on the left.
    fn add_products<T: Real>(
        &self,
        images: usize,
        copy: u64,
        blocks: MatrixMut<'_, T>,
    ) -> Result<()> {
        let (plan, channels) = (self.plan, self.plan.channels);
        let depth = images * plan.rows() - plan.reach();
        let (mut rest, area) = (blocks, channels * channels);
        let mut first = 0;
        for product in &plan.products {
            let out = rest.as_mut().subrows(first * channels, channels);
            let batch = Strided {
                count: product.width,
                strides: [0, channels, area],
            };
            let left = self.rows_at(copy, 0, depth);
            let right = self.rows_at(copy, product.shift, depth);
            let precision = self.squares.precision;
            self.cuda
                .add_product_of_rows(out, left, right, 1.0, precision, batch)?;
            first += product.width;
        }
        Ok(())
    }

    /// Copies the rows of all strips, and behind them those that their shifts lead to.
    fn gather(&self, images: usize, copy: u64, gathered: u64) -> Result<()> {
        let (plan, pieces) = (self.plan, self.row_bytes() / PIECE);
        let strips = self.strips;
        let mut first = 0;
        for some in plan.strips.chunks(GATHERED) {
            let mut words = Vec::with_capacity(GATHERED * WORDS_OF_STRIP);
            for strip in some {
                words.extend(
                    strip
                        .ranges
                        .iter()
                        .flat_map(|&(start, end)| [start, end - start]),
                );
                words.extend([strip.shift, first]);
                first += strip.size();
            }
            let mut words: Vec<u64> = words.into_iter().map(|word| word as u64).collect();
            words.resize(GATHERED * WORDS_OF_STRIP, 0);
            let most = some.iter().map(Strip::size).max().unwrap_or(0);
            let [_, high, wide] = plan.extents;
            let mut arguments = vec![Pointer(copy), Words(words)];
            arguments.extend([some.len(), images, plan.rows(), high, wide, strips].map(count));
            arguments.extend([count(2 * images * most), count(pieces), Pointer(gathered)]);
            let types = [Dtype::Float32; 2];
            // SAFETY: strips lie within an image and its gaps, and their shifts lead no further;
            // there is room for two rows of each place of theirs.
            unsafe {
                self.cuda.launch(
                    types,
                    "gather_strips",
                    some.len(),
                    2 * images * most,
                    pieces,
                    arguments,
                )?;
            }
        }
        Ok(())
    }

    /// The products of all strips, those of one size at once.
    fn add_strips<T: Real>(
        &self,
        images: usize,
        gathered: u64,
        mut blocks: MatrixMut<'_, T>,
    ) -> Result<()> {
        let (plan, channels, strips) = (self.plan, self.plan.channels, self.strips);
        let products: usize = plan.products.iter().map(|p| p.width).sum();
        let (mut index, mut first) = (0, 0);
        for alike in plan
            .strips
            .chunk_by(|one, other| one.size() == other.size())
        {
            let rows = images * alike[0].size();
            let batch = Strided {
                count: alike.len(),
                strides: [rows * channels, rows * channels, channels * channels],
            };
            let left = self.rows_at(gathered, first, rows);
            let right = self.rows_at(gathered, images * strips + first, rows);
            let start = (products + index) * channels;
            let out = blocks.as_mut().subrows(start, channels);
            let precision = self.squares.precision;
            self.cuda
                .add_product_of_rows(out, left, right, 1.0, precision, batch)?;
            index += alike.len();
            first += rows * alike.len();
        }
        Ok(())
    }
}
