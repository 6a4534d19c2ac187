//! What a Gram matrix is taken of, and how.

use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::strata::Stratum;
use crate::view::TensorView;

/// How single-precision products are rounded on a GPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// As IEEE 754 has it.
    #[default]
    Ieee,
    /// Factors with a mantissa of ten bits, on tensor cores.
    Tf32,
}

impl Precision {
    /// `ieee` or `tf32`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "ieee" => Ok(Self::Ieee),
            "tf32" => Ok(Self::Tf32),
            other => Err(Error::Option(format!(
                "unknown precision: expected ieee or tf32, got {other:?}"
            ))),
        }
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
