//! Units as the kernels read them: where they are, their sums, and rows of them packed for products.

use super::kernels::Argument::{self, Number, Pointer, Words};
use super::memory::{Buffer, DeviceMatrix};
use super::queue::{BLOCKS_PER_MULTIPROCESSOR, Cuda, THREADS, count};
use crate::element::{Dtype, Real};
use crate::error::{Error, Result};
use crate::geometry::Slide;
use crate::matrix::Storage;
use crate::offsets::Plan;
use crate::units::{Note, Precision, Units};
use crate::view::TensorView;

/// Bytes of packed units at a time: tall enough for full speed of the products, small beside the
/// factors of a network.
pub(super) const PACKED_BYTES: usize = 32 << 20;

/// Sums that one thread adds up one after the other.
const EACH: usize = 64;

/// The kernels that pack units in the type that is computed in, in float16 and in bfloat16.
type PackKernels = [&'static str; 3];

const PACK_DENSE: PackKernels = ["pack_dense", "pack_dense_half", "pack_dense_bfloat16"];
const PACK_PATCHES: PackKernels = ["pack_patches", "pack_patches_half", "pack_patches_bfloat16"];

/// Where units are read from: the kernels of its kind, and how they find a unit.
pub(super) struct Source {
    pub(super) dtype: Dtype,
    pub(super) address: u64,
    sum_kernel: &'static str,
    pack_kernels: PackKernels,
    words: Vec<u64>,
    pub(super) examples: usize,
    pub(super) locations: usize,
    pub(super) features: usize,
    /// How a kernel slides over what are patches.
    pub(super) slides: Option<[Slide; 3]>,
}

impl Source {
    pub(super) fn new(cuda: &Cuda, units: &Units<'_>) -> Result<Self> {
        let x = units.tensor();
        x.place().device.expect(cuda.place().device)?;
        let (dtype, address) = (x.dtype(), x.address() as u64);
        let layout = x.layout();
        match units {
            Units::Dense(_) => {
                let (&[examples, locations, features], steps) =
                    (&layout.shape[..], &layout.strides[..])
                else {
                    return Err(wrong_dimensions(x));
                };
                Ok(Self {
                    dtype,
                    address,
                    sum_kernel: "sum_dense",
                    pack_kernels: PACK_DENSE,
                    words: steps.iter().map(|&step| step as u64).collect(),
                    examples,
                    locations,
                    features,
                    slides: None,
                })
            }
            Units::Patches(_, geometry) => {
                let ([examples, channels, extents @ ..], [over, across, steps @ ..]) =
                    (&layout.shape[..], &layout.strides[..])
                else {
                    return Err(wrong_dimensions(x));
                };
                let slides = geometry.slides(extents)?;
                let mut words = vec![*over as u64, *across as u64];
                words.resize(2 + slides.len() - steps.len(), 0);
                words.extend(steps.iter().map(|&step| step as u64));
                words.extend(slides.iter().flat_map(words_of));
                Ok(Self {
                    dtype,
                    address,
                    sum_kernel: "sum_patches",
                    pack_kernels: PACK_PATCHES,
                    words,
                    examples: *examples,
                    locations: slides.iter().map(|slide| slide.outputs).product(),
                    features: channels * geometry.positions(),
                    slides: Some(slides),
                })
            }
        }
    }

    /// Rows in double precision, such as the sums of examples.
    pub(super) fn rows(address: u64, rows: usize, features: usize) -> Self {
        Self {
            dtype: Dtype::Float64,
            address,
            sum_kernel: "sum_dense",
            pack_kernels: PACK_DENSE,
            words: vec![features as u64, 0, 1],
            examples: rows,
            locations: 1,
            features,
            slides: None,
        }
    }

    pub(super) fn units(&self) -> usize {
        self.examples * self.locations
    }

    /// Of patches: every place of the input and of the gaps of a plan, with its channels alone.
    pub(super) fn places(&self, plan: &Plan) -> Self {
        let strides = self.words.len() - 3 * words_of(&plan.slides[0]).len();
        let mut words = self.words[..strides].to_vec();
        for (slide, &extent) in plan.slides.iter().zip(&plan.extents) {
            words.extend(words_of(&Slide {
                before: 0,
                kernel: 1,
                dilation: 1,
                outputs: extent,
                ..*slide
            }));
        }
        Self {
            words,
            locations: plan.rows(),
            features: plan.channels,
            slides: None,
            ..*self
        }
    }

    /// The arguments that every kernel of this source begins with.
    fn arguments(&self, note: Option<Note>) -> Vec<Argument> {
        vec![
            Pointer(self.address),
            Words(self.words.clone()),
            count(self.locations),
            Pointer(note.map_or(0, |note| note.address as u64)),
            Argument::Count(note.map_or(0, |note| note.first_example)),
        ]
    }

    fn pack_kernel(&self, tile: Dtype) -> &'static str {
        let [same, half, bfloat16] = self.pack_kernels;
        match tile {
            Dtype::Float16 => half,
            Dtype::BFloat16 => bfloat16,
            _ => same,
        }
    }
}

