//! Time per mini-batch of the factors, at sizes of common layers.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use ekfac_core::Cancel;
use ekfac_core::geometry::Geometry;
use ekfac_core::gram::{GramOptions, accumulate, accumulate_patches};
use ekfac_core::strata::{Approximation, Role};
use ekfac_core::units::Precision;
use ekfac_core::view::{TensorView, TensorViewMut};
use ndarray::{Array2, Array3, Array4};

fn gram(criterion: &mut Criterion) {
    for (examples, locations, features) in [
        (512, 1, 1025),
        (512, 1, 785),
        (256, 1, 101),
        (64, 49, 257),
        (64, 64, 577),
    ] {
        let shape = (examples, locations, features);
        let x = Array3::<f32>::from_shape_fn(shape, |(n, t, k)| {
            ((n * 7919 + t * 104_729 + k * 31) % 1000) as f32 / 1000.0
        });
        let mut group = criterion.benchmark_group(format!("gram {shape:?}"));
        let depth = (examples * locations) as u64;
        group.throughput(Throughput::Elements(depth * (features * features) as u64));
        compare(&mut group, features, |out, options| {
            let x = TensorView::new(x.view()).unwrap();
            accumulate(black_box(&x), out, options, &Cancel::new()).unwrap();
        });
        group.finish();
    }
}

/// The inputs of a 3 x 3 convolution: by offsets where images are large, unfolded where not.
fn patches(criterion: &mut Criterion) {
    let geometry = Geometry {
        kernel: vec![3; 2],
        stride: vec![1; 2],
        dilation: vec![1; 2],
        padding: vec![(1, 1); 2],
    };
    for (examples, channels, extent) in [
        (32, 64, 32),
        (32, 128, 16),
        (32, 256, 8),
        (32, 512, 4),
        (8, 64, 56),
        (8, 256, 14),
    ] {
        let shape = (examples, channels, extent, extent);
        let x = Array4::<f32>::from_shape_fn(shape, |(n, c, y, x)| {
            ((n * 7919 + c * 104_729 + y * 31 + x * 17) % 1000) as f32 / 1000.0
        });
        let features = 9 * channels;
        let mut group = criterion.benchmark_group(format!("patches {shape:?}"));
        let depth = (examples * extent * extent) as u64;
        group.throughput(Throughput::Elements(depth * (features * features) as u64));
        group.sample_size(10);
        compare(&mut group, features, |out, options| {
            let x = TensorView::new(x.view()).unwrap();
            accumulate_patches(black_box(&x), &geometry, out, options, &Cancel::new()).unwrap();
        });
        group.finish();
    }
}

/// Times the strata of every approximation.
fn compare(
    group: &mut BenchmarkGroup<'_, WallTime>,
    features: usize,
    accumulate: impl Fn(&mut [TensorViewMut<'_>], GramOptions),
) {
    for approximation in Approximation::ALL {
        let strata = approximation.strata().len();
        let mut out = vec![Array2::<f32>::zeros((features, features)); strata];
        let options = GramOptions {
            approximation,
            role: Role::Input,
            append_one: false,
            scale: 1e-3,
            precision: Precision::Ieee,
            note: None,
        };
        let name = BenchmarkId::from_parameter(approximation.name());
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let views = out.iter_mut().map(|out| TensorViewMut::new(out.view_mut()));
                let mut views = views.collect::<Result<Vec<_>, _>>().unwrap();
                accumulate(&mut views, options);
            });
        });
    }
}

criterion_group!(benches, gram, patches);
criterion_main!(benches);
