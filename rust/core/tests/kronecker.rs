//! Sums of Kronecker products against the dense matrices they stand for.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Noise, error, kronecker, norm, view, view_mut};
use ekfac_core::kronecker::{
    KroneckerInverse, KroneckerOperator, KroneckerRoot, KroneckerSum, Product, Stopping,
    TensorFactor,
};
use ekfac_core::terms::Factor;
use ekfac_core::units::Precision;
use ekfac_core::view::{TensorView, TensorViewMut};
use ekfac_core::{Cancel, Error, linalg};
use ndarray::{Array1, Array2, Array3, Array4, Axis};
use proptest::prelude::*;

type Terms = Vec<(Array2<f64>, Array2<f64>)>;

fn sum(terms: &Terms) -> KroneckerSum<'_> {
    let views = terms.iter().map(|(a, g)| (view(a.view()), view(g.view())));
    KroneckerSum::new(views.collect()).unwrap()
}

fn dense(terms: &Terms) -> Array2<f64> {
    let (a, g) = &terms[0];
    let size = a.nrows() * g.nrows();
    let products = terms.iter().map(|(a, g)| kronecker(g, a));
    products.fold(Array2::zeros((size, size)), |sum, product| sum + product)
}

/// Terms of the given ranks, relative to the sizes: 0 for zero factors, 100 for full rank.
fn terms(noise: &mut Noise, count: usize, d: usize, k: usize, percent: usize) -> Terms {
    let rank = |size: usize| (size * percent).div_ceil(100);
    let mut term = || (noise.psd(k, rank(k)), noise.psd(d, rank(d)));
    (0..count).map(|_| term()).collect()
}

/// Writes the product, and returns its inner product with V.
fn multiplied(operator: &KroneckerOperator, v: TensorView<'_>, out: TensorViewMut<'_>) -> f64 {
    let mut inner = Array2::<f64>::zeros((1, 2));
    let product = Product {
        operator,
        v,
        out,
        damping: 0.0,
        inner: view_mut(inner.view_mut()),
    };
    KroneckerOperator::apply_all(vec![product], 1.0).unwrap();
    inner[(0, 0)]
}

fn flat(v: &Array2<f64>) -> Array1<f64> {
    v.flatten().to_owned()
}

fn go() -> Cancel {
    Cancel::new()
}

/// A factor by what it is made of, and as a matrix.
struct Known {
    matrix: Array2<f64>,
    /// A root, or the matrix; nothing for the identity.
    part: Option<Array2<f64>>,
    /// What is on the diagonal beside a root.
    shift: Option<f64>,
}

impl Known {
    fn whole(noise: &mut Noise, size: usize) -> Self {
        let matrix = noise.psd(size, size);
        Self {
            part: Some(matrix.clone()),
            matrix,
            shift: None,
        }
    }

    fn rooted(noise: &mut Noise, size: usize, shift: f64) -> Self {
        let columns = (size / 3).max(1);
        let root: Array2<f64> = noise.array((size, columns));
        Self {
            matrix: root.dot(&root.t()) + shift * Array2::<f64>::eye(size),
            part: Some(root),
            shift: Some(shift),
        }
    }

    fn identity(size: usize) -> Self {
        Self {
            matrix: Array2::eye(size),
            part: None,
            shift: None,
        }
    }

    fn factor(&self) -> TensorFactor<'_> {
        match (&self.part, self.shift) {
            (Some(root), Some(shift)) => Factor::Rooted {
                root: view(root.view()),
                shift,
            },
            (Some(matrix), None) => Factor::Whole(view(matrix.view())),
            _ => Factor::Identity,
        }
    }
}

