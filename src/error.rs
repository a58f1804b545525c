//! The one error type: every variant carries the name of the argument, what was expected and what came.

/// Everything that can be wrong with a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The kind of thing is wrong: dtype, device, layout, not a tensor.
    #[error("{name}: expected {expected}, got {got}")]
    Type {
        /// Argument name as the caller knows it.
        name: String,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// The kind is right, the value is not: shape, stride, range.
    #[error("{name}: expected {expected}, got {got}")]
    Value {
        /// Argument name as the caller knows it.
        name: String,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// The caller's poll asked to stop (Ctrl-C); outputs are incomplete.
    #[error("interrupted")]
    Interrupted,
    /// A workspace or a thread could not be had.
    #[error("out of resources: {0}")]
    Resources(String),
    /// A device, its driver or the compiler for it: missing, or it refused.
    #[error("{0}")]
    Device(String),
}

impl Error {
    /// A [`Error::Type`] from anything printable.
    pub fn type_(name: impl ToString, expected: impl ToString, got: impl ToString) -> Self {
        Self::Type { name: name.to_string(), expected: expected.to_string(), got: got.to_string() }
    }

    /// A [`Error::Value`] from anything printable.
    pub fn value(name: impl ToString, expected: impl ToString, got: impl ToString) -> Self {
        Self::Value { name: name.to_string(), expected: expected.to_string(), got: got.to_string() }
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
