//! The one error of the crate.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Declares the error with the Python class of each variant: one without a class does not compile.
macro_rules! errors {
    (
        $(#[$about:meta])*
        pub enum Error {
            $(
                $(#[$detail:meta])*
                $variant:ident $(($message:ty))? => $class:literal,
            )*
        }
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
        #[non_exhaustive]
        pub enum Error {
            $($(#[$detail])* $variant $(($message))?,)*
        }

        impl Error {
            /// The class that each variant has in Python, in the order of the variants.
            pub const CLASSES: &'static [&'static str] = &[$($class),*];

            /// The class that this error has in Python.
            pub fn class_name(&self) -> &'static str {
                match self {
                    $(Self::$variant { .. } => $class,)*
                }
            }
        }
    };
}

errors! {
    /// What can go wrong in the numerics; each message says what was wrong, what was expected and
    /// what came.
    ///
    /// The variants correspond one to one to the classes of `ekfac_rs.errors` that the core raises;
    /// only [`Error::Interrupted`] is Python's own `KeyboardInterrupt`.
    pub enum Error {
        /// An argument has a value that is not among the allowed ones.
        #[error("{0}")]
        Option(String) => "OptionError",
        /// A tensor has a shape or strides that do not fit.
        #[error("{0}")]
        Shape(String) => "ShapeError",
        /// A tensor has a dtype that is not supported where it was given.
        #[error("{0}")]
        Dtype(String) => "DtypeError",
        /// A tensor lives on a device that is not supported, or not on the same one as the others.
        #[error("{0}")]
        Device(String) => "DeviceError",
        /// A tensor contains NaN or infinity.
        #[error("{0}")]
        NonFinite(String) => "NonFiniteError",
        /// A decomposition or an iteration failed on finite input.
        #[error("{0}")]
        Numerical(String) => "NumericalError",
        /// The CUDA driver or one of its libraries is missing, too old, or failed.
        #[error("{0}")]
        Cuda(String) => "CudaError",
        /// A device has no room for what was asked.
        #[error("{0}")]
        OutOfMemory(String) => "OutOfMemoryError",
        /// The work was cancelled from outside; outputs may be partly written.
        #[error("interrupted before the work was complete")]
        Interrupted => "KeyboardInterrupt",
        /// A fault of this crate: a panic, or something that should always hold and does not. Never a
        /// property of the data, so no caller may take it for divergence.
        #[error("internal error, please report it: {0}")]
        Internal(String) => "InternalError",
    }
}

/// Runs work of which a panic is [`Error::Internal`] with the panic's message.
pub fn without_panic<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| Err(of_panic(&*payload)))
}

/// The error for what a panic carried.
fn of_panic(payload: &(dyn Any + Send)) -> Error {
    let message = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied());
    Error::Internal(message.unwrap_or("unknown panic").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::panic, reason = "panics are what is tested")]
    fn a_panic_is_an_internal_error_with_its_message() {
        let literal = without_panic::<()>(|| panic!("a text"));
        let formatted = without_panic::<()>(|| panic!("{} of {}", 1, 2));
        let other = without_panic::<()>(|| std::panic::panic_any(3));
        let internal = |message: &str| Err(Error::Internal(message.to_owned()));
        assert_eq!(literal, internal("a text"));
        assert_eq!(formatted, internal("1 of 2"));
        assert_eq!(other, internal("unknown panic"));
        assert_eq!(without_panic(|| Ok(4)), Ok(4));
    }

    #[test]
    fn internal_errors_ask_for_a_report_and_are_no_numerical_ones() {
        let error = Error::Internal("what broke".to_owned());
        assert!(error.to_string().contains("please report it: what broke"));
        assert_eq!(error.class_name(), "InternalError");
        assert!(Error::CLASSES.contains(&"InternalError"));
    }
}
