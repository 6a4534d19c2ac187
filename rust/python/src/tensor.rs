//! Tensor descriptors from Python as checked views.

use ekfac_core::element::Dtype;
use ekfac_core::place::Device;
use ekfac_core::view::{Layout, TensorView, TensorViewMut};
use ekfac_core::{Error, Result};
use pyo3::prelude::*;

use crate::error::to_python;

/// `(data pointer, shape, strides, dtype, device, stream, owner)` of a tensor that Python leaves
/// alone for the duration of the call; the descriptor itself keeps its owner alive that long.
pub struct RawTensor {
    address: usize,
    layout: Layout,
}

/// A term as descriptors (A, G).
pub type RawTerm = (RawTensor, RawTensor);

impl<'py> FromPyObject<'_, 'py> for RawTensor {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        type Fields<'py> = (
            usize,
            Vec<usize>,
            Vec<usize>,
            String,
            String,
            usize,
            Bound<'py, PyAny>,
        );
        let (address, shape, strides, dtype, device, stream, _owner): Fields<'py> =
            object.extract()?;
        let layout = || -> Result<Layout> {
            Ok(Layout {
                shape,
                strides,
                dtype: Dtype::from_name(&dtype)?,
                device: Device::from_name(&device)?,
                stream,
            })
        };
        let layout = layout().map_err(|error| to_python(object.py(), &error))?;
        Ok(Self { address, layout })
    }
}

impl RawTensor {
    /// The tensor, to be read.
    pub fn view(&self) -> Result<TensorView<'_>> {
        // SAFETY: the descriptor is an argument of the call and holds the tensor, so its memory
        // outlives the call, which this view does not; `_core.pyi` asks the caller to leave the
        // tensor unchanged meanwhile. Work left on a GPU's stream is ahead of whatever torch does
        // to the tensor there, giving its memory back included. Outputs are checked against inputs in
        // `check_disjoint`.
        unsafe { TensorView::from_raw_parts(self.address, self.layout.clone()) }
    }

    /// The tensor, to be written to.
    pub fn view_mut(&mut self) -> Result<TensorViewMut<'_>> {
        // SAFETY: as in `view`.
        unsafe { TensorViewMut::from_raw_parts(self.address, self.layout.clone()) }
    }

    /// A vector as a matrix of one row, to be read.
    pub fn row(&self) -> Result<TensorView<'_>> {
        // SAFETY: as in `view`; a dimension of one element reaches no more memory.
        unsafe { TensorView::from_raw_parts(self.address, self.as_row()?) }
    }

    /// A vector as a matrix of one row, to be written to.
    pub fn row_mut(&mut self) -> Result<TensorViewMut<'_>> {
        // SAFETY: as in `row`.
        unsafe { TensorViewMut::from_raw_parts(self.address, self.as_row()?) }
    }

    fn as_row(&self) -> Result<Layout> {
        let mut layout = self.layout.clone();
        let &[columns] = &layout.shape[..] else {
            return Err(Error::Shape(format!(
                "expected a vector, got shape {:?}",
                layout.shape
            )));
        };
        layout.shape.insert(0, 1);
        layout.strides.insert(0, columns);
        Ok(layout)
    }

    /// First and one past the last byte.
    fn bytes(&self) -> (usize, usize) {
        let reach = self.layout.shape.iter().zip(&self.layout.strides);
        let last = reach.fold(0usize, |last, (&extent, &stride)| {
            last.saturating_add(extent.saturating_sub(1).saturating_mul(stride))
        });
        let elements = if self.layout.shape.contains(&0) {
            0
        } else {
            last.saturating_add(1)
        };
        let bytes = elements.saturating_mul(self.layout.dtype.size());
        (self.address, self.address.saturating_add(bytes))
    }

    /// The device and the bytes on it.
    fn reach(&self) -> (Device, usize, usize) {
        let (start, end) = self.bytes();
        (self.layout.device, start, end)
    }
}

/// Refuses outputs that share memory with an input or with each other, which the core relies on.
pub fn check_disjoint<'a>(
    outputs: &[&RawTensor],
    inputs: impl IntoIterator<Item = &'a RawTensor>,
) -> Result<()> {
    let is_empty = |&(_, start, end): &(Device, usize, usize)| start == end;
    let mut written: Vec<_> = outputs.iter().map(|output| output.reach()).collect();
    written.retain(|reach| !is_empty(reach));
    written.sort_unstable();
    let among_outputs = written.windows(2).any(|pair| {
        let [(device, _, end), (other, start, _)] = [pair[0], pair[1]];
        device == other && start < end
    });
    // Outputs that share nothing end in the order in which they start.
    let with_inputs = inputs
        .into_iter()
        .map(RawTensor::reach)
        .any(|(device, start, end)| {
            let after =
                written.partition_point(|&(other, _, last)| (other, last) <= (device, start));
            let next = written.get(after);
            start < end && next.is_some_and(|&(other, first, _)| other == device && first < end)
        });
    if among_outputs || with_inputs {
        return Err(Error::Option(
            "an output must not share memory with an input or with another output".to_owned(),
        ));
    }
    Ok(())
}

/// The factors of all terms, one after the other.
pub fn factors(terms: &[RawTerm]) -> impl Iterator<Item = &RawTensor> {
    terms.iter().flat_map(|(a, g)| [a, g])
}