/// A term (A, G) of each of the kinds that there are.
fn known_term(noise: &mut Noise, d: usize, k: usize, kind: usize) -> (Known, Known) {
    let thin_a = Known::rooted(noise, k, 0.0);
    let thin_g = Known::rooted(noise, d, 0.0);
    match kind {
        0 => (Known::whole(noise, k), Known::whole(noise, d)),
        1 => (thin_a, thin_g),
        2 => (thin_a, Known::whole(noise, d)),
        3 => (thin_a, Known::rooted(noise, d, 0.5)),
        4 => (thin_a, Known::identity(d)),
        5 => (Known::rooted(noise, k, 0.5), thin_g),
        _ => (Known::identity(k), thin_g),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_and_scalars_match_the_dense_matrix(
        seed: u64, count in 1usize..4, d in 1usize..7, k in 1usize..7, s in 1usize..4,
        percent in 0usize..101, damping in 0.0f64..2.0,
    ) {
        let mut noise = Noise::new(seed);
        let (first, second) = (terms(&mut noise, count, d, k, percent), terms(&mut noise, 2, d, k, 100));
        let (h, other) = (dense(&first), dense(&second));
        let h_sum = sum(&first);
        let v: Array3<f64> = noise.array((s, d, k));
        let mut out = Array3::zeros((s, d, k));
        h_sum.product(&view(v.view()), &mut view_mut(out.view_mut()), damping, &go()).unwrap();
        let mut quadratic = 0.0;
        for (v, out) in v.outer_iter().zip(out.outer_iter()) {
            let v = v.flatten().to_owned();
            quadratic += v.dot(&h.dot(&v));
            prop_assert!(error(&out.flatten().to_owned(), &(h.dot(&v) + damping * &v)) < 1e-12);
        }
        let close = |got: f64, expected: f64| (got - expected).abs() <= 1e-11 * (1.0 + expected.abs());
        prop_assert!(close(h_sum.quadratic(&view(v.view()), &go()).unwrap(), quadratic));
        prop_assert!(close(h_sum.inner(&sum(&second)).unwrap(), (&h * &other).sum()));
        prop_assert!(close(h_sum.trace().unwrap(), h.diag().sum()));
        let mut diagonal = Array2::zeros((d, k));
        h_sum.diagonal(&mut view_mut(diagonal.view_mut())).unwrap();
        prop_assert!(error(&flat(&diagonal), &h.diag().to_owned()) < 1e-13);
        let mut whole = Array2::zeros((d * k, d * k));
        h_sum.dense(&mut view_mut(whole.view_mut())).unwrap();
        prop_assert!(error(&whole, &h) < 1e-14);
    }

    #[test]
    fn packed_operator_matches_the_product(
        seed: u64, count in 1usize..5, d in 1usize..24, k in 1usize..24, percent in 0usize..101, dead: bool,
    ) {
        let mut noise = Noise::new(seed);
        let mut terms = terms(&mut noise, count, d, k, percent);
        // A full-rank term among deficient ones, so that all ways of packing meet.
        terms.push((noise.psd(k, 2 * k), noise.psd(d, 1)));
        terms.push((noise.psd(k, 1), noise.psd(d, 2 * d)));
        if dead {
            for (a, _) in &mut terms {
                a.slice_mut(ndarray::s![..k / 2, ..]).fill(0.0);
                a.slice_mut(ndarray::s![.., ..k / 2]).fill(0.0);
            }
        }
        let operator = KroneckerOperator::new(&sum(&terms), Precision::Ieee).unwrap();
        for _ in 0..2 {
            let v: Array2<f64> = noise.array((d, k));
            let (mut got, mut expected) = (Array2::zeros((d, k)), Array2::zeros((d, k)));
            let inner = multiplied(&operator, view(v.view()), view_mut(got.view_mut()));
            sum(&terms).product(&view(v.view()), &mut view_mut(expected.view_mut()), 0.0, &go()).unwrap();
            prop_assert!(error(&got, &expected) < 1e-11);
            prop_assert!((inner - (&v * &expected).sum()).abs() < 1e-10 * (1.0 + norm(&v) * norm(&expected)));
            operator.apply(&view(v.view()), &mut view_mut(got.view_mut())).unwrap();
            prop_assert!(error(&got, &expected) < 1e-11);
        }
    }

    #[test]
    fn factors_known_by_their_roots_multiply_like_the_matrices_they_are_of(
        seed: u64, sizes in prop::collection::vec((1usize..20, 1usize..20), 1..4),
        kinds in prop::collection::vec(0usize..7, 1..6), scale in 0.0f64..3.0, damping in 0.0f64..2.0,
    ) {
        let mut noise = Noise::new(seed);
        // Operators of different sizes side by side, as those of a network's layers.
        let sums: Vec<(Known, Known)> = sizes.iter().flat_map(|&(d, k)| {
            kinds.iter().map(|&kind| known_term(&mut noise, d, k, kind)).collect::<Vec<_>>()
        }).collect();
        let operators: Vec<_> = sizes.iter().zip(sums.chunks(kinds.len())).map(|(&(d, k), known)| {
            let terms: Vec<_> = known.iter().map(|(a, g)| (a.factor(), g.factor())).collect();
            KroneckerOperator::of_factors([d, k], &terms, Precision::Ieee).unwrap()
        }).collect();
        let v: Vec<Array2<f64>> = sizes.iter().map(|&size| noise.array(size)).collect();
        let mut got: Vec<_> = sizes.iter().map(|&size| Array2::from_elem(size, f64::NAN)).collect();
        let mut inner = vec![Array2::<f64>::zeros((1, 2)); sizes.len()];
        let asked = operators.iter().zip(&v).zip(got.iter_mut().zip(&mut inner));
        let products = asked.map(|((operator, v), (out, inner))| Product {
            operator, v: view(v.view()), out: view_mut(out.view_mut()), damping,
            inner: view_mut(inner.view_mut()),
        });
        KroneckerOperator::apply_all(products.collect(), scale).unwrap();
        for (((v, got), inner), known) in v.iter().zip(&got).zip(inner).zip(sums.chunks(kinds.len())) {
            let mut expected = Array2::zeros(v.raw_dim());
            for (a, g) in known {
                expected = expected + g.matrix.dot(v).dot(&a.matrix);
            }
            prop_assert!((inner[(0, 0)] - (v * &expected).sum()).abs() < 1e-10 * (1.0 + norm(v) * norm(&expected)));
            prop_assert!((inner[(0, 1)] - (v * v).sum()).abs() < 1e-12 * (1.0 + norm(v).powi(2)));
            prop_assert!(error(got, &(scale * expected + damping * v)) < 1e-11);
        }
    }

    #[test]
    fn inverses_are_exact(seed: u64, two: bool, d in 1usize..6, k in 1usize..6, damping in 0.01f64..1.0) {
        let mut noise = Noise::new(seed);
        let mut terms = terms(&mut noise, 1 + usize::from(two), d, k, 300);
        let damping = if two { 0.0 } else { damping };
        if two && k > 1 {
            // The within-batch stratum has no bias: a zero row and column.
            terms[0].0.row_mut(k - 1).fill(0.0);
            terms[0].0.column_mut(k - 1).fill(0.0);
        }
        let h = dense(&terms) + Array2::<f64>::eye(d * k) * damping;
        let inverse = KroneckerInverse::new(&sum(&terms), damping, &go()).unwrap();
        let v: Array2<f64> = noise.array((d, k));
        let mut out = Array2::zeros((d, k));
        inverse.solve(&view(v.view()), &mut view_mut(out.view_mut()), &go()).unwrap();
        let (expected, logdet) = common::solve(&h, &flat(&v));
        prop_assert!(norm(&(h.dot(&flat(&out)) - flat(&v))) < 1e-7 * norm(&v));
        prop_assert!(error(&flat(&out), &expected) < 1e-5);
        prop_assert!((inverse.logdet() - logdet).abs() < 1e-7 * (1.0 + logdet.abs()));

        // The sampler is linear: its matrix R must satisfy H R R^T = I.
        let size = d * k;
        let basis = Array2::<f64>::eye(size).into_shape_with_order((size, d, k)).unwrap();
        let mut samples = Array3::zeros((size, d, k));
        inverse.sample(&view(basis.view()), &mut view_mut(samples.view_mut()), &go()).unwrap();
        let r = samples.into_shape_with_order((size, size)).unwrap().reversed_axes();
        prop_assert!(error(&h.dot(&r.dot(&r.t())), &Array2::eye(size)) < 1e-5);
    }

    #[test]
    fn roots_have_the_sum_as_covariance(seed: u64, count in 1usize..4, d in 1usize..5, k in 1usize..5, percent in 0usize..101) {
        let mut noise = Noise::new(seed);
        let terms = terms(&mut noise, count, d, k, percent);
        let size = d * k;
        let basis = Array2::<f64>::eye(count * size).into_shape_with_order((count * size, count, d, k)).unwrap();
        let mut samples = Array3::zeros((count * size, d, k));
        let root = KroneckerRoot::new(&sum(&terms), &go()).unwrap();
        root.apply(&view(basis.view()), &mut view_mut(samples.view_mut()), &go()).unwrap();
        let r = samples.into_shape_with_order((count * size, size)).unwrap();
        prop_assert!(norm(&(r.t().dot(&r) - dense(&terms))) < 1e-7 * (1e-7 + norm(&dense(&terms))));
    }

    #[test]
    fn conjugate_gradients_solve(seed: u64, count in 1usize..5, d in 1usize..6, k in 1usize..6, percent in 0usize..101) {
        let mut noise = Noise::new(seed);
        let terms = terms(&mut noise, count, d, k, percent);
        let (damping, v) = (0.05, noise.array((2, d, k)));
        let mut out: Array3<f64> = Array3::zeros((2, d, k));
        let stopping = Stopping { tolerance: 1e-9, max_iterations: 500 };
        let convergence = sum(&terms)
            .conjugate_gradients(damping, &view(v.view()), &mut view_mut(out.view_mut()), stopping, &go())
            .unwrap();
        prop_assert!(convergence.residual <= 1e-9);
        prop_assert!(count > 1 || convergence.iterations == 1);
        let h = dense(&terms) + Array2::<f64>::eye(d * k) * damping;
        for (v, x) in v.outer_iter().zip(out.outer_iter()) {
            let (v, x) = (v.flatten().to_owned(), x.flatten().to_owned());
            prop_assert!(error(&h.dot(&x), &v) < 1e-8);
        }
    }

    #[test]
    fn top_eigenvalue_matches_power_iteration(seed: u64, count in 1usize..4, d in 1usize..6, k in 1usize..6, damping in 0.0f64..1.0) {
        let mut noise = Noise::new(seed);
        let terms = terms(&mut noise, count, d, k, 200);
        let h = dense(&terms);
        let mut vector: Array1<f64> = noise.array(d * k);
        for _ in 0..3000 {
            vector = h.dot(&vector);
            vector /= norm(&vector);
        }
        let expected = vector.dot(&h.dot(&vector)) + damping;
        let got = sum(&terms).top_eigenvalue(damping, &go()).unwrap();
        prop_assert!((got - expected).abs() < 1e-4 * expected);
    }

    #[test]
    fn compression_is_the_truncated_singular_value_decomposition(
        seed: u64, count in 1usize..5, kept in 1usize..6, d in 1usize..5, k in 1usize..5,
    ) {
        let mut noise = Noise::new(seed);
        let terms = terms(&mut noise, count, d, k, 100);
        let (compressed, error) = compress(&terms, kept);
        let (h, nearest) = (dense(&terms), dense(&compressed));
        prop_assert!((norm(&(&h - &nearest)) / norm(&h) - error).abs() < 1e-7);
        // Optimal and orthogonal: what is left is orthogonal to what was kept.
        let overlap = (&nearest * &(&h - &nearest)).sum();
        prop_assert!(overlap.abs() < 1e-7 * norm(&h).powi(2));
        prop_assert!(kept < count || error < 1e-7);
        // Each kept product is a fixed point of the power step, so none could be exchanged.
        let (a, g) = &compressed[0];
        let step = terms.iter().fold(Array2::<f64>::zeros((k, k)), |sum, (term_a, term_g)| {
            sum + term_a * (g * term_g).sum()
        });
        prop_assert!(common::error(&(step / (g * g).sum()), a) < 1e-6);
    }

    #[test]
    fn eigendecomposition_reproduces_the_matrix(seed: u64, size in 1usize..40) {
        let mut noise = Noise::new(seed);
        let x: Array2<f64> = noise.array((size, size));
        let mut symmetric = x.clone();
        linalg::symmetrize(&mut view_mut(symmetric.view_mut()), 1.0).unwrap();
        prop_assert_eq!(&symmetric, &common::mirrored(&x));
        let (mut values, mut vectors) = (Array1::<f64>::zeros(size), Array2::<f64>::zeros((size, size)));
        linalg::eigh(&view(x.view()), &mut view_mut(values.view_mut()), &mut view_mut(vectors.view_mut())).unwrap();
        prop_assert!(values.windows(2).into_iter().all(|pair| pair[0] <= pair[1]));
        prop_assert!(error(&vectors.dot(&Array2::from_diag(&values)).dot(&vectors.t()), &symmetric) < 1e-12);
        prop_assert!(error(&vectors.t().dot(&vectors), &Array2::eye(size)) < 1e-12);
    }
}

fn compress(terms: &Terms, kept: usize) -> (Terms, f64) {
    let (a, g) = &terms[0];
    let mut out: Terms = vec![(Array2::ones(a.dim()), Array2::ones(g.dim())); kept];
    let mut views: Vec<_> = out
        .iter_mut()
        .map(|(a, g)| (view_mut(a.view_mut()), view_mut(g.view_mut())))
        .collect();
    let error = sum(terms).compress(&mut views).unwrap();
    (out, error)
}

#[test]
fn large_sums_agree_in_single_precision() {
    let mut noise = Noise::new(1);
    for (d, k) in [(30, 300), (300, 30), (64, 64)] {
        let mut terms = terms(&mut noise, 2, d, k, 10);
        terms.extend(self::terms(&mut noise, 2, d, k, 100));
        let narrow: Vec<_> = terms
            .iter()
            .map(|(a, g)| (a.mapv(|x| x as f32), g.mapv(|x| x as f32)))
            .collect();
        let views = narrow.iter().map(|(a, g)| (view(a.view()), view(g.view())));
        let operator = KroneckerOperator::new(
            &KroneckerSum::new(views.collect()).unwrap(),
            Precision::Ieee,
        )
        .unwrap();
        assert!((operator.flops() as f64) < 0.8 * sum(&terms).flops());
        let v: Array2<f64> = noise.array((d, k));
        let v_narrow = v.mapv(|x| x as f32);
        let (mut got, mut expected) = (Array2::<f32>::zeros((d, k)), Array2::zeros((d, k)));
        operator
            .apply(&view(v_narrow.view()), &mut view_mut(got.view_mut()))
            .unwrap();
        sum(&terms)
            .product(
                &view(v.view()),
                &mut view_mut(expected.view_mut()),
                0.0,
                &go(),
            )
            .unwrap();
        assert!(error(&got.mapv(f64::from), &expected) < 1e-5);
    }
}

#[test]
fn the_first_compressed_term_is_positive_semi_definite() {
    let terms = terms(&mut Noise::new(2), 4, 4, 5, 100);
    let (compressed, _) = compress(&terms, 1);
    for factor in [&compressed[0].0, &compressed[0].1] {
        let size = factor.nrows();
        let (mut values, mut vectors) = (
            Array1::<f64>::zeros(size),
            Array2::<f64>::zeros((size, size)),
        );
        linalg::eigh(
            &view(factor.view()),
            &mut view_mut(values.view_mut()),
            &mut view_mut(vectors.view_mut()),
        )
        .unwrap();
        assert!(values[0] > -1e-12 * values[size - 1]);
    }
}

#[test]
fn what_has_no_inverse_says_so() {
    let mut noise = Noise::new(3);
    let singular = terms(&mut noise, 1, 4, 4, 50);
    let three = terms(&mut noise, 3, 4, 4, 100);
    let build = |terms: &Terms, damping| KroneckerInverse::new(&sum(terms), damping, &go()).err();
    assert!(
        matches!(build(&singular, 0.0), Some(Error::Numerical(message)) if message.contains("add damping"))
    );
    assert!(build(&singular, 0.1).is_none());
    assert!(matches!(build(&three, 0.0), Some(Error::Option(_))));
    assert!(matches!(
        build(&three[..2].to_vec(), 0.1),
        Some(Error::Option(_))
    ));
    assert!(matches!(build(&singular, -1.0), Some(Error::Option(_))));
    let twice = vec![singular[0].clone(), singular[0].clone()];
    assert!(matches!(build(&twice, 0.0), Some(Error::Numerical(_))));
}

#[test]
fn indefinite_and_non_finite_factors_are_refused() {
    let mut noise = Noise::new(4);
    let (a, g) = (noise.psd(3, 3), noise.psd(2, 2));
    let negative = vec![(-a.clone(), g.clone())];
    assert!(matches!(
        KroneckerRoot::new(&sum(&negative), &go()).err(),
        Some(Error::Numerical(_))
    ));
    let mut broken = a;
    broken[(1, 2)] = f64::NAN;
    let broken = vec![(broken, g)];
    assert!(matches!(
        KroneckerRoot::new(&sum(&broken), &go()).err(),
        Some(Error::NonFinite(_))
    ));
    assert!(matches!(
        KroneckerOperator::new(&sum(&broken), Precision::Ieee).err(),
        Some(Error::NonFinite(_))
    ));
    assert!(matches!(
        sum(&broken).top_eigenvalue(0.0, &go()),
        Err(Error::NonFinite(_))
    ));
}

#[test]
fn factors_that_do_not_fit_are_refused() {
    let (whole, root) = (Array2::<f64>::eye(3), Array2::<f64>::ones((3, 2)));
    let (narrow, broken) = (Array2::<f32>::eye(3), Array2::from_elem((3, 1), f64::NAN));
    let empty = Array2::<f64>::zeros((3, 0));
    let of_whole = || Factor::Whole(view(whole.view()));
    let rooted = |shift| Factor::Rooted {
        root: view(root.view()),
        shift,
    };
    fn thin(root: &Array2<f64>) -> TensorFactor<'_> {
        Factor::Rooted {
            root: view(root.view()),
            shift: 0.0,
        }
    }
    let build = |size, a, g| KroneckerOperator::of_factors(size, &[(a, g)], Precision::Ieee).err();
    let size = [3, 3];
    assert!(build(size, of_whole(), rooted(0.0)).is_none());
    for (a, g) in [
        (Factor::Identity, Factor::Identity),
        (Factor::Identity, of_whole()),
        (of_whole(), rooted(0.1)),
        (rooted(0.1), rooted(0.1)),
    ] {
        assert!(matches!(build(size, a, g), Some(Error::Option(_))));
    }
    let none = KroneckerOperator::of_factors(size, &[], Precision::Ieee).err();
    assert!(matches!(none, Some(Error::Option(_))));
    for wrong in [[3, 4], [2, 3]] {
        let refused = build(wrong, of_whole(), rooted(0.0));
        assert!(matches!(refused, Some(Error::Shape(_))));
    }
    let refused = build(size, of_whole(), thin(&empty));
    assert!(matches!(refused, Some(Error::Shape(_))));
    let refused = build(size, Factor::Whole(view(narrow.view())), rooted(0.0));
    assert!(matches!(refused, Some(Error::Dtype(_))));
    let refused = build(size, of_whole(), thin(&broken));
    assert!(matches!(refused, Some(Error::NonFinite(_))));
}

