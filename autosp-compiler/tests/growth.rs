//! Programs that double what they hold with every line, or compute with numbers that no tensor has: the analyser gives up on the value,
//! and neither memory nor time nor an overflow ends it.

mod common;

use std::time::{Duration, Instant};

use common::as_in_rustc;

fn function(body: &str) -> String {
    format!(
        "use candle_core::{{Result, Tensor, D}}; \
         pub fn f(x: &Tensor, a: bool, n: usize, m: usize) -> Result<Tensor> {{ {body} }}"
    )
}

/// How it begins, the line that stands there 60 times, and how it ends.
const GROWING: [(&str, &str, &str); 17] = [
    ("let t = (x, n);", "let t = (t, t);", "Ok(x.clone())"),
    (
        "let t = vec![x.clone()];",
        "let t = vec![t.clone(), t.clone()];",
        "Ok(x.clone())",
    ),
    (
        "let mut t = vec![x.clone()];",
        "t = vec![[t.clone()], [t.clone()]];",
        "Ok(x.clone())",
    ),
    (
        "let t = Some(x.clone());",
        "let t = t.map(|y| (y.clone(), y));",
        "Ok(x.clone())",
    ),
    (
        "let v = vec![x.clone(), x.clone()];",
        "let v: Vec<_> = v.iter().map(|y| v.iter().map(|z| (y, z)).collect::<Vec<_>>()).collect();",
        "Ok(x.clone())",
    ),
    (
        "let c = a;",
        "let c = (c && a) || (!c && n > m);",
        "if c { x.t() } else { Ok(x.clone()) }",
    ),
    (
        "let c = a;",
        "let c = if c { n > m } else { c && m > n };",
        "if c { x.t() } else { Ok(x.clone()) }",
    ),
    ("let k = n;", "let k = k * k;", "x.narrow(1, 0, k)"),
    ("let k = 3;", "let k = k * k;", "x.narrow(1, 0, k)"),
    ("let k = 3;", "let k = k + k;", "x.narrow(k, 0, 1)"),
    (
        "let k = n;",
        "let k = (k + n) * (k + 3 * m + 1);",
        "x.narrow(1, 0, k)",
    ),
    (
        "let k = n;",
        "let k = (k + 1) / (k * m + 1);",
        "x.narrow(1, 0, k)",
    ),
    (
        "let k = n;",
        "let k = k.max(m).min(k + 1) / 2 + k % m;",
        "x.narrow(1, 0, k)",
    ),
    (
        "let (b, s, h) = x.dims3()?; let y = x;",
        "let h = h * s + b; let y = &y.reshape((b, h, s))?.reshape((s * b, ()))?;",
        "Ok(y.clone())",
    ),
    (
        "let y = x.clone();",
        "let y = Tensor::cat(&[&y, &y, &y], 1)?;",
        "Ok(y)",
    ),
    (
        "let c = |y: &Tensor| y.t();",
        "let c = |y: &Tensor| c(&c(y)?);",
        "c(x)",
    ),
    (
        "let mut v = vec![];",
        "for _ in 0..n { v.push(x.clone()); v = vec![v.clone(), v]; }",
        "Tensor::cat(&v, 0)",
    ),
];

/// Numbers at the ends of what an integer holds, and counts of what nobody has memory for.
const HUGE: [&str; 10] = [
    "x.narrow(1, 0, 9223372036854775807 + 1)",
    "x.narrow(D::Minus1, 18446744073709551615, n - 9223372036854775808 * 9223372036854775807)",
    "let k = 0 - 9223372036854775807 - 1; let k = k / (0 - 1); x.narrow(1, 0, k)",
    "let k = -9223372036854775808; x.narrow(1, k - 1, -k)?.narrow(k / -1, k * k, n / 0)",
    "x.permute((18446744073709551615, 0, 99))?.transpose(9223372036854775807, D::Minus1)",
    "x.sum(D::Minus(18446744073709551615))?.dim(D::Minus(0))?; x.unsqueeze(99999999999)",
    "let v = x.chunk(10000000000, 1)?; Ok(v[9999999999].clone())",
    "let d = &x.dims()[0..1000000000]; x.reshape(d)",
    "let v = vec![x.clone(); 1000000000000]; Tensor::cat(&v, 0)",
    "let mut y = x.clone(); for _ in 0..100000000000usize { y = (y + 1.0)?; } Ok(y)",
];

fn comes_back(source: String) {
    let shown = source.chars().take(200).collect::<String>();
    let start = Instant::now();
    as_in_rustc(move || {
        let analysis = autosp_compiler::analyse(&source).expect("Rust");
        // None of them holds an attention.
        assert!(!analysis.refusals.is_empty());
        for refusal in &analysis.refusals {
            assert!(refusal.text(None).len() < 10_000);
        }
    });
    assert!(start.elapsed() < Duration::from_mins(1), "{shown}");
}

#[test]
fn what_grows_with_every_line_is_given_up() {
    for (start, line, end) in GROWING {
        comes_back(function(&format!("{start} {} {end}", line.repeat(60))));
    }
}

#[test]
fn numbers_that_no_tensor_has_are_given_up() {
    for body in HUGE {
        comes_back(function(body));
    }
}
