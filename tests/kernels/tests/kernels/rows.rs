//! Kernels over rows: norms, rotary positions, cross-entropy, embeddings.

use autosp_kernels_on_host::Buffer;
use autosp_runtime::loss::cross_entropy;
use autosp_runtime::ops::{layer_norm_op, rms_norm_op, rope, rope_i, rope_thd};
use autosp_templates::kernels::{Element, Rows};
use candle_core::{DType, Device, Tensor};

use crate::support::{
    A, assert_close, exact, module, modules, modules_of, random, run, run_once, tolerance,
};

const EPS: f32 = 1e-5;

/// Widths that a module is for: of one step, and of several with a part that is not filled.
fn widths(rows: Rows) -> [usize; 2] {
    let full = rows.pack * rows.steps * 256;
    [full, full - 37 * rows.pack]
}

#[test]
#[cfg_attr(no_compiler, ignore = "no C++ compiler")]
fn norms_are_those_of_the_processor() {
    for rows in modules_of(1).chain(modules_of(4)) {
        for n in widths(rows) {
            for remove_mean in [false, true] {
                norm(rows, n, remove_mean);
            }
        }
    }
}

fn norm(rows: Rows, n: usize, remove_mean: bool) {
    let (element, name, count) = (rows.element, module(rows), 7);
    let what = format!("{name}, {n} wide, remove the mean: {remove_mean}");
    let (x, at_x) = random(element, count * n, 1);
    let (alpha, at_alpha) = random(element, n, 2);
    let (beta, at_beta) = random(element, n, 3);
    let (dy, at_dy) = random(element, count * n, 4);
    let (dims, width) = ([count, n], [n]);
    let expected = if remove_mean {
        let operands: [(&[f64], &[usize]); 3] = [(&x, &dims), (&alpha, &width), (&beta, &width)];
        exact(
            |x| layer_norm_op(&x[0], &x[1], &x[2], EPS),
            &operands,
            Some(&dy),
        )
    } else {
        let operands: [(&[f64], &[usize]); 2] = [(&x, &dims), (&alpha, &width)];
        exact(|x| rms_norm_op(&x[0], &x[1], EPS), &operands, Some(&dy))
    };
    let bytes = count * n * element.bytes();
    let (wide, mean) = (n as i64, i32::from(remove_mean));
    let beta = if remove_mean {
        A::In(&at_beta)
    } else {
        A::Nothing
    };
    let mut y = run(
        &name,
        "norm_forward",
        count,
        &[
            A::In(&at_x),
            A::In(&at_alpha),
            beta,
            A::Out(bytes),
            A::Long(wide),
            A::Float(EPS),
            A::Int(mean),
        ],
    );
    assert_close(
        &what,
        &y[0].elements(element),
        &expected[0],
        tolerance(element),
    );

    // Fewer blocks than rows: each has several.
    let blocks = 3;
    let found = run(
        &name,
        "norm_backward",
        blocks,
        &[
            A::In(&at_x),
            A::In(&at_alpha),
            A::In(&at_dy),
            A::Out(bytes),
            A::Out(2 * blocks * n * 4),
            A::Long(count as i64),
            A::Long(wide),
            A::Float(EPS),
            A::Int(mean),
        ],
    );
    let [mut dx, mut partial] = <[Buffer; 2]>::try_from(found).ok().unwrap();
    assert_close(
        &format!("dx: {what}"),
        &dx.elements(element),
        &expected[1],
        tolerance(element),
    );
    for (part, expected) in expected[2..].iter().enumerate() {
        let each = blocks * n * 4;
        let from = Buffer::of(&partial.bytes()[part * each..(part + 1) * each]);
        let arguments = [
            A::In(&from),
            A::Out(n * element.bytes()),
            A::Long(blocks as i64),
            A::Long(wide),
        ];
        let mut sum = run(&name, "sum_rows", n.div_ceil(256), &arguments);
        let what = format!("weight {part}: {what}");
        assert_close(
            &what,
            &sum[0].elements(element),
            expected,
            tolerance(element),
        );
    }
}

/// What the rope kernel takes beside x and its tables.
struct Turn {
    /// [b, h, t, d], or [b, t, h, d] with the sequence first.
    dims: [usize; 4],
    /// Of all but the last.
    strides: [usize; 3],
    /// From one batch's tables to the next's.
    table: usize,
    interleaved: bool,
    sequence_first: bool,
    sign: f32,
}

