//! Element types: those that can be read, and those that are computed in.

use std::fmt;

use half::{bf16, f16};

use crate::error::{Error, Result};

/// Element types a tensor may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32-bit IEEE floating point.
    Float32,
    /// 64-bit IEEE floating point.
    Float64,
    /// 16-bit IEEE floating point.
    Float16,
    /// Truncated 32-bit floating point.
    BFloat16,
}

impl Dtype {
    /// The dtype torch calls by this name, without the `torch.` prefix.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "float32" => Ok(Self::Float32),
            "float64" => Ok(Self::Float64),
            "float16" => Ok(Self::Float16),
            "bfloat16" => Ok(Self::BFloat16),
            other => Err(Error::Dtype(format!(
                "unsupported dtype: expected float32, float64, float16 or bfloat16, got {other}"
            ))),
        }
    }

    /// The dtype in which sums over elements of this one are kept: its own, or single precision for
    /// half.
    pub fn of_sums(self) -> Self {
        match self {
            Self::Float64 => Self::Float64,
            Self::Float32 | Self::Float16 | Self::BFloat16 => Self::Float32,
        }
    }

    /// Bytes per element, which is the required alignment, too.
    pub fn size(self) -> usize {
        match self {
            Self::Float16 | Self::BFloat16 => 2,
            Self::Float32 => 4,
            Self::Float64 => 8,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Float32 => "float32",
            Self::Float64 => "float64",
            Self::Float16 => "float16",
            Self::BFloat16 => "bfloat16",
        })
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// An element type that can be read.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The matching dtype.
    const DTYPE: Dtype;
    /// The value in double precision, exactly.
    fn to_f64(self) -> f64;
    /// The value in single precision, rounded for `f64`.
    fn to_f32(self) -> f32;
    /// Rounds to this type.
    fn from_f64(value: f64) -> Self;
}

/// An element type that is computed in: `f32` or `f64`.
pub trait Real: Element + faer::traits::RealField + Copy + Default + fmt::Debug {
    /// The spacing of numbers just above one.
    const EPSILON: f64;
    /// Reads any element into this type.
    fn from_element<S: Element>(value: S) -> Self;
    /// Runs a reader for elements of this dtype, whose sums must be kept in this type: no other pair
    /// of types is compiled.
    fn read<R: Reader>(dtype: Dtype, reader: R) -> Result<R::Output>;
}

/// What is done with elements of a type that is known at run time.
pub trait Reader {
    /// What comes of it.
    type Output;
    /// Does it.
    fn read<S: Element>(self) -> Result<Self::Output>;
}

fn not_summed<T>(dtype: Dtype, sums: Dtype) -> Result<T> {
    Err(Error::Dtype(format!(
        "sums over elements of {dtype} are kept in {}, got {sums}",
        dtype.of_sums()
    )))
}

macro_rules! element {
    ($type:ty, $dtype:ident, $round:expr) => {
        impl Element for $type {
            const DTYPE: Dtype = Dtype::$dtype;
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                f32::from(self)
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                $round(value)
            }
        }
    };
}

element!(f32, Float32, |value| value as f32);
element!(f16, Float16, f16::from_f64);
element!(bf16, BFloat16, bf16::from_f64);

impl Element for f64 {
    const DTYPE: Dtype = Dtype::Float64;
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
}

impl Real for f32 {
    const EPSILON: f64 = f32::EPSILON as f64;
    #[inline(always)]
    fn from_element<S: Element>(value: S) -> Self {
        value.to_f32()
    }
    fn read<R: Reader>(dtype: Dtype, reader: R) -> Result<R::Output> {
        match dtype {
            Dtype::Float32 => reader.read::<f32>(),
            Dtype::Float16 => reader.read::<f16>(),
            Dtype::BFloat16 => reader.read::<bf16>(),
            Dtype::Float64 => not_summed(dtype, Self::DTYPE),
        }
    }
}

impl Real for f64 {
    const EPSILON: f64 = f64::EPSILON;
    #[inline(always)]
    fn from_element<S: Element>(value: S) -> Self {
        value.to_f64()
    }
    fn read<R: Reader>(dtype: Dtype, reader: R) -> Result<R::Output> {
        match dtype {
            Dtype::Float64 => reader.read::<f64>(),
            _ => not_summed(dtype, Self::DTYPE),
        }
    }
}

/// Runs a body with `T` standing for the type of a dtype that is computed in; other dtypes are an
/// error.
macro_rules! with_real {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::element::Dtype::Float32 => {
                type $T = f32;
                $body
            }
            $crate::element::Dtype::Float64 => {
                type $T = f64;
                $body
            }
            other => Err($crate::error::Error::Dtype(format!(
                "expected float32 or float64, got {other}"
            ))),
        }
    };
}
pub(crate) use with_real;