#[test]
fn an_indefinite_factor_is_packed_in_full() {
    // A zero diagonal hides everything from a pivoted Cholesky factorisation.
    let a = ndarray::array![[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]];
    let terms = vec![(a.clone(), Array2::eye(2))];
    let v: Array2<f64> = Noise::new(5).array((2, 3));
    let mut out = Array2::zeros((2, 3));
    let operator = KroneckerOperator::new(&sum(&terms), Precision::Ieee).unwrap();
    operator
        .apply(&view(v.view()), &mut view_mut(out.view_mut()))
        .unwrap();
    assert!(error(&out, &v.dot(&a)) < 1e-14);
}

#[test]
fn conjugate_gradients_report_failure() {
    let mut noise = Noise::new(6);
    let terms = terms(&mut noise, 3, 5, 6, 100);
    let v: Array2<f64> = noise.array((5, 6));
    let mut out = Array2::<f64>::zeros((5, 6));
    let stopping = Stopping {
        tolerance: 1e-12,
        max_iterations: 1,
    };
    let result = sum(&terms).conjugate_gradients(
        1e-6,
        &view(v.view()),
        &mut view_mut(out.view_mut()),
        stopping,
        &go(),
    );
    assert!(matches!(result, Err(Error::Numerical(_))));
}

#[test]
fn shapes_and_dtypes_must_agree() {
    let mut noise = Noise::new(7);
    let terms = terms(&mut noise, 2, 3, 4, 100);
    let h = sum(&terms);
    let (v, mut out) = (Array2::<f64>::ones((4, 3)), Array2::<f64>::ones((4, 3)));
    let product = h.product(&view(v.view()), &mut view_mut(out.view_mut()), 0.0, &go());
    assert!(matches!(product, Err(Error::Shape(_))));
    let (v, mut out) = (Array2::<f32>::ones((3, 4)), Array2::<f32>::ones((3, 4)));
    let product = h.product(&view(v.view()), &mut view_mut(out.view_mut()), 0.0, &go());
    assert!(matches!(product, Err(Error::Dtype(_))));
    assert!(matches!(KroneckerSum::new(vec![]), Err(Error::Option(_))));
    let noise = Array4::<f64>::ones((1, 3, 3, 4));
    let mut samples = Array2::<f64>::ones((3, 4)).insert_axis(Axis(0));
    let root = KroneckerRoot::new(&h, &go()).unwrap();
    let applied = root.apply(
        &view(noise.view()),
        &mut view_mut(samples.view_mut()),
        &go(),
    );
    assert!(matches!(applied, Err(Error::Shape(_))));
}

