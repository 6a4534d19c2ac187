//! Where memory is, and what orders work on it.

use std::fmt;

use crate::error::{Error, Result};

/// Where the memory of a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// Host memory.
    Cpu,
    /// Memory of the CUDA device with this ordinal.
    Cuda(usize),
}

impl Device {
    /// Parses `cpu` or `cuda:<index>`.
    pub fn from_name(name: &str) -> Result<Self> {
        if name == "cpu" {
            return Ok(Self::Cpu);
        }
        name.strip_prefix("cuda:")
            .and_then(|index| index.parse().ok())
            .map(Self::Cuda)
            .ok_or_else(|| {
                Error::Device(format!(
                    "unsupported device: expected cpu or cuda:<index>, got {name}"
                ))
            })
    }

    /// Fails unless this is the device on which a tensor is expected.
    pub(crate) fn expect(self, expected: Self) -> Result<()> {
        if self == expected {
            Ok(())
        } else {
            Err(Error::Device(format!(
                "all tensors must be on one device: expected {expected}, got one on {self}"
            )))
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// A device, and the stream that orders work there (0 on the CPU).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// The device.
    pub device: Device,
    /// The handle of a CUDA stream.
    pub stream: usize,
}

impl Place {
    /// Host memory.
    pub const HOST: Self = Self {
        device: Device::Cpu,
        stream: 0,
    };
}
