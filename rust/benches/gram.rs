//! Time per mini-batch of the factors, at sizes of common layers.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ekfac_core::Cancel;
use ekfac_core::gram::{GramOptions, accumulate};
use ekfac_core::strata::{Approximation, Role};
use ekfac_core::units::Precision;
use ekfac_core::view::{TensorView, TensorViewMut};
use ndarray::{Array2, Array3};

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
        for approximation in Approximation::ALL {
            let strata = approximation.strata().len();
            let mut out = vec![Array2::<f32>::zeros((features, features)); strata];
            let options = GramOptions {
                approximation,
                role: Role::Input,
                append_one: false,
                scale: 1e-3,
                precision: Precision::Ieee,
            };
            group.bench_function(
                BenchmarkId::from_parameter(approximation.name()),
                |bencher| {
                    bencher.iter(|| {
                        let x = TensorView::new(x.view()).unwrap();
                        let views = out.iter_mut().map(|out| TensorViewMut::new(out.view_mut()));
                        let mut views = views.collect::<Result<Vec<_>, _>>().unwrap();
                        accumulate(black_box(&x), &mut views, options, &Cancel::new()).unwrap();
                    });
                },
            );
        }
        group.finish();
    }
}

criterion_group!(benches, gram);
criterion_main!(benches);