#[test]
fn an_already_cancelled_product_does_nothing() {
    let terms = terms(&mut Noise::new(8), 2, 3, 4, 100);
    let (v, mut out) = (Array2::<f64>::ones((3, 4)), Array2::<f64>::ones((3, 4)));
    let cancel = Cancel::new();
    cancel.cancel();
    let product = sum(&terms).product(&view(v.view()), &mut view_mut(out.view_mut()), 0.0, &cancel);
    assert_eq!(product, Err(Error::Interrupted));
    assert_eq!(out, Array2::<f64>::ones((3, 4)));
}

/// Terms (A, G) of each group.
type GroupedTerms = Vec<(Array3<f64>, Array3<f64>)>;

fn grouped_terms(
    noise: &mut Noise,
    count: usize,
    groups: usize,
    d: usize,
    k: usize,
) -> GroupedTerms {
    let mut stack = |size: usize| {
        let parts: Vec<_> = (0..groups).map(|_| noise.psd(size, 2 * size)).collect();
        let parts: Vec<_> = parts.iter().map(|part| part.view()).collect();
        ndarray::stack(Axis(0), &parts).unwrap()
    };
    (0..count).map(|_| (stack(k), stack(d))).collect()
}

fn grouped_sum(terms: &GroupedTerms) -> KroneckerSum<'_> {
    let views = terms.iter().map(|(a, g)| (view(a.view()), view(g.view())));
    KroneckerSum::new(views.collect()).unwrap()
}

