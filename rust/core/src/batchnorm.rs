//! BatchNorms of many layers at once: moments of their inputs, and weights merged with them.
//!
//! `Wm = diag(gain) W` and `bm = beta + gain (b - mean)` with `gain = gamma / sqrt(variance + eps)`;
//! what is written is how far `[Wm bm]` is from an anchor. Going backward, the gradient of that
//! becomes those of everything it was made of.

use crate::backend::Backend;
use crate::backend::dispatch::{host, on_device};
use crate::element::{Dtype, Real, with_real};
use crate::error::{Error, Result};
use crate::merging::{Deviation, Map, MapGradient, Moments, MomentsGradient};
use crate::place::{Device, Place};
use crate::view::{Layout, TensorView, TensorViewMut};

/// A BatchNorm's input, and where its mean and its population variance by channel go.
pub struct InputMoments<'a> {
    /// `[N, C, S]`.
    pub x: TensorView<'a>,
    /// `[1, C]`.
    pub mean: TensorViewMut<'a>,
    /// `[1, C]`.
    pub variance: TensorViewMut<'a>,
}

/// Writes the moments of all of these inputs, of one type, NaN where there are no values; the threads
/// share them. On the CPU: torch has a kernel of its own for GPUs.
///
/// # Errors
///
/// [`Error::Shape`], [`Error::Dtype`] or [`Error::Device`] for what is something else.
pub fn moments(mut inputs: Vec<InputMoments<'_>>) -> Result<()> {
    for input in &inputs {
        let &[_, channels, _] = input.x.shape() else {
            return Err(Error::Shape(format!(
                "x must be [N, C, S], got shape {:?}",
                input.x.shape()
            )));
        };
        input.x.place().device.expect(Device::Cpu)?;
        for out in [&input.mean, &input.variance] {
            expect(out.layout(), "moments", &[1, channels], input.x.layout())?;
        }
    }
    let Some(dtype) = inputs.first().map(|input| input.x.dtype()) else {
        return Ok(());
    };
    let backend = host();
    with_real!(dtype, T => {
        let tasks = inputs.iter_mut().map(|input| Ok(Moments::<T> {
            x: input.x.clone(),
            mean: backend.matrix_mut(&mut input.mean)?,
            variance: backend.matrix_mut(&mut input.variance)?,
        }));
        backend.moments(tasks.collect::<Result<_>>()?)
    })
}

/// A BatchNorm's input, the gradients of its moments, and where that of the input goes.
pub struct InputGradient<'a> {
    /// `[N, C, S]`.
    pub x: TensorView<'a>,
    /// `[1, C]`, in the type of sums over the input.
    pub mean: TensorView<'a>,
    /// The gradient of the mean, where there is one, `[1, C]`.
    pub of_mean: Option<TensorView<'a>>,
    /// That of the population variance.
    pub of_variance: Option<TensorView<'a>>,
    /// Whether the result is added to what is there.
    pub keep: bool,
    /// `[N, C, S]`, of the input's type.
    pub out: TensorViewMut<'a>,
}

/// Writes, or adds, the gradient of a BatchNorm's input.
///
/// # Errors
///
/// As [`moments`].
pub fn moments_backward(gradient: InputGradient<'_>) -> Result<()> {
    let InputGradient {
        x,
        mean,
        of_mean,
        of_variance,
        keep,
        out,
    } = gradient;
    let &[_, channels, _] = x.shape() else {
        return Err(Error::Shape(format!(
            "x must be [N, C, S], got shape {:?}",
            x.shape()
        )));
    };
    if out.shape() != x.shape() {
        return Err(Error::Shape(format!(
            "out must be {:?}, got shape {:?}",
            x.shape(),
            out.shape()
        )));
    }
    out.layout().expect_dtype(x.dtype())?;
    out.place().device.expect(x.place().device)?;
    let sums = Layout {
        dtype: x.dtype().of_sums(),
        ..x.layout().clone()
    };
    let given = [&of_mean, &of_variance].into_iter().flatten();
    for (name, row) in given.map(|row| ("gradient", row)).chain([("mean", &mean)]) {
        expect(row.layout(), name, &[1, channels], &sums)?;
    }
    on_device!(x.place(), backend => with_real!(sums.dtype, T => {
        backend.moments_backward::<T>(MomentsGradient {
            x,
            mean: backend.matrix(&mean)?,
            of_mean: of_mean.as_ref().map(|x| backend.matrix(x)).transpose()?,
            of_variance: of_variance.as_ref().map(|x| backend.matrix(x)).transpose()?,
            keep,
            out,
        })
    }))
}

