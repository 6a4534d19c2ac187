//! Weights merged with the BatchNorm after them, of many layers in few launches, and the way back to a
//! BatchNorm's input.

use super::kernels::Argument::{self, Count, Pointer, Words};
use super::queue::{Cuda, count};
use crate::element::Real;
use crate::error::{Error, Result};
use crate::matrix::{Matrix, MatrixMut};
use crate::merging::{Deviation, Map, MapGradient, MomentsGradient};

/// Layers of one launch: as many as its arguments have room for (4 kB). As in kernels.cu.
const LAYERS: usize = 32;

/// Threads that share a row. As in kernels.cu.
const LANES: usize = 32;

/// The words of a layer. As in kernels.cu.
const WORDS: usize = 15;

impl Cuda {
    /// Writes what the gradients of moments become in their input.
    pub(super) fn move_moments_back<T: Real>(
        &self,
        gradient: MomentsGradient<'_, T>,
    ) -> Result<()> {
        let (x, out) = (&gradient.x, &gradient.out);
        for place in [x.place(), out.place()] {
            place.device.expect(self.place().device)?;
        }
        let (
            &[examples, channels, places],
            &[over, across, along],
            &[to_over, to_across, to_along],
        ) = (
            x.shape(),
            &x.layout().strides[..],
            &out.layout().strides[..],
        )
        else {
            return Err(Error::Internal("moments of no [N, C, S]".to_owned()));
        };
        // In the order of the structure in kernels.cu.
        let steps = |steps: [usize; 3]| Words(steps.map(|step| step as u64).to_vec());
        let arguments = vec![
            Pointer(x.address() as u64),
            steps([over, along, across]),
            count(examples),
            count(channels),
            count(places),
            Pointer(self.address(gradient.mean)?),
            Pointer(self.optional(gradient.of_mean)?),
            Pointer(self.optional(gradient.of_variance)?),
            Count(u64::from(gradient.keep)),
            Pointer(out.address() as u64),
            steps([to_over, to_along, to_across]),
        ];
        let types = [x.dtype(), T::DTYPE];
        // SAFETY: both are tensors of this shape on this device, the second of them written by nobody
        // else; the rows have an entry for every channel.
        unsafe {
            self.launch(
                types,
                "moments_backward",
                1,
                examples,
                channels * places,
                arguments,
            )
        }
    }

    /// Writes how far merged weights are from anchors.
    pub(super) fn merge_all<T: Real>(&self, layers: Vec<Deviation<'_, T>>) -> Result<()> {
        self.launch_by_layer(
            &layers,
            |layer| {
                let pointers = [
                    self.optional(layer.beta)?,
                    self.address(layer.anchor)?,
                    self.address(layer.out.as_ref())?,
                ];
                Ok((&layer.map, pointers.to_vec()))
            },
            |arguments, rows| {
                // SAFETY: everything lies without gaps on this device, as large as the words say, and
                // what is written to was exclusive.
                unsafe { self.launch([T::DTYPE; 2], "merge", 1, 1, rows * LANES, arguments) }
            },
        )
    }

    /// Writes what the gradients of merged weights become.
    pub(super) fn merge_all_backward<T: Real>(
        &self,
        layers: Vec<MapGradient<'_, T>>,
    ) -> Result<()> {
        self.launch_by_layer(
            &layers,
            |layer| {
                let mut pointers =
                    vec![self.address(layer.gradient)?, self.written(&layer.weight)?];
                for row in &layer.rows {
                    pointers.push(self.written(row)?);
                }
                Ok((&layer.map, pointers))
            },
            |mut arguments, rows| {
                let partial = self.matrix_of::<f64>(rows, LANES)?;
                arguments.push(Pointer(partial.address()));
                let types = [T::DTYPE; 2];
                // SAFETY: as in `merge_all`; there is a partial sum for every thread of a row.
                unsafe {
                    let first = arguments.clone();
                    self.launch(types, "merge_backward", 1, 1, rows * LANES, first)?;
                    self.launch(types, "merge_backward_rows", 1, 1, rows, arguments)
                }
            },
        )
    }

    /// Launches what is done with the rows of some layers at a time.
    fn launch_by_layer<'l, 'a: 'l, L, T: Real>(
        &self,
        layers: &'l [L],
        parts: impl Fn(&'l L) -> Result<(&'l Map<'a, T>, Vec<u64>)>,
        launch: impl Fn(Vec<Argument>, usize) -> Result<()>,
    ) -> Result<()> {
        for some in layers.chunks(LAYERS) {
            let (mut words, mut rows) = (Vec::with_capacity(LAYERS * WORDS), 0);
            for layer in some {
                let (map, pointers) = parts(layer)?;
                let start = words.len();
                words.extend([
                    rows as u64,
                    map.weight.columns() as u64,
                    map.epsilon.to_bits(),
                    self.address(map.weight)?,
                    self.optional(map.bias)?,
                    self.optional(map.gamma)?,
                    self.address(map.mean)?,
                    self.address(map.variance)?,
                ]);
                words.extend(pointers);
                words.resize(start + WORDS, 0);
                rows += map.weight.rows();
            }
            words.resize(LAYERS * WORDS, 0);
            launch(vec![Words(words), count(some.len()), count(rows)], rows)?;
        }
        Ok(())
    }

    /// An address; 0 of what is not there.
    fn optional<T>(&self, x: Option<Matrix<'_, T>>) -> Result<u64> {
        x.map_or(Ok(0), |x| self.address(x))
    }

    fn written<T>(&self, x: &Option<MatrixMut<'_, T>>) -> Result<u64> {
        self.optional(x.as_ref().map(MatrixMut::as_ref))
    }
}
