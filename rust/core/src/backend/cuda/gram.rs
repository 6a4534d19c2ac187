//! Strata of a mini-batch: sums, then tiles of packed (centred) units, squared by cuBLAS.

use super::blas::{Rows, Strided, lies_well};
use super::memory::DeviceMatrix;
use super::offsets;
use super::queue::{Cuda, step_of};
use super::source::{
    Centre, PACKED_BYTES, Source, Squares, sum_units, sums_of_rows, sums_of_units,
};
use crate::cancel::Cancel;
use crate::element::Real;
use crate::error::{Error, Result};
use crate::matrix::{MatrixMut, Storage};
use crate::strata::Stratum;
use crate::units::{GramTask, Note, Precision, Units};

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
        let (rows, centre, constant, weight) = match stratum {
            Stratum::Total => (None, None, Some(1.0), weight),
            Stratum::WithinBatch => {
                let centre = Centre::mean(&self.sums()?.all, false, units);
                (None, Some(centre), None, weight)
            }
            Stratum::WithinExample => {
                let centre = Centre::mean(by_example()?, true, source.locations as f64);
                (None, Some(centre), None, weight)
            }
            Stratum::ExampleTotals => {
                let rows = sums(by_example()?, examples);
                (Some(rows), None, Some(source.locations as f64), weight)
            }
            Stratum::BetweenExamples => {
                let rows = sums(by_example()?, examples);
                let centre = Centre::mean(&self.sums()?.all, false, examples as f64);
                (
                    Some(rows),
                    Some(centre),
                    None,
                    weight / source.locations as f64,
                )
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
        // A centred coordinate that is constant is zero: its row and column gain nothing.
        let size = source.features / out.len() + usize::from(squares.constant.is_some());
        let out = out
            .into_iter()
            .map(|out| out.subrows(0, size).subcolumns(0, size))
            .collect::<Vec<_>>();
        let units = Some(source).filter(|_| rows.is_none() && out.len() == 1);
        match units.and_then(offsets::plan) {
            Some(plan) => {
                for out in out {
                    offsets::add_squares(self.cuda, source, &plan, &squares, out, cancel)?;
                }
                Ok(())
            }
            None => squares.add(self.cuda, out, cancel),
        }
    }
}

impl Squares<'_> {
    /// Packs the rows, some at a time, and adds their squares.
    pub(super) fn add<T: Real>(
        &self,
        cuda: &Cuda,
        mut out: Vec<MatrixMut<'_, T>>,
        cancel: &Cancel,
    ) -> Result<()> {
        let groups = out.len();
        let size = self.rows.features / groups;
        let width = size + usize::from(self.constant.is_some());
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
