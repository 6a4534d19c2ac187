//! Sums of squares and products against their definitions.
#![allow(clippy::unwrap_used)]

mod common;

use common::strata::{approximation, expected, flattened, options};
use common::{Noise, error, mirrored, view, view_mut};
use ekfac_core::gram::{GramOptions, accumulate};
use ekfac_core::strata::{Approximation, Role};
use ekfac_core::view::TensorView;
use ekfac_core::{Cancel, Error, Result};
use ndarray::{Array1, Array2, Array3, Axis, s};
use proptest::prelude::*;

/// The lower triangles in double precision, starting from zero.
fn factors(x: &TensorView<'_>, size: usize, options: GramOptions) -> Result<Vec<Array2<f64>>> {
    let mut out = vec![Array2::zeros((size, size)); options.approximation.strata().len()];
    let mut views: Vec<_> = out.iter_mut().map(|out| view_mut(out.view_mut())).collect();
    accumulate(x, &mut views, options, &Cancel::new())?;
    Ok(out)
}

/// Where the elements of a `[N, T, K]` array lie in memory.
#[derive(Debug, Clone, Copy)]
enum Memory {
    RowMajor,
    FeaturesOutside,
    EveryOther,
    Reversed,
}

fn laid_out(noise: &mut Noise, memory: Memory, shape: (usize, usize, usize)) -> Array3<f64> {
    let (n, t, k) = shape;
    match memory {
        Memory::RowMajor => noise.array((n, t, k)),
        Memory::FeaturesOutside => noise.array((n, k, t)).permuted_axes([0, 2, 1]),
        Memory::EveryOther => {
            let mut wide: Array3<f64> = noise.array((n, t, 2 * k));
            wide.slice_collapse(s![.., .., ..;2]);
            wide
        }
        Memory::Reversed => noise.array((k, t, n)).permuted_axes([2, 1, 0]),
    }
}