/// One block for each group along the diagonal.
fn grouped_dense(terms: &GroupedTerms) -> Array2<f64> {
    let (groups, k, d) = (terms[0].0.dim().0, terms[0].0.dim().1, terms[0].1.dim().1);
    let size = d * k;
    let mut whole = Array2::zeros((groups * size, groups * size));
    for group in 0..groups {
        let own = |stack: &Array3<f64>| stack.index_axis(Axis(0), group).to_owned();
        let own: Terms = terms.iter().map(|(a, g)| (own(a), own(g))).collect();
        let place = group * size..(group + 1) * size;
        whole
            .slice_mut(ndarray::s![place.clone(), place])
            .assign(&dense(&own));
    }
    whole
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn groups_are_blocks_of_the_dense_matrix(
        seed: u64, count in 1usize..4, groups in 1usize..40, d in 1usize..4, k in 1usize..5,
        s in 1usize..3, damping in 0.0f64..2.0,
    ) {
        let mut noise = Noise::new(seed);
        let (first, second) = (
            grouped_terms(&mut noise, count, groups, d, k), grouped_terms(&mut noise, 2, groups, d, k),
        );
        let (h, other, h_sum, rows) = (grouped_dense(&first), grouped_dense(&second), grouped_sum(&first), groups * d);
        prop_assert_eq!((h_sum.groups(), h_sum.outputs(), h_sum.inputs()), (groups, rows, k));
        let v: Array3<f64> = noise.array((s, rows, k));
        let mut out = Array3::zeros((s, rows, k));
        h_sum.product(&view(v.view()), &mut view_mut(out.view_mut()), damping, &go()).unwrap();
        let operator = KroneckerOperator::new(&h_sum, Precision::Ieee).unwrap();
        let mut quadratic = 0.0;
        for (v, out) in v.outer_iter().zip(out.outer_iter()) {
            let mut applied = Array2::zeros((rows, k));
            let inner = multiplied(&operator, view(v.view()), view_mut(applied.view_mut()));
            let v = v.flatten().to_owned();
            let image = h.dot(&v);
            prop_assert!(error(&out.flatten().to_owned(), &(&image + damping * &v)) < 1e-12);
            prop_assert!(error(&flat(&applied), &image) < 1e-12);
            prop_assert!((inner - v.dot(&image)).abs() < 1e-11 * (1.0 + norm(&image) * norm(&v)));
            quadratic += v.dot(&image);
        }
        let close = |got: f64, expected: f64| (got - expected).abs() <= 1e-11 * (1.0 + expected.abs());
        prop_assert!(close(h_sum.quadratic(&view(v.view()), &go()).unwrap(), quadratic));
        prop_assert!(close(h_sum.inner(&grouped_sum(&second)).unwrap(), (&h * &other).sum()));
        prop_assert!(close(h_sum.trace().unwrap(), h.diag().sum()));
        let mut diagonal = Array2::zeros((rows, k));
        h_sum.diagonal(&mut view_mut(diagonal.view_mut())).unwrap();
        prop_assert!(error(&flat(&diagonal), &h.diag().to_owned()) < 1e-13);
        let mut whole = Array2::ones(h.dim());
        h_sum.dense(&mut view_mut(whole.view_mut())).unwrap();
        prop_assert!(error(&whole, &h) < 1e-14);
        let (mut values, mut vectors) = (Array1::<f64>::zeros(h.nrows()), Array2::<f64>::zeros(h.dim()));
        linalg::eigh(&view(h.view()), &mut view_mut(values.view_mut()), &mut view_mut(vectors.view_mut())).unwrap();
        let (top, expected) = (h_sum.top_eigenvalue(damping, &go()).unwrap(), values[h.nrows() - 1] + damping);
        prop_assert!((top - expected).abs() < 1e-4 * expected);
    }

    #[test]
    fn groups_are_solved_and_sampled_one_by_one(
        seed: u64, count in 1usize..4, groups in 1usize..6, d in 1usize..4, k in 1usize..4,
    ) {
        let mut noise = Noise::new(seed);
        let terms = grouped_terms(&mut noise, count, groups, d, k);
        let (sum, rows, size) = (grouped_sum(&terms), groups * d, groups * d * k);
        let damping = if count == 2 { 0.0 } else { 0.1 };
        let h = grouped_dense(&terms) + Array2::<f64>::eye(size) * damping;
        let v: Array2<f64> = noise.array((rows, k));
        let (expected, logdet) = common::solve(&h, &flat(&v));
        let mut out = Array2::zeros((rows, k));
        let stopping = Stopping { tolerance: 1e-11, max_iterations: 500 };
        sum.conjugate_gradients(damping, &view(v.view()), &mut view_mut(out.view_mut()), stopping, &go()).unwrap();
        prop_assert!(norm(&(h.dot(&flat(&out)) - flat(&v))) < 1e-9 * norm(&v));
        let basis = Array2::<f64>::eye(size).into_shape_with_order((size, rows, k)).unwrap();
        if count < 3 {
            let inverse = KroneckerInverse::new(&sum, damping, &go()).unwrap();
            inverse.solve(&view(v.view()), &mut view_mut(out.view_mut()), &go()).unwrap();
            prop_assert!(norm(&(h.dot(&flat(&out)) - flat(&v))) < 1e-7 * norm(&v));
            prop_assert!(error(&flat(&out), &expected) < 1e-4);
            prop_assert!((inverse.logdet() - logdet).abs() < 1e-7 * (1.0 + logdet.abs()));
            let mut samples = Array3::zeros((size, rows, k));
            inverse.sample(&view(basis.view()), &mut view_mut(samples.view_mut()), &go()).unwrap();
            let r = samples.into_shape_with_order((size, size)).unwrap().reversed_axes();
            prop_assert!(error(&h.dot(&r.dot(&r.t())), &Array2::eye(size)) < 1e-5);
        }
        let noise = Array2::<f64>::eye(count * size).into_shape_with_order((count * size, count, rows, k)).unwrap();
        let mut samples = Array3::zeros((count * size, rows, k));
        let root = KroneckerRoot::new(&sum, &go()).unwrap();
        root.apply(&view(noise.view()), &mut view_mut(samples.view_mut()), &go()).unwrap();
        let r = samples.into_shape_with_order((count * size, size)).unwrap();
        let h = grouped_dense(&terms);
        prop_assert!(norm(&(r.t().dot(&r) - &h)) < 1e-7 * (1e-7 + norm(&h)));
    }

    #[test]
    fn groups_are_compressed_one_by_one(
        seed: u64, count in 1usize..4, kept in 1usize..4, groups in 1usize..5, d in 1usize..4, k in 1usize..4,
    ) {
        let terms = grouped_terms(&mut Noise::new(seed), count, groups, d, k);
        let mut out: GroupedTerms = vec![(Array3::ones((groups, k, k)), Array3::ones((groups, d, d))); kept];
        let mut views: Vec<_> = out.iter_mut().map(|(a, g)| (view_mut(a.view_mut()), view_mut(g.view_mut()))).collect();
        let error = grouped_sum(&terms).compress(&mut views).unwrap();
        let (h, nearest) = (grouped_dense(&terms), grouped_dense(&out));
        prop_assert!((norm(&(&h - &nearest)) / norm(&h) - error).abs() < 1e-7);
        prop_assert!((&nearest * &(&h - &nearest)).sum().abs() < 1e-7 * norm(&h).powi(2));
        for group in 0..groups {
            let own = |stack: &Array3<f64>| stack.index_axis(Axis(0), group).to_owned();
            let own: Terms = terms.iter().map(|(a, g)| (own(a), own(g))).collect();
            let (alone, _) = compress(&own, kept);
            let place = group * d * k..(group + 1) * d * k;
            let nearest = nearest.slice(ndarray::s![place.clone(), place]).to_owned();
            prop_assert!(common::error(&nearest, &dense(&alone)) < 1e-9);
        }
    }

    #[test]
    fn stacks_are_decomposed_one_by_one(seed: u64, groups in 1usize..5, size in 1usize..6) {
        let x = grouped_terms(&mut Noise::new(seed), 1, groups, 1, size).remove(0).0;
        let (mut values, mut vectors) = (Array2::<f64>::zeros((groups, size)), Array3::<f64>::zeros(x.dim()));
        linalg::eigh(&view(x.view()), &mut view_mut(values.view_mut()), &mut view_mut(vectors.view_mut())).unwrap();
        for ((x, values), vectors) in x.outer_iter().zip(values.outer_iter()).zip(vectors.outer_iter()) {
            let diagonal = Array2::from_diag(&values);
            prop_assert!(error(&vectors.dot(&diagonal).dot(&vectors.t()), &x.to_owned()) < 1e-12);
        }
    }
}

