//! Kernels over all elements of tensors of one shape, and copies.

use autosp_kernels_on_host::Buffer;
use autosp_runtime::ops::silu;
use autosp_templates::kernels::{Copy, Element};

use crate::support::{A, assert_close, exact, module, modules, random, run, tolerance};

/// More than a round of the loop of so many blocks, and no multiple of a block.
const COUNT: usize = 8 * 2400;
const BLOCKS: usize = 3;

#[test]
#[cfg_attr(no_compiler, ignore = "no C++ compiler")]
fn activations_are_those_of_the_processor() {
    for rows in modules() {
        let (element, name) = (rows.element, module(rows));
        let bytes = COUNT * element.bytes();
        let (x, at_x) = random(element, COUNT, 1);
        let (b, at_b) = random(element, COUNT, 2);
        let (dy, at_dy) = random(element, COUNT, 3);
        let count = || A::Long(COUNT as i64);
        let check = |kernel: &str, arguments: &[A], expected: &[&[f64]]| {
            let found = run(&name, kernel, BLOCKS, arguments);
            assert_eq!(found.len(), expected.len());
            for (mut found, expected) in found.into_iter().zip(expected) {
                let what = format!("{name} {kernel}");
                assert_close(
                    &what,
                    &found.elements(element),
                    expected,
                    tolerance(element),
                );
            }
        };
        let dims = [COUNT];
        let one = exact(|x| silu(&x[0]), &[(&x, &dims)], Some(&dy));
        check(
            "silu_forward",
            &[A::In(&at_x), A::Out(bytes), count()],
            &[&one[0]],
        );
        let backward = [A::In(&at_x), A::In(&at_dy), A::Out(bytes), count()];
        check("silu_backward", &backward, &[&one[1]]);

        let operands: [(&[f64], &[usize]); 2] = [(&x, &dims), (&b, &dims)];
        let two = exact(|x| silu(&x[0])? * &x[1], &operands, Some(&dy));
        let both = |kernel, expected: &[f64]| {
            check(
                kernel,
                &[A::In(&at_x), A::In(&at_b), A::Out(bytes), count()],
                &[expected],
            );
        };
        both("gated_forward", &two[0]);
        let backward = [
            A::In(&at_x),
            A::In(&at_b),
            A::In(&at_dy),
            A::Out(bytes),
            A::Out(bytes),
            count(),
        ];
        check("gated_backward", &backward, &[&two[1], &two[2]]);
        both("add", &exact(|x| &x[0] + &x[1], &operands, None)[0]);
        both("mul", &exact(|x| &x[0] * &x[1], &operands, None)[0]);
    }
}

/// As gradients are accumulated: the result is the first operand.
#[test]
#[cfg_attr(no_compiler, ignore = "no C++ compiler")]
fn a_sum_in_place_is_a_sum() {
    for rows in modules() {
        let (element, name) = (rows.element, module(rows));
        let (_, at_x) = random(element, COUNT, 4);
        let (_, at_b) = random(element, COUNT, 5);
        let count = || A::Long(COUNT as i64);
        let out = A::Out(COUNT * element.bytes());
        let mut apart = run(
            &name,
            "add",
            BLOCKS,
            &[A::In(&at_x), A::In(&at_b), out, count()],
        );
        let mut sum = run(
            &name,
            "add",
            BLOCKS,
            &[A::Both(&at_x), A::In(&at_b), A::Same(0), count()],
        );
        assert_eq!(sum[0].bytes(), apart[0].bytes(), "{name}");
    }
}

#[test]
#[cfg_attr(no_compiler, ignore = "no C++ compiler")]
fn casts_are_exact_or_rounded_once() {
    for rows in modules().filter(|rows| rows.element != Element::F32) {
        let (element, name) = (rows.element, module(rows));
        let (x, at_x) = random(element, COUNT, 6);
        let (b, at_b) = random(element, COUNT, 7);
        let count = || A::Long(COUNT as i64);
        let mut wide = run(
            &name,
            "widen",
            BLOCKS,
            &[A::In(&at_x), A::Out(COUNT * 4), count()],
        );
        assert_eq!(wide[0].elements(Element::F32), x, "{name}");
        let arguments = [A::In(&at_x), A::In(&at_b), A::Out(COUNT * 4), count()];
        let mut sum = run(&name, "add_wide", BLOCKS, &arguments);
        let expected: Vec<f64> = x.iter().zip(&b).map(|(a, b)| a + b).collect();
        assert_eq!(sum[0].elements(Element::F32), expected, "{name}");
        // Numbers between those that the type holds, and the ends of its range.
        let mut numbers = random(Element::F32, COUNT, 8).0;
        numbers[..6].copy_from_slice(&[0.0, -0.0, 1e-7, -3e-8, 65504.0, -65519.0]);
        let from = Buffer::of_elements(Element::F32, &numbers);
        let arguments = [A::In(&from), A::Out(COUNT * element.bytes()), count()];
        let mut narrow = run(&name, "narrow", BLOCKS, &arguments);
        let singles = from.clone().elements(Element::F32);
        let expected = Buffer::of_elements(element, &singles).bytes().to_vec();
        assert_eq!(narrow[0].bytes(), expected, "{name}");
    }
}

/// [a, b, c, d] with other strides on both sides, for each width of access.
#[test]
#[cfg_attr(no_compiler, ignore = "no C++ compiler")]
fn copies_put_every_unit_where_it_belongs() {
    let [a, b, c, d] = [3, 4, 5, 6];
    for bytes in Copy::WIDTHS {
        let count = a * b * c * d;
        let content: Vec<u8> = (0..count * bytes).map(|i| (i * 7 % 251) as u8).collect();
        let from = Buffer::of(&content);
        // [a, b, c, d] in memory read as it lies, written as [c, a, b, d].
        let (f, t) = ([b * c * d, c * d, d], [b * d, d, a * b * d]);
        let longs = |x: [usize; 3]| x.map(|x| x as i64);
        let found = run(
            &format!("copy-{bytes}"),
            "copy",
            2,
            &[
                A::In(&from),
                A::Out(content.len()),
                A::Longs(&longs([b, c, d])),
                A::Longs(&longs(f)),
                A::Longs(&longs(t)),
                A::Long(count as i64),
            ],
        );
        let mut expected = vec![0; content.len()];
        for i in 0..a {
            for j in 0..b {
                for k in 0..c {
                    for l in 0..d {
                        let source = (i * f[0] + j * f[1] + k * f[2] + l) * bytes;
                        let target = (i * t[0] + j * t[1] + k * t[2] + l) * bytes;
                        expected[target..target + bytes]
                            .copy_from_slice(&content[source..source + bytes]);
                    }
                }
            }
        }
        assert_eq!(
            found.into_iter().next().unwrap().bytes(),
            expected,
            "{bytes} bytes"
        );
    }
}