fn memory() -> impl Strategy<Value = Memory> {
    prop_oneof![
        Just(Memory::RowMajor),
        Just(Memory::FeaturesOutside),
        Just(Memory::EveryOther),
        Just(Memory::Reversed)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_stratum_matches_its_definition(
        seed: u64, n in 1usize..12, t in 1usize..6, k in 1usize..40,
        memory in memory(), approximation in approximation(), input: bool, append_one: bool,
    ) {
        let mut noise = Noise::new(seed);
        let x = laid_out(&mut noise, memory, (n, t, k)) + 0.5;
        let role = if input { Role::Input } else { Role::Gradient };
        let options = options(approximation, role, append_one && input, 0.3);
        let size = k + usize::from(options.append_one);
        let got = factors(&view(x.view()), size, options).unwrap();
        for (got, expected) in got.iter().zip(expected(x.view(), options)) {
            prop_assert!(error(&mirrored(got), &expected) < 1e-12);
        }
    }

    #[test]
    fn pair_form_and_strata_form_agree(seed: u64, n in 1usize..8, t in 1usize..5, k in 1usize..6, d in 1usize..6) {
        prop_assume!(n * t > 1);
        let mut noise = Noise::new(seed);
        let (a, g): (Array3<f64>, Array3<f64>) = (noise.array((n, t, k)), noise.array((n, t, d)));
        let run = |x: &Array3<f64>, role| {
            let size = x.dim().2;
            let out = factors(&view(x.view()), size, options(Approximation::Xkfac, role, false, 1.0 / n as f64));
            out.unwrap().iter().map(mirrored).collect::<Vec<_>>()
        };
        let (a_strata, g_strata) = (run(&a, Role::Input), run(&g, Role::Gradient));
        let strata = common::kronecker(&g_strata[0], &a_strata[0])
            + common::kronecker(&g_strata[1], &a_strata[1]);

        let units = (n * t) as f64;
        let moments = |x: &Array3<f64>| {
            let flat = flattened(x);
            let sum = flat.sum_axis(Axis(0)).insert_axis(Axis(0));
            (flat.t().dot(&flat), sum.t().dot(&sum))
        };
        let ((a_square, a_sum), (g_square, g_sum)) = (moments(&a), moments(&g));
        let same = common::kronecker(&(&g_square / n as f64), &(&a_square / units));
        let different = common::kronecker(
            &((&g_sum - &g_square) / n as f64),
            &((&a_sum - &a_square) / (units * (units - 1.0))),
        );
        prop_assert!(error(&strata, &(same + different)) < 1e-10);
    }

    #[test]
    fn two_batches_add_up(seed: u64, n in 1usize..6, t in 1usize..4, k in 1usize..6, approximation in approximation()) {
        let mut noise = Noise::new(seed);
        let (x, y): (Array3<f64>, Array3<f64>) = (noise.array((n, t, k)), noise.array((n, t, k)));
        let options = options(approximation, Role::Input, true, 0.5);
        let mut out = factors(&view(x.view()), k + 1, options).unwrap();
        let alone = factors(&view(y.view()), k + 1, options).unwrap();
        let sums: Vec<_> = out.iter().zip(&alone).map(|(first, second)| first + second).collect();
        let mut views: Vec<_> = out.iter_mut().map(|out| view_mut(out.view_mut())).collect();
        accumulate(&view(y.view()), &mut views, options, &Cancel::new()).unwrap();
        for (got, sum) in out.iter().zip(&sums) {
            prop_assert!(error(got, sum) < 1e-13);
        }
    }

    #[test]
    fn the_root_of_the_mean_squares_to_its_factor(
        seed: u64, n in 1usize..6, t in 1usize..4, groups in 1usize..4, k in 1usize..20,
        nested: bool, input: bool, append_one: bool,
    ) {
        let approximation = if nested { Approximation::XkfacNested } else { Approximation::Xkfac };
        let role = if input { Role::Input } else { Role::Gradient };
        let options = options(approximation, role, append_one && input, 0.7);
        let x: Array3<f64> = Noise::new(seed).array((n, t, groups * k)) + 0.5;
        let size = k + usize::from(options.append_one);
        let strata = approximation.strata().len();
        let mut squares = vec![Array3::<f64>::zeros((groups, size, size)); strata];
        let mut views: Vec<_> = squares.iter_mut().map(|out| view_mut(out.view_mut())).collect();
        accumulate(&view(x.view()), &mut views, options, &Cancel::new()).unwrap();
        let mut others = vec![Array3::<f64>::zeros((groups, size, size)); strata - 1];
        let mut root = Array2::<f64>::from_elem((groups, size), 2.0);
        let mut views: Vec<_> = others.iter_mut().map(|out| view_mut(out.view_mut())).collect();
        views.push(view_mut(root.view_mut()));
        accumulate(&view(x.view()), &mut views, options, &Cancel::new()).unwrap();
        prop_assert_eq!(&others[..], &squares[..strata - 1]);
        // It is added to what was there.
        let root = root - 2.0;
        for (root, square) in root.outer_iter().zip(squares[strata - 1].outer_iter()) {
            let root = root.insert_axis(Axis(0));
            prop_assert!(error(&root.t().dot(&root), &mirrored(&square.to_owned())) < 1e-12);
        }
    }

    #[test]
    fn one_location_makes_nested_and_plain_coincide(seed: u64, n in 1usize..9, k in 1usize..6) {
        let x: Array2<f64> = Noise::new(seed).array((n, k));
        let run = |approximation| {
            factors(&view(x.view()), k, options(approximation, Role::Input, false, 1.0)).unwrap()
        };
        let (plain, nested) = (run(Approximation::Xkfac), run(Approximation::XkfacNested));
        prop_assert_eq!(common::norm(&nested[0]), 0.0);
        prop_assert!(error(&nested[1], &plain[0]) < 1e-14);
        prop_assert!(error(&nested[2], &plain[1]) < 1e-14);
    }
}

/// Large enough for every way of cutting the work, for both element types.
#[test]
fn large_batches_match_their_definition() {
    for (seed, shape) in [
        (1, (40, 9, 333)),
        (2, (3000, 1, 130)),
        (3, (5000, 2, 20)),
        (4, (700, 1, 300)),
    ] {
        let mut noise = Noise::new(seed);
        let x = laid_out(&mut noise, Memory::RowMajor, shape) + 1.0;
        let single = x.mapv(|value| value as f32);
        for approximation in Approximation::ALL {
            let options = options(approximation, Role::Input, true, 1.0);
            let got = factors(&view(x.view()), shape.2 + 1, options).unwrap();
            let count = got.len();
            let mut narrow = vec![Array2::<f32>::zeros((shape.2 + 1, shape.2 + 1)); count];
            let mut views: Vec<_> = narrow
                .iter_mut()
                .map(|out| view_mut(out.view_mut()))
                .collect();
            accumulate(&view(single.view()), &mut views, options, &Cancel::new()).unwrap();
            let expected = expected(x.view(), options);
            for ((got, narrow), expected) in got.iter().zip(&narrow).zip(&expected) {
                assert!(error(&mirrored(got), expected) < 1e-12);
                assert!(error(&mirrored(&narrow.mapv(f64::from)), expected) < 1e-5);
            }
        }
    }
}

#[test]
fn single_precision_survives_a_mean_of_a_thousand_spreads() {
    let mut noise = Noise::new(5);
    let x: Array3<f64> = laid_out(&mut noise, Memory::RowMajor, (300, 4, 50)) + 1000.0;
    let single = x.mapv(|value| value as f32);
    let exact = single.mapv(f64::from);
    for approximation in [Approximation::Xkfac, Approximation::XkfacNested] {
        let options = options(approximation, Role::Input, true, 1.0);
        let mut out = vec![Array2::<f32>::zeros((51, 51)); approximation.strata().len()];
        let mut views: Vec<_> = out.iter_mut().map(|out| view_mut(out.view_mut())).collect();
        accumulate(&view(single.view()), &mut views, options, &Cancel::new()).unwrap();
        for (got, expected) in out.iter().zip(expected(exact.view(), options)) {
            let lost = error(&mirrored(&got.mapv(f64::from)), &expected);
            assert!(lost < 1e-5, "{approximation:?}: {lost}");
        }
    }
}

#[test]
fn half_precision_is_read_exactly() {
    let x: Array2<f64> = Noise::new(6).array((30, 7));
    let half = x.mapv(half::bf16::from_f64);
    let exact = half.mapv(f64::from).insert_axis(Axis(1));
    let options = options(Approximation::Xkfac, Role::Input, true, 1.0);
    let mut out = vec![Array2::<f32>::zeros((8, 8)); 2];
    let mut views: Vec<_> = out.iter_mut().map(|out| view_mut(out.view_mut())).collect();
    accumulate(&view(half.view()), &mut views, options, &Cancel::new()).unwrap();
    for (got, expected) in out.iter().zip(expected(exact.view(), options)) {
        assert!(error(&mirrored(&got.mapv(f64::from)), &expected) < 1e-6);
    }
}

#[test]
fn expanded_input_is_welcome_and_expanded_output_is_not() {
    let row: Array1<f64> = Noise::new(7).array(5);
    let expanded = row.broadcast((6, 5)).unwrap();
    let options = options(Approximation::KfacExpand, Role::Input, false, 1.0);
    let got = factors(&view(expanded), 5, options).unwrap();
    let owned = expanded.to_owned().insert_axis(Axis(1));
    assert!(error(&mirrored(&got[0]), &expected(owned.view(), options)[0]) < 1e-14);

    let layout = ekfac_core::view::Layout {
        shape: vec![5, 5],
        strides: vec![0, 1],
        dtype: ekfac_core::element::Dtype::Float64,
        device: ekfac_core::place::Device::Cpu,
        stream: 0,
    };
    let mut memory = vec![0.0f64; 5];
    // SAFETY: the five elements the layout reaches are those of `memory`.
    let refused = unsafe {
        ekfac_core::view::TensorViewMut::from_raw_parts(
            memory.as_mut_ptr().expose_provenance(),
            layout,
        )
    };
    assert!(matches!(refused, Err(Error::Shape(_))));
}

#[test]
fn non_finite_input_leaves_the_outputs_as_they_were() {
    for (bad, shape) in [
        (f32::NAN, (3, 2, 4)),
        (f32::INFINITY, (5, 1, 4)),
        (f32::NEG_INFINITY, (2, 3, 4)),
    ] {
        let mut x = Array3::<f32>::ones(shape);
        x[(1, 0, 2)] = bad;
        let mut out = vec![Array2::<f32>::from_elem((4, 4), 7.0); 2];
        let mut views: Vec<_> = out.iter_mut().map(|out| view_mut(out.view_mut())).collect();
        let options = options(Approximation::Xkfac, Role::Gradient, false, 1.0);
        let result = accumulate(&view(x.view()), &mut views, options, &Cancel::new());
        assert!(matches!(result, Err(Error::NonFinite(message)) if message.contains("feature 2")));
        assert!(out.iter().all(|out| out.iter().all(|&value| value == 7.0)));
    }
}

#[test]
fn wrong_arguments_are_named() {
    let x: Array2<f64> = Noise::new(8).array((4, 3));
    let fine = options(Approximation::Xkfac, Role::Input, false, 1.0);
    let run = |x: &TensorView<'_>, sizes: &[usize], options: GramOptions| {
        let mut out: Vec<_> = sizes
            .iter()
            .map(|&size| Array2::<f64>::zeros((size, size)))
            .collect();
        let mut views: Vec<_> = out.iter_mut().map(|out| view_mut(out.view_mut())).collect();
        accumulate(x, &mut views, options, &Cancel::new())
    };
    let x_view = view(x.view());
    assert!(run(&x_view, &[3, 3], fine).is_ok());
    assert!(matches!(run(&x_view, &[3], fine), Err(Error::Shape(_))));
    assert!(matches!(run(&x_view, &[3, 4], fine), Err(Error::Shape(_))));
    let empty = Array2::<f64>::zeros((0, 3));
    assert!(matches!(
        run(&view(empty.view()), &[3, 3], fine),
        Err(Error::Shape(_))
    ));
    let row = Array1::<f64>::zeros(3);
    assert!(matches!(
        run(&view(row.view()), &[3, 3], fine),
        Err(Error::Shape(_))
    ));
    for units in [
        view(x.mapv(|value| value as f32).view()),
        view(x.mapv(half::f16::from_f64).view()),
    ] {
        let refused = run(&units, &[3, 3], fine);
        assert!(
            matches!(refused, Err(Error::Dtype(message)) if message.contains("must be float32"))
        );
    }
    let gradient = options(Approximation::Xkfac, Role::Gradient, true, 1.0);
    assert!(matches!(
        run(&x_view, &[4, 4], gradient),
        Err(Error::Option(_))
    ));
    let endless = options(Approximation::Xkfac, Role::Input, false, f64::NAN);
    assert!(matches!(
        run(&x_view, &[3, 3], endless),
        Err(Error::Option(_))
    ));
    assert!(matches!(
        Approximation::from_name("ekfac"),
        Err(Error::Option(_))
    ));
    assert!(matches!(Role::from_name("output"), Err(Error::Option(_))));
}

