//! From a place to the backend that computes there.

use super::Backend;
use super::cpu::Cpu;

/// Runs a body with the backend for tensors at this place.
macro_rules! on_device {
    ($place:expr, $backend:ident => $body:expr) => {{
        let place: $crate::place::Place = $place;
        match place.device {
            $crate::place::Device::Cpu => {
                let handle = <$crate::backend::cpu::Cpu as $crate::backend::Backend>::at(place)?;
                let $backend = &*handle;
                $body
            }
            $crate::place::Device::Cuda(_) => {
                let handle = <$crate::backend::cuda::Cuda as $crate::backend::Backend>::at(place)?;
                let $backend = &*handle;
                $body
            }
        }
    }};
}
pub(crate) use on_device;

/// The backend of host memory, for small matrices that are there whatever the device.
pub(crate) fn host() -> <Cpu as Backend>::Handle {
    Cpu::current()
}