impl Turn {
    /// The elements of x, turned.
    fn of(&self, rows: Rows, x: &Buffer, [cosine, sine]: [&Buffer; 2]) -> Vec<f64> {
        let [b, h, t, d] = self.dims;
        let [sb, sh, st] = self.strides;
        let count = b * h * t;
        let arguments = [
            A::In(x),
            A::In(cosine),
            A::In(sine),
            A::Out(count * d * rows.element.bytes()),
            A::Longs(&[h, t, sb, sh, st].map(|x| x as i64)),
            A::Long(count as i64),
            A::Int((d / 2) as i32),
            A::Long(self.table as i64),
            A::Long(self.table as i64),
            A::Int(i32::from(self.interleaved)),
            A::Int(i32::from(self.sequence_first)),
            A::Float(self.sign),
        ];
        let blocks = (count * (d / 2 / rows.pack)).div_ceil(256);
        let mut found = run(&module(rows), "rope", blocks, &arguments);
        found[0].elements(rows.element)
    }
}

/// Tables for all rows alike and for each batch, and x that is a transposed view.
#[test]
#[cfg_attr(no_compiler, ignore = "no C++ compiler")]
fn positions_are_those_of_the_processor() {
    let (b, h, t, d) = (2, 3, 40, 32);
    for rows in modules() {
        for (interleaved, sequence_first, batched) in [
            (false, false, false),
            (true, false, false),
            (false, false, true),
            (false, true, false),
        ] {
            let (element, name) = (rows.element, module(rows));
            let what = format!(
                "{name}: interleaved {interleaved}, first {sequence_first}, batched {batched}"
            );
            let (x, at_x) = random(element, b * h * t * d, 5);
            let (dy, at_dy) = random(element, b * h * t * d, 6);
            let tables = if batched { b * t * d / 2 } else { t * d / 2 };
            let (cosine, at_cosine) = random(element, tables, 7);
            let (sine, at_sine) = random(element, tables, 8);
            let shape = if batched {
                vec![b, t, d / 2]
            } else {
                vec![t, d / 2]
            };
            let dims = if sequence_first {
                [b, t, h, d]
            } else {
                [b, h, t, d]
            };
            let expected = exact(
                |x| match (interleaved, sequence_first) {
                    (true, _) => rope_i(&x[0], &x[1], &x[2]),
                    (_, true) => rope_thd(&x[0], &x[1], &x[2]),
                    _ => rope(&x[0], &x[1], &x[2]),
                },
                &[(&x, &dims), (&cosine, &shape), (&sine, &shape)],
                Some(&dy),
            );
            let turn = |from: &Buffer, sign: f32| {
                let how = Turn {
                    dims,
                    strides: [dims[1] * dims[2] * d, dims[2] * d, d],
                    table: if batched { tables / b } else { 0 },
                    interleaved,
                    sequence_first,
                    sign,
                };
                how.of(rows, from, [&at_cosine, &at_sine])
            };
            // Near zeros of a c - b s the rounding of the operands' product counts.
            let near = 2.0 * tolerance(element);
            assert_close(&what, &turn(&at_x, 1.0), &expected[0], near);
            assert_close(&what, &turn(&at_dy, -1.0), &expected[1], near);
        }
    }
}

/// [b, t, h, d] in memory, turned as [b, h, t, d].
#[test]
#[cfg_attr(no_compiler, ignore = "no C++ compiler")]
fn positions_follow_strides() {
    let (b, h, t, d) = (2, 3, 20, 16);
    for rows in modules() {
        let (element, name) = (rows.element, module(rows));
        let (x, at_x) = random(element, b * h * t * d, 5);
        let (cosine, at_cosine) = random(element, t * d / 2, 7);
        let (sine, at_sine) = random(element, t * d / 2, 8);
        let expected = exact(
            |x| rope(&x[0].transpose(1, 2)?.contiguous()?, &x[1], &x[2]),
            &[
                (&x, &[b, t, h, d]),
                (&cosine, &[t, d / 2]),
                (&sine, &[t, d / 2]),
            ],
            None,
        );
        let how = Turn {
            dims: [b, h, t, d],
            strides: [t * h * d, d, h * d],
            table: 0,
            interleaved: false,
            sequence_first: false,
            sign: 1.0,
        };
        let found = how.of(rows, &at_x, [&at_cosine, &at_sine]);
        assert_close(&name, &found, &expected[0], 2.0 * tolerance(element));
    }
}

/// No class, as kernels take it.
const NONE: u32 = u32::MAX;