#[test]
fn only_the_mean_has_a_root() {
    let x: Array2<f64> = Noise::new(9).array((4, 3));
    let run = |approximation, shapes: &[&[usize]], scale| {
        let zeros = |shape: &&[usize]| ndarray::ArrayD::<f64>::zeros(ndarray::IxDyn(shape));
        let mut out: Vec<_> = shapes.iter().map(zeros).collect();
        let mut views: Vec<_> = out.iter_mut().map(|out| view_mut(out.view_mut())).collect();
        let options = options(approximation, Role::Input, false, scale);
        accumulate(&view(x.view()), &mut views, options, &Cancel::new())
    };
    let (square, row): (&[usize], &[usize]) = (&[3, 3], &[3]);
    let plain = Approximation::Xkfac;
    assert!(run(plain, &[square, row], 1.0).is_ok());
    assert!(run(Approximation::XkfacNested, &[square, square, row], 1.0).is_ok());
    assert!(run(plain, &[&[1, 3, 3], &[1, 3]], 1.0).is_ok());
    for (approximation, shapes) in [
        (plain, &[row, square][..]),
        (plain, &[row, row]),
        (plain, &[square, &[4]]),
        (plain, &[&[1, 3, 3], row]),
        (Approximation::XkfacNested, &[square, row, square]),
        (Approximation::KfacExpand, &[row]),
    ] {
        let refused = run(approximation, shapes, 1.0);
        assert!(matches!(refused, Err(Error::Shape(_))), "{shapes:?}");
    }
    assert!(run(plain, &[square, square], -1.0).is_ok());
    let refused = run(plain, &[square, row], -1.0);
    assert!(matches!(refused, Err(Error::Option(_))));
}

#[test]
fn cancelling_stops_a_long_gram() {
    let x = Array2::<f32>::ones((60_000, 900));
    let mut out = [Array2::<f32>::zeros((900, 900))];
    let mut views: Vec<_> = out.iter_mut().map(|out| view_mut(out.view_mut())).collect();
    let options = options(Approximation::KfacExpand, Role::Input, false, 1.0);
    let cancel = Cancel::new();
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            cancel.cancel();
        });
        accumulate(&view(x.view()), &mut views, options, &cancel)
    });
    assert_eq!(result, Err(Error::Interrupted));
}
