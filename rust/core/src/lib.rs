//! Numerics of `ekfac_rs`: strata, Gram matrices and sums of Kronecker products.
//!
//! Memory belongs to the caller: tensors come in as borrowed [`view::TensorView`]s (from any
//! ndarray view, or from raw parts) and results are written into [`view::TensorViewMut`]s.
//! Nothing here knows Python or torch.
//!
//! From the ground up: errors, element types, places, views and matrices; then what is spoken of
//! (geometry, strata, units, terms, spectra); then what a device must be able to do ([`backend`]),
//! and the devices; then the mathematics ([`gram`], [`kronecker`], [`linalg`]), written once for
//! all of them. Imports run only downwards, which `tests/floors.rs` asserts.

pub mod backend;
pub mod batchnorm;
pub mod cancel;
pub mod element;
pub mod error;
pub mod geometry;
pub mod gram;
pub mod kronecker;
pub mod linalg;
pub mod matrix;
pub mod merging;
mod offsets;
pub mod place;
pub mod spectrum;
pub mod strata;
pub mod terms;
pub mod units;
pub mod view;

pub use cancel::Cancel;
pub use error::{Error, Result};