/// Enough work for the threads, in single precision, for groups of one row and of several.
#[test]
fn large_groups_agree_with_the_product() {
    let mut noise = Noise::new(9);
    for (groups, d, k) in [(700, 1, 70), (48, 8, 72), (3, 70, 90)] {
        let terms = grouped_terms(&mut noise, 2, groups, d, k);
        let narrow: Vec<_> = terms
            .iter()
            .map(|(a, g)| (a.mapv(|x| x as f32), g.mapv(|x| x as f32)))
            .collect();
        let views = narrow.iter().map(|(a, g)| (view(a.view()), view(g.view())));
        let operator = KroneckerOperator::new(
            &KroneckerSum::new(views.collect()).unwrap(),
            Precision::Ieee,
        )
        .unwrap();
        let v: Array2<f64> = noise.array((groups * d, k));
        let narrow = v.mapv(|x| x as f32);
        let mut got = Array2::<f32>::zeros(v.dim());
        let mut expected = Array2::zeros(v.dim());
        let inner = multiplied(&operator, view(narrow.view()), view_mut(got.view_mut()));
        grouped_sum(&terms)
            .product(
                &view(v.view()),
                &mut view_mut(expected.view_mut()),
                0.0,
                &go(),
            )
            .unwrap();
        assert!(error(&got.mapv(f64::from), &expected) < 1e-5);
        let exact = (&v * &expected).sum();
        assert!((inner - exact).abs() < 1e-5 * exact);
    }
}

#[test]
fn groups_must_agree() {
    let stack = |shape: [usize; 3]| Array3::<f64>::ones(shape);
    let matrix = Array2::<f64>::ones((2, 2));
    let (three, four) = (stack([3, 2, 2]), stack([4, 2, 2]));
    let build = |terms: Vec<(TensorView<'_>, TensorView<'_>)>| KroneckerSum::new(terms).map(|_| ());
    assert!(build(vec![(view(three.view()), view(three.view()))]).is_ok());
    for terms in [
        vec![(view(three.view()), view(four.view()))],
        vec![(view(three.view()), view(matrix.view()))],
        vec![
            (view(three.view()), view(three.view())),
            (view(four.view()), view(four.view())),
        ],
    ] {
        assert!(matches!(build(terms), Err(Error::Shape(_))));
    }
    let mut broken = three.clone();
    broken[(1, 0, 0)] = f64::NAN;
    let sum = KroneckerSum::new(vec![(view(broken.view()), view(three.view()))]).unwrap();
    let refused = sum.top_eigenvalue(0.0, &go());
    assert!(matches!(refused, Err(Error::NonFinite(message)) if message.contains("group 1")));
}
