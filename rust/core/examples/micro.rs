use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatMut, MatRef, Par};
use std::time::Instant;
fn time(mut f: impl FnMut()) -> f64 {
    f();
    f();
    let mut b = f64::MAX;
    for _ in 0..30 {
        let t = Instant::now();
        f();
        b = b.min(t.elapsed().as_secs_f64());
    }
    b
}
fn tri(mut out: MatMut<'_, f32>, x: MatRef<'_, f32>, leaf: usize) {
    let n = x.ncols();
    if n <= leaf {
        triangular::matmul(
            out,
            BlockStructure::TriangularLower,
            Accum::Add,
            x.transpose(),
            BlockStructure::Rectangular,
            x,
            BlockStructure::Rectangular,
            1.0,
            Par::Seq,
        );
        return;
    }
    let h = (n / 2).next_multiple_of(16).min(n);
    let (a, _, b, c) = out.as_mut().split_at_mut(h, h);
    tri(a, x.subcols(0, h), leaf);
    tri(c, x.subcols(h, n - h), leaf);
    matmul(
        b,
        Accum::Add,
        x.subcols(h, n - h).transpose(),
        x.subcols(0, h),
        1.0,
        Par::Seq,
    );
}
fn main() {
    for &(r, k) in &[
        (512usize, 1024usize),
        (512, 1025),
        (512, 784),
        (512, 785),
        (2048, 577),
        (256, 785),
        (256, 101),
        (50000, 64),
    ] {
        let xs: Vec<f32> = (0..r * k)
            .map(|i| ((i * 7919) % 1000) as f32 / 1000.0 - 0.5)
            .collect();
        let x = MatRef::from_row_major_slice(&xs, r, k);
        let mut outs = vec![0f32; k * k];
        let mut out = MatMut::from_row_major_slice_mut(&mut outs, k, k);
        let full = time(|| matmul(out.as_mut(), Accum::Add, x.transpose(), x, 1.0, Par::Seq));
        let fl = 2.0 * r as f64 * (k * k) as f64;
        let t = time(|| {
            triangular::matmul(
                out.as_mut(),
                BlockStructure::TriangularLower,
                Accum::Add,
                x.transpose(),
                BlockStructure::Rectangular,
                x,
                BlockStructure::Rectangular,
                1.0,
                Par::Seq,
            )
        });
        print!(
            "{r}x{k}: full {:.3} ms {:.0} GF/s; tri {:.3} ratio {:.2};",
            full * 1e3,
            fl / full / 1e9,
            t * 1e3,
            t / full
        );
        for leaf in [32, 64, 128, 256] {
            let t = time(|| tri(out.as_mut(), x, leaf));
            print!(" leaf{leaf} {:.2}", t / full);
        }
        let xc = Mat::<f32>::from_fn(r, k, |i, j| xs[i * k + j]);
        let mut oc = Mat::<f32>::zeros(k, k);
        let f2 = time(|| {
            matmul(
                oc.as_mut(),
                Accum::Add,
                xc.transpose(),
                xc.as_ref(),
                1.0,
                Par::Seq,
            )
        });
        let mut f3 = 0.0;
        if k > 200 {
            f3 = time(|| {
                matmul(
                    out.as_mut().submatrix_mut(k / 2, 0, 128, k / 2),
                    Accum::Add,
                    x.subcols(k / 2, 128).transpose(),
                    x.subcols(0, k / 2),
                    1.0,
                    Par::Seq,
                )
            });
            f3 = 2.0 * (r * 128 * (k / 2)) as f64 / f3 / 1e9;
        }
        let f4 = time(|| matmul(out.as_mut(), Accum::Add, xc.transpose(), x, 1.0, Par::Seq));
        println!(
            " colmajor {:.2} strip128 {:.0} GF/s  mixed {:.2}",
            f2 / full,
            f3,
            f4 / full
        );
    }
}
