//! Errors of the core as the exceptions of `ekfac_rs.errors`.

use ekfac_core::Error;
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;

/// The Python exception for an error of the core: of the class that the core names.
pub fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    if *error == Error::Interrupted {
        return PyKeyboardInterrupt::new_err(error.to_string());
    }
    let raised = py
        .import("ekfac_rs.errors")
        .and_then(|errors| errors.getattr(error.class_name()))
        .and_then(|class| class.call1((error.to_string(),)));
    match raised {
        Ok(exception) => PyErr::from_value(exception),
        Err(problem) => problem,
    }
}

/// The class of each kind of error of the core.
#[pyfunction]
pub fn error_classes() -> Vec<&'static str> {
    Error::CLASSES.to_vec()
}
