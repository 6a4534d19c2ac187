//! The one error of the crate.

/// What can go wrong in the numerics; each message says what was wrong, what was expected and what
/// came.
///
/// The variants correspond one to one to the classes of `ekfac_rs.errors`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has a value that is not among the allowed ones.
    #[error("{0}")]
    Option(String),
    /// A tensor has a shape or strides that do not fit.
    #[error("{0}")]
    Shape(String),
    /// A tensor has a dtype that is not supported where it was given.
    #[error("{0}")]
    Dtype(String),
    /// A tensor lives on a device that is not supported, or not on the same one as the others.
    #[error("{0}")]
    Device(String),
    /// A tensor contains NaN or infinity.
    #[error("{0}")]
    NonFinite(String),
    /// A decomposition or an iteration failed on finite input.
    #[error("{0}")]
    Numerical(String),
    /// The CUDA driver or one of its libraries is missing, too old, or failed.
    #[error("{0}")]
    Cuda(String),
    /// A device has no room for what was asked.
    #[error("{0}")]
    OutOfMemory(String),
    /// The work was cancelled from outside; outputs may be partly written.
    #[error("interrupted before the work was complete")]
    Interrupted,
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
