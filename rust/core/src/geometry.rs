//! Where the patches of a convolution lie.
//!
//! One unit of a convolutional layer is one output location of one example; its features are the
//! patch of the input that the kernel sees there. Padding is with zeros, which are part of the
//! data.

use std::ops::Range;

use crate::error::{Error, Result};

/// The geometry of a convolution over one to three spatial dimensions; every vector has one entry
/// per spatial dimension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Extent of the kernel.
    pub kernel: Vec<usize>,
    /// Distance between neighbouring output locations.
    pub stride: Vec<usize>,
    /// Distance between neighbouring kernel positions.
    pub dilation: Vec<usize>,
    /// Zeros before and after the input.
    pub padding: Vec<(usize, usize)>,
}

impl Geometry {
    /// The most spatial dimensions there can be.
    pub const MOST_DIMENSIONS: usize = 3;

    /// Number of positions in the kernel.
    pub fn positions(&self) -> usize {
        self.kernel.iter().product()
    }

    /// Whether every patch is a single input location, and every input location a patch.
    pub(crate) fn is_pointwise(&self) -> bool {
        let ones = |extents: &[usize]| extents.iter().all(|&extent| extent == 1);
        ones(&self.kernel) && ones(&self.stride) && self.padding.iter().all(|&pad| pad == (0, 0))
    }

    /// How the kernel slides over an input of this spatial shape; leading dimensions of extent one
    /// are added so that there are always three.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] unless the geometry has 1 to 3 dimensions and positive kernel, stride and
    /// dilation; [`Error::Shape`] if the input has other dimensions or no output location.
    pub fn slides(&self, spatial: &[usize]) -> Result<[Slide; Self::MOST_DIMENSIONS]> {
        self.check()?;
        if spatial.len() != self.kernel.len() {
            return Err(Error::Shape(format!(
                "x must be [N, C, *spatial] with {} spatial dimensions like the kernel {:?}, got \
                 spatial shape {spatial:?}",
                self.kernel.len(),
                self.kernel
            )));
        }
        let mut slides = [Slide::trivial(); Self::MOST_DIMENSIONS];
        let first = slides.len() - spatial.len();
        for (dimension, slide) in slides[first..].iter_mut().enumerate() {
            *slide = self.slide(dimension, spatial[dimension])?;
        }
        let padded = slides.iter().try_fold(1usize, |product, slide| {
            product.checked_mul(slide.reach(0..slide.outputs).end)
        });
        match padded {
            Some(padded) if padded <= isize::MAX as usize / 8 => Ok(slides),
            _ => Err(Error::Shape(format!(
                "an input of spatial shape {spatial:?} padded by {:?} does not fit into memory",
                self.padding
            ))),
        }
    }

    fn check(&self) -> Result<()> {
        let dimensions = self.kernel.len();
        let lengths = [
            dimensions,
            self.stride.len(),
            self.dilation.len(),
            self.padding.len(),
        ];
        if !(1..=Self::MOST_DIMENSIONS).contains(&dimensions)
            || lengths.iter().any(|&length| length != dimensions)
        {
            return Err(Error::Option(format!(
                "kernel, stride, dilation and padding must have one entry for each of 1 to 3 \
                 spatial dimensions, got {lengths:?} entries"
            )));
        }
        for (name, extents) in [
            ("kernel", &self.kernel),
            ("stride", &self.stride),
            ("dilation", &self.dilation),
        ] {
            if extents.contains(&0) {
                return Err(Error::Option(format!(
                    "{name} must be at least 1 in every dimension, got {extents:?}"
                )));
            }
        }
        Ok(())
    }

    fn slide(&self, dimension: usize, input: usize) -> Result<Slide> {
        let (before, after) = self.padding[dimension];
        let (kernel, stride) = (self.kernel[dimension], self.stride[dimension]);
        let dilation = self.dilation[dimension];
        let padded = input
            .checked_add(before)
            .and_then(|extent| extent.checked_add(after));
        let reach = (kernel - 1)
            .checked_mul(dilation)
            .and_then(|reach| reach.checked_add(1));
        match (padded, reach) {
            (Some(padded), Some(reach)) if reach <= padded && input > 0 => Ok(Slide {
                input,
                before,
                kernel,
                stride,
                dilation,
                outputs: (padded - reach) / stride + 1,
            }),
            _ => Err(Error::Shape(format!(
                "there is no output location: along spatial dimension {dimension} the input has \
                 extent {input}, padded by ({before}, {after}), the kernel {kernel} with dilation \
                 {dilation}"
            ))),
        }
    }
}

/// How the kernel slides along one dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slide {
    /// Extent of the input.
    pub input: usize,
    /// Zeros before it.
    pub before: usize,
    /// Extent of the kernel.
    pub kernel: usize,
    /// Distance between neighbouring outputs.
    pub stride: usize,
    /// Distance between neighbouring kernel positions.
    pub dilation: usize,
    /// Number of outputs.
    pub outputs: usize,
}

impl Slide {
    /// A dimension that is not there.
    fn trivial() -> Self {
        Self {
            input: 1,
            before: 0,
            kernel: 1,
            stride: 1,
            dilation: 1,
            outputs: 1,
        }
    }

    /// The range of the padded input that these outputs, of which there is one at least, see.
    pub fn reach(&self, outputs: Range<usize>) -> Range<usize> {
        let last = (outputs.end - 1) * self.stride + (self.kernel - 1) * self.dilation;
        outputs.start * self.stride..last + 1
    }
}
