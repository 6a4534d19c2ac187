//! Strata of a mini-batch: sums, then tiles of packed (centred) units, squared by cuBLAS.

use super::blas::{Rows, Strided, lies_well};
use super::kernels::Argument::{self, Number, Pointer, Words};
use super::memory::{Buffer, DeviceMatrix};
use super::queue::{BLOCKS_PER_MULTIPROCESSOR, Cuda, THREADS, count, step_of};
use crate::cancel::Cancel;
use crate::element::{Dtype, Real};
use crate::error::{Error, Result};
use crate::geometry::Slide;
use crate::matrix::{MatrixMut, Storage};
use crate::strata::Stratum;
use crate::units::{GramTask, Note, Precision, Units};
use crate::view::TensorView;

/// Bytes of packed units at a time: tall enough for full speed of the products, small beside the
/// factors of a network.
const PACKED_BYTES: usize = 32 << 20;

/// Sums that one thread adds up one after the other.
const EACH: usize = 64;

/// Adds the weighted sum of squares and products of each stratum to the lower triangles of its
/// outputs, one for each group of consecutive features.
pub(super) fn accumulate<T: Real>(
    cuda: &Cuda,
    units: &Units<'_>,
    out: Vec<Vec<MatrixMut<'_, T>>>,
    task: &GramTask,
    cancel: &Cancel,
) -> Result<()> {
    let batch = Batch::new(cuda, units, task)?;
    for ((out, weight), &stratum) in out.into_iter().zip(&task.strata).zip(&batch.strata) {
        cancel.check()?;
        match stratum {
            Some(Stratum::Mean) if weight.as_root => batch.add_root(out, weight.weight, task)?,
            Some(stratum) => batch.add_stratum(out, stratum, weight.weight, task, cancel)?,
            None => {}
        }
    }
    Ok(())
}

/// The kernels that pack units in the type that is computed in, in float16 and in bfloat16.
type PackKernels = [&'static str; 3];

const PACK_DENSE: PackKernels = ["pack_dense", "pack_dense_half", "pack_dense_bfloat16"];
const PACK_PATCHES: PackKernels = ["pack_patches", "pack_patches_half", "pack_patches_bfloat16"];

/// Where units are read from: the kernels of its kind, and how they find a unit.
struct Source {
    dtype: Dtype,
    address: u64,
    sum_kernel: &'static str,
    pack_kernels: PackKernels,
    words: Vec<u64>,
    examples: usize,
    locations: usize,
    features: usize,
}

impl Source {
    fn new(cuda: &Cuda, units: &Units<'_>) -> Result<Self> {
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
                })
            }
        }
    }

    /// Rows in double precision, such as the sums of examples.
    fn rows(address: u64, rows: usize, features: usize) -> Self {
        Self {
            dtype: Dtype::Float64,
            address,
            sum_kernel: "sum_dense",
            pack_kernels: PACK_DENSE,
            words: vec![features as u64, 0, 1],
            examples: rows,
            locations: 1,
            features,
        }
    }

    fn units(&self) -> usize {
        self.examples * self.locations
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

/// A mini-batch with the sums its strata need.
struct Batch<'a> {
    cuda: &'a Cuda,
    source: Source,
    /// What is to be added for each stratum, if anything: with one location, some are others'.
    strata: Vec<Option<Stratum>>,
    sums: Option<Sums>,
    /// Where a kernel that packs units notes what is not finite, unless sums did.
    note: Option<Note>,
}

struct Sums {
    /// Over all units, `[1, features]`.
    all: DeviceMatrix<f64>,
    /// Over the locations of each example, `[examples, features]`; only where a stratum tells
    /// examples of more than one location apart.
    by_example: Option<DeviceMatrix<f64>>,
}

/// What is subtracted from units: sums, how far apart those of examples are, and their factor.
type Centre<'a> = Option<(&'a DeviceMatrix<f64>, usize, f64)>;

impl<'a> Batch<'a> {
    /// Takes the sums. A sum of finite numbers is finite: where nothing is noted, they show NaN and
    /// infinity, too.
    fn new(cuda: &'a Cuda, units: &Units<'_>, task: &GramTask) -> Result<Self> {
        let source = Source::new(cuda, units)?;
        let of_source = |stratum: Stratum| match source.locations {
            1 => stratum.with_one_location(),
            _ => Some(stratum),
        };
        let strata = task.strata.iter().map(|weight| {
            let stratum = Some(weight.stratum).filter(|_| weight.weight != 0.0);
            stratum.and_then(of_source)
        });
        let mut batch = Self {
            strata: strata.collect(),
            cuda,
            source,
            sums: None,
            note: task.note,
        };
        let read_once = batch.strata.iter().flatten().eq([&Stratum::Total]);
        if read_once && batch.note.is_some() {
            return Ok(batch);
        }
        let note = batch.note.take();
        let sums = batch.summed(note)?;
        if task.note.is_none() {
            let on_host = cuda.download::<f64>(sums.all.buffer(), batch.source.features)?;
            if on_host.iter().any(|sum| !sum.is_finite()) {
                return Err(what_overflowed(cuda, units)?);
            }
        }
        batch.sums = Some(sums);
        Ok(batch)
    }