/// A layer and the BatchNorm after it: what the merged weights are made of. All row by row, without
/// gaps.
pub struct Layer<'a> {
    /// `[D, K]`.
    pub weight: TensorView<'a>,
    /// `[1, D]` each, where there are such.
    pub bias: Option<TensorView<'a>>,
    /// The BatchNorm's scale.
    pub gamma: Option<TensorView<'a>>,
    /// The BatchNorm's statistics, `[1, D]`.
    pub mean: TensorView<'a>,
    /// Population variance.
    pub variance: TensorView<'a>,
    /// What is added to the variance.
    pub epsilon: f64,
}

impl<'a> Layer<'a> {
    fn place(&self) -> Place {
        self.weight.place()
    }

    /// Fails unless everything fits the weight.
    fn check(&self) -> Result<()> {
        let like = self.weight.layout();
        let &[rows, _] = self.weight.shape() else {
            return Err(Error::Shape(format!(
                "weight must be [D, K], got shape {:?}",
                self.weight.shape()
            )));
        };
        expect(like, "weight", &like.shape, like)?;
        let optional = [("bias", &self.bias), ("gamma", &self.gamma)];
        let given = optional
            .into_iter()
            .filter_map(|(name, x)| Some((name, x.as_ref()?)));
        for (name, x) in given.chain([("mean", &self.mean), ("variance", &self.variance)]) {
            expect(x.layout(), name, &[1, rows], like)?;
        }
        Ok(())
    }

    fn map<T: Real>(&self, backend: &impl Backend) -> Result<Map<'a, T>> {
        let optional = |x: Option<&TensorView<'a>>| x.map(|x| backend.matrix(x)).transpose();
        Ok(Map {
            weight: backend.matrix(&self.weight)?,
            bias: optional(self.bias.as_ref())?,
            gamma: optional(self.gamma.as_ref())?,
            mean: backend.matrix(&self.mean)?,
            variance: backend.matrix(&self.variance)?,
            epsilon: self.epsilon,
        })
    }
}

/// What is asked of a layer: `[Wm bm]` less an anchor.
pub struct Merged<'a> {
    /// The layer.
    pub layer: Layer<'a>,
    /// The BatchNorm's shift, `[1, D]`.
    pub beta: Option<TensorView<'a>>,
    /// `[D, K + 1]`.
    pub anchor: TensorView<'a>,
    /// `[D, K + 1]`.
    pub out: TensorViewMut<'a>,
}

/// Writes how far merged weights are from anchors, for all layers of one device and type.
///
/// # Errors
///
/// [`Error::Shape`], [`Error::Dtype`] or [`Error::Device`] where something does not fit.
pub fn merge(mut layers: Vec<Merged<'_>>) -> Result<()> {
    for merged in &layers {
        merged.layer.check()?;
        let like = merged.layer.weight.layout();
        let full = [like.shape[0], like.shape[1] + 1];
        expect(merged.anchor.layout(), "anchor", &full, like)?;
        expect(merged.out.layout(), "out", &full, like)?;
        if let Some(beta) = &merged.beta {
            expect(beta.layout(), "beta", &[1, full[0]], like)?;
        }
    }
    let Some(like) = common(layers.iter().map(|merged| &merged.layer))? else {
        return Ok(());
    };
    on_device!(like.0, backend => with_real!(like.1, T => {
        let maps = layers.iter_mut().map(|merged| {
            let beta = merged.beta.as_ref().map(|x| backend.matrix(x));
            Ok(Deviation {
                map: merged.layer.map(backend)?,
                beta: beta.transpose()?,
                anchor: backend.matrix(&merged.anchor)?,
                out: backend.matrix_mut(&mut merged.out)?,
            })
        });
        backend.merge::<T>(maps.collect::<Result<_>>()?)
    }))
}

