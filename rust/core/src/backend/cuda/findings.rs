//! What was found of CUDA on this machine.

use super::gpu;
use super::libraries::{Library, dotted, driver_version, require_all};
use crate::error::Error;

/// What was found of one library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Which one.
    pub library: Library,
    /// Whether it can be loaded.
    pub present: bool,
    /// The file it was loaded from.
    pub file: Option<String>,
    /// Functions it lacks.
    pub missing: Vec<&'static str>,
}

/// What was found on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Findings {
    /// Each library.
    pub libraries: Vec<Found>,
    /// The CUDA version that the driver supports.
    pub driver_version: Option<String>,
    /// Name and compute capability of each device.
    pub devices: Vec<(String, String)>,
    /// Why the backend cannot be used, if it cannot.
    pub problem: Option<Error>,
}

/// Looks for the libraries and asks the driver, where there is one, for its devices.
pub fn look() -> Findings {
    let libraries = Library::ALL.map(|library| {
        let present = library.is_present();
        Found {
            library,
            present,
            file: present.then(|| library.file()).flatten(),
            missing: if present {
                library.missing()
            } else {
                Vec::new()
            },
        }
    });
    let driver = &libraries[0];
    let has_driver = driver.present && driver.missing.is_empty();
    let version = has_driver.then(|| driver_version().ok()).flatten();
    let devices = match require_all() {
        Ok(()) => gpu::devices(),
        Err(problem) => Err(problem),
    };
    let (devices, problem) = match devices {
        Ok(devices) => (devices, None),
        Err(problem) => (Vec::new(), Some(problem)),
    };
    Findings {
        libraries: libraries.to_vec(),
        driver_version: version.map(dotted),
        devices,
        problem,
    }
}