fn wrong_dimensions(x: &TensorView<'_>) -> Error {
    Error::Shape(format!(
        "x has the wrong number of dimensions: {:?}",
        x.shape()
    ))
}

/// In the order of the structure in kernels.cu.
fn words_of(slide: &Slide) -> [u64; 6] {
    [
        slide.input,
        slide.before,
        slide.kernel,
        slide.stride,
        slide.dilation,
        slide.outputs,
    ]
    .map(|word| word as u64)
}

/// What is subtracted from units: sums by feature, times a factor. As in kernels.cu.
#[derive(Clone, Copy)]
pub(super) struct Centre<'a> {
    pub(super) sums: &'a DeviceMatrix<f64>,
    /// Numbers before those of the first feature.
    pub(super) first: usize,
    /// Whether each example has its own, in a row of its own.
    pub(super) by_example: bool,
    /// Features that have the same one, and numbers from theirs to that of the next ones.
    pub(super) group: usize,
    pub(super) step: usize,
    pub(super) factor: f64,
    /// Whether what is beyond the input stays zero.
    pub(super) gaps: bool,
}

impl<'a> Centre<'a> {
    /// Means of features: sums over so many units.
    pub(super) fn mean(sums: &'a DeviceMatrix<f64>, by_example: bool, units: f64) -> Self {
        Self {
            sums,
            first: 0,
            by_example,
            group: 1,
            step: 1,
            factor: units.recip(),
            gaps: false,
        }
    }

    /// Of patches, for each channel what is subtracted in the middle of the kernel.
    pub(super) fn of_channels(self, plan: &Plan) -> Self {
        Self {
            first: plan.middle(),
            step: plan.positions(),
            gaps: true,
            ..self
        }
    }

    /// A row for each example, of numbers for each channel, without their factor.
    pub(super) fn rows(self, examples: usize, channels: usize) -> Source {
        let mut rows = Source::rows(self.start(), examples, channels);
        rows.words = vec![self.of_example() as u64, 0, self.step as u64];
        rows
    }

    /// The address of what the first feature has.
    fn start(self) -> u64 {
        self.sums.address() + (self.first * size_of::<f64>()) as u64
    }

    /// Numbers from those of an example to those of the next one.
    fn of_example(self) -> usize {
        if self.by_example {
            self.sums.view().columns()
        } else {
            0
        }
    }

    fn words(centre: Option<Self>) -> Argument {
        let Some(centre) = centre else {
            return Words(vec![0, 0, 1, 0, 0, 0]);
        };
        Words(vec![
            centre.start(),
            centre.of_example() as u64,
            centre.group as u64,
            centre.step as u64,
            centre.factor.to_bits(),
            u64::from(centre.gaps),
        ])
    }
}

/// Rows whose squares are added.
pub(super) struct Squares<'a> {
    pub(super) rows: &'a Source,
    pub(super) note: Option<Note>,
    pub(super) centre: Option<Centre<'a>>,
    /// What is appended to each row.
    pub(super) constant: Option<f64>,
    pub(super) weight: f64,
    pub(super) precision: Precision,
}

