use ekfac_core::{Cancel, backend::cpu, gram::*, strata::*, view::*};
use std::time::Instant;
fn main() {
    let th: usize = std::env::args().nth(1).unwrap().parse().unwrap();
    cpu::set_num_threads(th).unwrap();
    for (r, k) in [(4096usize, 577usize)] {
        let x = ndarray::Array2::<f32>::from_shape_fn((r, k), |(i, j)| {
            ((i * 7919 + j * 31) % 1000) as f32 / 1000.0
        });
        let mut o = ndarray::Array2::<f32>::zeros((k, k));
        let mut o2 = ndarray::Array2::<f32>::zeros((k, k));
        for ap in [Approximation::KfacExpand, Approximation::Xkfac] {
            let mut best = f64::MAX;
            for _ in 0..20 {
                let mut outs = vec![TensorViewMut::new(o.view_mut()).unwrap()];
                if ap == Approximation::Xkfac {
                    outs.push(TensorViewMut::new(o2.view_mut()).unwrap());
                }
                let t = Instant::now();
                accumulate(
                    &TensorView::new(x.view()).unwrap(),
                    &mut outs,
                    GramOptions {
                        approximation: ap,
                        role: Role::Gradient,
                        append_one: false,
                        scale: 1.0,
                    },
                    &Cancel::new(),
                )
                .unwrap();
                best = best.min(t.elapsed().as_secs_f64());
            }
            print!("{r}x{k} {:?}: {:.3} ms  ", ap, best * 1e3);
        }
        println!();
    }
}