#[test]
#[cfg_attr(no_compiler, ignore = "no C++ compiler")]
fn losses_are_those_of_the_processor() {
    let (count, n) = (6, 8 * 300);
    for rows in modules() {
        let (element, name) = (rows.element, module(rows));
        let (mut x, _) = random(element, count * n, 1);
        // A row with large and with forbidden logits; the last element is a class.
        x[n + 5] = 60.0;
        x[n + 6] = f64::NEG_INFINITY;
        x[2 * n..2 * n + 500].fill(f64::NEG_INFINITY);
        let at_x = Buffer::of_elements(element, &x);
        let classes = [3, 5, n as u32 - 1, NONE, 0, 700];
        let bytes: Vec<u8> = classes.iter().flat_map(|c| c.to_le_bytes()).collect();
        let at_classes = Buffer::of(&bytes);
        let valid = classes.iter().filter(|c| **c != NONE).count() as f64;

        let logits = Tensor::from_slice(&x, (count, n), &Device::Cpu).unwrap();
        let logits = candle_core::Var::from_tensor(&logits).unwrap();
        let labels: Vec<i64> = classes
            .iter()
            .map(|&c| if c == NONE { -100 } else { i64::from(c) })
            .collect();
        let labels = Tensor::new(labels, &Device::Cpu).unwrap();
        let loss = cross_entropy(&logits, &labels).unwrap();
        let grads = loss.backward().unwrap();
        let gradient = grads.get(&logits).unwrap().flatten_all().unwrap();
        let gradient = gradient
            .to_dtype(DType::F64)
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        let mean = loss.to_scalar::<f64>().unwrap();

        let wide = A::Long(n as i64);
        let arguments = [
            A::In(&at_x),
            A::In(&at_classes),
            A::Out(4 * count),
            A::Out(4 * count),
            wide,
        ];
        let mut found = run(&name, "loss_forward", count, &arguments);
        let losses = found[1].elements(Element::F32);
        assert_close(&name, &[losses.iter().sum::<f64>() / valid], &[mean], 4e-6);
        assert!(
            losses[3].abs() < f64::MIN_POSITIVE,
            "no class, no loss: {losses:?}"
        );

        let scale = (1.0 / valid) as f32;
        let arguments = [
            A::In(&at_x),
            A::In(&at_classes),
            A::In(&found[0]),
            A::Out(count * n * element.bytes()),
            A::Long(n as i64),
            A::Float(scale),
        ];
        let mut dx = run(&name, "loss_backward", count, &arguments);
        assert_close(
            &name,
            &dx[0].elements(element),
            &gradient,
            2.0 * tolerance(element),
        );

        for backward in [false, true] {
            let arguments = [
                A::Both(&at_x),
                A::In(&at_classes),
                A::Out(4 * count),
                A::Long(n as i64),
                A::Float(scale),
                A::Int(i32::from(backward)),
            ];
            let mut tile = run(&name, "loss_tile", count, &arguments);
            assert_eq!(tile[1].elements(Element::F32), losses, "{name}");
            let after = if backward {
                dx[0].bytes().to_vec()
            } else {
                at_x.clone().bytes().to_vec()
            };
            assert_eq!(tile[0].bytes(), after, "{name}: backward {backward}");
        }
    }
}

/// Rows that are taken several times, and one that nobody takes; sums in any order are close.
#[test]
#[cfg_attr(no_compiler, ignore = "no C++ compiler")]
fn embeddings_get_the_sum_of_their_rows() {
    let (table, n) = (5, 8 * 40);
    let index = [0u32, 3, 3, 1, 4, 3, 0, 3];
    for rows in modules() {
        let (element, name) = (rows.element, module(rows));
        let (dy, at_dy) = random(element, index.len() * n, 1);
        let bytes: Vec<u8> = index.iter().flat_map(|i| i.to_le_bytes()).collect();
        let at_index = Buffer::of(&bytes);
        let zeros = Buffer::of_elements(Element::F32, &vec![0.0; table * n]);
        let mut expected = vec![0.0; table * n];
        for (row, &i) in index.iter().enumerate() {
            for j in 0..n {
                expected[i as usize * n + j] += dy[row * n + j];
            }
        }
        for seed in [1, 2] {
            let arguments = [
                A::In(&at_index),
                A::In(&at_dy),
                A::Both(&zeros),
                A::Long(n as i64),
            ];
            let mut found = run_once(&name, "embedding_backward", index.len(), seed, &arguments);
            assert_close(&name, &found[0].elements(Element::F32), &expected, 1e-6);
        }
    }
}