impl Squares<'_> {
    /// The type in which rows are packed and multiplied.
    pub(super) fn tile<T: Real>(&self) -> Dtype {
        let of_rows = self.rows.dtype;
        match (T::DTYPE, of_rows) {
            (Dtype::Float64, _) => Dtype::Float64,
            (_, Dtype::Float16 | Dtype::BFloat16) if self.centre.is_none() => of_rows,
            _ if self.precision == Precision::Bf16 => Dtype::BFloat16,
            _ => Dtype::Float32,
        }
    }

    /// Writes rows from `first` on, minus their centre, each group followed by the constant, as a
    /// table of `rows` and `columns` with elements of the first type; the second is computed in.
    pub(super) fn pack(
        &self,
        cuda: &Cuda,
        packed: &Buffer,
        [tile, real]: [Dtype; 2],
        first: usize,
        [rows, columns]: [usize; 2],
        size: usize,
    ) -> Result<()> {
        let mut arguments = self.rows.arguments(self.note);
        arguments.extend([first, rows, size, usize::from(self.constant.is_some())].map(count));
        arguments.push(Number(self.constant.unwrap_or(0.0)));
        arguments.push(Centre::words(self.centre));
        arguments.extend([count(columns), Pointer(packed.address())]);
        let (types, kernel) = ([self.rows.dtype, real], self.rows.pack_kernel(tile));
        // SAFETY: the source describes a tensor on this device; the packed table is used by nobody
        // else and has room for the rows; the centre has a number for every feature (of every example).
        unsafe { cuda.launch(types, kernel, 1, rows, columns, arguments) }
    }
}

/// Of patches under stride 1, for each kernel position and example what their centre makes of features
/// where the position is beyond the input, `[positions examples, features]`: see kernels.cu.
pub(super) fn sums_at_border<T: Real>(
    cuda: &Cuda,
    patches: &Source,
    positions: usize,
    centre: Centre<'_>,
) -> Result<DeviceMatrix<T>> {
    let (examples, features) = (patches.examples, patches.features);
    let sums = cuda.matrix_of::<T>(positions * examples, features)?;
    let mut arguments = vec![Pointer(patches.address), Words(patches.words.clone())];
    arguments.push(Centre::words(Some(centre)));
    arguments.extend([positions, examples, features].map(count));
    arguments.push(Pointer(sums.address()));
    let types = [patches.dtype, T::DTYPE];
    // SAFETY: the source describes patches of a tensor on this device; the centre has a number for
    // every channel (of every example), and the result one for each position, example and feature.
    unsafe {
        cuda.launch(
            types,
            "sum_border",
            positions,
            examples,
            features,
            arguments,
        )?
    };
    Ok(sums)
}

/// Sums over `outer` equal shares of the units, `[outer, features]`.
pub(super) fn sums_of_units(
    cuda: &Cuda,
    source: &Source,
    outer: usize,
    note: Option<Note>,
) -> Result<DeviceMatrix<f64>> {
    // As many runs as fill the device, each of one unit at the least.
    let threads = THREADS * BLOCKS_PER_MULTIPROCESSOR * cuda.gpu.multiprocessors;
    let wanted = threads.div_ceil(source.features.next_multiple_of(THREADS) * outer);
    let parts = wanted.clamp(1, source.units() / outer);
    let runs = sum_units(cuda, source, outer * parts, note)?;
    sums_of_rows(cuda, runs.address(), parts, source.features, outer)
}

/// Sums over the middle index of `[outer, inner, features]`, in steps that no thread goes through
/// for long.
pub(super) fn sums_of_rows(
    cuda: &Cuda,
    rows: u64,
    inner: usize,
    features: usize,
    outer: usize,
) -> Result<DeviceMatrix<f64>> {
    let parts = inner.div_ceil(EACH);
    // Shares of rows are like shares of units, each row a unit with one location.
    let source = Source::rows(rows, outer * inner, features);
    let sums = sum_units(cuda, &source, outer * parts, None)?;
    if parts == 1 {
        return Ok(sums);
    }
    sums_of_rows(cuda, sums.address(), parts, features, outer)
}

/// Sums over this many equal shares of the units, each by one thread for each feature, `[runs,
/// features]`.
pub(super) fn sum_units(
    cuda: &Cuda,
    source: &Source,
    runs: usize,
    note: Option<Note>,
) -> Result<DeviceMatrix<f64>> {
    let sums = cuda.matrix_of::<f64>(runs, source.features)?;
    let mut arguments = source.arguments(note);
    arguments.extend([source.units(), runs, source.features].map(count));
    arguments.push(Pointer(sums.address()));
    let real = match source.dtype {
        Dtype::Float64 => Dtype::Float64,
        _ => Dtype::Float32,
    };
    let (types, kernel) = ([source.dtype, real], source.sum_kernel);
    // SAFETY: the source describes a tensor on this device; there is a row for each run.
    unsafe { cuda.launch(types, kernel, 1, runs, source.features, arguments)? };
    Ok(sums)
}
