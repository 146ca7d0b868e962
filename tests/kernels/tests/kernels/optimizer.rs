//! AdamW, and the norm of gradients.

use autosp_kernels_on_host::Buffer;
use autosp_templates::kernels::Element;

use crate::support::{A, assert_close, module, modules, random, run, tolerance};

const COUNT: usize = 5000;

/// Decoupled weight decay (Loshchilov and Hutter 2019): m and v are means of g and g^2, and
/// x <- x (1 - rate decay) - rate m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps).
#[test]
#[cfg_attr(no_compiler, ignore = "no C++ compiler")]
fn adamw_is_its_formula() {
    let (rate, decay, beta1, beta2, eps, t, factor) = (3e-2, 0.1, 0.9, 0.95, 1e-8, 3, 0.5);
    for rows in modules().filter(|rows| rows.pack == 1) {
        let wide = Element::F32;
        let (x, at_x) = random(wide, COUNT, 1);
        let (m, at_m) = random(wide, COUNT, 2);
        let (v, _) = random(wide, COUNT, 3);
        let at_v = Buffer::of_elements(wide, &v.iter().map(|v| v * v).collect::<Vec<_>>());
        let v = at_v.clone().elements(wide);
        let (g, at_g) = random(wide, COUNT, 4);
        let (root1, root2) = (1.0 - f64::powi(beta1, t), 1.0 - f64::powi(beta2, t));
        let mut arguments = vec![
            A::Both(&at_x),
            A::Both(&at_m),
            A::Both(&at_v),
            A::In(&at_g),
            A::Out(COUNT * rows.element.bytes()),
            A::Long(COUNT as i64),
        ];
        let numbers = [
            factor,
            1.0 - rate * decay,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            rate / root1,
            root2.sqrt(),
            eps,
        ];
        arguments.extend(numbers.map(|x| A::Float(x as f32)));
        let found = run(&module(rows), "adamw", 4, &arguments);
        let expected: Vec<[f64; 3]> = (0..COUNT)
            .map(|i| {
                let g = g[i] * factor;
                let (m, v) = (
                    beta1 * m[i] + (1.0 - beta1) * g,
                    beta2 * v[i] + (1.0 - beta2) * g * g,
                );
                let step = rate * (m / root1) / ((v / root2).sqrt() + eps);
                [x[i] * (1.0 - rate * decay) - step, m, v]
            })
            .collect();
        let column = |i: usize| expected.iter().map(|row| row[i]).collect::<Vec<_>>();
        let [mut master, mut first, mut second, mut out] =
            <[Buffer; 4]>::try_from(found).ok().unwrap();
        for (what, found, i) in [
            ("x", &mut master, 0),
            ("m", &mut first, 1),
            ("v", &mut second, 2),
        ] {
            assert_close(what, &found.elements(wide), &column(i), 4e-6);
        }
        let element = rows.element;
        assert_close(
            "out",
            &out.elements(element),
            &column(0),
            tolerance(element),
        );
    }
}

#[test]
#[cfg_attr(no_compiler, ignore = "no C++ compiler")]
fn squares_are_summed_in_double() {
    for rows in modules() {
        let count = 40 * 8 * 256;
        let (x, at_x) = random(rows.element, count, 9);
        let blocks = 7;
        let arguments = [A::In(&at_x), A::Out(8 * blocks), A::Long(count as i64)];
        let mut found = run(&module(rows), "sum_squares", blocks, &arguments);
        let parts = found[0].bytes().chunks_exact(8);
        let sum: f64 = parts
            .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
            .sum();
        let expected: f64 = x.iter().map(|x| x * x).sum();
        assert_close("squares", &[sum], &[expected], 1e-6);
    }
}