    fn summed(&self, note: Option<Note>) -> Result<Sums> {
        let (cuda, source) = (self.cuda, &self.source);
        let (examples, features) = (source.examples, source.features);
        let mut strata = self.strata.iter().flatten();
        if !strata.any(|stratum| stratum.tells_examples_apart()) || source.locations == 1 {
            return Ok(Sums {
                all: sums_of_units(cuda, source, 1, note)?,
                by_example: None,
            });
        }
        // Runs must not cross examples.
        let by_example = sums_of_units(cuda, source, examples, note)?;
        Ok(Sums {
            all: sums_of_rows(cuda, by_example.address(), examples, features, 1)?,
            by_example: Some(by_example),
        })
    }

    fn sums(&self) -> Result<&Sums> {
        let missing = || Error::Internal("sums of units were not taken".to_owned());
        self.sums.as_ref().ok_or_else(missing)
    }

    /// Adds the root of the mean's stratum to a row for each group.
    fn add_root<T: Real>(
        &self,
        out: Vec<MatrixMut<'_, T>>,
        weight: f64,
        task: &GramTask,
    ) -> Result<()> {
        let units = self.source.units() as f64;
        let sums = Squares {
            rows: &Source::rows(self.sums()?.all.address(), 1, self.source.features),
            note: None,
            centre: None,
            constant: Some(units).filter(|_| task.append_one),
            weight: 1.0,
            precision: Precision::Ieee,
        };
        let size = self.source.features / out.len();
        let width = size + usize::from(task.append_one);
        let packed = self.cuda.matrix_of::<T>(1, out.len() * width)?;
        let types = [T::DTYPE; 2];
        let columns = out.len() * width;
        sums.pack(self.cuda, packed.buffer(), types, 0, [1, columns], size)?;
        for (group, out) in out.into_iter().enumerate() {
            let own = packed.view().subcolumns(group * width, width);
            self.cuda.add_multiple((weight / units).sqrt(), own, out)?;
        }
        Ok(())
    }

    fn add_stratum<T: Real>(
        &self,
        out: Vec<MatrixMut<'_, T>>,
        stratum: Stratum,
        weight: f64,
        task: &GramTask,
        cancel: &Cancel,
    ) -> Result<()> {
        let source = &self.source;
        let (units, examples) = (source.units() as f64, source.examples);
        let sums =
            |rows: &DeviceMatrix<f64>, count| Source::rows(rows.address(), count, source.features);
        let missing = || Error::Internal("sums of examples were not taken".to_owned());
        let by_example = || self.sums()?.by_example.as_ref().ok_or_else(missing);
        let appended = task.append_one;
        // Rows, what is subtracted from them, the appended coordinate (0 after centring), weight.
        let (rows, centre, constant, weight): (_, Centre<'_>, _, _) = match stratum {
            Stratum::Total => (None, None, Some(1.0), weight),
            Stratum::WithinBatch => {
                let centre = Some((&self.sums()?.all, 0, units.recip()));
                (None, centre, None, weight)
            }
            Stratum::WithinExample => {
                let factor = (source.locations as f64).recip();
                let centre = Some((by_example()?, source.features, factor));
                (None, centre, None, weight)
            }
            Stratum::ExampleTotals => {
                let rows = sums(by_example()?, examples);
                (Some(rows), None, Some(source.locations as f64), weight)
            }
            Stratum::BetweenExamples => {
                let rows = sums(by_example()?, examples);
                let centre = Some((&self.sums()?.all, 0, (examples as f64).recip()));
                (Some(rows), centre, None, weight / source.locations as f64)
            }
            Stratum::Mean => {
                let rows = sums(&self.sums()?.all, 1);
                (Some(rows), None, Some(units), weight / units)
            }
        };
        let squares = Squares {
            rows: rows.as_ref().unwrap_or(source),
            note: self.note.filter(|_| rows.is_none()),
            centre,
            constant: constant.filter(|_| appended),
            weight,
            // Sums of examples are few: rounding them would gain no time, and is most of the error.
            precision: if rows.is_some() {
                Precision::Ieee
            } else {
                task.precision
            },
        };
        squares.add(self.cuda, out, appended, cancel)
    }
}