/// Where the gradients of what a merged weight was made of go, as far as they are wanted.
pub struct Gradients<'a> {
    /// `[D, K]`.
    pub weight: Option<TensorViewMut<'a>>,
    /// Of bias, gamma, beta, mean and variance, `[1, D]` each.
    pub rows: [Option<TensorViewMut<'a>>; 5],
}

/// What is asked of a layer going backward.
pub struct Backward<'a> {
    /// The layer.
    pub layer: Layer<'a>,
    /// The gradient of `[Wm bm]`, `[D, K + 1]`.
    pub gradient: TensorView<'a>,
    /// Where the others go.
    pub out: Gradients<'a>,
}

/// Writes gradients, for all layers of one device and type.
///
/// # Errors
///
/// As [`merge`].
pub fn merge_backward(mut layers: Vec<Backward<'_>>) -> Result<()> {
    for backward in &layers {
        backward.layer.check()?;
        let like = backward.layer.weight.layout();
        let full = [like.shape[0], like.shape[1] + 1];
        expect(backward.gradient.layout(), "gradient", &full, like)?;
        if let Some(weight) = &backward.out.weight {
            expect(weight.layout(), "gradient of the weight", &like.shape, like)?;
        }
        for vector in backward.out.rows.iter().flatten() {
            expect(vector.layout(), "gradient of a vector", &[1, full[0]], like)?;
        }
    }
    let Some(like) = common(layers.iter().map(|backward| &backward.layer))? else {
        return Ok(());
    };
    on_device!(like.0, backend => with_real!(like.1, T => {
        let maps = layers.iter_mut().map(|backward| {
            let weight = match &mut backward.out.weight {
                Some(weight) => Some(backend.matrix_mut(weight)?),
                None => None,
            };
            let mut rows = [const { None }; 5];
            for (target, row) in rows.iter_mut().zip(&mut backward.out.rows) {
                *target = match row {
                    Some(row) => Some(backend.matrix_mut(row)?),
                    None => None,
                };
            }
            Ok(MapGradient {
                map: backward.layer.map(backend)?,
                gradient: backend.matrix(&backward.gradient)?,
                weight,
                rows,
            })
        });
        backend.merge_backward::<T>(maps.collect::<Result<_>>()?)
    }))
}

/// Where all layers are and their type.
fn common<'l, 'a: 'l>(
    layers: impl Iterator<Item = &'l Layer<'a>>,
) -> Result<Option<(Place, Dtype)>> {
    let mut like = None;
    for layer in layers {
        let (place, dtype) = *like.get_or_insert((layer.place(), layer.weight.dtype()));
        layer.place().device.expect(place.device)?;
        layer.weight.layout().expect_dtype(dtype)?;
    }
    Ok(like)
}

/// Fails unless a tensor has this shape without gaps, and the type and device of another.
fn expect(layout: &Layout, name: &str, shape: &[usize], like: &Layout) -> Result<()> {
    let mut step = 1;
    let steps = layout.shape.iter().zip(&layout.strides).rev();
    let mut is_dense = true;
    for (&extent, &stride) in steps {
        is_dense &= extent <= 1 || stride == step;
        step *= extent;
    }
    if layout.shape != shape || !is_dense {
        return Err(Error::Shape(format!(
            "{name} must be {shape:?} without gaps, got shape {:?} with strides {:?}",
            layout.shape, layout.strides
        )));
    }
    layout.expect_dtype(like.dtype)?;
    layout.device.expect(like.device)
}
