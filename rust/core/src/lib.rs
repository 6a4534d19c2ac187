//! Numerics of `ekfac_rs`: strata, Gram matrices and sums of Kronecker products.
//!
//! Memory belongs to the caller: tensors come in as borrowed [`view::TensorView`]s (from any
//! ndarray view, or from raw parts) and results are written into [`view::TensorViewMut`]s.
//! Nothing here knows Python or torch.

pub mod backend;
pub mod cancel;
pub mod error;
pub mod geometry;
pub mod gram;
pub mod kronecker;
pub mod linalg;
pub mod strata;
pub mod view;

pub use cancel::Cancel;
pub use error::{Error, Result};