/// Rows whose squares are added.
struct Squares<'a> {
    rows: &'a Source,
    note: Option<Note>,
    centre: Centre<'a>,
    /// What is appended to each row.
    constant: Option<f64>,
    weight: f64,
    precision: Precision,
}

impl Squares<'_> {
    fn add<T: Real>(
        &self,
        cuda: &Cuda,
        out: Vec<MatrixMut<'_, T>>,
        has_border: bool,
        cancel: &Cancel,
    ) -> Result<()> {
        let groups = out.len();
        let size = self.rows.features / groups;
        let width = size + usize::from(self.constant.is_some());
        // A centred coordinate that is constant is zero: its row and column gain nothing.
        let mut out: Vec<_> = if has_border && self.constant.is_none() {
            let inner = out.into_iter();
            inner
                .map(|out| out.subrows(0, size).subcolumns(0, size))
                .collect()
        } else {
            out
        };
        let dtype = self.tile::<T>();
        let columns = groups * width;
        let height = (PACKED_BYTES / (columns * dtype.size()))
            .max(1)
            .min(self.rows.units());
        let packed = cuda.buffer(height * columns * dtype.size())?;
        for first in (0..self.rows.units()).step_by(height) {
            cancel.check()?;
            let rows = height.min(self.rows.units() - first);
            let types = [dtype, T::DTYPE];
            self.pack(cuda, &packed, types, first, [rows, columns], size)?;
            let packed = Rows {
                address: packed.address(),
                dtype,
                count: rows,
                step: columns,
            };
            let places: Vec<_> = out.iter().map(|out| out.as_ref()).collect();
            match step_of(&places) {
                Some(step) if groups > 1 && lies_well(places[0]) => {
                    let batch = Strided {
                        count: groups,
                        strides: [width, width, step],
                    };
                    cuda.add_squares(out[0].as_mut(), packed, self.weight, self.precision, batch)?;
                }
                _ => {
                    for (group, out) in out.iter_mut().enumerate() {
                        let own = packed.starting_at(group * width);
                        let one = Strided::ONE;
                        cuda.add_squares(out.as_mut(), own, self.weight, self.precision, one)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The type in which rows are packed and multiplied.
    fn tile<T: Real>(&self) -> Dtype {
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
    fn pack(
        &self,
        cuda: &Cuda,
        packed: &Buffer,
        [tile, real]: [Dtype; 2],
        first: usize,
        [rows, columns]: [usize; 2],
        size: usize,
    ) -> Result<()> {
        let (means, step, factor) = match self.centre {
            Some((means, step, factor)) => (means.address(), step, factor),
            None => (0, 0, 0.0),
        };
        let mut arguments = self.rows.arguments(self.note);
        arguments.extend([first, rows, size, usize::from(self.constant.is_some())].map(count));
        arguments.push(Number(self.constant.unwrap_or(0.0)));
        arguments.extend([Pointer(means), count(step), Number(factor)]);
        arguments.extend([count(columns), Pointer(packed.address())]);
        let (types, kernel) = ([self.rows.dtype, real], self.rows.pack_kernel(tile));
        // SAFETY: the source describes a tensor on this device; the packed table is used by nobody
        // else and has room for the rows; means have an entry for every feature (of every example).
        unsafe { cuda.launch(types, kernel, 1, rows, columns, arguments) }
    }
}

/// Sums over `outer` equal shares of the units, `[outer, features]`.
fn sums_of_units(
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
fn sums_of_rows(
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
fn sum_units(
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

/// The error of sums that are not finite.
fn what_overflowed(cuda: &Cuda, units: &Units<'_>) -> Result<Error> {
    let layout = units.tensor().layout();
    let address = units.tensor().address() as u64;
    let found = cuda.first_non_finite(layout.dtype, address, &layout.shape, &layout.strides)?;
    let Some(number) = found else {
        return Ok(Error::Numerical(
            "the sum of x over its units overflows".to_owned(),
        ));
    };
    let mut index = vec![0; layout.shape.len()];
    let mut rest = number;
    for (index, extent) in index.iter_mut().zip(&layout.shape).rev() {
        (*index, rest) = (rest % extent, rest / extent);
    }
    let mut source = Source::rows(address, 1, 1);
    source.dtype = layout.dtype;
    let distance: usize = index
        .iter()
        .zip(&layout.strides)
        .map(|(i, step)| i * step)
        .sum();
    source.address += (distance * layout.dtype.size()) as u64;
    let value = cuda.to_host(sum_units(cuda, &source, 1, None)?.view())?[0];
    Ok(units.non_finite(&index, value))
}
