//! Factors of the curvature: sums of squares and products of each stratum of a mini-batch.

use crate::backend::Backend;
use crate::backend::dispatch::on_device;
use crate::cancel::Cancel;
use crate::element::{Dtype, Real, with_real};
use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::strata::{Approximation, Role, Stratum};
use crate::units::{GramTask, Note, Precision, StratumWeight, Units};
use crate::view::{TensorView, TensorViewMut};

/// How [`accumulate`] and [`accumulate_patches`] read a mini-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GramOptions {
    /// Which strata to keep.
    pub approximation: Approximation,
    /// Inputs or gradients, which are normalised differently.
    pub role: Role,
    /// Whether a constant 1 is appended to each unit, for the bias; inputs only.
    pub append_one: bool,
    /// The weight of this mini-batch per example.
    pub scale: f64,
    /// Of single-precision products, on a GPU; on the CPU only [`Precision::Ieee`].
    pub precision: Precision,
    /// Where a GPU notes that `x` is not finite, instead of the host waiting to hear of it; the
    /// outputs are then good for nothing. In the memory of the device of `x`. Not on the CPU.
    pub note: Option<Note>,
}

/// Adds `scale * N * F_k` to the lower triangle of `out[k]` for each stratum k, where N is the
/// number of examples and `F_k` the stratum's factor of this mini-batch.
///
/// `x` is `[N, K]` or `[N, T, K]`; the outputs are `[K', K']` with K' = K, or K + 1 if a one is
/// appended. Outputs `[groups, K', K']` split the features into `groups` consecutive blocks, each
/// with a factor of its own: K' is then K / groups, or one more. For inputs `F_k` is the sum of
/// squares and products divided by the number of units U, for gradients multiplied by
/// `U / (dof_k N)` (0 without degrees of freedom). Their product is that of the analysis of
/// variance; divided this way both factors keep their size as N varies, so that they may be
/// averaged separately over mini-batches of different sizes. Outputs have the dtype of
/// [`Dtype::of_sums`]: that of the units, or float32 for half precision. What is centred has the precision of strata centred before they are squared,
/// with means in double precision.
///
/// The mean's sum of squares and products has rank one, and an update of a whole matrix for it takes
/// long beside its few numbers. Its output may have one dimension less, `[K']` or `[groups, K']`: then
/// the root is added, the row `r` with `r^T r = scale * N * F_k`, for the caller to square many
/// mini-batches' at a time.
///
/// Returns the degrees of freedom of each stratum in this mini-batch: one without any says nothing
/// about its gradients, and counts for nothing in their mean.
///
/// # Errors
///
/// Nothing is written if `x` contains NaN or infinity and no note was asked for, or if any shape, dtype or option does not
/// fit. After [`Error::Interrupted`], or an error of a GPU at work, the outputs are partly written.
pub fn accumulate(
    x: &TensorView<'_>,
    out: &mut [TensorViewMut<'_>],
    options: GramOptions,
    cancel: &Cancel,
) -> Result<Vec<usize>> {
    let x = x.as_examples();
    let &[examples, locations, features] = x.shape() else {
        return Err(Error::Shape(format!(
            "x must be [N, K] or [N, T, K], got shape {:?}",
            x.shape()
        )));
    };
    let batch = MiniBatch {
        units: Units::Dense(x),
        examples,
        locations,
        channels: features,
        positions: 1,
    };
    batch.accumulate(out, options, cancel)
}

/// As [`accumulate`] for the inputs of a convolution: the units are the output locations of the
/// examples of `x`, `[N, C, *spatial]` in any memory layout, and the features of a unit are its
/// patch, ordered as `weight.flatten(1)` in torch: by channel, then by kernel position.
///
/// Outputs `[groups, K', K']` split the channels into `groups` consecutive blocks; K' is
/// `C / groups` times the number of kernel positions, or one more. The unfolded input is never
/// stored as a whole. Padding is with zeros, which count as data.
///
/// # Errors
///
/// As [`accumulate`], and if the geometry does not fit `x` or leaves no output location.
pub fn accumulate_patches(
    x: &TensorView<'_>,
    geometry: &Geometry,
    out: &mut [TensorViewMut<'_>],
    options: GramOptions,
    cancel: &Cancel,
) -> Result<Vec<usize>> {
    let [examples, channels, spatial @ ..] = x.shape() else {
        return Err(Error::Shape(format!(
            "x must be [N, C, *spatial], got shape {:?}",
            x.shape()
        )));
    };
    if options.role == Role::Gradient {
        return Err(Error::Option(
            "patches are inputs: gradients have none".to_owned(),
        ));
    }
    let slides = geometry.slides(spatial)?;
    let flat = geometry
        .is_pointwise()
        .then(|| x.flatten_locations())
        .flatten();
    let batch = MiniBatch {
        units: flat.map_or_else(|| Units::Patches(x.clone(), geometry), Units::Dense),
        examples: *examples,
        locations: slides.iter().map(|slide| slide.outputs).product(),
        channels: *channels,
        positions: geometry.positions(),
    };
    batch.accumulate(out, options, cancel)
}

/// A mini-batch and its sizes.
struct MiniBatch<'a> {
    units: Units<'a>,
    examples: usize,
    locations: usize,
    /// What groups divide: consecutive blocks of `positions` features.
    channels: usize,
    positions: usize,
}

impl MiniBatch<'_> {
    fn accumulate(
        &self,
        out: &mut [TensorViewMut<'_>],
        options: GramOptions,
        cancel: &Cancel,
    ) -> Result<Vec<usize>> {
        self.check(options)?;
        self.check_outputs(out, options)?;
        let as_root = out.last().is_some_and(|last| is_root(last, &out[0]));
        if as_root && options.scale < 0.0 {
            return Err(Error::Option(format!(
                "scale must not be negative where the root of the mean's factor is wanted, got {}",
                options.scale
            )));
        }
        let task = GramTask {
            strata: weights(options, self.examples, self.locations, as_root),
            append_one: options.append_one,
            precision: options.precision,
            note: options.note,
        };
        with_real!(self.dtype_of_sums(), T => self.run::<T>(out, &task, cancel))?;
        let strata = options.approximation.strata().iter();
        Ok(strata
            .map(|stratum| stratum.degrees_of_freedom(self.examples, self.locations))
            .collect())
    }

    fn dtype_of_sums(&self) -> Dtype {
        self.units.tensor().dtype().of_sums()
    }

    fn run<T: Real>(
        &self,
        out: &mut [TensorViewMut<'_>],
        task: &GramTask,
        cancel: &Cancel,
    ) -> Result<()> {
        on_device!(self.units.tensor().place(), backend => {
            let strata = out.iter_mut().zip(&task.strata);
            let mut views: Vec<_> = strata
                .map(|(out, weight)| out.as_matrices(weight.as_root))
                .collect();
            let out = views
                .iter_mut()
                .map(|out| backend.matrices_mut::<T>(out))
                .collect::<Result<_>>()?;
            backend.accumulate_gram(&self.units, out, task, cancel)
        })
    }

    fn check(&self, options: GramOptions) -> Result<()> {
        let sizes = [self.examples, self.locations, self.channels, self.positions];
        let elements = sizes
            .iter()
            .try_fold(1usize, |product, &size| product.checked_mul(size));
        if elements.is_none_or(|elements| elements == 0) {
            return Err(Error::Shape(format!(
                "x must have at least one example, location and feature, and no more of them than \
                 can be counted, got shape {:?}",
                self.units.tensor().shape()
            )));
        }
        if let Some(note) = options.note {
            note.device.expect(self.units.tensor().place().device)?;
        }
        if options.append_one && options.role == Role::Gradient {
            return Err(Error::Option(
                "append_one is for inputs: gradients have no constant coordinate".to_owned(),
            ));
        }
        if !options.scale.is_finite() {
            return Err(Error::Option(format!(
                "scale must be finite, got {}",
                options.scale
            )));
        }
        Ok(())
    }

    fn check_outputs(&self, out: &[TensorViewMut<'_>], options: GramOptions) -> Result<()> {
        let expected = options.approximation.strata().len();
        if out.len() != expected {
            return Err(Error::Shape(format!(
                "{} has {expected} strata, got {} outputs",
                options.approximation.name(),
                out.len()
            )));
        }
        let (groups, _) = out[0].layout().expect_squares("output 0")?;
        if !self.channels.is_multiple_of(groups) {
            return Err(Error::Shape(format!(
                "{groups} groups must divide the {} features or channels of x evenly",
                self.channels
            )));
        }
        let size = self.channels / groups * self.positions + usize::from(options.append_one);
        for (index, tensor) in out.iter().enumerate() {
            let expected = [groups, size, size];
            let expected = &expected[3 - out[0].shape().len()..];
            let root = &expected[..expected.len() - 1];
            let is_mean = options.approximation.strata()[index] == Stratum::Mean;
            if tensor.shape() != expected && !(is_mean && tensor.shape() == root) {
                let or_root = if is_mean {
                    format!(" or, for the root of the mean, {root:?}")
                } else {
                    String::new()
                };
                return Err(Error::Shape(format!(
                    "output {index} must be {expected:?}{or_root}, got shape {:?}",
                    tensor.shape()
                )));
            }
            let (of_units, expected) = (self.units.tensor().dtype(), self.dtype_of_sums());
            if tensor.dtype() != expected {
                return Err(Error::Dtype(format!(
                    "output {index} must be {expected}, as sums over units of {of_units} are, got {}",
                    tensor.dtype()
                )));
            }
        }
        Ok(())
    }
}

/// The weight of each sum of squares and products, so that `scale * N * F_k` results.
///
/// The sums of [`Stratum::ExampleTotals`] are taken over locations for both roles; inputs are
/// averaged instead, hence the extra division.
fn weights(
    options: GramOptions,
    examples: usize,
    locations: usize,
    as_root: bool,
) -> Vec<StratumWeight> {
    let per_example = options.scale * examples as f64;
    let weigh = |stratum: Stratum| {
        let (rows, averaging) = match stratum {
            Stratum::ExampleTotals => (examples, (locations as f64).powi(2)),
            _ => (examples * locations, 1.0),
        };
        match (
            options.role,
            stratum.degrees_of_freedom(examples, locations),
        ) {
            (_, 0) => 0.0,
            (Role::Input, _) => per_example / rows as f64 / averaging,
            (Role::Gradient, dof) => options.scale * rows as f64 / dof as f64,
        }
    };
    let strata = options.approximation.strata().iter();
    strata
        .map(|&stratum| StratumWeight {
            stratum,
            weight: weigh(stratum),
            as_root: as_root && stratum == Stratum::Mean,
        })
        .collect()
}

/// Whether an output has a dimension less than the first one, as roots have.
fn is_root(out: &TensorViewMut<'_>, first: &TensorViewMut<'_>) -> bool {
    out.shape().len() + 1 == first.shape().len()
}
