//! What a Gram matrix is taken of, and how.

use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::place::Device;
use crate::strata::Stratum;
use crate::view::{TensorView, TensorViewMut};

/// To what the operands of single-precision products are rounded on a GPU; sums are in single
/// precision always. Units of half precision that nothing is subtracted from are multiplied as they
/// are, which is exact.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// Not at all.
    #[default]
    Ieee,
    /// A mantissa of ten bits, on tensor cores.
    Tf32,
    /// A mantissa of seven bits: bfloat16, on tensor cores.
    Bf16,
}

impl Precision {
    const ALL: [Self; 3] = [Self::Ieee, Self::Tf32, Self::Bf16];

    /// `ieee`, `tf32` or `bf16`.
    pub fn from_name(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|one| one.name() == name);
        found.ok_or_else(|| {
            Error::Option(format!(
                "unknown precision: expected ieee, tf32 or bf16, got {name:?}"
            ))
        })
    }

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ieee => "ieee",
            Self::Tf32 => "tf32",
            Self::Bf16 => "bf16",
        }
    }
}

/// Where a GPU notes, instead of waiting for it, that units are not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Note {
    /// A word of eight bytes on the device of the units, for the smallest number noted.
    pub(crate) address: usize,
    pub(crate) device: Device,
    /// The number that stands for the mini-batch's first example; others follow.
    pub first_example: u64,
}

impl Note {
    /// A note in a tensor of one element of eight bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] or [`Error::Dtype`] for any other tensor.
    pub fn new(word: &mut TensorViewMut<'_>, first_example: u64) -> Result<Self> {
        let layout = word.layout();
        if layout.shape.iter().product::<usize>() != 1 || layout.dtype.size() != 8 {
            return Err(Error::Shape(format!(
                "a note must be one number of eight bytes, got {} of shape {:?}",
                layout.dtype, layout.shape
            )));
        }
        Ok(Self {
            device: word.layout().device,
            address: word.address(),
            first_example,
        })
    }
}

/// What a backend is to do with the units of a mini-batch.
#[derive(Debug, Clone)]
pub struct GramTask {
    /// The strata, in the order of the outputs.
    pub strata: Vec<StratumWeight>,
    /// Whether a constant 1 is appended to each unit.
    pub append_one: bool,
    /// Of single-precision products.
    pub precision: Precision,
    /// Where units that are not finite are noted; without it they are an error at once, before any
    /// output changes.
    pub note: Option<Note>,
}

/// A stratum and the number its sum of squares and products is multiplied by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StratumWeight {
    /// Which sum of squares and products.
    pub stratum: Stratum,
    /// Its weight; 0 where the stratum has no degrees of freedom.
    pub weight: f64,
    /// Whether the outputs are single rows, to which the root of a sum of rank one is added instead:
    /// the row whose square it is.
    pub as_root: bool,
}

/// Where the units of a mini-batch, and their features, come from.
#[derive(Debug, Clone)]
pub enum Units<'a> {
    /// `[examples, locations, features]`, as they are.
    Dense(TensorView<'a>),
    /// The patches of `[examples, channels, *spatial]`: a location for each output location of a
    /// convolution, a feature for each channel and kernel position.
    Patches(TensorView<'a>, &'a Geometry),
}

impl<'a> Units<'a> {
    /// The tensor they are read from.
    pub fn tensor(&self) -> &TensorView<'a> {
        match self {
            Self::Dense(x) | Self::Patches(x, _) => x,
        }
    }

    /// The error for an element of the tensor that is NaN or infinite.
    pub(crate) fn non_finite(&self, index: &[usize], value: f64) -> Error {
        let place = match (self, index) {
            (Self::Dense(_), &[example, location, feature]) => {
                name_in_units(example, location, feature)
            }
            (Self::Patches(..), &[example, channel, ref location @ ..]) => {
                name_in_image(example, channel, location)
            }
            _ => format!("{index:?}"),
        };
        Error::NonFinite(format!("x contains {value} at {place}"))
    }
}

/// What error messages call an element of `[N, T, K]`.
pub(crate) fn name_in_units(example: usize, location: usize, feature: usize) -> String {
    format!("example {example}, location {location}, feature {feature}")
}

/// What error messages call an element of `[N, C, *spatial]`.
pub(crate) fn name_in_image(example: usize, channel: usize, location: &[usize]) -> String {
    format!("example {example}, channel {channel}, location {location:?}")
}
