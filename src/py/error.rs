//! The core's errors as Python's own exceptions.

use pyo3::PyErr;
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyRuntimeError, PyTypeError, PyValueError};

use crate::error::Error;

/// Type -> TypeError, Value -> ValueError, Resources -> MemoryError, Device -> RuntimeError.
pub fn raise(e: Error) -> PyErr {
    match e {
        Error::Type { .. } => PyTypeError::new_err(e.to_string()),
        Error::Value { .. } => PyValueError::new_err(e.to_string()),
        Error::Interrupted => PyKeyboardInterrupt::new_err(()),
        Error::Device(_) => PyRuntimeError::new_err(e.to_string()),
        Error::Resources(_) => PyMemoryError::new_err(e.to_string()),
    }
}
